"""Which chains count in statistics of all chains: those that are hopelessly far behind do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from blackjax.adaptation.meads_adaptation import maximum_eigenvalue

# A place whose log density is behind by 30, and by 10 for each dimension, weighs exp(-30) of the
# best one even where it is 20,000 times as wide in every direction.
_BEHIND, _BEHIND_PER_DIMENSION = 30.0, 10.0
_FEWEST = 4  # chains of a fold that count; where fewer would, all do


def hopelessly_behind(size: int) -> float:
    """Return by how much a log density in so many dimensions is hopelessly behind another one."""
    return _BEHIND + _BEHIND_PER_DIMENSION * size


def counted(log_density: jax.Array, size: int) -> jax.Array:
    """Return which chains count in statistics of all, from their log densities `(C,)`.

    A chain counts unless its density is hopelessly behind the median of the chains. It moves, and
    counts again when it has come nearer. Up to half of the chains can be left out.
    """
    known = jnp.where(jnp.isfinite(log_density), log_density, -jnp.inf)
    counts = known >= jnp.median(known) - hopelessly_behind(size)
    return counts | (counts.sum() < _FEWEST)


def in_folds(counts: jax.Array) -> jax.Array:
    """Return which chains count in the statistics of their fold, of flags `(K, C / K)`."""
    return counts | (counts.sum(axis=1, keepdims=True) < _FEWEST)


def largest_eigenvalue(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return BlackJAX's estimate of the largest eigenvalue, from the rows `(C, D)` that count."""
    number = counts.sum()
    rows = jnp.where(counts[:, None], rows, 0.0)
    # the estimate divides by C - 1, where it divides by a number of rows
    return maximum_eigenvalue(rows) * (len(counts) - 1) / jnp.maximum(number - 1, 1)


def with_stand_ins(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return rows `(C, D)` of which those that do not count are replaced by others that do."""
    places = jnp.arange(len(counts))
    last = jax.lax.cummax(jnp.where(counts, places, -1))
    return rows[jnp.where(last < 0, jnp.argmax(counts), last)]
