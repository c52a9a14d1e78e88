"""Sine and cosine together, several times faster on CPUs than one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# pi / 2 as a sum of pieces; the first have few bits, so that their multiples are exact
_PIECES = {
    "float32": (1.5703125, 4.8351287841796875e-04, 3.1385570764541626e-07, 6.077100506506192e-11),
    "float64": (
        1.5707963258028030, 9.920935791635221e-10, 5.170182978890250e-19, 2.903855973979361e-28,
    ),
}  # fmt: skip
_SINE_TERMS = {"float32": 5, "float64": 8}


@jax.custom_jvp
def sine_cosine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `(sin(x), cos(x))`, to rounding: Taylor series after a reduction to `|r| <= pi / 4`.

    The reduction is exact up to 10^7 quarter turns (10^4 in single precision). For larger x, the
    error is that of `x` itself.
    """
    if jnp.result_type(x).name not in _PIECES:
        return _one_by_one(x)
    return jax.lax.platform_dependent(x, cpu=_by_series, default=_one_by_one)


def _one_by_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sin(x), jnp.cos(x)


def _by_series(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    name = jnp.result_type(x).name
    r, turn = _reduce(x, _PIECES[name])
    r, more = _reduce(r, _PIECES[name])  # after rounding, a large x has quarter turns left
    turn = _within_turn(turn + more)
    r = jnp.clip(r, -0.8, 0.8)  # keeps waves within [-1, 1] for any x
    squared, terms = r * r, _SINE_TERMS[name]
    near_zero = r * _polynomial(squared, [1.0 / math.factorial(2 * k + 1) for k in range(terms)])
    near_one = _polynomial(squared, [1.0 / math.factorial(2 * k) for k in range(terms + 1)])
    odd = (turn == 1.0) | (turn == 3.0)
    sine, cosine = jnp.where(odd, near_one, near_zero), jnp.where(odd, near_zero, near_one)
    return (
        jnp.where(turn >= 2.0, -sine, sine),
        jnp.where((turn == 1.0) | (turn == 2.0), -cosine, cosine),
    )


def _reduce(x: jax.Array, pieces: Sequence[float]) -> tuple[jax.Array, jax.Array]:
    """Subtract whole quarter turns; return the rest, and the number of quarters modulo 4."""
    quarter = jnp.round(x * (2.0 / math.pi))
    for piece in pieces:
        x = x - quarter * piece
    return x, _within_turn(quarter)


def _within_turn(quarter: jax.Array) -> jax.Array:
    return quarter - 4.0 * jnp.floor(0.25 * quarter)


def _polynomial(squared: jax.Array, inverse_factorials: Sequence[float]) -> jax.Array:
    """Sum an alternating series, the highest term first."""
    total = jnp.full_like(squared, inverse_factorials[-1])
    for term in inverse_factorials[-2::-1]:
        total = term - squared * total
    return total


@sine_cosine.defjvp
def _sine_cosine_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    (x,), (tangent,) = primals, tangents
    sine, cosine = sine_cosine(x)
    return (sine, cosine), (cosine * tangent, -sine * tangent)
