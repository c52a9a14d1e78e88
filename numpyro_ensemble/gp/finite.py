"""Kernels with finitely many features of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.inputs import EXACT, check_dims
from numpyro_ensemble.gp.kernels import Atom, Kernel


class Linear(Atom):
    """The kernel `variance * x . x'` of linear functions through the origin.

    Args:
        variance: one number.
        active_dims: columns of the inputs that the kernel works on (default: all).
    """

    def __init__(
        self, variance: Any = 1.0, *, active_dims: int | Sequence[int] | None = None
    ) -> None:
        super().__init__(variance, active_dims)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return jnp.matmul(X1, X2.T, precision=EXACT)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.variance * (self.inputs(X) ** 2).sum(axis=1)

    def columns(self, X: jax.Array) -> jax.Array:
        return jnp.sqrt(self.variance) * self.inputs(X)


class Coregion(Kernel):
    """Covariances `W W' + diag(kappa)` of outputs, whose numbers are a column of the inputs.

    Times a kernel over the other columns it makes the intrinsic coregionalisation model.

    Args:
        W: `(num_outputs, rank)`.
        kappa: `(num_outputs,)`, not negative (default: none).
        active_dims: the column that holds the outputs' numbers.
    """

    is_numbered: ClassVar[bool] = True
    _leaves: ClassVar[tuple[str, ...]] = ("W", "kappa")
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims",)

    def __init__(self, W: Any, kappa: Any = None, *, active_dims: int = -1) -> None:
        if jnp.ndim(W) != 2:
            raise ValueError(f"Coregion: W takes shape (num_outputs, rank), got {jnp.shape(W)}.")
        if kappa is not None and jnp.shape(kappa) != jnp.shape(W)[:1]:
            raise ValueError(
                f"Coregion: kappa takes shape {jnp.shape(W)[:1]}, got {jnp.shape(kappa)}."
            )
        if kappa is not None and not has_tracers(kappa) and (np.asarray(kappa) < 0).any():
            raise ValueError(f"Coregion: kappa is not negative, got {np.asarray(kappa)}.")
        self.W, self.kappa, self.active_dims = W, kappa, int(active_dims)

    def is_valid(self) -> jax.Array:
        return jnp.asarray(True) if self.kappa is None else (jnp.asarray(self.kappa) >= 0).all()

    def check_inputs(self, X: jax.Array) -> None:
        if has_tracers((X, self.W)):
            return
        number, column = jnp.shape(self.W)[-2], check_dims("Coregion", (self.active_dims,), X)[0]
        numbers = np.asarray(X[:, column])
        wrong = np.flatnonzero((numbers != np.round(numbers)) | (numbers < 0) | (numbers >= number))
        if len(wrong):
            raise ValueError(
                f"Coregion: column {column} holds the outputs' numbers, 0 to {number - 1}; got "
                f"{numbers[wrong[0]]} in row {wrong[0]}."
            )

    def columns(self, X: jax.Array) -> jax.Array:
        parts = [jnp.asarray(self.W)]
        if self.kappa is not None:
            parts.append(jnp.diag(jnp.sqrt(jnp.asarray(self.kappa))))
        factor = jnp.concatenate(parts, axis=1)
        column = check_dims("Coregion", (self.active_dims,), X)
        numbers = X[:, column[0]]
        # an output that does not exist is NaN, never its neighbour
        numbers = jnp.where(numbers == jnp.round(numbers), numbers, -1.0).astype(int)
        return factor.at[numbers].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return jnp.matmul(self.columns(X1), self.columns(X2).T, precision=EXACT)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return (self.columns(X) ** 2).sum(axis=1)
