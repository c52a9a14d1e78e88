"""Replacement of bad starts: such a chain gets a start near those of the other chains."""

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

_TURNS = 10  # rounds of new starts at most; each round moves half as far from fit starts
_PART = 0.8  # a move is this part of the difference between two fit chains, before halving
_NOISE = 0.1  # noise of a move, in parts of each spread: few chains span few directions
_FEWEST = 4  # fit chains that are needed to estimate their spread
_FEWEST_PART = 8  # one chain in so many has to be fit
# A search whose log mass is below the best one's by more than 10 + D is dropped. Mass is density
# times volume. 100 draws estimate the volume to less than a factor of e for each dimension.
_LESS, _LESS_PER_DIMENSION = 10.0, 1.0


class Found(NamedTuple):
    """What `replace_unfit` found about the given starts, and which starts are fit at its end."""

    finite: jax.Array  # (C,), whether the start is usable, with finite density and gradient
    dropped: jax.Array  # (C,), whether the chain's search is dropped
    behind: jax.Array  # (C,), by how much the search's log mass or the log density is too low
    hopeless: jax.Array  # (C,), whether the log mass or the log density is far too low
    fit: jax.Array  # (C,), whether the start, perhaps a new one, is good


class _Turn(NamedTuple):
    """The state of the loop that replaces starts. The first turn evaluates the given starts."""

    number: jax.Array
    key: jax.Array
    rows: jax.Array
    least: jax.Array  # a start with a lower log density is replaced
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
    """Replace unfit starts; return all starts, and what was found about the given ones.

    A new start is a fit start, moved by a part of the difference between two others. A start is
    unfit if its density or gradient is not finite. After searches of the typical set a start is
    also unfit if its search found a negligible part of the mass of the best search, or if its log
    density is far below those of all searches that are kept.

    Args:
        call: arguments of the model.
        key: one key.
        z: unconstrained values with a leading chain axis.
        usable: `(C,)`, False for starts that are known to be bad.
        log_volumes: `(S,)`, the log volume of each search's draws, or None if the starts are no
            draws of searches of the typical set. Chain c belongs to search `c % S`.
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
    """Compare the masses of searches in `size` dimensions; chain c belongs to search `c % S`.

    Density alone would prefer the neck of a funnel, and accept a narrow mode without mass.

    Returns:
        For each chain whether its search is dropped, and how far it is behind. If the search is
        dropped, that is the distance of its log mass from the best one's. Otherwise it is the
        distance of the chain's log density below the lowest median log density of the searches that
        are kept. Last, that lowest median.
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
    """Return the number of fit starts that are needed to replace the others."""
    return max(_FEWEST, num_chains // _FEWEST_PART)


def _moved(key: jax.Array, rows: jax.Array, fit: jax.Array, step: jax.Array) -> jax.Array:
    """Return rows of fit chains, moved by a part of the difference of two others, with noise."""
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
        num_searches: the number of searches whose masses were compared, or 0.

    Raises:
        ValueError: if too few chains are fit.
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
