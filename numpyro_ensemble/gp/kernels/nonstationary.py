"""Kernels that depend on the place of inputs, without features, so without paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.kernels.base import Atom
from numpyro_ensemble.gp.means import Function


class Gibbs(Atom):
    """The RBF kernel with a lengthscale that is a function of the inputs (Gibbs, 1997).

    Args:
        lengthscale: a positive function of the columns that the kernel works on,
            `(N, D) -> (N,)`, or `(N, D)` for one in each dimension.
        variance: one number.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Gibbs
        >>> kernel = Gibbs(lambda X: 0.5 + X**2)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.519
    """

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "lengthscale")

    def __init__(
        self,
        lengthscale: Callable,
        variance: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        if not callable(lengthscale):
            raise TypeError(
                f"Gibbs: lengthscale takes a function of the inputs, got {lengthscale!r}; RBF has "
                f"one that is the same everywhere."
            )
        self.lengthscale = Function(lengthscale)

    def _lengthscales(self, X: jax.Array) -> jax.Array:
        scales = jnp.asarray(self.lengthscale(X))
        if scales.shape not in ((len(X),), X.shape):
            raise ValueError(
                f"Gibbs: lengthscale returned shape {scales.shape} for inputs {X.shape}."
            )
        return jnp.broadcast_to(scales.reshape(len(X), -1), X.shape)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        total = jnp.ones((len(X1), len(X2)), X1.dtype)
        columns = (X1, X2, self._lengthscales(X1), self._lengthscales(X2))
        for x1, x2, one, other in zip(*(a.T for a in columns), strict=True):
            squares = (one**2)[:, None] + (other**2)[None, :]
            near = jnp.exp(-((x1[:, None] - x2[None, :]) ** 2) / squares)
            total = total * jnp.sqrt(2.0 * one[:, None] * other[None, :] / squares) * near
        return total

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.variance_at(X)


class ArcCosine(Atom):
    """The kernel of a wide layer of a network (Cho and Saul, 2009), with a bias.

    Args:
        variance: one number.
        order: activation: 0 for steps, 1 for rectified linear, 2 for rectified quadratic.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import ArcCosine
        >>> kernel = ArcCosine()
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        1.068
    """

    is_differentiable = False  # uses the angle, which has no slope at 0
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims", "order")

    def __init__(
        self,
        variance: Any = 1.0,
        order: int = 1,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        if order not in (0, 1, 2):
            raise ValueError(f"ArcCosine: order takes 0, 1 or 2, got {order!r}.")
        self.order = int(order)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        X1, X2 = (jnp.concatenate([jnp.ones_like(X[:, :1]), X], axis=1) for X in (X1, X2))
        lengths = [jnp.sqrt((X**2).sum(axis=1)) for X in (X1, X2)]
        norms = lengths[0][:, None] * lengths[1][None, :]
        cosine = jnp.matmul(X1, X2.T, precision=EXACT) / norms
        inside = jnp.abs(cosine) < 1.0  # the angle has no slope at its ends
        angle = jnp.where(
            inside, jnp.arccos(jnp.where(inside, cosine, 0.0)), jnp.where(cosine > 0, 0.0, math.pi)
        )
        left, sine = math.pi - angle, jnp.sin(angle)
        form = (
            left,
            sine + left * cosine,
            3.0 * sine * cosine + left * (1.0 + 2.0 * cosine**2),
        )[self.order]
        return norms**self.order * form / math.pi
