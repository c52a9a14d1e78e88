"""Chains whose start is unfit are given one beside the starts of the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.mcmc.checks import listed
from numpyro_ensemble.mcmc.counted import hopelessly_behind
from numpyro_ensemble.mcmc.target import Target

_TURNS = 10  # of new starts for those that are unfit, each half as far from the fit ones
_PART = 0.8  # of the difference between two fit chains, before the first halving
_NOISE = 0.1  # of each coordinate's spread besides: few chains span few directions
_FEWEST = 4  # fit chains, below which nothing is known of their spread
_FEWEST_PART = 8  # one chain in so many has to be fit
# Mass is density times volume, which 100 draws tell to less than a factor of e for each dimension.
_LESS, _LESS_PER_DIMENSION = 10.0, 1.0


class Found(NamedTuple):
    """What is known of the starts of chains."""

    finite: jax.Array  # (C,), whether density and gradient were
    dropped: jax.Array  # (C,), whether its search is
    behind: jax.Array  # (C,), by how much its search's log mass, or its log density, is too low
    hopeless: jax.Array  # (C,), whether either is far too low
    fit: jax.Array  # (C,), whether the start is a good one now


class _Turn(NamedTuple):
    """The state of the loop that replaces starts; its first turn evaluates those that are given."""

    number: jax.Array
    key: jax.Array
    rows: jax.Array
    least: jax.Array  # the log density below which a start is hopeless
    found: Found


def replace_unfit(
    call: tuple[tuple, dict],
    key: jax.Array,
    z: Any,
    usable: jax.Array,
    log_volumes: jax.Array | None = None,
    *,
    target: Target,
) -> tuple[Any, Found]:
    """Return starts of which those that are unfit are replaced, and what was found.

    A new start is a fit one, moved by a part of the difference between two others. A chain is unfit
    where its density or gradient is not finite or, after searches of the typical set, where its
    search has found hardly any of the mass that another one has, or where its density is hopelessly
    behind those of all searches that are left.

    Args:
        call: arguments of the model.
        key: one key.
        z: unconstrained values with a leading chain axis.
        usable: `(C,)`, False for those that are known to be no start.
        log_volumes: `(S,)`, of what the searches have found, where the starts are draws of searches
            of the typical set: chain c is of search `c % S`.
        target: the density.
    """
    z = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, float)), z)
    coordinates = target.coordinates(z, *call)
    value_and_grad = jax.vmap(jax.value_and_grad(target.log_density(*call, coordinates)))
    rows = coordinates.rows(z)

    def body(turn: _Turn) -> _Turn:
        first = turn.number == 0
        key, move_key = jax.random.split(turn.key)
        moved = _moved(move_key, turn.rows, turn.found.fit, 0.5**turn.number)
        rows = jnp.where(first | turn.found.fit[:, None], turn.rows, moved.astype(turn.rows.dtype))
        values, slopes = value_and_grad(rows)
        finite = jnp.isfinite(values) & jnp.isfinite(slopes).all(axis=1) & (usable | ~first)
        dropped, behind, least = none, jnp.zeros_like(values), turn.least
        if log_volumes is not None:
            known = jnp.where(finite, values, jnp.finfo(values.dtype).min)
            dropped, behind, lowest = _compared(known, log_volumes, rows.shape[1])
            least = jnp.where(first, lowest - hopelessly_behind(rows.shape[1]), least)
        hopeless = finite & ((first & dropped) | (values < least))
        fit = finite & ~hopeless
        now = Found(finite, dropped, behind, hopeless, fit)
        found = jax.tree.map(partial(jnp.where, first), now, turn.found)._replace(fit=fit)
        return _Turn(turn.number + 1, key, rows, least, found)

    def unfinished(turn: _Turn) -> jax.Array:
        fit = turn.found.fit
        some = ~fit.all() & (fit.sum() >= fewest(len(fit))) & (turn.number <= _TURNS)
        return (turn.number == 0) | some

    none, zeros = jnp.zeros(usable.shape, bool), jnp.zeros_like(rows[:, 0])
    found = Found(none, none, zeros, none, none)
    start = _Turn(jnp.zeros((), int), key, rows, zeros[0] - jnp.inf, found)
    end = jax.lax.while_loop(unfinished, body, start)
    return coordinates.tree(end.rows), end.found


def _compared(
    log_density: jax.Array, log_volumes: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compare searches, of which chain c is of search `c % S`, in so many dimensions.

    Density alone would take the neck of a funnel for the best place, and a well that holds nothing
    for a good one.

    Returns:
        For each chain whether its search is dropped, and by how much the search's log mass is below
        that of the best one or, of a search that is kept, the chain's log density below that of the
        lowest one kept; and the median log density of that lowest one.
    """
    number = min(len(log_volumes), len(log_density))
    medians = jnp.stack([jnp.median(log_density[i :: len(log_volumes)]) for i in range(number)])
    log_mass = medians + log_volumes[:number]
    behind = log_mass.max() - log_mass
    dropped = behind > _LESS + _LESS_PER_DIMENSION * size
    lowest = jnp.where(dropped, jnp.inf, medians).min()
    search = jnp.arange(len(log_density)) % len(log_volumes)
    return dropped[search], jnp.where(dropped[search], behind[search], lowest - log_density), lowest


def fewest(num_chains: int) -> int:
    """Return how many of the starts have to be fit, for the others to be replaced."""
    return max(_FEWEST, num_chains // _FEWEST_PART)


def _moved(key: jax.Array, rows: jax.Array, fit: jax.Array, step: jax.Array) -> jax.Array:
    """Return rows of fit chains, moved by a part of how these differ."""
    pick_key, noise_key = jax.random.split(key)
    among = jnp.where(fit, 0.0, -jnp.inf)
    one, two, three = jax.random.categorical(pick_key, among, shape=(3, len(fit)))
    spread = rows.std(axis=0, keepdims=True, where=fit[:, None])
    noise = spread * jax.random.normal(noise_key, rows.shape, rows.dtype)
    return rows[one] + step * (_PART * (rows[two] - rows[three]) + _NOISE * noise)


def report(found: Found, cause: Callable[[], str], num_searches: int = 0) -> None:
    """Warn of starts that were replaced.

    Args:
        found: what `replace_unfit` found.
        cause: returns why a density may not be finite.
        num_searches: the number of searches whose densities were compared, or 0.

    Raises:
        ValueError: where too few chains are fit.
    """
    if has_tracers(found):
        return
    finite, dropped, behind, hopeless, fit = (np.asarray(x) for x in found)
    dropped, low = hopeless & dropped, hopeless & ~dropped
    number, messages = len(fit), []
    if not fit.all():
        raise ValueError(
            f"{(~finite).sum()} of {number} chains would start where the log density or its "
            f"gradient is not finite, and {hopeless.sum()} where it is hopelessly low: too few are "
            f"left, of which {fewest(number)} are needed, to start the others beside. {cause()}"
        )
    if not finite.all():
        messages.append(
            f"{(~finite).sum()} of {number} chains would start where the log density or its "
            f"gradient is not finite. {cause()}"
        )
    if dropped.any():
        searches = [i for i in range(num_searches) if dropped[i::num_searches].any()]
        messages.append(
            f"{dropped.sum()} of {number} chains would start where the posterior has exp(-"
            f"{behind[dropped].min():.3g}) or less of the mass that the best search has found: "
            f"those of search {listed(np.array(searches))}, of {num_searches} from 0 on."
        )
    if low.any():
        messages.append(
            f"{low.sum()} of {number} chains would start where the log density is "
            f"{behind[low].min():.3g} or more below those of all searches: "
            f"{listed(np.flatnonzero(low))}."
        )
    if messages:
        messages.append("They start beside the other chains instead.")
        warn(" ".join(messages))
