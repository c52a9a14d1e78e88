"""The forces between members in one step: a kernel at all pairs, and one gradient of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIState

from numpyro_ensemble.fit.repulsion import Repulsion

_HIGHEST = jax.lax.Precision.HIGHEST  # products of single precision are coarse on accelerators


class Pull(NamedTuple):
    """What one member contributes to a step, before forces act on it.

    Attributes:
        state: its state after the step, except the optimiser's.
        loss: at its current parameters.
        gradient: of the loss in its unconstrained parameters.
        place: the parameters, or values of a function, by which it repels others.
        step: the number of the optimiser's step.
    """

    state: SVIState
    loss: jax.Array
    gradient: Any
    place: Any
    step: jax.Array


def forces(repulsion: Repulsion, pulls: Pull) -> tuple[Any, Any]:
    """Return the gradient that each member follows, and a push on the values of its function.

    If members repel by their parameters, the gradient includes the push, and the second value is
    None. A member that is not finite pushes no other, and keeps its own gradient.

    Args:
        repulsion: how members push each other apart.
        pulls: of all members, each leaf with a leading `(E,)`.
    """
    alive = jnp.isfinite(pulls.loss) & _finite(pulls.place)
    if repulsion.mixes_gradients:
        alive = alive & _finite(pulls.gradient)
    places = _centred(jax.tree.map(_wide, pulls.place), alive)
    kernel, bandwidth = _kernel(repulsion, places, alive)
    totals = jnp.where(alive, kernel.sum(axis=1), 1.0)
    weight = repulsion.weight_at(pulls.step.max()).astype(totals.dtype)
    slope = 2.0 * weight / bandwidth
    if repulsion.mixes_gradients:
        share = 1.0 / jnp.maximum(alive.sum(), 1).astype(totals.dtype)

        def follow(own: jax.Array, place: jax.Array) -> jax.Array:
            # kernel @ gradients less kernel slopes, as one product: most of the cost of repulsion
            known = share * (_where(alive, _wide(own), 0.0) + slope * place)
            total = _mixed(kernel, known) - _column(share * slope * totals, place) * place
            return _where(alive, total, own).astype(own.dtype)

        return jax.tree.map(follow, pulls.gradient, places), None
    pushing = (slope / totals)[:, None] * (jnp.diag(totals) - kernel)
    pushes = jax.tree.map(lambda place: _mixed(pushing, place), places)
    if not repulsion.in_function_space:
        return jax.tree.map(lambda g, p: g - p.astype(g.dtype), pulls.gradient, pushes), None

    def on_values(push: jax.Array, own: jax.Array) -> jax.Array:
        return _where(alive, push, 0 * own).astype(own.dtype)  # a failed member stays visible

    return pulls.gradient, jax.tree.map(on_values, pushes, pulls.place)


def _kernel(repulsion: Repulsion, places: Any, alive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the kernel at all pairs, 0 where one is not alive, and the bandwidth."""
    inner = sum(_products(leaf) for leaf in jax.tree.leaves(places))
    squares = jnp.diag(inner)
    squares = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * inner, 0.0)
    squares = squares * (1.0 - jnp.eye(len(alive), dtype=squares.dtype))
    pairs = alive[:, None] & alive[None, :]
    if repulsion.bandwidth is None:
        number = jnp.maximum(alive.sum(), 2)
        bandwidth = _median(jnp.sqrt(squares), pairs) ** 2 / jnp.log(number).astype(squares.dtype)
        bandwidth = bandwidth + jnp.finfo(squares.dtype).eps
    else:
        bandwidth = jnp.asarray(repulsion.bandwidth, squares.dtype)
    return jnp.where(pairs, jnp.exp(-squares / bandwidth), 0.0), bandwidth


def _finite(tree: Any) -> jax.Array:
    """Return which members have only finite numbers: others would spoil the sum over all."""
    sums = [
        _flat(leaf) @ jnp.ones(_flat(leaf).shape[1], leaf.dtype)
        for leaf in map(_wide, jax.tree.leaves(tree))
    ]
    return jnp.isfinite(jnp.stack(sums)).all(axis=0)


def _wide(leaf: jax.Array) -> jax.Array:
    """Return numbers in single precision at least."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _flat(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(len(leaf), leaf.size // len(leaf))


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
    """Return one value for each member, with the axes of an array of all."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _where(flags: jax.Array, one: jax.Array, other: Any) -> jax.Array:
    return jnp.where(_column(flags, one), one, other)


def _centred(places: Any, alive: jax.Array) -> Any:
    """Return places relative to one in the middle, so that differences keep their digits.

    That is the place nearest to the mean of the finite members. Relative to a member far from all
    others, these would differ by little more than rounding.
    """
    number = jnp.maximum(alive.sum(), 1)

    def from_mean(leaf: jax.Array) -> jax.Array:
        away = _flat(_where(alive, leaf, 0.0))
        away = away - (away.sum(axis=0, keepdims=True) / number).astype(away.dtype)
        return jnp.square(away).sum(axis=1)

    distances = sum(map(from_mean, jax.tree.leaves(places)))
    middle = jnp.argmin(jnp.where(alive, distances, jnp.inf))
    return jax.tree.map(lambda leaf: _where(alive, leaf - leaf[middle][None], 0.0), places)


def _products(leaf: jax.Array) -> jax.Array:
    return jnp.matmul(_flat(leaf), _flat(leaf).T, precision=_HIGHEST)


def _mixed(weights: jax.Array, leaf: jax.Array) -> jax.Array:
    mixed = jnp.matmul(weights.astype(leaf.dtype), _flat(leaf), precision=_HIGHEST)
    return mixed.reshape(leaf.shape)


def _median(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Return the median of the counted values, whose number is only known in the program."""
    ordered = jnp.sort(jnp.where(counted, values, jnp.inf).reshape(-1))
    number = jnp.maximum(counted.sum(), 1)
    median = 0.5 * (ordered[(number - 1) // 2] + ordered[number // 2])
    return jnp.where(jnp.isfinite(median), median, 0.0)
