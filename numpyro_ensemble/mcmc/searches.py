"""Searches for starts of chains: each returns unconstrained values with a leading chain axis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.hmc import hmc

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mapping import platform_of
from numpyro_ensemble.mcmc.burn_in import burn_in
from numpyro_ensemble.mcmc.counted import with_stand_ins
from numpyro_ensemble.mcmc.pathfinding import Settings, choose, pathfind
from numpyro_ensemble.mcmc.replacements import Found, replace_unfit, report
from numpyro_ensemble.mcmc.target import Target

_NUM_STARTS = 4  # short NUTS chains
NUM_PATHS, MAX_STEPS = 8, 200  # paths of Pathfinder, and evaluations on each path at most
WALK_STEPS = 500  # steps of the microcanonical walk at most; each moves all chains
_POOL = 10  # draws of Pathfinder for each chain; one of them is chosen by weight


def search(
    draw: Callable,
    target: Target,
    key: jax.Array,
    num_chains: int,
    args: tuple,
    kwargs: dict,
    **options: Any,
) -> Any:
    """Find starts for a target's chains by one of the `_draw_...` functions below, compiled.

    Raises:
        RuntimeError: if no start is valid, with NumPyro's message and the likely cause.
        ValueError: if too few starts are fit.
    """
    num_searches = options.get("num_starts", _NUM_STARTS) if draw is _draw_nuts else 0

    def found(call: tuple[tuple, dict], key: jax.Array) -> tuple[Any, Found]:
        draw_key, move_key = jax.random.split(key)
        drawn = draw(call, draw_key, target=target, num_chains=num_chains, **options)
        return replace_unfit(call, move_key, *drawn, target=target)

    name = (draw.__name__, num_chains, *sorted(options.items()))
    z, known = target.run(name, found, (key,), args, kwargs)
    known = home(known)
    if not has_tracers(known):
        if not known.fit.any():  # outside a compiled program NumPyro raises a helpful error
            try:
                target.initial(jax.random.split(key, _NUM_STARTS), args, kwargs)
            except RuntimeError as error:
                if type(error) is not RuntimeError:  # of JAX, out of memory for example
                    raise
                cause = target.why_not_finite(z, args, kwargs)
                raise RuntimeError(f"{str(error).rstrip('.')}. {cause}") from None
        report(known, partial(target.why_not_finite, z, args, kwargs), num_searches)
    return z


def given(
    target: Target, key: jax.Array, z: Any, num_chains: int, args: tuple, kwargs: dict
) -> Any:
    """Return the starts that a user's function gave, and replace those that are unfit."""

    def found(call: tuple[tuple, dict], key: jax.Array, z: Any) -> tuple[Any, Found]:
        return replace_unfit(call, key, z, jnp.ones(num_chains, bool), target=target)

    z, known = target.run(("given", num_chains), found, (key, z), args, kwargs)
    known = home(known)
    if not has_tracers(known):
        report(known, partial(target.why_not_finite, z, args, kwargs))
    return z


def _draw_nuts(
    call: tuple[tuple, dict],
    key: jax.Array,
    *,
    target: Target,
    num_chains: int,
    num_starts: int = _NUM_STARTS,
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
    if platform_of(first, keys) == "cpu":  # in a loop no chain waits for a longer trajectory
        draws = jax.lax.map(lambda pair: run(*pair), (first, keys))
    else:
        draws = jax.vmap(run)(first, keys)
    chains = spread(spread_key, draws, num_chains, jitter)
    return chains, valid[jnp.arange(num_chains) % num_starts], _log_volumes(draws)


def _log_volumes(draws: Any) -> jax.Array:
    """Return the logarithm of the volume of each search's draws `(S, M, ...)`.

    It is the sum of the logarithms of the draws' standard deviations. If each search has only one
    draw, it is 0 for all searches.
    """
    num_starts, num_draws = jax.tree.leaves(draws)[0].shape[:2]
    if num_draws == 1:
        return jnp.zeros(num_starts)
    widths = [x.std(axis=1).reshape(num_starts, -1) for x in jax.tree.leaves(draws)]
    tiny = jnp.finfo(widths[0].dtype).tiny
    return jnp.log(jnp.maximum(jnp.concatenate(widths, axis=1), tiny)).sum(axis=1)


def spread(key: jax.Array, draws: Any, num_chains: int, jitter: float) -> Any:
    """Assign draws `(S, M, ...)` of S starts to chains: chain c takes a draw of start `c % S`.

    The draws that are taken from one start are as far apart as possible. Uniform noise is added,
    with `jitter` times the standard deviation of the start's draws, as the MEADS tutorial adds it
    to one position. The noise separates chains that take the same draw.
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
    num_paths: int = NUM_PATHS,
    max_steps: int = MAX_STEPS,
) -> Any:
    start_key, path_key, pick_key = jax.random.split(key, 3)
    first, valid = target.initial(jax.random.split(start_key, num_paths), *call)
    coordinates = target.coordinates(first, *call)
    density, rows = target.log_density(*call, coordinates), coordinates.rows(first)
    settings = Settings(max_steps=max_steps)
    _, normals, pool = pathfind(density, path_key, rows, _POOL * num_chains, settings)
    chosen = choose(pick_key, pool.log_weights, num_chains, replace=False)
    found = valid.any() & jnp.isfinite(normals.elbo).any()
    return coordinates.tree(pool.points[chosen]), jnp.broadcast_to(found, num_chains)


def _draw_microcanonical(
    call: tuple[tuple, dict],
    key: jax.Array,
    *,
    target: Target,
    num_chains: int,
    max_steps: int = WALK_STEPS,
) -> Any:
    start_key, walk_key = jax.random.split(key)
    first, valid = target.initial(jax.random.split(start_key, num_chains), *call)
    coordinates = target.coordinates(first, *call)
    density = target.log_density(*call, coordinates)
    rows = with_stand_ins(coordinates.rows(first), valid)
    if coordinates.size == 1:  # at constant speed a chain in one dimension cannot turn
        other = jax.random.normal(key, rows.shape, rows.dtype)
        both = jnp.concatenate([rows, other], axis=1)
        rows, _ = burn_in(
            lambda row: density(row[:1]) - 0.5 * row[1] ** 2, walk_key, both, max_steps
        )
        rows = rows[:, :1]
    else:
        rows, _ = burn_in(density, walk_key, rows, max_steps)
    # all chains belong to one search: chains far below its median log density are replaced
    return coordinates.tree(rows), jnp.broadcast_to(valid.any(), num_chains), jnp.zeros(1)


def _draw_initial(
    call: tuple[tuple, dict], key: jax.Array, *, target: Target, num_chains: int
) -> Any:
    return target.initial(jax.random.split(key, num_chains), *call)


# starts by NUTS, by Pathfinder, by a microcanonical walk, and by the initialisation strategy alone
nuts, pathfinder, microcanonical, initial = (
    partial(search, draw)
    for draw in (_draw_nuts, _draw_pathfinder, _draw_microcanonical, _draw_initial)
)
STARTS: dict[str, Callable] = {
    "nuts": nuts,
    "pathfinder": pathfinder,
    "microcanonical": microcanonical,
    "init": initial,
}
