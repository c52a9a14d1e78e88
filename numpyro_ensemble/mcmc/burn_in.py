"""The first phase of LAPS (Robnik et al., 2025): all chains walk to the typical set together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation import laps_burn_in
from blackjax.mcmc.integrators import IntegratorState

_WINDOW = 40  # steps; the chains' means are compared between the halves of this window
_ALPHA = 1.9  # multiplies the distance in which a direction is forgotten: the value of LAPS
_LOST = 0.02  # the part of the chains whose step may end without a finite density
# Once chains have arrived, the squared difference between the means of the two halves is at most
# twice the variance of a mean, on average over coordinates, and at most 16 times in each.
_DRIFT, _LARGEST_DRIFT = 2.0, 16.0
_UNEQUAL = 0.5  # the mean square of -(z - mean) * gradient - 1, at most


class _Walk(NamedTuple):
    """The state of the loop."""

    number: jax.Array
    key: jax.Array
    chains: IntegratorState
    adapted: Any  # BlackJAX's state of the adaptation
    means: jax.Array  # (W, d + 1), means over chains at the last W steps, log density last
    arrived: jax.Array


def burn_in(
    log_density: Callable, key: jax.Array, rows: jax.Array, max_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Walk from positions `(C, D)` to the typical set.

    Steps become more exact as the chains come nearer. The walk ends when the chains' means no
    longer move.

    Args:
        log_density: log density of one chain's row, which has two coordinates or more.
        key: one key.
        rows: first positions of the chains, with finite densities.
        max_steps: largest number of steps.

    Returns:
        The chains' last positions, and the number of steps.
    """
    num_chains, size = rows.shape
    adaptation = laps_burn_in.Adaptation(
        size, microcanonical=True, alpha=_ALPHA, bias_type=3, save_num=2
    )
    kernel = jax.vmap(laps_burn_in.build_kernel(log_density, size), in_axes=(0, 0, None))
    chains = _first(log_density, rows)

    def body(walk: _Walk) -> _Walk:
        key, step_key = jax.random.split(walk.key)
        keys = jax.random.split(step_key, num_chains)
        chains, info = kernel(keys, walk.chains, walk.adapted)
        chains = chains._replace(
            momentum=jnp.where(info["nans"][:, None] > 0, -walk.chains.momentum, chains.momentum)
        )
        seen = _averages(chains, info)
        adapted, _ = adaptation.update(walk.adapted, seen)
        adapted = jax.tree.map(lambda x, old: x.astype(old.dtype), adapted, walk.adapted)
        now = jnp.concatenate([seen["x"], -seen["entropy"][None]])
        means = jnp.concatenate([now[None], walk.means[:-1]])
        number = walk.number + 1
        still = _still(chains, means) & (number >= _WINDOW)
        equal = jnp.square(1.0 - seen["equipartition_diagonal"]).mean() < _UNEQUAL
        return _Walk(number, key, chains, adapted, means, still & equal)

    def unfinished(walk: _Walk) -> jax.Array:
        return (walk.number < max_steps) & ~walk.arrived

    first = jax.tree.map(jnp.asarray, adaptation.initial_state)
    first = jax.tree.map(
        lambda x: x.astype(rows.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x, first
    )
    means = jnp.zeros((_WINDOW, size + 1), rows.dtype)
    start = _Walk(jnp.zeros((), int), key, chains, first, means, jnp.zeros((), bool))
    with jax.numpy_rank_promotion("allow"):  # BlackJAX needs it, whatever the user's setting
        end = jax.lax.while_loop(unfinished, body, start)
    return end.chains.position, end.number


def _first(log_density: Callable, rows: jax.Array) -> IntegratorState:
    """Return chains that move up the gradient in coordinates that are too wide, else down."""
    values, slopes = jax.vmap(jax.value_and_grad(log_density))(rows)
    wide = _equipartition(rows, slopes) >= 1.0
    direction = slopes * jnp.where(wide, 1.0, -1.0)[None]
    norm = jnp.linalg.norm(direction, axis=1, keepdims=True)
    uniform = jnp.full_like(direction, direction.shape[1] ** -0.5)
    direction = jnp.where(norm > 0.0, direction / norm, uniform)
    return IntegratorState(rows, direction.astype(rows.dtype), values, slopes)


def _equipartition(rows: jax.Array, slopes: jax.Array) -> jax.Array:
    """Return the mean of `-(z - mean) * gradient` for each coordinate: 1 in the typical set.

    BlackJAX does not subtract the mean, so its noise grows with the square of the mean.
    """
    return -((rows - rows.mean(axis=0, keepdims=True)) * slopes).mean(axis=0)


def _averages(chains: IntegratorState, info: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the averages over chains that BlackJAX's adaptation needs."""
    x = chains.position
    lost = info["nans"].mean()
    none = jnp.zeros(x.shape[1], x.dtype)
    return {
        "equipartition_diagonal": _equipartition(x, chains.logdensity_grad),
        "equipartition_fullrank": none,  # not used
        "x": x.mean(axis=0),
        "xsq": (x**2).mean(axis=0),
        "E": info["energy_change"].mean(),
        "Esq": (info["energy_change"] ** 2).mean(),
        "rejection_rate_nans": jnp.where(lost > _LOST, lost, 0.0),
        "observables_for_bias": none,
        "observables": none,
        "entropy": -chains.logdensity.mean(),
    }


def _still(chains: IntegratorState, means: jax.Array) -> jax.Array:
    """Return whether the chains' means have stopped moving, relative to their standard errors."""
    half = _WINDOW // 2
    values = jnp.concatenate([chains.position, chains.logdensity[:, None]], axis=1)
    variance = values.var(axis=0) / len(values)
    moved = (means[:half].mean(axis=0) - means[half:].mean(axis=0)) ** 2
    drift = moved / jnp.maximum(variance, jnp.finfo(variance.dtype).tiny)
    return (drift.mean() < _DRIFT) & (drift.max() < _LARGEST_DRIFT)
