"""Drawing posterior functions by Matheron's rule."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.conditioning import check_solved, solved
from numpyro_ensemble.gp.features import check_num_features, draw_features
from numpyro_ensemble.gp.inputs import (
    CONTRADICTION,
    EXACT,
    as_inputs,
    check_finite,
    check_values,
    contradictions,
    diagonal,
)
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.means import as_mean
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.solvers import SOLVERS, default_jitter
from numpyro_ensemble.gp.solvers import covariance as covariance_of
from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.mapping import pick

_ROUNDING = 1e-4  # of a covariance from single precision, relative to its largest number


def check_options(num_paths: int, num_bases: int, num_features: int, solver: str) -> None:
    """Raise an error for invalid options."""
    check_count("num_paths", num_paths)
    check_count("num_bases", num_bases)
    check_num_features(num_features)
    if solver not in SOLVERS:
        raise ValueError(f"solver takes one of {SOLVERS}, got {solver!r}.")


def check_kernel(kernel: Any, jitter: Any) -> None:
    """Raise an error if `kernel` is not a kernel, or `jitter` is not one number."""
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel takes a kernel of numpyro_ensemble.gp, got {kernel!r}.")
    if jitter is not None and jnp.ndim(jitter):
        raise ValueError(f"jitter takes one number, got shape {jnp.shape(jitter)}.")


def draw_paths(
    rng_key: jax.Array,
    kernel: Kernel,
    points: ArrayLike,
    values: ArrayLike,
    noise: ArrayLike = 0.0,
    mean_fn: Any = None,
    jitter: ArrayLike | None = None,
    *,
    observed: ArrayLike | None = None,
    num_paths: int = 1,
    num_features: int = 1024,
    num_bases: int = 4,
    solver: str = "cholesky",
    tolerance: float | None = None,
    copies: int = 1,
    latent: bool | None = None,
    covariance: ArrayLike | None = None,
) -> Paths:
    """Draw functions from the posterior of a Gaussian process, by Matheron's rule.

    Args:
        rng_key: one key, which determines the functions.
        kernel: a kernel, one draw of its hyperparameters.
        points: inputs `(N, D)` or `(N,)`: data of an exact process, inputs of a latent one, or
            inducing points.
        values: `(N,)`, or `(num_paths, N)` with values for each path: observations, latent values,
            or values at the inducing points.
        noise: variance of the values, one number or `(N,)`; 0 for latent values.
        mean_fn: a number, or a function of the inputs (a pytree, such as a module).
        jitter: added to the covariance's diagonal (default: `4 N eps` times the mean variance).
        observed: which values are observed, `(N,)`; the others may be NaN.
        num_paths: number of functions.
        num_features: columns of a random basis, even.
        num_bases: number of random bases, shared evenly by the paths. More bases average over the
            error of a single basis; more paths do not.
        solver: "cholesky", or "cg" for conjugate gradients in memory that grows with N.
        tolerance: relative residual of conjugate gradients (default: the square root of machine
            epsilon).
        copies: number of processes of a plate. So many consecutive paths, one of each process,
            share a basis.
        latent: whether `values` are draws of latent or inducing values, which `Paths.update` must
            not treat as data (default: true for values `(num_paths, N)` without noise).
        covariance: posterior covariance `(N, N)` of latent or inducing values with a normal
            posterior of mean `values`. Each path draws its own values, and `Paths.update`
            conditions them on new data.

    Raises:
        ValueError: for shapes that do not match, values that are not finite, or solves that fail.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, draw_paths
        >>> X = jnp.linspace(0.0, 6.0, 20)
        >>> paths = draw_paths(jax.random.key(0), RBF(), X, jnp.sin(X), noise=0.01, num_paths=5)
        >>> paths(jnp.array([1.5, 3.0])).shape
        (5, 2)
        >>> jax.grad(lambda x: paths(x[None])[0, 0])(1.5).shape
        ()
    """
    rng_key = one_key(rng_key)
    check_kernel(kernel, jitter)
    check_options(num_paths, num_bases, num_features, solver)
    points = as_inputs(points, "points")
    if not len(points):
        raise ValueError(
            "points has no row, and paths go through one observation or more. For functions of the "
            "prior use the features of draw_features, with normal weights."
        )
    values = jnp.asarray(values)
    if values.shape not in ((len(points),), (num_paths, len(points))):
        raise ValueError(
            f"values take shape ({len(points)},), one for each point, or ({num_paths}, "
            f"{len(points)}), got {values.shape}."
        )
    if observed is not None:
        observed = jnp.asarray(observed, bool)
        if observed.shape != (len(points),):
            raise ValueError(f"observed takes shape ({len(points)},), got {observed.shape}.")
    check_values("values", values, observed)
    kernel.check_inputs(points)
    mean_fn = as_mean(mean_fn)
    extra = default_jitter(kernel, points) if jitter is None else jnp.asarray(jitter)
    noise_free = not has_tracers(noise) and not np.any(noise)
    moved = {}
    if covariance is not None:
        _check_covariance(covariance, values, noise_free and observed is None)
        key_values, rng_key = jax.random.split(rng_key)
        prior = covariance_of(kernel, points, jnp.broadcast_to(extra, len(points)), None)
        S = jnp.asarray(covariance, prior.dtype)
        drawn, whitened, least, most = _draw_latents(key_values, values, S, prior, num_paths)
        _check_widths(least, most)
        moved = {"whitened": whitened, "noise": jnp.zeros(len(points))}  # noise of data: unknown
        values = jnp.asarray(drawn)
    elif latent is None:
        latent = values.ndim == 2 and noise_free
    variances = diagonal("noise", noise, points)
    if observed is None and not has_tracers((points, values, variances, extra)):
        if contradictions(points, values, variances, extra):
            raise ValueError(CONTRADICTION)
    dtype = jnp.result_type(points.dtype, values.dtype)
    paths = _draw(
        rng_key,
        jax.tree.map(jnp.asarray, (kernel, mean_fn)),
        points,
        values.astype(dtype),
        jnp.asarray(noise, dtype),
        jnp.asarray(extra, dtype),
        observed,
        num_paths=num_paths,
        num_features=num_features,
        num_bases=min(num_bases, num_paths // copies),
        copies=copies,
        solver=solver,
        tolerance=None if tolerance is None else jnp.asarray(tolerance, dtype),
    )
    check_solved(paths)
    kept = {"latent": bool(latent), "copies": copies, "keeps_jitter": jitter is not None}
    return replace(paths, **kept, **moved)


def _check_covariance(covariance: ArrayLike, mean: jax.Array, exact: bool) -> None:
    """Raise a ValueError for a covariance that does not fit the mean of latent values."""
    number = mean.shape[-1]
    if mean.ndim != 1 or jnp.shape(covariance) != (number, number):
        raise ValueError(
            f"covariance takes shape ({number}, {number}) and values, the mean, ({number},), got "
            f"{jnp.shape(covariance)} and {mean.shape}."
        )
    if not exact:
        raise ValueError(
            "covariance is that of latent values, which have no noise and no mask: leave noise and "
            "observed out, and give the noise of observations to Paths.update."
        )
    check_finite("covariance", covariance)
    if has_tracers(covariance):
        return
    given = np.asarray(covariance)
    if not np.allclose(given, given.T, rtol=0.0, atol=_ROUNDING * np.abs(given).max(initial=0.0)):
        raise ValueError(
            "covariance is not symmetric: pass the covariance itself, L @ L.T, not its Cholesky "
            "factor L."
        )


def _check_widths(least: jax.Array, most: jax.Array) -> None:
    """Raise a ValueError for the least eigenvalue of a covariance, if it is negative."""
    if not has_tracers((least, most)) and least < -_ROUNDING * abs(most):
        raise ValueError(f"covariance has the eigenvalue {least:.3g}, and none may be negative.")


@partial(jax.jit, static_argnames="number")
def _draw_latents(
    rng_key: jax.Array, mean: jax.Array, covariance: jax.Array, prior: jax.Array, number: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draw latent values `(number, N)`.

    Return also `L^-1 covariance L^-T`, where `L L'` is the prior covariance, and the least and the
    largest eigenvalue of the covariance.
    """
    width, directions = jnp.linalg.eigh(covariance)  # the covariance may be singular
    normal = jax.random.normal(rng_key, (number, len(mean)), covariance.dtype)
    scaled = normal * jnp.sqrt(jnp.maximum(width, 0.0))[None, :]
    values = mean[None, :] + jnp.matmul(scaled, directions.T, precision=EXACT)
    L = jnp.linalg.cholesky(prior)
    half = solve_triangular(L, covariance, lower=True)
    return values, solve_triangular(L, half.T, lower=True), width[0], width[-1]


@partial(jax.jit, static_argnames=("num_paths", "num_features", "num_bases", "copies", "solver"))
def _draw(
    rng_key: jax.Array,
    process: tuple[Kernel, Any],
    points: jax.Array,
    values: jax.Array,
    noise: jax.Array,
    jitter: jax.Array,
    observed: jax.Array | None,
    *,
    num_paths: int,
    num_features: int,
    num_bases: int,
    copies: int,
    solver: str,
    tolerance: jax.Array | None,
) -> Paths:
    """Draw features, weights and noise, and solve for values - mean - prior - noise."""
    kernel, mean_fn = process
    key_features, key_weights, key_noise, key_later = jax.random.split(rng_key, 4)
    features = jax.vmap(lambda key: draw_features(key, kernel, num_features, points))(
        jax.random.split(key_features, num_bases)
    )
    width = sum(pick(features, 0).sizes(points.shape[1]))
    each = -(-(num_paths // copies) // num_bases) * copies
    group, copy = np.divmod(np.arange(num_paths), copies)
    order = group % num_bases * each + group // num_bases * copies + copy  # groups cycle over bases
    total = diagonal("noise", noise, points) + jitter
    normal = jax.random.normal(key_noise, (num_paths, len(points)), values.dtype)
    paths = Paths(
        kernel=kernel,
        mean_fn=mean_fn,
        points=points,
        features=features,
        weights=jax.random.normal(key_weights, (num_bases, each, width), values.dtype),
        order=jnp.asarray(order),
        number=jnp.arange(num_paths),
        alpha=jnp.zeros_like(normal),
        rhs=jnp.zeros_like(normal),
        diagonal=total,
        noise=noise,
        jitter=jitter,
        observed=observed,
        residuals=jnp.zeros_like(normal[:, 0]),
        ok=jnp.ones(num_paths, bool),
        seed=jax.random.bits(key_later, (2,), jnp.uint32),
        solver=solver,
        tolerance=tolerance,
    )
    values = jnp.broadcast_to(values, normal.shape)
    left = values - kernel.mean_at(mean_fn, points)[None, :] - paths._prior_at(points).T
    rhs = left - jnp.sqrt(total)[None, :] * normal
    if observed is not None:
        rhs = jnp.where(observed[None, :], rhs, 0.0)
    return solved(replace(paths, rhs=rhs))
