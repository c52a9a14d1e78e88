"""Kernels that depend on differences of inputs, each with its spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from numpyro_ensemble.gp.inputs import per_dimension
from numpyro_ensemble.gp.kernels import Atom, Spectrum
from numpyro_ensemble.gp.spectra import (
    bessel_weights,
    gaussian,
    multivariate_t,
    scale_mixture,
    signed_harmonics,
)
from numpyro_ensemble.gp.waves import sine_cosine

_FEW_COLUMNS = 8


class _Stationary(Atom):
    is_spectral = True

    def diagonal(self, X: jax.Array) -> jax.Array:
        self.inputs(X)
        return jnp.full(len(X), self.variance, jnp.result_type(X, self.variance))

    def _scaled(self, name: str, X: jax.Array) -> jax.Array:
        by = per_dimension(type(self).__name__, name, getattr(self, name), X)
        return X / by[None, :]


@partial(jax.jit, static_argnums=0)
def _sum_over_columns(
    term: Callable[..., jax.Array], X1: jax.Array, X2: jax.Array, *each: jax.Array
) -> jax.Array:
    """Sum `term(difference, *each)` over columns: exact near 0 in single precision, and fused.

    A few columns are added one by one, which CPUs vectorise where they do not a short reduction.
    """
    if X1.shape[1] > _FEW_COLUMNS:
        each = tuple(x[None, None, :] for x in each)
        return term(X1[:, None, :] - X2[None, :, :], *each).sum(axis=-1)
    columns = zip(X1.T, X2.T, *each, strict=True)
    return sum(
        (term(x1[:, None] - x2[None, :], *rest) for x1, x2, *rest in columns),
        jnp.zeros((len(X1), len(X2)), X1.dtype),
    )


def _squared_wave(difference: jax.Array, turn: jax.Array, by: jax.Array) -> jax.Array:
    return (sine_cosine(difference * turn)[0] / by) ** 2


class _Radial(_Stationary):
    """A function of the distance in lengthscales."""

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "lengthscale")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "lengthscale")

    def __init__(
        self,
        variance: Any = 1.0,
        lengthscale: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        self.lengthscale = self._number("lengthscale", lengthscale, vector=True)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        X1, X2 = self._scaled("lengthscale", X1), self._scaled("lengthscale", X2)
        return self.profile(_sum_over_columns(jnp.square, X1, X2))

    def profile(self, squared: jax.Array) -> jax.Array:
        """Return the correlation at squared distances in lengthscales."""
        raise NotImplementedError

    def _unscaled(self, frequencies: jax.Array) -> jax.Array:
        return self._scaled("lengthscale", frequencies)


class RBF(_Radial):
    """The squared exponential kernel, `variance * exp(-d^2 / 2)`, d in lengthscales.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        active_dims: columns of the inputs that the kernel works on (default: all).
    """

    def profile(self, squared: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * squared)

    def num_uniforms(self, dim: int) -> int:
        return 1 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        frequencies, weights = gaussian(uniforms, widening=min(2.0, 1.0 + 3.0 / dim))
        return Spectrum(self._unscaled(frequencies), weights)


class _Matern(_Radial):
    degrees: ClassVar[int]  # twice the smoothness

    def profile(self, squared: jax.Array) -> jax.Array:
        return _matern((self.degrees - 1) // 2, self.degrees * squared)

    def num_uniforms(self, dim: int) -> int:
        return 2 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        widening = min(6.0, 1.0 + 12.0 / dim)
        frequencies, weights = multivariate_t(uniforms, self.degrees, widening)
        return Spectrum(self._unscaled(frequencies), weights)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _matern(order: int, squared: jax.Array) -> jax.Array:
    """Matern kernel of smoothness `order + 1/2` at `squared = 2 * smoothness * d^2`."""
    r = jnp.sqrt(squared)
    return (1.0, 1.0 + r, 1.0 + r + squared / 3.0)[order] * jnp.exp(-r)


@_matern.defjvp
def _matern_jvp(order: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Slopes in the squared distance, which are finite at 0 where the kernel has a curvature."""
    (squared,), (tangent,) = primals, tangents
    if order == 0:
        apart = squared > 0
        r = jnp.sqrt(jnp.where(apart, squared, 1.0))
        slope = jnp.where(apart, -0.5 * jnp.exp(-r) / r, 0.0)
    else:
        slope = -_matern(order - 1, squared) * (1 / 2, 1 / 6)[order - 1]
    return _matern(order, squared), slope * tangent


class Matern12(_Matern):
    """The exponential kernel, `variance * exp(-d)`; arguments as `RBF`."""

    degrees = 1


class Matern32(_Matern):
    """The Matern kernel of smoothness 3/2; arguments as `RBF`."""

    degrees = 3


class Matern52(_Matern):
    """The Matern kernel of smoothness 5/2; arguments as `RBF`."""

    degrees = 5


class RationalQuadratic(_Radial):
    """The kernel `variance * (1 + d^2 / (2 * alpha))^-alpha`, a mixture of RBF lengthscales.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        alpha: one number; large ones come near `RBF`.
        active_dims: columns of the inputs that the kernel works on (default: all).
    """

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "alpha")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "alpha")

    def __init__(
        self,
        variance: Any = 1.0,
        lengthscale: Any = 1.0,
        alpha: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, lengthscale, active_dims=active_dims)
        self.alpha = self._number("alpha", alpha)

    def profile(self, squared: jax.Array) -> jax.Array:
        return jnp.exp(-self.alpha * jnp.log1p(squared / (2.0 * self.alpha)))

    def num_uniforms(self, dim: int) -> int:
        return 2 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        widening = 3.0 if dim == 1 else 2.0
        frequencies, weights = scale_mixture(uniforms, self.alpha, widening)
        return Spectrum(self._unscaled(frequencies), weights)


class Periodic(_Stationary):
    """The periodic kernel, `variance * prod_d exp(-2 sin^2(pi * d / period) / lengthscale^2)`.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        period: one number.
        active_dims: columns of the inputs that the kernel works on (default: all).
    """

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "period")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "period")

    def __init__(
        self,
        variance: Any = 1.0,
        lengthscale: Any = 1.0,
        period: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        self.lengthscale = self._number("lengthscale", lengthscale, vector=True)
        self.period = self._number("period", period)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        by = per_dimension("Periodic", "lengthscale", self.lengthscale, X1)
        turn = jnp.broadcast_to(math.pi / self.period, by.shape)
        squared = _sum_over_columns(_squared_wave, X1, X2, turn, by)
        return jnp.exp(-2.0 * squared)

    def num_uniforms(self, dim: int) -> int:
        return 1 + dim

    def _concentration(self, dim: int) -> jax.Array:
        like = jnp.zeros((1, dim))
        return per_dimension("Periodic", "lengthscale", self.lengthscale, like) ** -2.0

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        harmonics, weights = signed_harmonics(uniforms, self._concentration(dim), widening=2.0)
        return Spectrum(2.0 * math.pi * harmonics / self.period, weights)

    def series(self, number: int, dim: int) -> Spectrum | None:
        """Return the Fourier series, which needs no randomness in one dimension."""
        if dim != 1:
            return None
        weights = bessel_weights(self._concentration(1), number)[:, 0]
        weights = jnp.where(jnp.arange(number) > 0, 2.0, 1.0) * weights
        harmonics = jnp.arange(number, dtype=weights.dtype)[:, None]
        weights = number * weights / weights.sum()  # what is cut off is spread over the others
        return Spectrum(2.0 * math.pi * harmonics / self.period, weights)


class Cosine(_Stationary):
    """The kernel `variance * cos(2 * pi * d / period)`, of one dimension.

    Args:
        variance: one number.
        period: one number.
        active_dims: the column of the inputs that the kernel works on (default: the only one).
    """

    _leaves: ClassVar[tuple[str, ...]] = ("variance", "period")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "period")

    def __init__(
        self,
        variance: Any = 1.0,
        period: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, active_dims)
        self.period = self._number("period", period)

    def inputs(self, X: jax.Array) -> jax.Array:
        X = super().inputs(X)
        if X.shape[1] != 1:
            raise ValueError(
                f"Cosine works on one dimension, and the inputs have {X.shape[1]}: choose one with "
                f"active_dims."
            )
        return X

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        return sine_cosine(2.0 * math.pi * (X1 - X2[:, 0][None, :]) / self.period)[1]

    def num_uniforms(self, dim: int) -> int:
        return 1

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        sign = jnp.where(uniforms < 0.5, -1.0, 1.0).astype(uniforms.dtype)
        return Spectrum(2.0 * math.pi * sign / self.period, jnp.ones_like(sign[:, 0]))

    def series(self, number: int, dim: int) -> Spectrum:
        """Return the one frequency there is."""
        one = jnp.ones((1, 1))
        return Spectrum(2.0 * math.pi * one / self.period, one[0])
