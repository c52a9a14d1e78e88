"""Kernels with periods, each with its spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.gp.inputs import check_positive, per_dimension
from numpyro_ensemble.gp.kernels.base import Kernel, Spectrum, as_active, check_columns
from numpyro_ensemble.gp.kernels.stationary import Differences, sum_over_columns
from numpyro_ensemble.gp.spectra import bessel_weights, gaussian_mixture, signed_harmonics
from numpyro_ensemble.gp.waves import sine_cosine


def _squared_wave(difference: jax.Array, turn: jax.Array, by: jax.Array) -> jax.Array:
    return (sine_cosine(difference * turn)[0] / by) ** 2


class Periodic(Differences):
    """The periodic kernel, `variance * prod_d exp(-2 sin^2(pi * d / period) / lengthscale^2)`.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        period: one number.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Periodic
        >>> kernel = Periodic(period=4.0)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.368
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
        squared = sum_over_columns(_squared_wave, X1, X2, turn, by)
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
        weights = number * weights / weights.sum()  # renormalise the truncated series
        return Spectrum(2.0 * math.pi * harmonics / self.period, weights)


class Cosine(Differences):
    """The kernel `variance * cos(2 * pi * d / period)`, of one dimension.

    Args:
        variance: one number.
        period: one number.
        active_dims: the column of the inputs that the kernel works on (default: the only one).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Cosine
        >>> kernel = Cosine(period=8.0)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.707
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
        """Return the kernel's only frequency."""
        one = jnp.ones((1, 1))
        return Spectrum(2.0 * math.pi * one / self.period, one[0])


class SpectralMixture(Kernel):
    """The kernel of a spectrum that is a mixture of Gaussians (Wilson and Adams, 2013).

    `sum_q weights_q * exp(-2 pi^2 |bandwidths_q * d|^2) * cos(2 pi * frequencies_q . d)`

    Args:
        weights: `(Q,)`, which add up to the variance.
        frequencies: `(Q, D)`, in turns for each unit of the inputs, or `(Q,)` in one dimension.
        bandwidths: standard deviations of the frequencies, of the same shape.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import SpectralMixture
        >>> parts = {"frequencies": jnp.array([[0.0], [0.25]]), "bandwidths": jnp.full((2, 1), 0.1)}
        >>> kernel = SpectralMixture(weights=jnp.array([0.5, 0.5]), **parts)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.410
    """

    is_spectral = True
    _leaves: ClassVar[tuple[str, ...]] = ("weights", "frequencies", "bandwidths")
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims",)
    _positive: ClassVar[tuple[str, ...]] = ("weights", "bandwidths")

    def __init__(
        self,
        weights: Any,
        frequencies: Any,
        bandwidths: Any,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        given = (weights, frequencies, bandwidths)
        weights, frequencies, bandwidths = (
            np.asarray(x, float) if isinstance(x, list | tuple) else x for x in given
        )
        shapes = [jnp.shape(x) for x in (weights, frequencies, bandwidths)]
        if len(shapes[0]) != 1 or shapes[1] != shapes[2] or shapes[1][:1] != shapes[0]:
            raise ValueError(
                f"SpectralMixture takes weights (Q,), and frequencies and bandwidths (Q, D) or "
                f"(Q,); got shapes {shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        for name, value in {"weights": weights, "bandwidths": bandwidths}.items():
            check_positive("SpectralMixture", name, value)
        self.weights, self.frequencies, self.bandwidths = weights, frequencies, bandwidths
        self.active_dims = as_active(active_dims)

    @property
    def takes_all(self) -> bool:  # type: ignore[override]
        return self.active_dims is None

    def inputs(self, X: jax.Array) -> jax.Array:
        X = check_columns("SpectralMixture", self.active_dims, X)
        dims = self._wide(self.frequencies).shape[1]
        if X.shape[1] != dims:
            raise ValueError(
                f"SpectralMixture: frequencies have {dims} columns, and the inputs it works on "
                f"{X.shape[1]}."
            )
        return X

    @staticmethod
    def _wide(values: Any) -> jax.Array:
        values = jnp.asarray(values)
        return values[:, None] if values.ndim == 1 else values

    def matrix(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        X1, X2 = self.inputs(X1), self.inputs(X2)
        total = jnp.zeros((len(X1), len(X2)), X1.dtype)
        parts = zip(
            jnp.asarray(self.weights), self._wide(self.frequencies), self._wide(self.bandwidths),
            strict=True,
        )  # fmt: skip
        for weight, turn, width in parts:
            near = sum_over_columns(jnp.square, X1 * width[None, :], X2 * width[None, :])
            # take differences first, so that equal inputs have phase 0 exactly
            phase = sum_over_columns(jnp.multiply, X1, X2, turn)
            wave = sine_cosine(2.0 * math.pi * phase)[1]
            total = total + weight * jnp.exp(-2.0 * math.pi**2 * near) * wave
        return total

    def diagonal(self, X: jax.Array) -> jax.Array:
        self.inputs(X)
        return jnp.full(len(X), self.scale(), jnp.result_type(X, self.scale()))

    def scale(self) -> Any:
        return jnp.asarray(self.weights).sum()

    def num_uniforms(self, dim: int) -> int:
        return 1 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        """Draw a component of the mixture, then a frequency from it."""
        turns = gaussian_mixture(
            uniforms, jnp.asarray(self.weights), self._wide(self.frequencies),
            self._wide(self.bandwidths),
        )  # fmt: skip
        return Spectrum(2.0 * math.pi * turns, jnp.ones_like(turns[:, 0]))
