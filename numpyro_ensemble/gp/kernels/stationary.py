"""Kernels that depend on differences of inputs, each with its spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.inputs import per_dimension
from numpyro_ensemble.gp.kernels.base import Atom, Spectrum
from numpyro_ensemble.gp.kernels.fields import to_define
from numpyro_ensemble.gp.kernels.smoothness import is_smooth
from numpyro_ensemble.gp.spectra import gaussian, multivariate_t, scale_mixture, stable_mixture

_FEW_COLUMNS = 8


class Differences(Atom):
    """A kernel of the difference of inputs, with a variance."""

    is_spectral = True

    def diagonal(self, X: jax.Array) -> jax.Array:
        return self.variance_at(X)

    def _scaled(self, name: str, X: jax.Array) -> jax.Array:
        by = per_dimension(type(self).__name__, name, getattr(self, name), X)
        return X / by[None, :]


@partial(jax.jit, static_argnums=0)
def sum_over_columns(
    term: Callable[..., jax.Array], X1: jax.Array, X2: jax.Array, *each: jax.Array
) -> jax.Array:
    """Sum `term(difference, *each)` over columns: exact near 0 in single precision, and fused.

    A few columns are added one by one: CPUs vectorise this, but not a short reduction.
    """
    if X1.shape[1] > _FEW_COLUMNS:
        each = tuple(x[None, None, :] for x in each)
        return term(X1[:, None, :] - X2[None, :, :], *each).sum(axis=-1)
    columns = zip(X1.T, X2.T, *each, strict=True)
    return sum(
        (term(x1[:, None] - x2[None, :], *rest) for x1, x2, *rest in columns),
        jnp.zeros((len(X1), len(X2)), X1.dtype),
    )


class Stationary(Differences):
    """A kernel of the distance in lengthscales; derive a kernel of your own from this class.

    Define `profile`. For paths, also define `waves`, which draws from the spectral density.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.scipy.special import ndtri
        >>> from numpyro_ensemble.gp import Stationary
        >>> class Cauchy(Stationary):
        ...     def profile(self, squared):
        ...         return 1 / (1 + squared)
        ...     def waves(self, uniforms):  # normal, of variances that are exponential
        ...         return jnp.sqrt(-2 * jnp.log(uniforms[:, :1])) * ndtri(uniforms[:, 1:])
        >>> Cauchy(2.0, 0.5)(jnp.linspace(0.0, 1.0, 3)).shape
        (3, 3)
    """

    _parts: ClassVar[tuple[str, ...]] = ("profile",)
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

    @property
    def is_spectral(self) -> bool:  # type: ignore[override]
        drawn = type(self).waves is not Stationary.waves
        return drawn or type(self).spectrum is not Stationary.spectrum

    @property
    def is_differentiable(self) -> bool:  # type: ignore[override]
        return is_smooth(self.profile)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        X1, X2 = self._scaled("lengthscale", X1), self._scaled("lengthscale", X2)
        return self.profile(sum_over_columns(jnp.square, X1, X2))

    @to_define
    def profile(self, squared: jax.Array) -> jax.Array:
        """Return the correlation at squared distances in lengthscales."""
        raise NotImplementedError

    def waves(self, uniforms: jax.Array) -> jax.Array:
        """Return frequencies `(M, D)` from the spectral density, of lengthscale 1.

        Args:
            uniforms: `(M, 1 + D)`, independent and uniform between 0 and 1.
        """
        raise NotImplementedError

    def num_uniforms(self, dim: int) -> int:
        return 1 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        waves = self.waves(uniforms)
        return Spectrum(self._unscaled(waves), jnp.ones_like(waves[:, 0]))

    def _unscaled(self, frequencies: jax.Array) -> jax.Array:
        return self._scaled("lengthscale", frequencies)


class RBF(Stationary):
    """The squared exponential kernel, `variance * exp(-d^2 / 2)`, d in lengthscales.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF
        >>> kernel = RBF(variance=2.0, lengthscale=0.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.271
    """

    def profile(self, squared: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * squared)

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        frequencies, weights = gaussian(uniforms, widening=min(2.0, 1.0 + 3.0 / dim))
        return Spectrum(self._unscaled(frequencies), weights)


class _Matern(Stationary):
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
    """Slopes in the squared distance; finite at 0 if the kernel has a second derivative there."""
    (squared,), (tangent,) = primals, tangents
    if order == 0:
        apart = squared > 0
        r = jnp.sqrt(jnp.where(apart, squared, 1.0))
        slope = jnp.where(apart, -0.5 * jnp.exp(-r) / r, 0.0)
    else:
        slope = -_matern(order - 1, squared) * (1 / 2, 1 / 6)[order - 1]
    return _matern(order, squared), slope * tangent


class Matern12(_Matern):
    """The exponential kernel, `variance * exp(-d)`; arguments as `RBF`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Matern12
        >>> kernel = Matern12(variance=2.0, lengthscale=0.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.271
    """

    degrees = 1


class Matern32(_Matern):
    """The Matern kernel of smoothness 3/2; arguments as `RBF`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Matern32
        >>> kernel = Matern32(variance=2.0, lengthscale=0.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.279
    """

    degrees = 3


class Matern52(_Matern):
    """The Matern kernel of smoothness 5/2; arguments as `RBF`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import Matern52
        >>> kernel = Matern52(variance=2.0, lengthscale=0.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.277
    """

    degrees = 5


class RationalQuadratic(Stationary):
    """The kernel `variance * (1 + d^2 / (2 * alpha))^-alpha`, a mixture of RBF lengthscales.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        alpha: one number; the kernel approaches `RBF` for large alpha.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RationalQuadratic
        >>> kernel = RationalQuadratic(lengthscale=0.5, alpha=2.0)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.250
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


class PoweredExponential(Stationary):
    """The kernel `variance * exp(-d^power)`: `Matern12` for power 1, and an RBF for power 2.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        power: above 0, at most 2.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import PoweredExponential
        >>> kernel = PoweredExponential(lengthscale=0.5, power=1.5)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.059
    """

    is_differentiable = False  # except for power 2, an RBF kernel
    _leaves: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "power")
    _positive: ClassVar[tuple[str, ...]] = ("variance", "lengthscale", "power")

    def __init__(
        self,
        variance: Any = 1.0,
        lengthscale: Any = 1.0,
        power: Any = 1.0,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, lengthscale, active_dims=active_dims)
        self.power = self._number("power", power)
        if not has_tracers(power) and not np.asarray(power) <= 2:
            raise ValueError(f"PoweredExponential: power is at most 2, got {np.asarray(power)}.")

    def is_valid(self) -> jax.Array:
        return super().is_valid() & (jnp.asarray(self.power) <= 2)

    def profile(self, squared: jax.Array) -> jax.Array:
        apart = squared > 0  # the slope at 0 is not finite
        raised = jnp.where(apart, squared, 1.0) ** (0.5 * self.power)
        return jnp.where(apart, jnp.exp(-raised), 1.0)

    def num_uniforms(self, dim: int) -> int:
        return 2 + dim

    def spectrum(self, uniforms: jax.Array, dim: int) -> Spectrum:
        frequencies, weights = stable_mixture(uniforms, 0.5 * self.power)
        return Spectrum(self._unscaled(frequencies), weights)


class PiecewisePolynomial(Stationary):
    """A kernel that is 0 from a distance of one lengthscale on (Rasmussen and Williams, 4.21).

    It has no paths: its spectral density has no form that can be drawn from.

    Args:
        variance: one number.
        lengthscale: one number, or one for each dimension, `(D,)`.
        degree: 0 to 3, the number of derivatives that the functions have.
        active_dims: columns of the inputs that the kernel works on (default: all).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import PiecewisePolynomial
        >>> kernel = PiecewisePolynomial(lengthscale=2.0, degree=1)
        >>> print(f"{kernel(jnp.zeros(1), jnp.ones(1)).item():.3f}")
        0.312
    """

    is_differentiable = False  # uses the distance, which has no slope at 0
    _parts: ClassVar[tuple[str, ...]] = ()
    _fixed: ClassVar[tuple[str, ...]] = ("active_dims", "degree")

    def __init__(
        self,
        variance: Any = 1.0,
        lengthscale: Any = 1.0,
        degree: int = 2,
        *,
        active_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(variance, lengthscale, active_dims=active_dims)
        if degree not in (0, 1, 2, 3):
            raise ValueError(f"PiecewisePolynomial: degree takes 0, 1, 2 or 3, got {degree!r}.")
        self.degree = int(degree)

    def correlation(self, X1: jax.Array, X2: jax.Array) -> jax.Array:
        X1, X2 = self._scaled("lengthscale", X1), self._scaled("lengthscale", X2)
        squared = sum_over_columns(jnp.square, X1, X2)
        apart = squared > 0
        r = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
        j = X1.shape[1] // 2 + self.degree + 1
        factor = (
            1.0,
            (j + 1) * r + 1,
            ((j**2 + 4 * j + 3) * r**2 + (3 * j + 6) * r + 3) / 3,
            (
                (j**3 + 9 * j**2 + 23 * j + 15) * r**3
                + (6 * j**2 + 36 * j + 45) * r**2
                + (15 * j + 45) * r
                + 15
            )
            / 15,
        )[self.degree]
        return jnp.maximum(1.0 - r, 0.0) ** (j + self.degree) * factor
