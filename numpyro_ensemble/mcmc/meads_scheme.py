"""The pure step of MEADS, Algorithm 3 of Hoffman and Sountsov (2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc.ghmc import GHMCState

from numpyro_ensemble.mcmc.counted import counted, in_folds, largest_eigenvalue, with_stand_ins
from numpyro_ensemble.mcmc.ghmc import Outcome, ghmc_steps, kinetic_energy
from numpyro_ensemble.mcmc.metric import SharedMetric, num_directions
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import choose, per_chain

_ACCEPTED = 0.9  # lowest acceptance to aim at: 0.91 is best on the item response problem
_GAIN = 0.1  # change of the log step size in an iteration, per unit of missing acceptance


class Sums(NamedTuple):
    """Sums over iterations: of `1 / step_size**2`, of the scale and of the damping's rate gamma."""

    curvature: jax.Array  # (C,)
    scale: jax.Array  # (C, d)
    gamma: jax.Array  # (C,)


class MEADSAdaptation(NamedTuple):
    """What MEADS adapts, for each chain.

    Attributes:
        step_size: `(C,)`.
        scale: `(C, d)`, standard deviations of the unconstrained coordinates.
        damping: `(C,)`, alpha, the part of the momentum that each step renews.
        drift: `(C,)`, delta, how far each step moves the slice variable.
        slot: `(C,)`, each chain's place in the folds. Slots are shuffled, the chains' order is not.
        progress: how far warm-up has come.
        metric: the metric that all chains share, or None if `scale` is the metric.
        sums: sums over the last half of warm-up, for the parameters of draws, or None.
        log_shrinkage: `(C,)`, logarithm of the factor that shrinks the step size until enough
            proposals are accepted, the same for all chains; or None.
    """

    step_size: jax.Array
    scale: jax.Array
    damping: jax.Array
    drift: jax.Array
    slot: jax.Array
    progress: Progress
    metric: SharedMetric | None = None
    sums: Sums | None = None
    log_shrinkage: jax.Array | None = None


class Scheme(NamedTuple):
    """The constants of Algorithm 3 of Hoffman and Sountsov (2022), and its metric.

    `plain` is BlackJAX's own scheme: draws are made with the last step's parameters, the metric is
    renewed in every step of a window at the end of warm-up, and the step size depends neither on
    the metric nor on acceptance.
    """

    num_folds: int = 4
    step_size_multiplier: float = 0.5
    damping_slowdown: float = 1.0
    metric: str | int = "diagonal"
    window_fraction: float = 0.5
    plain: bool = False


def meads_start(
    rows: jax.Array, log_density: jax.Array, grad: jax.Array, progress: Progress, scheme: Scheme
) -> MEADSAdaptation:
    """Return the adaptation of chains that have not moved yet, from positions `(C, D)`."""
    num_chains, size = rows.shape
    none = jnp.zeros(num_chains, rows.dtype)
    rank = num_directions(scheme.metric, num_chains, size)
    metric = SharedMetric.identity(num_chains, size, rank, rows.dtype) if rank else None
    slot = jnp.arange(num_chains)
    sums = None if scheme.plain else Sums(none, jnp.zeros_like(rows), none)
    shrinkage = None if scheme.plain else none
    empty = MEADSAdaptation(none, rows, none, none, slot, progress, None, sums, shrinkage)
    counts = _counts(log_density, rows, scheme)
    return _adapt(rows, grad, counts, empty, scheme)._replace(metric=metric)


def meads_step(
    keys: jax.Array,
    shuffle_key: jax.Array,
    chains: GHMCState,
    adaptation: MEADSAdaptation,
    log_density: Callable,
    scheme: Scheme,
) -> tuple[GHMCState, MEADSAdaptation, jax.Array, Outcome]:
    """Make one iteration: one step of Algorithm 3 in warm-up, else one step for each row of keys.

    Args:
        keys: `(S, C)`.
        shuffle_key: the key that shuffles the folds.
        chains: BlackJAX's state, with a leading chain axis and positions in rows.
        adaptation: the state of the scheme.
        log_density: log density of one chain's row.
        scheme: its constants.

    Returns:
        Chains, adaptation, the chains' energies, and statistics of the steps.
    """
    warming = adaptation.progress.warming
    counts = _counts(chains.logdensity, chains.position, scheme)
    adaptation = jax.lax.cond(
        warming,
        lambda a: _adapt(chains.position, chains.logdensity_grad, counts, a, scheme),
        lambda a: a,
        adaptation,
    )
    metric = adaptation.scale if adaptation.metric is None else adaptation.metric.inverse_mass
    new, outcome = ghmc_steps(
        keys[:, adaptation.slot],
        jnp.where(warming, 1, keys.shape[0]),
        chains,
        log_density,
        adaptation.step_size,
        metric,
        adaptation.damping,
        adaptation.drift,
    )
    # line 4: all folds but k = t mod K move
    if scheme.num_folds > 1:
        resting = adaptation.progress.iteration % scheme.num_folds == _fold(adaptation, scheme)
        new = choose(warming & resting, chains, new)
        diverged = jnp.where(warming & resting, 0, outcome.num_divergences)
        outcome = outcome._replace(num_divergences=diverged)
    if adaptation.log_shrinkage is not None:
        shrunk = _shrunk(adaptation.log_shrinkage, outcome.accept_prob, counts)
        adaptation = adaptation._replace(
            log_shrinkage=jnp.where(warming, shrunk, adaptation.log_shrinkage)
        )
    energy = kinetic_energy(metric, new.momentum) - new.logdensity
    adaptation = jax.lax.cond(
        warming,
        lambda a: _end_step(shuffle_key, a, scheme),
        lambda a: a,
        adaptation,
    )
    return new, adaptation, energy, outcome


def _counts(log_density: jax.Array, rows: jax.Array, scheme: Scheme) -> jax.Array:
    """Return which chains count in the adaptation."""
    if scheme.plain:
        return jnp.ones(len(rows), bool)
    return counted(log_density, rows.shape[1])


def _shrunk(log_shrinkage: jax.Array, accept_prob: jax.Array, counts: jax.Array) -> jax.Array:
    """Return the shrinkage after a step with these acceptance probabilities.

    In many dimensions the step size from the largest eigenvalue is too long. With 160 or 1,000
    dimensions only 0.6 to 0.7 of the proposals are accepted, and momentum is reversed too often.
    """
    accepted = jnp.nan_to_num(accept_prob).mean(where=counts)
    # acceptance is 1 at most, so a rise is slow: a fall without a bound would take long to undo
    lacking = jnp.maximum(accepted - _ACCEPTED, _ACCEPTED - 1.0)
    return jnp.minimum(log_shrinkage + _GAIN * lacking, 0.0)


def _fold(adaptation: MEADSAdaptation, scheme: Scheme) -> jax.Array:
    return adaptation.slot // (adaptation.slot.shape[0] // scheme.num_folds)


def _inverse(permutation: jax.Array) -> jax.Array:
    places = jnp.arange(permutation.shape[0])
    return places.at[permutation].set(places)


def _adapt(
    rows: jax.Array,
    slopes: jax.Array,
    counts: jax.Array,
    adaptation: MEADSAdaptation,
    scheme: Scheme,
) -> MEADSAdaptation:
    """Set a fold's scale and step size by its left neighbour, and its damping by its own chains."""
    order = _inverse(adaptation.slot)
    shape = (scheme.num_folds, -1, rows.shape[1])
    folds, gradients = rows[order].reshape(shape), slopes[order].reshape(shape)
    counting = in_folds(counts[order].reshape(scheme.num_folds, -1))
    where = counting[..., None]
    scales = folds.std(axis=1, where=where)
    # lines 7 and 8: the step size comes from the scaled gradients, and is at most 1
    metric = adaptation.metric
    folds = folds - folds.mean(axis=1, keepdims=True, where=where)
    whitened, scaled = folds / scales[:, None], gradients * scales[:, None]
    if metric is not None:
        seen = with_stand_ins(rows, counts), adaptation.progress
        if scheme.plain:
            metric = metric.observe_as_blackjax(*seen, scheme.window_fraction)
            whitened = metric.whiten_as_blackjax(folds)
        else:
            metric = metric.observe(*seen)
            whitened, scaled = metric.whiten(folds), metric.whiten_gradients(gradients)
    largest = jax.vmap(largest_eigenvalue)(scaled, counting)
    step_sizes = jnp.minimum(scheme.step_size_multiplier / jnp.sqrt(largest), 1.0)
    if adaptation.log_shrinkage is not None:
        step_sizes = step_sizes * jnp.exp(adaptation.log_shrinkage[0])
    step_sizes, lent_scales = jnp.roll(step_sizes, 1), jnp.roll(scales, 1, axis=0)
    # line 9: the damping is at least the floor, which falls with time
    floor = scheme.damping_slowdown / ((adaptation.progress.iteration[0] + 1) * step_sizes)
    widest = jax.vmap(largest_eigenvalue)(whitened, counting)
    gamma = jnp.maximum(1.0 / jnp.sqrt(widest), floor)
    alpha = 1.0 - jnp.exp(-2.0 * step_sizes * gamma)
    fold = _fold(adaptation, scheme)
    return adaptation._replace(
        step_size=step_sizes[fold],
        scale=lent_scales[fold],
        damping=alpha[fold],
        drift=alpha[fold] / 2,
        metric=metric,
    )


def _end_step(key: jax.Array, adaptation: MEADSAdaptation, scheme: Scheme) -> MEADSAdaptation:
    """Shuffle the folds every K steps, and fix the parameters after the last step of warm-up."""
    progress, slot = adaptation.progress, adaptation.slot
    num_chains = slot.size
    if scheme.num_folds > 1:
        moved = _inverse(jax.random.permutation(key, num_chains))[slot]
        slot = jnp.where((progress.iteration[0] + 1) % scheme.num_folds == 0, moved, slot)

    if adaptation.sums is not None:
        adaptation = adaptation._replace(sums=_add(adaptation, adaptation.sums))
    settled = jax.lax.cond(progress.ending, _settle, lambda a: a, adaptation)
    return settled._replace(slot=slot, progress=progress.next())


def _add(a: MEADSAdaptation, sums: Sums) -> Sums:
    late = (a.progress.iteration[0] >= a.progress.total // 2).astype(a.step_size.dtype)
    gamma = -jnp.log1p(-a.damping) / (2.0 * a.step_size)
    return Sums(
        *(s + late * x for s, x in zip(sums, (a.step_size**-2, a.scale, gamma), strict=True))
    )


def _settle(a: MEADSAdaptation) -> MEADSAdaptation:
    """Choose the parameters that draws are made with.

    An eigenvalue of one fold's gradients is noisy. Steps that are too long are often rejected, and
    a rejection reverses the momentum. The best step is about that of the mean eigenvalue.
    """
    step_size, scale, damping, drift = (x.mean(axis=0) for x in a[:4])
    if a.sums is not None:
        number = a.progress.total - a.progress.total // 2
        curvature, scale, gamma = (x.mean(axis=0) / number for x in a.sums)
        step_size = curvature**-0.5
        damping = 1.0 - jnp.exp(-2.0 * step_size * gamma)
        drift = damping / 2
    new = per_chain((step_size, scale, damping, drift), a.slot.size)
    values = dict(zip(("step_size", "scale", "damping", "drift"), new, strict=True))
    values = {name: x.astype(getattr(a, name).dtype) for name, x in values.items()}
    return a._replace(**values)
