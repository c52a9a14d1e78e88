"""The forces between members in one step: a kernel at all pairs, and one gradient of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIState

from numpyro_ensemble.fit.repulsion import Repulsion

_HIGHEST = jax.lax.Precision.HIGHEST  # products of single precision are coarse on accelerators


class Pull(NamedTuple):
    """What one member brings to a step, before it is pushed.

    Attributes:
        state: its state after the step, but for the optimiser's.
        loss: at its present parameters.
        gradient: that of the loss in its unconstrained parameters.
        place: the parameters, or values of a function, by which it repels others.
        weight: of the pushes.
    """

    state: SVIState
    loss: jax.Array
    gradient: Any
    place: Any
    weight: jax.Array


def forces(repulsion: Repulsion, pulls: Pull) -> tuple[Any, Any]:
    """Return the gradient that each member follows, and the push on the place where it is.

    A member with anything that is not finite pushes no other, and keeps its own gradient.

    Args:
        repulsion: how members push each other apart.
        pulls: of all members, each leaf with a leading `(E,)`.
    """
    alive = _finite(pulls)
    number = jnp.maximum(alive.sum(), 1)
    places = jax.tree.map(lambda x: _centred(_wide(x), alive, number), pulls.place)
    kernel, bandwidth = _kernel(repulsion, places, alive, number)
    totals = jnp.where(alive, kernel.sum(axis=1), 1.0)
    share = 1.0 / totals
    if repulsion.mixes_gradients:
        share = jnp.full_like(totals, 1.0) / number.astype(totals.dtype)
    strength = 2.0 / bandwidth * share * pulls.weight.astype(totals.dtype)

    def push(place: jax.Array, given: jax.Array) -> jax.Array:
        apart = _column(totals, place) * place - _mixed(kernel, place)
        # what is not finite stays so: no member fails in silence
        moved = jnp.where(_column(alive, place), _column(strength, place) * apart, 0 * given)
        return moved.astype(given.dtype)

    def follow(own: jax.Array) -> jax.Array:
        known = jnp.where(_column(alive, own), _wide(own), 0.0)
        mixed = _mixed(kernel, known) * _column(share, own).astype(known.dtype)
        return jnp.where(_column(alive, own), mixed.astype(own.dtype), own)

    pushes = jax.tree.map(push, places, pulls.place)
    if not repulsion.mixes_gradients:
        return pulls.gradient, pushes
    return jax.tree.map(follow, pulls.gradient), pushes


def _kernel(
    repulsion: Repulsion, places: Any, alive: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the kernel at all pairs, 0 where one is not alive, and the bandwidth."""
    inner = sum(_products(leaf) for leaf in jax.tree.leaves(places))
    squares = jnp.diag(inner)
    squares = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * inner, 0.0)
    squares = squares * (1.0 - jnp.eye(len(alive), dtype=squares.dtype))
    pairs = alive[:, None] & alive[None, :]
    if repulsion.bandwidth is None:
        bandwidth = _median(jnp.sqrt(squares), pairs) ** 2 / jnp.log(jnp.maximum(number, 2))
        bandwidth = bandwidth + jnp.finfo(squares.dtype).eps
    else:
        bandwidth = jnp.asarray(repulsion.bandwidth, squares.dtype)
    return jnp.where(pairs, jnp.exp(-squares / bandwidth), 0.0), bandwidth


def _finite(pulls: Pull) -> jax.Array:
    """Return which members have nothing but finite numbers."""
    leaves = jax.tree.leaves((pulls.loss, pulls.gradient, pulls.place))
    flags = [jnp.isfinite(_flat(leaf)).all(axis=1) for leaf in leaves]
    return jnp.stack(flags).all(axis=0)


def _wide(leaf: jax.Array) -> jax.Array:
    """Return numbers in single precision at least."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
    """Return one value for each member, with the axes of an array of all."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _centred(leaf: jax.Array, alive: jax.Array, number: jax.Array) -> jax.Array:
    """Return places around their mean, so that squares of differences keep their digits."""
    known = jnp.where(_column(alive, leaf), leaf, 0.0)
    centre = known.sum(axis=0, keepdims=True) / number.astype(leaf.dtype)
    return jnp.where(_column(alive, leaf), known - centre, 0.0)


def _flat(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(len(leaf), leaf.size // len(leaf))


def _products(leaf: jax.Array) -> jax.Array:
    flat = _flat(leaf)
    return jnp.matmul(flat, flat.T, precision=_HIGHEST)


def _mixed(kernel: jax.Array, leaf: jax.Array) -> jax.Array:
    mixed = jnp.matmul(kernel.astype(leaf.dtype), _flat(leaf), precision=_HIGHEST)
    return mixed.reshape(leaf.shape)


def _median(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Return the median of the counted values, whose number is only known in the program."""
    ordered = jnp.sort(jnp.where(counted, values, jnp.inf).reshape(-1))
    number = jnp.maximum(counted.sum(), 1)
    middle = ordered[(number - 1) // 2], ordered[number // 2]
    median = 0.5 * (middle[0] + middle[1])
    return jnp.where(jnp.isfinite(median), median, 0.0)
