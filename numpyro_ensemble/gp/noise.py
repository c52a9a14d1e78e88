"""Noise of observations: it depends on the input, not on the input's position in a call."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def normal_at(
    rng_key: jax.Array,
    X: jax.Array,
    copies: tuple[int, ...],
    dtype: Any,
    before: jax.Array | None = None,
) -> jax.Array:
    """Return standard normals `(*copies, N)` that depend on the key and each input's own values.

    Inputs that are repeated within a call have independent normals. `before` holds how often each
    input occurred in the earlier blocks of the call.
    """

    def draw(words: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(rng_key, words[0]), words[1])
        return jax.random.normal(key, copies, dtype)

    return jnp.moveaxis(jax.vmap(draw)(_hashes(X, before)), 0, -1)


def _hashes(X: jax.Array, before: jax.Array | None) -> jax.Array:
    """Hash each input `(N, D)` and its number of earlier occurrences to two numbers, `(N, 2)`."""
    X = jax.lax.stop_gradient(X) + 0.0  # turn -0.0 into 0.0
    words = jax.lax.bitcast_convert_type(X, jnp.uint32)
    earlier = _earlier(X) if before is None else _earlier(X) + before
    words = jnp.concatenate(
        [words.reshape(len(X), math.prod(words.shape[1:])), earlier[:, None]], axis=1
    )

    def of_row(row: jax.Array) -> jax.Array:
        start = jax.random.key(0, impl="threefry2x32")
        key, _ = jax.lax.scan(lambda key, word: (jax.random.fold_in(key, word), None), start, row)
        return jax.random.key_data(key)

    return jax.vmap(of_row)(words)


def _earlier(X: jax.Array) -> jax.Array:
    """Return, for each input, how many earlier inputs are equal to it."""
    order = jnp.lexsort(X.T)  # stable: equal inputs keep their order
    place, ordered = jnp.arange(len(X)), X[order]
    is_first = jnp.concatenate([jnp.ones(1, bool), (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = jax.lax.cummax(jnp.where(is_first[: len(X)], place, 0))
    return jnp.zeros(len(X), jnp.uint32).at[order].set((place - first).astype(jnp.uint32))
