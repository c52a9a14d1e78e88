"""Conditioning posterior functions on values: the first solve, and later updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.inputs import CONTRADICTION, contradictions, diagonal, repeated
from numpyro_ensemble.gp.path_arrays import PathArrays, evaluated
from numpyro_ensemble.gp.solvers import default_jitter, solve, why_unfactored

P = TypeVar("P", bound=PathArrays)


def solved(paths: P) -> P:
    """Solve for the weights of the kernel functions at the points, given the right-hand sides."""
    solution = solve(
        paths.kernel,
        paths.points,
        paths.diagonal,
        paths.observed,
        paths.rhs,
        paths.solver,
        paths.tolerance,
        paths.whitened,
    )
    return replace(paths, alpha=solution.values, residuals=solution.residuals, ok=solution.ok)


@jax.jit
def updated(paths: P, X: jax.Array, values: jax.Array, noise: Any, key: Any) -> P:
    """Condition functions on more values, `(N,)` or `(num_paths, N)`, of all draws."""
    values = jnp.broadcast_to(values, (paths.num_paths, len(X)))
    if paths.num_draws is None:
        return _updated(paths, X, values, noise, key)
    values = values.reshape(*paths.alpha.shape[:2], len(X))
    keys = None if key is None else jax.random.split(key, len(values))
    return jax.lax.map(lambda a: _updated(a[0], X, a[1], noise, a[2]), (paths, values, keys))


def _updated(paths: P, X: jax.Array, values: jax.Array, noise: Any, key: jax.Array | None) -> P:
    points = jnp.concatenate([paths.points, X])
    variances = diagonal("noise", paths.noise if noise is None else noise, X)
    jitter = own = paths.jitter
    if not paths.keeps_jitter:
        default = default_jitter(paths.kernel, points)
        if default.ndim:  # one jitter for each point
            own = default[len(paths.points) :]
            jitter = jnp.concatenate([paths.jitter, own])
        else:
            jitter = own = jnp.maximum(jitter, default)
    added = variances + own
    if key is None:
        seed = jax.random.wrap_key_data(paths.seed, impl="threefry2x32")
        key = jax.random.fold_in(seed, len(paths.points))
    # one key for each path: a subset of the paths gets the same update as in the full set
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(paths.number)
    normal = jax.vmap(lambda key: jax.random.normal(key, (len(X),), values.dtype))(keys)
    error = jnp.sqrt(added)[None, :] * normal
    rhs = values - paths.kernel.mean_at(paths.mean_fn, X)[None, :] - paths._prior_at(X).T - error
    observed = paths.observed
    if observed is not None:
        observed = jnp.concatenate([observed, jnp.ones(len(X), bool)])
    whole = replace(
        paths,
        points=points,
        diagonal=jnp.concatenate([paths.diagonal, added]),
        rhs=jnp.concatenate([paths.rhs, rhs], axis=1),
        jitter=jitter,
        noise=jnp.concatenate([paths.noise, variances]) if paths.noise.ndim else paths.noise,
        observed=observed,
    )
    return solved(whole)


def check_updatable(paths: PathArrays, noise: Any) -> None:
    """Raise a ValueError for paths that cannot be conditioned on more values."""
    if paths.part:
        raise ValueError("one term's paths cannot be updated alone: update the whole first.")
    if paths.latent:
        raise ValueError(
            "update cannot condition these paths: they pass through draws of latent or "
            "inducing values, whose posterior covariance is not known, so that the new values "
            "cannot move them. Add the new values to the data and fit again, use "
            "CollapsedSparseGP where the noise is normal, or give draw_paths the mean and the "
            "covariance= of the latent values."
        )
    if noise is None and paths.noise.ndim > (paths.num_draws is not None):
        raise ValueError(
            "the noise of the new values is not known, as that of the paths is not one number "
            "for all observations: give update(..., noise=), a variance."
        )


def check_agrees(paths: PathArrays, X: jax.Array, values: jax.Array, noise: Any) -> None:
    """Raise a ValueError where values without noise differ from others at the same inputs."""
    if paths.solver == "cg" or has_tracers((paths.alpha, X, values, noise)):
        return
    variances = diagonal("noise", paths.noise.min() if noise is None else noise, X)
    jitter = 4.0 * paths.jitter.max()
    sure = paths.diagonal <= jitter
    sure = sure if paths.observed is None else sure & paths.observed
    if paths.whitened is not None:  # inducing values are not data
        sure = sure.at[..., : paths.whitened.shape[-1]].set(False)
    again = repeated(X, paths.points[sure]) & np.asarray(variances == 0)
    differs = contradictions(X, values, variances, jitter)
    if again.any():
        known = np.asarray(evaluated(paths, X[again]))
        differs |= (abs(known - np.asarray(values)[..., again]) > 20.0 * np.sqrt(jitter)).any()
    if differs:
        raise ValueError(CONTRADICTION)


def check_solved(paths: PathArrays) -> None:
    """Raise a ValueError if the solves of paths failed (traced flags are not checked)."""
    if has_tracers(paths.ok) or bool(paths.ok.all()):
        return
    bad = np.flatnonzero(~np.asarray(paths.ok).reshape(-1))
    if paths.solver == "cg":
        worst = float(jnp.nanmax(paths.residuals))
        raise ValueError(
            f"{len(bad)} of {paths.num_paths} paths did not converge (largest relative residual "
            f"{worst:.1e}): more noise, a larger tolerance, or solver='cholesky'."
        )
    if jnp.isfinite(paths.residuals).all():
        raise ValueError(
            f"single precision does not solve for {len(bad)} of {paths.num_paths} paths: more "
            f"noise or jitter, or double precision (numpyro.enable_x64())."
        )
    raise ValueError(
        f"the kernel matrix could not be factored for {len(bad)} of {paths.num_paths} paths: "
        f"{why_unfactored(paths.points.dtype)}"
    )
