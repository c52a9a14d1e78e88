"""The programs that look for a start: each returns unconstrained values with a chain axis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.util import psis_weights
from blackjax.vi.multipathfinder import multi_approximate
from numpyro.infer.hmc import hmc

from numpyro_ensemble.arguments import has_tracers
from numpyro_ensemble.mcmc.target import Target

_POOL = 10  # draws of Pathfinder for each chain, of which the weights choose one


def search(
    draw: Callable,
    target: Target,
    key: jax.Array,
    num_chains: int,
    args: tuple,
    kwargs: dict,
    **options: Any,
) -> Any:
    """Start a target's chains by one of the programs below, compiled.

    Raises:
        RuntimeError: where no start is valid, as NumPyro says it.
        ValueError: where what is found is not finite.
    """
    fn = partial(draw, target=target, num_chains=num_chains, **options)
    name = (draw.__name__, num_chains, *sorted(options.items()))
    z, valid = target.run(name, fn, (key,), args, kwargs)
    if not has_tracers((z, valid)):
        if not valid.all():  # the same again outside a program, where NumPyro says what is wrong
            target.initial(jax.random.split(key, valid.size), args, kwargs)
        if not (valid.all() and all(jnp.isfinite(x).all() for x in jax.tree.leaves(z))):
            raise ValueError(
                "no start with a finite log density and gradient was found: look for data that "
                "are not finite or outside of their distribution's support, or give another "
                "init_strategy, such as init_to_median or init_to_value."
            )
    return z


def _draw_nuts(
    call: tuple[tuple, dict],
    key: jax.Array,
    *,
    target: Target,
    num_chains: int,
    num_starts: int = 4,
    num_warmup: int = 200,
    num_draws: int = 100,
    jitter: float = 0.1,
) -> Any:
    start_key, run_key, spread_key = jax.random.split(key, 3)
    first, valid = target.initial(jax.random.split(start_key, num_starts), *call)
    log_density = target.log_density(*call)
    start, step = hmc(potential_fn=lambda z: -log_density(z), algo="NUTS")

    def run(z: Any, key: jax.Array) -> Any:
        def body(i: jax.Array, carry: tuple) -> tuple:
            state = step(carry[0])
            at = jnp.maximum(i - num_warmup, 0)
            kept = jax.tree.map(lambda kept, new: kept.at[at].set(new), carry[1], state.z)
            return state, kept

        room = jax.tree.map(lambda x: jnp.zeros((num_draws, *x.shape), x.dtype), z)
        state = start(z, num_warmup, rng_key=key)
        return jax.lax.fori_loop(0, num_warmup + num_draws, body, (state, room))[1]

    keys = jax.random.split(run_key, num_starts)
    if jax.default_backend() == "cpu":  # no chain waits for another
        draws = jax.lax.map(lambda pair: run(*pair), (first, keys))
    else:
        draws = jax.vmap(run)(first, keys)
    return spread(spread_key, draws, num_chains, jitter), valid


def spread(key: jax.Array, draws: Any, num_chains: int, jitter: float) -> Any:
    """Deal draws `(S, M, ...)` to chains: chain c is of start c mod S, and its draws are far apart.

    Uniform noise of `jitter` times the standard deviation within a start is added, as where the
    MEADS tutorial spreads one position: here it tells apart draws that are dealt twice.
    """
    num_starts, num_draws = jax.tree.leaves(draws)[0].shape[:2]
    chain = jnp.arange(num_chains)
    each = -(-num_chains // num_starts)
    place = (chain // num_starts + 1) * num_draws // each - 1
    keys = iter(jax.random.split(key, len(jax.tree.leaves(draws))))

    def deal(x: jax.Array) -> jax.Array:
        taken = x[chain % num_starts, place]
        scale = jitter * x.std(axis=1)[chain % num_starts]
        noise = jax.random.uniform(next(keys), taken.shape, taken.dtype, -(3**0.5), 3**0.5)
        return taken + scale.astype(taken.dtype) * noise

    return jax.tree.map(deal, draws)


def _draw_pathfinder(
    call: tuple[tuple, dict],
    key: jax.Array,
    *,
    target: Target,
    num_chains: int,
    num_paths: int = 4,
    max_iterations: int = 50,
) -> Any:
    start_key, path_key, pick_key = jax.random.split(key, 3)
    first, valid = target.initial(jax.random.split(start_key, num_paths), *call)
    each = -(-_POOL * num_chains // num_paths)
    with jax.numpy_rank_promotion("allow"):  # BlackJAX does, whatever the user's setting
        state, _ = multi_approximate(
            path_key,
            target.log_density(*call),
            first,
            num_samples=each,
            maxiter=max_iterations,
            maxls=100,
        )
        log_weights, _ = psis_weights((state.logp - state.logq).ravel())
    # without replacement (Gumbel's trick), for chains must differ
    noise = jax.random.gumbel(pick_key, log_weights.shape, log_weights.dtype)
    ranked = jnp.where(jnp.isfinite(log_weights), log_weights, -1e30) + noise
    _, chosen = jax.lax.top_k(ranked, num_chains)
    draws = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[chosen], state.samples)
    return draws, valid


def _draw_initial(
    call: tuple[tuple, dict], key: jax.Array, *, target: Target, num_chains: int
) -> Any:
    return target.initial(jax.random.split(key, num_chains), *call)


# by NUTS, by Pathfinder, and by the initialisation strategy alone
nuts, pathfinder, initial = (
    partial(search, draw) for draw in (_draw_nuts, _draw_pathfinder, _draw_initial)
)
STARTS: dict[str, Callable] = {"nuts": nuts, "pathfinder": pathfinder, "init": initial}
