"""Where chains start: in the typical set, all different.

Each function returns unconstrained values by site with a leading chain axis: what
`MCMC.run(init_params=...)` takes, for the kernels of this package and for NUTS alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_uniform
from numpyro.infer.util import unconstrain_fn

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.mcmc.checks import check_scale
from numpyro_ensemble.mcmc.pathfinding import choose
from numpyro_ensemble.mcmc.searches import (
    MAX_STEPS,
    NUM_PATHS,
    WALK_STEPS,
    microcanonical,
    nuts,
    pathfinder,
)
from numpyro_ensemble.mcmc.target import Target
from numpyro_ensemble.results import PathfinderResult

_PROBES = 32  # random directions in which the curvature is measured
_FLATTEST = 1e-4  # the least curvature of a mode that noise follows


@checked_keywords
def from_nuts(
    rng_key: jax.Array,
    model: Callable,
    num_chains: int,
    *args: Any,
    num_starts: int = 4,
    num_warmup: int = 200,
    num_draws: int = 100,
    jitter: float = 0.1,
    init_strategy: Callable = init_to_uniform,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Start at the draws of a few short NUTS chains.

    Args:
        rng_key: one key.
        model: a NumPyro model.
        num_chains: number of chains C to come.
        *args: arguments of the model.
        num_starts: number of NUTS chains S; chain c starts at a draw of chain `c % S`.
        num_warmup: iterations of NUTS that are thrown away.
        num_draws: iterations from which starts are taken, as far apart as possible.
        jitter: uniform noise, in standard deviations of the draws of one NUTS chain.
        init_strategy: where NUTS starts.
        **kwargs: keyword arguments of the model.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]))
        >>> starts.from_nuts(jax.random.key(0), model, 64)["x"].shape
        (64, 3)
    """
    options = {"num_starts": num_starts, "num_warmup": num_warmup, "num_draws": num_draws}
    target = _checked(model, init_strategy, args, kwargs, num_chains=num_chains, **options)
    check_scale("jitter", jitter)
    return nuts(target, one_key(rng_key), num_chains, args, kwargs, jitter=jitter, **options)


@checked_keywords
def from_pathfinder(
    rng_key: jax.Array,
    model: Callable | PathfinderResult,
    num_chains: int,
    *args: Any,
    num_paths: int = NUM_PATHS,
    max_steps: int = MAX_STEPS,
    init_strategy: Callable = init_to_uniform,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Start at draws of Pathfinder, chosen from those of all paths by weight, none twice.

    Args:
        rng_key: one key.
        model: a NumPyro model, or the result of a `Pathfinder`, which needs nothing more.
        num_chains: number of chains C to come.
        *args: arguments of the model.
        num_paths: number of paths of L-BFGS.
        max_steps: number of evaluations in each, at most.
        init_strategy: where the paths start.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: if a result has fewer draws than there are chains.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_ensemble import Pathfinder
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     numpyro.sample("x", dist.LogNormal(3.0, 0.5))
        >>> result = Pathfinder(model, num_paths=4).run(jax.random.key(0), num_samples=100)
        >>> init_params = starts.from_pathfinder(jax.random.key(1), result, 4)
        >>> init_params["x"].shape
        (4,)
        >>> mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=100, num_chains=4,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(2), init_params=init_params)
    """
    if isinstance(model, PathfinderResult):
        asked = (num_paths, max_steps, init_strategy) != (NUM_PATHS, MAX_STEPS, init_to_uniform)
        if args or kwargs or asked:
            raise ValueError(
                "a result of a Pathfinder needs no arguments of its model and no options of a "
                "search: its paths have been found."
            )
        return _from_result(one_key(rng_key), model, num_chains)
    options = {"num_paths": num_paths, "max_steps": max_steps}
    target = _checked(model, init_strategy, args, kwargs, num_chains=num_chains, **options)
    return pathfinder(target, one_key(rng_key), num_chains, args, kwargs, **options)


def _from_result(key: jax.Array, result: PathfinderResult, num_chains: int) -> dict[str, jax.Array]:
    """Choose starts among the draws of a result."""
    check_count("num_chains", num_chains)
    log_weights = jnp.asarray(result.pool_log_weights)
    there = None if has_tracers(log_weights) else int((log_weights > -jnp.inf).sum())
    if there is not None and there < num_chains:
        raise ValueError(
            f"num_chains={num_chains}, and the result has {there} draws to start at: run "
            f"Pathfinder with num_samples={num_chains} or more."
        )
    chosen = choose(key, log_weights, num_chains, replace=False)
    return jax.tree.map(lambda x: x[chosen], result.pool)


def metric_from_pathfinder(result: PathfinderResult) -> dict[tuple[str, ...], jax.Array]:
    """Return the covariance of Pathfinder's draws, as the metric of NumPyro's HMC and NUTS.

    Draws count by their weights where these leave four effective draws for each dimension, else
    equally. NUTS adapts it further in its warm-up; with `adapt_mass_matrix=False` it stays, which
    serves short warm-ups where Pareto k is below 0.7.

    Args:
        result: what `Pathfinder.run` returned.

    Returns:
        A dict of one block `(D, D)` for the names of all latents, in unconstrained space.

    Raises:
        TypeError: for something else than a result.
        ValueError: if none of its draws is finite.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_ensemble import Pathfinder
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.01))
        >>> result = Pathfinder(model, num_paths=4).run(jax.random.key(0))
        >>> metric = starts.metric_from_pathfinder(result)
        >>> kernel = NUTS(model, inverse_mass_matrix=metric, dense_mass=True)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(1))
    """
    if not isinstance(result, PathfinderResult):
        raise TypeError(f"result takes what Pathfinder.run returned, got {type(result).__name__}.")
    names = tuple(sorted(result.pool))
    draws = jax.vmap(lambda z: ravel_pytree(z)[0])(result.pool)  # in this order
    log_weights = jnp.asarray(result.pool_log_weights)
    there = jnp.isfinite(log_weights) & jnp.isfinite(draws).all(axis=1)
    if not has_tracers(there) and not there.any():
        raise ValueError("no draw of the result is finite: there is no metric in it.")
    weights = jax.nn.softmax(jnp.where(there, log_weights, -jnp.inf))
    enough = (weights**2).sum() * 4.0 * draws.shape[1] < 1.0
    weights = jnp.where(enough, weights, there / there.sum())[:, None]
    left = jnp.where(there[:, None], draws, 0.0)
    left = left - (weights * left).sum(axis=0)[None, :]
    return {names: jnp.matmul((weights * left).T, left, precision="highest")}


def _checked(
    model: Callable, init_strategy: Callable, args: tuple, kwargs: dict, **counts: Any
) -> Target:
    """Return the target of a search, after the checks of the model and of its numbers."""
    target = Target(model, init_strategy=init_strategy)
    target.latent_names(args, kwargs)
    for name, value in counts.items():
        check_count(name, value)
    return target


@checked_keywords
def from_microcanonical(
    rng_key: jax.Array,
    model: Callable,
    num_chains: int,
    *args: Any,
    max_steps: int = WALK_STEPS,
    init_strategy: Callable = init_to_uniform,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Start where all chains end that walk to the typical set together.

    It is the first phase of LAPS (Robnik et al., 2025): microcanonical steps without a correction,
    the more exact the nearer the chains have come, until their means no longer move.

    Args:
        rng_key: one key.
        model: a NumPyro model.
        num_chains: number of chains C to come; 64 or more know well where they are.
        *args: arguments of the model.
        max_steps: the most steps of each chain; a step costs a gradient.
        init_strategy: where the chains' walk begins.
        **kwargs: keyword arguments of the model.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]))
        >>> starts.from_microcanonical(jax.random.key(0), model, 64)["x"].shape
        (64, 3)
    """
    counts = {"num_chains": num_chains, "max_steps": max_steps}
    target = _checked(model, init_strategy, args, kwargs, **counts)
    key = one_key(rng_key)
    return microcanonical(target, key, num_chains, args, kwargs, max_steps=max_steps)


@checked_keywords
def from_ensemble(
    rng_key: jax.Array,
    runner: Any,
    result: Any,
    *args: Any,
    num_chains: int = 64,
    jitter: float | None = None,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Start at the members of an ensemble of MAP or variational fits.

    Chain c starts at member `c % E`, of those that are finite: at a draw of its guide, or at its
    mode. Normal noise is added, scaled by the standard deviation of the guide or, at a mode, by
    the curvature of the density.

    Args:
        rng_key: one key.
        runner: an `EnsembleMAP` or `EnsembleVI`.
        result: what its `run` returned.
        *args: arguments of the model, those of the fit.
        num_chains: number of chains C to come.
        jitter: scale of the noise; None is 0.1 for draws of a guide and 1 for modes.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: if no member is finite.
    """
    check_count("num_chains", num_chains)
    check_scale("jitter", 0.0 if jitter is None else jitter)
    rng_key = one_key(rng_key)
    draw_key, noise_key = jax.random.split(rng_key)
    members = np.flatnonzero(np.asarray(result.finite))
    if not members.size:
        raise ValueError("No member of the result is finite, so that no chain can start at one.")
    chosen = members[np.arange(num_chains) % members.size]
    draws_guide = hasattr(runner, "sample_posterior")
    each = -(-num_chains // members.size)
    if draws_guide:
        draws = runner.sample_posterior(
            draw_key, result, *args, num_samples=max(each, _PROBES), group_by_member=True, **kwargs
        )
    else:
        draws = jax.tree.map(lambda x: x[:, None], result.params)
    target = Target(runner.model)
    names = target.latent_names(args, kwargs)
    draws = {name: draws[name] for name in names}
    scale = 0.1 if draws_guide else 1.0
    place = np.arange(num_chains) // members.size if draws_guide else np.zeros(num_chains, int)
    deal = partial(_around, target=target, modes=not draws_guide)
    inputs = noise_key, draws, chosen, place, jnp.asarray(scale if jitter is None else jitter)
    return target.run(("ensemble", draws_guide), deal, inputs, args, kwargs)


def _around(
    call: tuple[tuple, dict],
    key: jax.Array,
    draws: Any,
    chosen: jax.Array,
    place: jax.Array,
    jitter: jax.Array,
    *,
    target: Target,
    modes: bool,
) -> Any:
    """Unconstrain draws `(E, n, ...)`, and add noise to those that chains start at."""
    model, probe_key, *noise_keys = target.prepared(*call), *jax.random.split(key, 1 + len(draws))

    def free(values: Any) -> Any:
        return unconstrain_fn(model, *call, values)

    z = jax.vmap(jax.vmap(free))(draws)
    if modes:
        keys = jax.random.split(probe_key, jax.tree.leaves(z)[0].shape[0])
        at_modes = jax.tree.map(lambda x: x[:, 0], z)
        scales = jax.vmap(partial(_widths, target.smooth_density(*call)))(keys, at_modes)
    else:
        scales = jax.tree.map(lambda x: x.std(axis=1), z)
    leaf_keys = iter(noise_keys)

    def deal(x: jax.Array, scale: jax.Array) -> jax.Array:
        taken = x[chosen, place]
        noise = jax.random.normal(next(leaf_keys), taken.shape, taken.dtype)
        return taken + (jitter * scale[chosen] * noise).astype(taken.dtype)

    return jax.tree.map(deal, z, scales)


def _widths(log_density: Callable, key: jax.Array, z: Any) -> Any:
    """Return how wide the density is along each coordinate, from its curvature there."""
    row, unravel = ravel_pytree(z)
    gradient = jax.grad(lambda row: log_density(unravel(row)))

    def probe(key: jax.Array) -> jax.Array:
        direction = jax.random.rademacher(key, row.shape, row.dtype)
        return direction * jax.jvp(gradient, (row,), (direction,))[1]

    # Hutchinson's estimate of the diagonal of the Hessian, no smaller than its error
    probes = jax.vmap(probe)(jax.random.split(key, _PROBES))
    error = probes.std(axis=0) / _PROBES**0.5
    curvature = jnp.maximum(jnp.abs(probes.mean(axis=0)), error)
    return unravel(1.0 / jnp.sqrt(jnp.maximum(curvature, _FLATTEST)))
