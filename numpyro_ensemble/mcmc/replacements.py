"""Chains whose start is unfit are given one beside the starts of the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.mcmc.checks import callers_level, listed
from numpyro_ensemble.mcmc.target import Target

_TURNS = 10  # of new starts for those that are unfit, each half as far from the fit ones
_PART = 0.8  # of the difference between two fit chains, before the first halving
_NOISE = 0.1  # of each coordinate's spread besides: few chains span few directions
_FEWEST = 4  # fit chains, below which nothing is known of their spread
_FEWEST_PART = 8  # one chain in so many has to be fit
# A mode whose log density is behind by 30, and by 10 for each dimension, weighs exp(-30) of the
# best one even where it is 20,000 times as wide in every direction.
_BEHIND, _BEHIND_PER_DIMENSION = 30.0, 10.0


class Found(NamedTuple):
    """What is known of the starts of chains."""

    finite: jax.Array  # (C,), whether density and gradient were
    behind: jax.Array  # (C,), how far the log density was below the median of the best search
    hopeless: jax.Array  # (C,), whether that is too far
    fit: jax.Array  # (C,), whether the start is a good one now


class _Turn(NamedTuple):
    """The state of the loop that replaces starts; its first turn evaluates those that are given."""

    number: jax.Array
    key: jax.Array
    rows: jax.Array
    best: jax.Array  # the median log density of the best search
    found: Found


def replace_unfit(
    call: tuple[tuple, dict],
    key: jax.Array,
    z: Any,
    usable: jax.Array,
    *,
    target: Target,
    num_searches: int = 0,
) -> tuple[Any, Found]:
    """Return starts of which those that are unfit are replaced, and what was found.

    A new start is a fit one, moved by a part of the difference between two others. A chain is unfit
    where its density or gradient is not finite or, after searches of the typical set, where its
    density is hopelessly behind.

    Args:
        call: arguments of the model.
        key: one key.
        z: unconstrained values with a leading chain axis.
        usable: `(C,)`, False for those that are known to be no start.
        target: the density.
        num_searches: how many searches of the typical set the starts are from: chain c is of search
            `c % num_searches`. 0 compares no densities.
    """
    z = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, float)), z)
    coordinates = target.coordinates(z, *call)
    value_and_grad = jax.vmap(jax.value_and_grad(target.log_density(*call, coordinates)))
    rows = coordinates.rows(z)
    limit = _BEHIND + _BEHIND_PER_DIMENSION * rows.shape[1]

    def body(turn: _Turn) -> _Turn:
        first = turn.number == 0
        key, move_key = jax.random.split(turn.key)
        moved = _moved(move_key, turn.rows, turn.found.fit, 0.5**turn.number)
        rows = jnp.where(first | turn.found.fit[:, None], turn.rows, moved.astype(turn.rows.dtype))
        values, slopes = value_and_grad(rows)
        finite = jnp.isfinite(values) & jnp.isfinite(slopes).all(axis=1) & (usable | ~first)
        best, behind = turn.best, jnp.zeros_like(values)
        if num_searches:
            known = jnp.where(finite, values, jnp.finfo(values.dtype).min)
            medians = [
                jnp.median(known[i::num_searches]) for i in range(min(num_searches, len(known)))
            ]
            best = jnp.where(first, jnp.stack(medians).max(), best)
            behind = best - known
        hopeless = finite & (behind > limit)
        fit = finite & ~hopeless
        now = Found(finite, behind, hopeless, fit)
        found = jax.tree.map(partial(jnp.where, first), now, turn.found)._replace(fit=fit)
        return _Turn(turn.number + 1, key, rows, best, found)

    def unfinished(turn: _Turn) -> jax.Array:
        fit = turn.found.fit
        some = ~fit.all() & (fit.sum() >= fewest(len(fit))) & (turn.number <= _TURNS)
        return (turn.number == 0) | some

    none, zeros = jnp.zeros(usable.shape, bool), jnp.zeros_like(rows[:, 0])
    start = _Turn(jnp.zeros((), int), key, rows, zeros[0], Found(none, zeros, none, none))
    end = jax.lax.while_loop(unfinished, body, start)
    return coordinates.tree(end.rows), end.found


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
    finite, behind, hopeless, fit = (np.asarray(x) for x in found)
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
    if hopeless.any():
        searches = [i for i in range(num_searches) if hopeless[i::num_searches].any()]
        messages.append(
            f"{hopeless.sum()} of {number} chains would start where the log density is "
            f"{behind[hopeless].min():.3g} or more below that of the best search: those of search "
            f"{listed(np.array(searches))}, of {num_searches} from 0 on."
        )
    if messages:
        messages.append("They start beside the other chains instead.")
        warnings.warn(" ".join(messages), stacklevel=callers_level())
