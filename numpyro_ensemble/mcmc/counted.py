"""Which chains count in statistics of all chains: those with a far lower log density do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from blackjax.adaptation.meads_adaptation import maximum_eigenvalue

# A region whose log density is 30 + 10 D below the best one's holds exp(-30) of its mass at
# most, even if the region is 20,000 times as wide in each of D dimensions.
_BEHIND, _BEHIND_PER_DIMENSION = 30.0, 10.0
_FEWEST = 4  # chains that must count; if fewer would, all chains (of the fold) count


def hopelessly_behind(size: int) -> float:
    """Return the gap below which a log density in `size` dimensions counts as far too low."""
    return _BEHIND + _BEHIND_PER_DIMENSION * size


def counted(log_density: jax.Array, size: int) -> jax.Array:
    """Return which chains count in statistics of all, from their log densities `(C,)`.

    A chain counts unless its log density is below the median of the chains by more than
    `hopelessly_behind(size)`. A chain that does not count still moves, and counts again when its
    density is high enough. Up to half of the chains can be left out.
    """
    known = jnp.where(jnp.isfinite(log_density), log_density, -jnp.inf)
    counts = known >= jnp.median(known) - hopelessly_behind(size)
    return counts | (counts.sum() < _FEWEST)


def in_folds(counts: jax.Array) -> jax.Array:
    """Return which chains count in the statistics of their fold, from flags `(K, C / K)`."""
    return counts | (counts.sum(axis=1, keepdims=True) < _FEWEST)


def largest_eigenvalue(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return BlackJAX's estimate of the largest eigenvalue, from the rows `(C, D)` that count."""
    number = counts.sum()
    rows = jnp.where(counts[:, None], rows, 0.0)
    # BlackJAX divides by C - 1 for C rows: replace that by the number of rows that count, less 1
    return maximum_eigenvalue(rows) * (len(counts) - 1) / jnp.maximum(number - 1, 1)


def with_stand_ins(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return rows `(C, D)` in which each row that does not count is replaced by one that does."""
    places = jnp.arange(len(counts))
    last = jax.lax.cummax(jnp.where(counts, places, -1))
    return rows[jnp.where(last < 0, jnp.argmax(counts), last)]
