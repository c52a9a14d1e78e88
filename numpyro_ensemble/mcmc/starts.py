"""Starts for chains: different points in the typical set.

Each function returns unconstrained values by site, with a leading chain axis. Pass them to
`MCMC.run(init_params=...)`, with the kernels of this package or with NUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_uniform

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.mcmc.checks import check_scale
from numpyro_ensemble.mcmc.member_starts import chain_members, from_ensemble
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

__all__ = [
    "chain_members",
    "from_ensemble",
    "from_microcanonical",
    "from_nuts",
    "from_pathfinder",
    "metric_from_pathfinder",
]


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
        num_chains: number of chains C of the later run.
        *args: arguments of the model.
        num_starts: number of NUTS chains S. Chain c starts at a draw of NUTS chain `c % S`.
        num_warmup: warm-up iterations of NUTS.
        num_draws: draws of NUTS. Starts are taken from them, as far apart as possible.
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
    """Start at draws of Pathfinder, chosen by their weights from all paths, without replacement.

    Args:
        rng_key: one key.
        model: a NumPyro model, or the result of a `Pathfinder`, which needs no further arguments.
        num_chains: number of chains C of the later run.
        *args: arguments of the model.
        num_paths: number of paths of L-BFGS.
        max_steps: largest number of evaluations on each path.
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

    The draws are weighted if the weights leave at least four effective draws for each dimension.
    Otherwise all draws count equally. NUTS adapts the metric further in its warm-up. With
    `adapt_mass_matrix=False` the metric stays, which helps in short warm-ups if Pareto k is below
    0.7.

    Args:
        result: what `Pathfinder.run` returned.

    Returns:
        A dict of one block `(D, D)` for the names of all latents, in unconstrained space.

    Raises:
        TypeError: for anything but a result of `Pathfinder.run`.
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
    """Return the target of a search, after checks of the model and of the counts."""
    for name, value in counts.items():
        check_count(name, value)
    target = Target(model, init_strategy=init_strategy)
    target.latent_names(args, kwargs)
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
    """Start at the end of a microcanonical walk that takes all chains to the typical set.

    It is the first phase of LAPS (Robnik et al., 2025): microcanonical steps without a correction,
    which become more exact as the chains come nearer, until the means over the chains are stable.

    Args:
        rng_key: one key.
        model: a NumPyro model.
        num_chains: number of chains C of the later run. Means over chains decide when the
            walk ends, so more chains make its end more reliable.
        *args: arguments of the model.
        max_steps: largest number of steps of each chain; each step costs one gradient.
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
