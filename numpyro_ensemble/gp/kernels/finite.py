"""Kernels with finitely many features of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.inputs import (
    EXACT,
    check_dims,
    check_given,
    hyperparameter,
    misnumbered,
    per_dimension,
)
from numpyro_ensemble.gp.kernels.base import Atom, Kernel, as_active
from numpyro_ensemble.gp.means import Function
from numpyro_ensemble.handlers import check_count


class Linear(Atom):
    """The kernel `sum_d variance_d * x_d * x'_d` of linear functions through the origin.

    Args:
        variance: one number, or one for each dimension, `(D,)`.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Linear
        >>> kernel = Linear(variance=2.0)
        >>> print(f"{kernel(jnp.ones(1), jnp.full(1, 3.0)).item():.3f}")
        6.000
    """

    _parts: ClassVar[tuple[str, ...]] = ("matrix",)

    def __init__(
        self, variance: Any = 1.0, *, active_dims: int | Sequence[int] | None = None
    ) -> None:
        self.variance = self._number("variance", variance, vector=True)
        self.active_dims = as_active(active_dims)

    def columns(self, X: jax.Array) -> jax.Array:
        X = self.inputs(X)
        return jnp.sqrt(per_dimension("Linear", "variance", self.variance, X))[None, :] * X

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return jnp.matmul(self.columns(X1), self.columns(X2).T, precision=EXACT)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return (self.columns(X) ** 2).sum(axis=1)


class Polynomial(Atom):
    """The kernel `variance * (x @ x' + offset)^degree`.

    Args:
        variance: one number.
        offset: one number; a small offset makes the low powers small.
        degree: a whole number, 1 or more.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Polynomial
        >>> kernel = Polynomial(offset=1.0, degree=2)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        1.000
    """

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "offset")
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims", "degree")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "offset")

    def __init__(
        self,
        variance: Any = 1.0,
        offset: Any = 1.0,
        degree: int = 2,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        self.offset = self._number("offset", offset)
        check_count("degree", degree)
        self.degree = int(degree)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return (jnp.matmul(X1, X2.T, precision=EXACT) + self.offset) ** self.degree

    def columns(self, X: jax.Array) -> jax.Array:
        """Return a column for each monomial, by the multinomial theorem."""
        X = self.inputs(X)
        one = jnp.full((len(X), 1), jnp.sqrt(self.offset), X.dtype)
        wide = jnp.concatenate([one, X], axis=1)
        parts = []
        for places in combinations_with_replacement(range(wide.shape[1]), self.degree):
            counts = Counter(places).values()
            number = factorial(self.degree) / prod(map(factorial, counts))
            parts.append(number**0.5 * wide[:, np.array(places)].prod(axis=1))
        return jnp.sqrt(self.variance) * jnp.stack(parts, axis=1)


class Coregion(Kernel):
    """Covariances `W W' + diag(kappa)` of outputs, which a column of the inputs numbers.

    `multi_output` multiplies it with a kernel over the other columns.

    Args:
        W: `(num_outputs, rank)`.
        kappa: `(num_outputs,)`, not negative (default: none).
        active_dims: the column that holds the outputs' numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Coregion
        >>> kernel = Coregion(jnp.array([[1.0], [0.5]]), jnp.array([0.0, 0.1]))
        >>> numbers = jnp.array([[0.0], [1.0]])  # of the outputs
        >>> print(kernel(numbers).round(2))
        [[1.   0.5 ]
         [0.5  0.35]]
    """

    is_numbered: ClassVar[bool] = True
    _numbered: ClassVar[str] = "the outputs"
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
        name, number = type(self).__name__, jnp.shape(self.W)[-2]
        column = check_dims(name, (self.active_dims,), X)[0]
        wrong = misnumbered(X, column, number)
        if wrong:
            raise ValueError(
                f"{name}: column {column} holds {self._numbered}' numbers, 0 to {number - 1}; got "
                f"{wrong}."
            )

    def _numbers(self, X: jax.Array) -> jax.Array:
        return X[:, check_dims(type(self).__name__, (self.active_dims,), X)[0]]

    def _rows(self, values: Any, X: jax.Array) -> jax.Array:
        """Return the rows of outputs; NaN for an output that does not exist."""
        numbers = self._numbers(X)
        numbers = jnp.where(numbers == jnp.round(numbers), numbers, -1.0).astype(int)
        values = jnp.asarray(values)
        return values.at[numbers].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def columns(self, X: jax.Array) -> jax.Array:
        parts = [jnp.asarray(self.W)]
        if self.kappa is not None:
            parts.append(jnp.diag(_root(jnp.asarray(self.kappa))))
        return self._rows(jnp.concatenate(parts, axis=1), X)

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        shared = jnp.matmul(self._rows(self.W, X1), self._rows(self.W, X2).T, precision=EXACT)
        if self.kappa is None:
            return shared
        same = self._numbers(X1)[:, None] == self._numbers(X2)[None, :]
        return shared + jnp.where(same, self._rows(self.kappa, X1)[:, None], 0.0)

    def diagonal(self, X: jax.Array) -> jax.Array:
        shared = (self._rows(self.W, X) ** 2).sum(axis=1)
        return shared if self.kappa is None else shared + self._rows(self.kappa, X)


def multi_output(kernel: Kernel, W: Any, kappa: Any = None) -> Kernel:
    """Return the kernel of several outputs that share functions, weighted by `W`.

    The last column of the inputs is the output's number, as `numbered_inputs` writes it. Sums of
    such kernels, with a `W` for each, are the linear model of coregionalisation.

    Args:
        kernel: a kernel of the other columns.
        W: `(num_outputs, rank)`.
        kappa: variances of a separate function for each output, `(num_outputs,)` (default: none).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, multi_output, numbered_inputs
        >>> X = numbered_inputs(jnp.linspace(0.0, 1.0, 4), jnp.linspace(0.0, 1.0, 3))
        >>> multi_output(RBF(), jnp.array([[1.0], [-0.5]]))(X).shape
        (7, 7)
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"multi_output: kernel takes a kernel, got {kernel!r}.")
    return kernel.warp(_without_last) * Coregion(W, kappa)


def _without_last(X: jax.Array) -> jax.Array:
    return X[:, :-1]


def _root(x: jax.Array) -> jax.Array:
    """Return the square root, with slope 0 at 0 instead of infinity."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


class Categorical(Coregion):
    """The kernel of categories, numbered in a column of the inputs, with equal correlations.

    Args:
        num_categories: number of categories.
        variance: one number, the covariance of a category with itself.
        correlation: one number between 0 and 1, for any two categories.
        active_dims: the column that holds the categories' numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Categorical
        >>> kernel = Categorical(3, variance=2.0, correlation=0.5)
        >>> print(kernel(jnp.array([[0.0], [2.0]])).round(2))
        [[2. 1.]
         [1. 2.]]
    """

    _numbered: ClassVar[str] = "the categories"

    def __init__(
        self,
        num_categories: int,
        variance: Any = 1.0,
        correlation: Any = 0.0,
        *,
        active_dims: int = -1,
    ) -> None:
        check_count("num_categories", num_categories)
        variance = hyperparameter("Categorical", "variance", variance)
        if not has_tracers(correlation) and not 0 <= np.asarray(correlation) < 1:
            raise ValueError(f"Categorical: correlation lies in [0, 1), got {correlation}.")
        ones = jnp.ones(num_categories)
        common = jnp.sqrt(variance) * _root(jnp.asarray(correlation)) * ones[:, None]
        super().__init__(common, variance * (1.0 - correlation) * ones, active_dims=active_dims)


class Envelope(Kernel):
    """The kernel `fn(x) * fn(x')`, whose functions are `fn` times one random number.

    Multiply it with another kernel: the functions of the product are those of the other times `fn`.

    Args:
        fn: a function of the inputs, `(N, D) -> (N,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, Envelope
        >>> kernel = Envelope(lambda x: jnp.exp(-x[:, 0])) * RBF()  # variance falls
        >>> print(kernel.diagonal(jnp.array([[0.0], [1.0]])).round(3))
        [1.    0.135]
    """

    _leaves: ClassVar[tuple[str, ...]] = ("fn",)

    def __init__(self, fn: Callable) -> None:
        self.fn = Function(fn)

    def columns(self, X: jax.Array) -> jax.Array:
        heights = jnp.asarray(self.fn(X))
        if heights.shape != (len(X),):
            raise ValueError(f"Envelope: fn returned shape {heights.shape} for {len(X)} inputs.")
        return heights[:, None]

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.columns(X1) * self.columns(X2)[:, 0][None, :]

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.columns(X)[:, 0] ** 2


def change_point(
    before: Kernel, after: Kernel, location: Any, steepness: Any = 1.0, *, active_dims: int = 0
) -> Kernel:
    """Return a kernel that changes from one to another where a column passes a location.

    Args:
        before: the kernel at low values.
        after: the kernel at high ones.
        location: where both kernels have weight one half.
        steepness: how fast the weights change, per unit of the column.
        active_dims: the column.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, change_point
        >>> kernel = change_point(RBF(lengthscale=2.0), RBF(lengthscale=0.1), location=5.0)
        >>> X = jnp.linspace(0.0, 10.0, 6)
        >>> kernel(X, X).shape
        (6, 6)
    """
    steepness = hyperparameter("change_point", "steepness", steepness)
    check_given("change_point: location", location)
    if jnp.shape(location):
        raise ValueError(f"change_point: location is one place, got shape {jnp.shape(location)}.")

    def share(sign: float) -> Envelope:
        return Envelope(partial(_sigmoid, sign * jnp.asarray(steepness), location, active_dims))

    return before * share(-1.0) + after * share(1.0)


def _sigmoid(steepness: jax.Array, location: Any, column: int, X: jax.Array) -> jax.Array:
    column = check_dims("change_point", (column,), X)[0]
    return jax.nn.sigmoid(steepness * (X[:, column] - location))
