"""Kernels: pytrees with hyperparameters as leaves, and their algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.gp.inputs import (
    as_inputs,
    check_dims,
    hyperparameter,
    with_named_errors,
)
from numpyro_ensemble.gp.kernels.fields import declared, is_fixed, made_init, to_define
from numpyro_ensemble.gp.means import Function, mean_at


class Spectrum(NamedTuple):
    """Frequencies `(M, D)` of random features, and squared amplitudes `(M,)`, whose mean is 1.

    Example:
        >>> import jax
        >>> from numpyro_ensemble.gp import RBF
        >>> uniforms = jax.random.uniform(jax.random.key(0), (16, 4))
        >>> spectrum = RBF(lengthscale=2.0).spectrum(uniforms, 3)
        >>> print(spectrum.frequencies.shape, spectrum.weights.shape)
        (16, 3) (16,)
    """

    frequencies: jax.Array
    weights: jax.Array


def values_of(fn: Callable[[jax.Array], jax.Array], X: jax.Array) -> jax.Array:
    """Return a function's values at inputs; `Derivatives` has its slopes too."""
    return fn(X)


class Kernel:
    """A covariance function `matrix(X1, X2)`, and its random or finite features.

    Kernels can be added and multiplied, with each other and with positive numbers, which may be
    NumPyro samples. A kernel of your own declares its hyperparameters by annotations, as a
    dataclass does, and defines `matrix`. A kernel of the distance derives from `Stationary`. A
    field annotated as `int`, `bool` or `str` is fixed, and not a hyperparameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, Periodic
        >>> kernel = 0.5 * RBF(lengthscale=2.0) + RBF() * Periodic(period=1.0)
        >>> kernel(jnp.linspace(0.0, 1.0, 3), jnp.zeros(2)).shape
        (3, 2)
    """

    __array_ufunc__ = None  # a NumPy number times a kernel is a kernel
    _leaves: ClassVar[tuple[str, ...]] = ()
    _fixed: ClassVar[tuple[str, ...]] = ()
    _positive: ClassVar[tuple[str, ...]] = ()

    _parts: ClassVar[tuple[str, ...]] = ("matrix",)  # methods that a kernel must define

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = declared(cls)
        known = (*cls._leaves, *cls._fixed)
        new = [name for name in own if name not in known]
        cls._fixed = (*cls._fixed, *(name for name in new if is_fixed(cls, name)))
        cls._leaves = (*cls._leaves, *(name for name in new if not is_fixed(cls, name)))
        if own and "__init__" not in vars(cls):
            cls.__init__ = made_init(cls, own)  # type: ignore[method-assign]
        jax.tree_util.register_pytree_with_keys(
            cls, cls._flatten_with_keys, partial(_unflatten, cls)
        )
        cls.__init__ = with_named_errors(cls)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise an error for a class that lacks a method that it must define."""
        for name in cls._parts:
            if getattr(getattr(cls, name), "is_missing", False):
                doc = getattr(cls, name).__doc__ or ""
                raise TypeError(f"{cls.__name__} has to define {name}: {doc.splitlines()[0]}")
        return object.__new__(cls)

    def _flatten_with_keys(self) -> tuple[tuple, tuple]:
        leaves = tuple(
            (jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._leaves
        )
        return leaves, tuple(getattr(self, name) for name in self._fixed)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._leaves + self._fixed)
        return f"{type(self).__name__}({fields})"

    # The covariance -----------------------------------------------------------------------------

    def __call__(self, X1: ArrayLike, X2: ArrayLike | None = None) -> jax.Array:
        """Return the covariances `(N1, N2)` of inputs `(N1, D)` and `(N2, D)`; `(N,)` is `(N, 1)`.

        Raises:
            ValueError: if the inputs do not have the number of columns that the kernel needs.
        """
        X1 = as_inputs(X1, "X1")
        X2 = X1 if X2 is None else as_inputs(X2, "X2")
        if X1.shape[1] != X2.shape[1]:
            raise ValueError(f"X1 has {X1.shape[1]} columns, and X2 has {X2.shape[1]}.")
        for X in (X1, X2):
            self.check_inputs(X)
        return self.matrix(X1, X2)

    def diag(self, X: ArrayLike) -> jax.Array:
        """Return the variances `(N,)` at inputs."""
        return self.diagonal(as_inputs(X))

    @to_define
    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        """Return the covariances of two matrices of inputs, `(N1, N2)`."""
        raise NotImplementedError

    def diagonal(self, X: jax.Array) -> jax.Array:
        """Return the variances at a matrix of inputs."""
        return jax.vmap(lambda x: self.matrix(x[None], x[None])[0, 0])(X)

    def check_inputs(self, X: jax.Array) -> None:
        """Raise a ValueError for inputs that the kernel does not take, unless they are traced."""
        for factor in atoms(self):
            if factor is not self:
                factor.check_inputs(X)

    def is_valid(self) -> jax.Array:
        """Return whether all hyperparameters are in their range; they may be traced."""
        positive = [(jnp.asarray(getattr(self, name)) > 0).all() for name in self._positive]
        return jnp.stack([jnp.asarray(True), *positive]).all()

    # The algebra --------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Kernel:
        return Sum(self, _as_kernel(other))

    def __radd__(self, other: Any) -> Kernel:
        if isinstance(other, int) and other == 0:  # sum() starts from 0
            return self
        return Sum(_as_kernel(other), self)

    def __mul__(self, other: Any) -> Kernel:
        return Product(self, _as_kernel(other))

    def __rmul__(self, other: Any) -> Kernel:
        return Product(_as_kernel(other), self)

    def warp(self, fn: Callable) -> Kernel:
        """Return the kernel of `fn(X)`, with `fn` `(N, D) -> (N, D')`: a warp, or a network."""
        return Warped(self, fn)

    def with_features(self, feature_map: Callable) -> Kernel:
        """Give the kernel features `X -> (N, F)` whose products are, or approximate, its values."""
        return Featured(self, feature_map)

    def terms(self) -> list[Kernel]:
        """Return the terms of this kernel's sum, with products of sums expanded."""
        return [self]

    def factors(self) -> list[Kernel]:
        """Return the factors of this kernel's product."""
        return [self]

    # Features -----------------------------------------------------------------------------------

    is_spectral: ClassVar[bool] = False
    is_numbered: ClassVar[bool] = False  # whether the kernel reads numbers of outputs
    takes_all: bool = False  # whether the kernel uses all columns of any inputs
    is_differentiable: bool = True  # False for a kernel whose functions have no slopes
    is_whole: ClassVar[bool] = False  # True for Derivatives, which cannot be part of a kernel
    observe: ClassVar[Callable] = staticmethod(values_of)  # values of a function, or slopes too

    def of_values(self, X: jax.Array) -> tuple[Kernel, jax.Array]:
        """Return the kernel of values, and the inputs without the column that marks slopes."""
        return self, X

    def typical_variance(self, X: jax.Array) -> jax.Array:
        """Return the variance of rows: a number, or `(N,)` where their units differ."""
        return self.diagonal(X).mean()

    def mean_at(self, mean_fn: Any, X: jax.Array) -> jax.Array:
        """Evaluate a mean, or its slopes, at a matrix of inputs, `(N,)`."""
        return self.observe(partial(mean_at, mean_fn), X)

    def inputs(self, X: jax.Array) -> jax.Array:
        """Return the inputs that the kernel's own frequencies belong to."""
        return X

    def num_uniforms(self, dim: int) -> int:
        """Return how many uniform numbers one random frequency in `dim` dimensions needs."""
        raise NotImplementedError

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        """Turn uniform numbers `(M, num_uniforms)` into frequencies."""
        raise NotImplementedError

    def series(self, number: int, dim: int) -> Spectrum | None:
        """Return deterministic frequencies, with weights that add up to M, or None."""
        return None

    def scale(self) -> Any:
        """Return the variance of a kernel with a spectral density."""
        return getattr(self, "variance", 1.0)

    def columns(self, X: jax.Array) -> jax.Array:
        """Return the features `(N, F)` of a kernel that has finitely many."""
        raise NotImplementedError(
            f"{type(self).__name__} has no spectral density that is known. Give it features: "
            f"kernel.with_features(fn), with fn(X) -> (N, F)."
        )


def _unflatten(cls: type, fixed: tuple, leaves: tuple) -> Any:
    self: Any = object.__new__(cls)
    for name, value in zip(cls._leaves, leaves, strict=True):  # type: ignore[attr-defined]
        setattr(self, name, value)
    for name, value in zip(cls._fixed, fixed, strict=True):  # type: ignore[attr-defined]
        setattr(self, name, value)
    return self


def _as_kernel(value: Any) -> Kernel:
    return value if isinstance(value, Kernel) else Constant(value)


# Composition ------------------------------------------------------------------------------------


def _check_parts(*kernels: Kernel) -> None:
    """Raise a TypeError for a kernel, such as Derivatives, that cannot be part of another."""
    for kernel in kernels:
        if kernel.is_whole:
            name = type(kernel).__name__
            raise TypeError(
                f"{name} comes last, around a whole kernel: {name}(a + b), {name}(a * b), "
                f"{name}(kernel.warp(fn)), {name}(multi_output(kernel, W))."
            )


class _Pair(Kernel):
    _leaves: ClassVar[tuple[str, ...]] = ("left", "right")

    def __init__(self, left: Kernel, right: Kernel) -> None:
        _check_parts(left, right)
        self.left, self.right = left, right

    def is_valid(self) -> jax.Array:
        return self.left.is_valid() & self.right.is_valid()


class Sum(_Pair):
    """The sum of two kernels."""

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.left.matrix(X1, X2) + self.right.matrix(X1, X2)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.left.diagonal(X) + self.right.diagonal(X)

    def terms(self) -> list[Kernel]:
        return self.left.terms() + self.right.terms()


class Product(_Pair):
    """The product of two kernels.

    Raises:
        ValueError: if one kernel reads numbers of outputs in a column that the other uses as input.
    """

    def __init__(self, left: Kernel, right: Kernel) -> None:
        super().__init__(left, right)
        for one, other in ((left, right), (right, left)):
            wide = [type(f).__name__ for f in atoms(other) if f.takes_all]
            numbered = [type(f).__name__ for f in atoms(one) if f.is_numbered]
            if wide and numbered:
                raise ValueError(
                    f"{wide[0]} works on all columns, and a {numbered[0]} it is multiplied with "
                    f"reads numbers from one of them: give {wide[0]} its active_dims."
                )

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.left.matrix(X1, X2) * self.right.matrix(X1, X2)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.left.diagonal(X) * self.right.diagonal(X)

    def terms(self) -> list[Kernel]:
        return [Product(a, b) for a in self.left.terms() for b in self.right.terms()]

    def factors(self) -> list[Kernel]:
        return self.left.factors() + self.right.factors()


def atoms(kernel: Kernel) -> list[Kernel]:
    """Return the kernels in the sums and products of a kernel."""
    return [factor for term in kernel.terms() for factor in term.factors()]


class _Wrapped(Kernel):
    _leaves: ClassVar[tuple[str, ...]] = ("kernel", "fn")

    def __init__(self, kernel: Kernel, fn: Callable) -> None:
        _check_parts(kernel)
        self.kernel, self.fn = kernel, Function(fn)

    def check_inputs(self, X: jax.Array) -> None:
        """Check nothing: the kernel gets transformed inputs."""

    def is_valid(self) -> jax.Array:
        return self.kernel.is_valid()


def rough_parts(kernel: Kernel) -> list[str]:
    """Return the names of a kernel's parts whose functions are not differentiable."""
    found = []
    for atom in atoms(kernel):
        if isinstance(atom, _Wrapped):
            found += rough_parts(atom.kernel)
        elif not atom.is_differentiable:
            found.append(type(atom).__name__)
    return found


class Warped(_Wrapped):
    """A kernel of transformed inputs."""

    def _map(self, X: jax.Array) -> jax.Array:
        mapped = as_inputs(self.fn(X), "the input map's result")
        if len(mapped) != len(X):
            raise ValueError(f"the input map returned {len(mapped)} rows for {len(X)} inputs.")
        return mapped

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.kernel.matrix(self._map(X1), self._map(X2))

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.kernel.diagonal(self._map(X))

    def terms(self) -> list[Kernel]:
        return [_warped(term, self.fn) for term in self.kernel.terms()]

    def factors(self) -> list[Kernel]:
        return [_warped(factor, self.fn) for factor in self.kernel.factors()]

    @property
    def is_spectral(self) -> bool:  # type: ignore[override]
        return self.kernel.is_spectral

    def inputs(self, X: jax.Array) -> jax.Array:
        return self.kernel.inputs(self._map(X))

    def num_uniforms(self, dim: int) -> int:
        return self.kernel.num_uniforms(dim)

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        return self.kernel.spectrum(uniforms, dim)

    def series(self, number: int, dim: int) -> Spectrum | None:
        return self.kernel.series(number, dim)

    def scale(self) -> Any:
        return self.kernel.scale()

    def columns(self, X: jax.Array) -> jax.Array:
        return self.kernel.columns(self._map(X))


def _warped(kernel: Kernel, fn: Function) -> Warped:
    return _unflatten(Warped, (), (kernel, fn))


class Featured(_Wrapped):
    """A kernel with a feature map that the user gave."""

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.kernel.matrix(X1, X2)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.kernel.diagonal(X)

    def columns(self, X: jax.Array) -> jax.Array:
        columns = jnp.asarray(self.fn(X))
        if columns.ndim != 2 or len(columns) != len(X):
            raise ValueError(f"the feature map returned {columns.shape} for {len(X)} inputs.")
        return columns


# Kernels with hyperparameters ---------------------------------------------------------------------


def as_active(active_dims: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the numbers of the columns that a kernel works on, None for all of them."""
    return None if active_dims is None else tuple(map(int, np.atleast_1d(active_dims)))


def check_columns(owner: str, active_dims: tuple[int, ...] | None, X: jax.Array) -> jax.Array:
    """Return the columns of the inputs that a kernel works on."""
    return X if active_dims is None else X[:, check_dims(owner, active_dims, X)]


class Atom(Kernel):
    """A kernel with a variance and hyperparameters, over all columns of the inputs or some."""

    _parts: ClassVar[tuple[str, ...]] = ("correlation",)
    _leaves: ClassVar[tuple[str, ...]] = ("variance",)
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims",)
    _positive: ClassVar[tuple[str, ...]] = ("variance",)

    def __init__(self, variance: Any, active_dims: int | Sequence[int] | None) -> None:
        self.variance = self._number("variance", variance)
        self.active_dims = as_active(active_dims)

    @property
    def takes_all(self) -> bool:  # type: ignore[override]
        return self.active_dims is None

    def _number(self, name: str, value: Any, *, vector: bool = False) -> Any:
        return hyperparameter(type(self).__name__, name, value, vector=vector)

    def inputs(self, X: jax.Array) -> jax.Array:
        return check_columns(type(self).__name__, self.active_dims, X)

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return self.variance * self.correlation(self.inputs(X1), self.inputs(X2))

    def variance_at(self, X: jax.Array) -> jax.Array:
        """Return the diagonal of a kernel whose variance is the same everywhere."""
        self.inputs(X)
        return jnp.full(len(X), self.variance, jnp.result_type(X, self.variance))

    @to_define
    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        """Return the kernel with variance 1 of the inputs that it works on."""
        raise NotImplementedError


class Constant(Atom):
    """The kernel of functions that are one random constant.

    Args:
        variance: one number.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Constant
        >>> kernel = Constant(0.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.500
    """

    takes_all = False  # type: ignore[assignment]

    def __init__(self, variance: Any = 1.0) -> None:
        super().__init__(variance, None)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return jnp.ones((len(X1), len(X2)), X1.dtype)

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.variance_at(X)

    def columns(self, X: jax.Array) -> jax.Array:
        return jnp.sqrt(self.variance) * jnp.ones((len(X), 1), X.dtype)
