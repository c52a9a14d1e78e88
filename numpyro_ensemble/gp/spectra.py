"""Frequencies of stationary kernels, half of them drawn from a stretched spectrum.

If noise is small, the posterior depends on the tail of the spectrum, where draws from the spectral
density `p` are rare. So half of the frequencies come from the density stretched by `c`: the mixture
is `q = p / 2 + p(. / c) / (2 c^D)`, and the squared amplitudes are `p / q`, at most 2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammainc, gammaln, i0e, ndtri

_WIDEST = 60.0  # log variance of frequencies, at most: beyond it, waves are rounding noise
_GRID = 1024  # grid points of a distribution function that is inverted
_HARMONICS = 512  # harmonics of a periodic kernel in several dimensions


@lru_cache(maxsize=64)
def _sobol(count: int, dim: int) -> np.ndarray:
    from scipy.stats.qmc import Sobol

    points = Sobol(dim, scramble=False, bits=32).random_base2(max(count - 1, 0).bit_length())
    return (points[:count] * 2.0**32).astype(np.uint32)


def sobol(rng_key: jax.Array, count: int, dim: int, dtype: Any) -> jax.Array:
    """Return a Sobol sequence `(count, dim)` in the open unit cube, digitally shifted by a key."""
    bits = jax.random.bits(rng_key, (1, dim), jnp.uint32) ^ _sobol(count, dim)
    kept = min(32, jnp.finfo(dtype).nmant)  # so that no number is rounded to 1
    return ((bits >> (32 - kept)).astype(dtype) + 0.5) / 2.0**kept


def _weights(ratio: jax.Array) -> jax.Array:
    """Return `p / q`, from the ratio of the stretched density to `p`."""
    return 2.0 / (1.0 + ratio)


def _stretch(selector: jax.Array, by: float) -> jax.Array:
    return jnp.where(selector < 0.5, 1.0, by).astype(selector.dtype)


def gaussian(uniforms: jax.Array, widening: float) -> tuple[jax.Array, jax.Array]:
    """Return frequencies `(M, D)` of a standard normal spectrum, and their weights `(M,)`."""
    dim = uniforms.shape[1] - 1
    w = _stretch(uniforms[:, :1], widening) * ndtri(uniforms[:, 1:])
    squared = (w**2).sum(axis=1)
    return w, _weights(widening**-dim * jnp.exp(0.5 * squared * (1.0 - widening**-2)))


@lru_cache(maxsize=8)
def _chi_square_table(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal quantiles, and logarithms of chi-square quantiles at the same uniforms."""
    from scipy.stats import chi2, norm

    normal = np.linspace(-7.0, 7.0, 4001)
    upper = chi2.isf(norm.sf(normal), degrees)
    return normal, np.log(np.where(normal > 0, upper, chi2.ppf(norm.cdf(normal), degrees)))


def multivariate_t(
    uniforms: jax.Array, degrees: int, widening: float
) -> tuple[jax.Array, jax.Array]:
    """Return frequencies of a multivariate t: one chi-square is shared by all dimensions."""
    normals = ndtri(uniforms[:, 1:])
    normals, last = normals[:, 1:], normals[:, :1]
    dim = normals.shape[1]
    grid, table = (jnp.asarray(x, normals.dtype) for x in _chi_square_table(degrees))
    w = normals * jnp.sqrt(degrees / jnp.exp(jnp.interp(last, grid, table)))
    w = _stretch(uniforms[:, :1], widening) * w
    s = (w**2).sum(axis=1) / degrees
    ratio = ((1.0 + s) / (1.0 + s / widening**2)) ** (0.5 * (degrees + dim))
    return w, _weights(widening**-dim * ratio)


def _gamma_quantiles(alpha: jax.Array, probabilities: jax.Array) -> jax.Array:
    """Return quantiles of Gamma(alpha, alpha), by inverting its distribution on a grid."""
    least = (jnp.log(1e-8) + gammaln(alpha + 1.0)) / alpha
    most = jnp.log(alpha + 9.0 * jnp.sqrt(alpha) + 20.0)
    grid = jnp.linspace(least, most, _GRID, dtype=alpha.dtype)
    return jnp.exp(jnp.interp(probabilities, gammainc(alpha, jnp.exp(grid)), grid)) / alpha


def scale_mixture(uniforms: jax.Array, alpha: Any, widening: float) -> tuple[jax.Array, jax.Array]:
    """Return normal frequencies with gamma-distributed precisions; the gamma is stretched."""
    alpha = jnp.asarray(alpha, uniforms.dtype)
    tau = _gamma_quantiles(alpha, uniforms[:, 1])
    tau = _stretch(uniforms[:, 0], widening**2) * tau
    w = jnp.sqrt(tau)[:, None] * ndtri(uniforms[:, 2:])
    shift = alpha * tau * (1.0 - widening**-2) - 2.0 * alpha * jnp.log(widening)
    return w, _weights(jnp.exp(shift))


def stable_mixture(uniforms: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
    """Return normal frequencies with variances from a positive stable law of index `alpha <= 1`.

    `exp(-s^alpha)` is the Laplace transform of that law. Kanter (1975) draws it from two uniforms.
    The density has no closed form, so the spectrum is not stretched.
    """
    alpha = jnp.asarray(alpha, uniforms.dtype)
    angle, exponential = jnp.pi * uniforms[:, 0], -jnp.log(uniforms[:, 1])
    tiny = jnp.finfo(uniforms.dtype).tiny
    bent = jnp.log(jnp.maximum(jnp.sin((1.0 - alpha) * angle), tiny)) - jnp.log(exponential)
    log_tau = jnp.log(jnp.sin(alpha * angle)) - jnp.log(jnp.sin(angle)) / alpha
    log_tau = log_tau + bent * (1.0 - alpha) / alpha
    sd = jnp.exp(0.5 * jnp.minimum(jnp.log(2.0) + log_tau, _WIDEST))
    return sd[:, None] * ndtri(uniforms[:, 2:]), jnp.ones_like(sd)


def gaussian_mixture(
    uniforms: jax.Array, weights: jax.Array, means: jax.Array, sds: jax.Array
) -> jax.Array:
    """Return frequencies `(M, D)` from a mixture of Gaussians, `(Q, D)`, by their shares."""
    bounds = jnp.cumsum(weights) / weights.sum()
    part = jnp.searchsorted(bounds[:-1], uniforms[:, 0], side="right")
    return means[part] + sds[part] * ndtri(uniforms[:, 1:])


def bessel_weights(concentration: jax.Array, number: int) -> jax.Array:
    """Return `exp(-z) I_k(z)` for k below `number`, for each z: `(number, D)`.

    Ratios of neighbours come from the backward recurrence, which is stable (Gautschi, 1967). It
    starts at a bound that is nearly exact (Amos, 1974).
    """

    def step(above: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        ratio = concentration / (2.0 * k + concentration * above)
        return ratio, ratio

    top = number + 32
    start = concentration / (top - 0.5 + jnp.sqrt((top + 0.5) ** 2 + concentration**2))
    orders = jnp.arange(1, top, dtype=concentration.dtype)
    _, ratios = jax.lax.scan(step, start, orders, reverse=True)
    first = i0e(concentration)[None]
    return jnp.concatenate([first, first * jnp.cumprod(ratios[: number - 1], axis=0)])


def signed_harmonics(
    uniforms: jax.Array, concentration: jax.Array, widening: float
) -> tuple[jax.Array, jax.Array]:
    """Return whole numbers `(M, D)`, the harmonics of a periodic kernel, and their weights."""
    order = np.abs(np.arange(-_HARMONICS + 1, _HARMONICS))
    tables = (
        bessel_weights(scaled, _HARMONICS)[order]
        for scaled in (concentration, concentration * widening**2)
    )
    narrow, wide = (table / table.sum(axis=0, keepdims=True) for table in tables)
    chosen = []
    for table in (narrow, wide):
        bounds = jnp.cumsum(table, axis=0)
        bounds = bounds / bounds[-1:]  # the last bound is exactly 1 despite rounding
        chosen.append(jax.vmap(jnp.searchsorted, 1, 1)(bounds, uniforms[:, 1:]))
    place = jnp.where(uniforms[:, :1] < 0.5, chosen[0], chosen[1]).clip(0, len(order) - 1)
    p, q = (jnp.take_along_axis(table, place, axis=0).prod(axis=1) for table in (narrow, wide))
    return (place - (_HARMONICS - 1)).astype(uniforms.dtype), p / (0.5 * p + 0.5 * q)
