"""Slopes of processes, observed and predicted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.inputs import misnumbered
from numpyro_ensemble.gp.kernels.base import Kernel, atoms, rough_parts
from numpyro_ensemble.gp.means import mean_at


def slopes_of(fn: Callable[[jax.Array], jax.Array], X: jax.Array) -> jax.Array:
    """Return a function's values or slopes at inputs, row by row.

    Args:
        fn: a function of rows, `(N, D) -> (N, ...)`.
        X: `(N, D + 1)`; the last column is 0 for the value, d for the slope along column d - 1.
            Other numbers give NaN.
    """
    places, numbers = X[:, :-1], X[:, -1]
    columns = jnp.arange(1, X.shape[1])
    along = (numbers[:, None] == columns[None, :]).astype(X.dtype)
    values, slopes = jax.jvp(fn, (places,), (along,))
    shape = (len(X), *[1] * (values.ndim - 1))
    is_slope = along.any(axis=1).reshape(shape)
    known = is_slope | (numbers == 0).reshape(shape)
    return jnp.where(known, jnp.where(is_slope, slopes, values), jnp.nan)


def _with_slopes(fn: Callable[[jax.Array], jax.Array], X: jax.Array) -> jax.Array:
    """Return the inputs, with rows of values moved to a place where the function has a slope.

    Slopes are computed for all rows. An infinite or NaN slope, such as that of a square root at 0,
    would make gradients NaN even in a row of a value, which does not use the slope.
    """
    places = X[:, :-1]
    slopes = jax.jvp(fn, (places,), (jnp.ones_like(places),))[1]
    has_slope = jnp.isfinite(slopes)
    another = places[jnp.argmax(has_slope)]
    moved = (X[:, -1:] == 0) & ~has_slope[:, None]
    return X.at[:, :-1].set(jnp.where(moved, another[None, :], places))


class Derivatives(Kernel):
    """The kernel of a process and of its slopes, marked by a last column of the inputs.

    That column is 0 for a value, and d for the slope along column d - 1 of the others:
    `numbered_inputs(X, X_slopes)` makes such inputs. `mean_fn` gets the other columns, and JAX
    differentiates it. Put sums, products and warps inside: `Derivatives(k1 + k2)`.

    Args:
        kernel: a kernel of functions that are differentiable, such as RBF and Matern52. JAX
            must differentiate a kernel of your own twice at equal inputs, so write it in squared
            distances. A `Stationary` kernel is checked, others are not.

    Raises:
        ValueError: for a kernel of functions without slopes, or one that JAX cannot differentiate.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, Derivatives, GaussianProcess, numbered_inputs
        >>> places, slopes_at = jnp.array([0.0, 2.0]), jnp.array([0.0])
        >>> X = numbered_inputs(places, slopes_at)
        >>> gp = GaussianProcess(Derivatives(RBF()), X, noise=1e-4)
        >>> mean, variance = gp.predict(jnp.array([0.0, 1.0, 0.0]), numbered_inputs(places))
        >>> mean.round(2).tolist()
        [0.0, 1.0]
    """

    observe = staticmethod(slopes_of)
    is_whole: ClassVar[bool] = True
    _leaves: ClassVar[tuple[str, ...]] = ("kernel",)

    def __init__(self, kernel: Kernel) -> None:
        if not isinstance(kernel, Kernel) or kernel.is_whole:
            raise TypeError(f"Derivatives: kernel takes a kernel of values, got {kernel!r}.")
        rough = rough_parts(kernel)
        if rough:
            raise ValueError(
                f"Derivatives takes no {rough[0]}: its functions have no slopes, or JAX does not "
                f"have them at equal inputs. Take RBF, Matern52, or another smooth kernel; write "
                f"one of your own in squared distances, without their root."
            )
        self.kernel = kernel

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        def over_rows(places: jax.Array) -> jax.Array:
            return slopes_of(lambda others: self.kernel.matrix(places, others).T, X2).T

        return slopes_of(over_rows, X1)

    def of_values(self, X: jax.Array) -> tuple[Kernel, jax.Array]:
        return self.kernel, X[:, :-1]

    def mean_at(self, mean_fn: Any, X: jax.Array) -> jax.Array:
        if not callable(mean_fn):
            return super().mean_at(mean_fn, X)
        fn = partial(mean_at, mean_fn)
        slopes = slopes_of(fn, _with_slopes(fn, X))
        return jnp.where(X[:, -1] == 0, fn(X[:, :-1]), slopes)

    def check_inputs(self, X: jax.Array) -> None:
        if has_tracers(X):
            return
        columns = X.shape[1] - 1
        wrong = misnumbered(X, -1, columns + 1) if columns else "one column alone"
        if wrong:
            raise ValueError(
                f"Derivatives: the last column of the inputs is 0 for a value, and 1 to "
                f"{max(columns, 1)} for a slope; got {wrong}. Write numbered_inputs(X) for values, "
                f"numbered_inputs(X, X_slopes) for slopes too."
            )
        places, numbers = np.asarray(X)[:, :-1], np.asarray(X)[:, -1]
        self.kernel.check_inputs(places)  # type: ignore[arg-type]
        for atom in atoms(self.kernel):
            if not atom.is_numbered:
                continue
            column = atom.active_dims % places.shape[1]  # type: ignore[attr-defined]
            along = np.flatnonzero(numbers == column + 1)
            if len(along):
                raise ValueError(
                    f"Derivatives: column {column} holds the numbers that {type(atom).__name__} "
                    f"reads, and nothing has a slope along them; row {along[0]} asks for it."
                )

    def typical_variance(self, X: jax.Array) -> jax.Array:
        """Return a variance for each row: slopes and values have different units."""
        return self.diagonal(X)

    def is_valid(self) -> jax.Array:
        return self.kernel.is_valid()

    def terms(self) -> list[Kernel]:
        return [Derivatives(term) for term in self.kernel.terms()]

    def __add__(self, other: Any) -> Kernel:
        if isinstance(other, Derivatives):
            return Derivatives(self.kernel + other.kernel)
        return super().__add__(other)

    def __mul__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return super().__mul__(other)
        return Derivatives(self.kernel * other)

    def __rmul__(self, other: Any) -> Kernel:
        return self * other
