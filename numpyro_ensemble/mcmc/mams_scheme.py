"""The pure step of MAMS (Robnik et al., 2025), adapted from the spread of the chains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.mcmc.adjusted_mclmc import adjusted_mclmc_proposal
from blackjax.mcmc.dynamic_hmc import DynamicHMCState
from blackjax.mcmc.integrators import IntegratorState, isokinetic_velocity_verlet
from blackjax.mcmc.metrics import LowRankInverseMassMatrix
from blackjax.util import generate_unit_vector

from numpyro_ensemble.mcmc.counted import counted, with_stand_ins
from numpyro_ensemble.mcmc.metric import SharedMetric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import per_chain, shared
from numpyro_ensemble.mcmc.trajectories import (
    LEAST_ACCEPTED,
    leapfrogs,
    make_trajectories,
)

_FORGETTING = 3.0  # decay of averages: they cover the last third of warm-up


class MAMSAdaptation(NamedTuple):
    """What MAMS adapts, the same for each chain.

    Attributes:
        step_size: `(C,)`. This and all lengths are in coordinates in which the metric is the
            identity.
        trajectory_length: `(C,)`, the longest length; each trajectory is a part of it.
        metric: the metric that all chains share.
        widths: `(C, d)`, variances of the directions in which each coordinate moves.
        place: `(C,)`, index in the Halton sequence of these parts.
        inner: BlackJAX's state of the dual averaging.
        progress: how far warm-up has come.
    """

    step_size: jax.Array
    trajectory_length: jax.Array
    metric: SharedMetric
    widths: jax.Array
    place: jax.Array
    inner: Any
    progress: Progress


class Scheme(NamedTuple):
    """The constants of the scheme."""

    target_accept_prob: float = 0.8
    length_factor: float = 1.0
    max_steps: int = 1000

    def rules(self) -> tuple[Callable, Callable, Callable]:
        """Return BlackJAX's `init`, `update` and `final` of the step size."""
        return dual_averaging_adaptation(self.target_accept_prob)


def time_unit(size: int) -> float:
    """Return the time in which a chain in `size` coordinates moves by the scale of each.

    The speed is 1 over all coordinates together. In HMC it is about 1 in each coordinate.
    """
    return max(size, 2) ** 0.5


def microcanonical(
    key: jax.Array,
    chain: DynamicHMCState,
    log_density: Callable,
    step_size: jax.Array,
    metric: LowRankInverseMassMatrix,
    most: jax.Array,
) -> tuple[DynamicHMCState, Any]:
    """Make one trajectory of BlackJAX's adjusted MCLMC, of `most` steps or fewer.

    The result is that of `adjusted_mclmc_dynamic` without noise in the momentum during the
    trajectory. That kernel draws the random numbers of the noise even then.
    """
    if chain.position.shape[0] == 1:
        return _accompanied(key, chain, log_density, step_size, metric, most)
    momentum_key, key = jax.random.split(key)
    step = isokinetic_velocity_verlet(log_density, metric)
    propose = adjusted_mclmc_proposal(
        lambda state, step_size, *_: step(state, step_size),
        step_size,
        jnp.inf,
        leapfrogs(chain.random_generator_arg, most),
    )
    momentum = generate_unit_vector(momentum_key, chain.position)
    new, info, _ = propose(key, IntegratorState(chain.position, momentum, *chain[1:3]))
    moved = new.position, new.logdensity, new.logdensity_grad
    return DynamicHMCState(*moved, chain.random_generator_arg + 1), info


def _accompanied(
    key: jax.Array,
    chain: DynamicHMCState,
    log_density: Callable,
    step_size: jax.Array,
    metric: LowRankInverseMassMatrix,
    most: jax.Array,
) -> tuple[DynamicHMCState, Any]:
    """Make a trajectory of one coordinate and of a standard normal variable, drawn anew.

    In one dimension a chain of constant speed can neither turn nor slow down.
    """
    key, other_key = jax.random.split(key)
    other = jax.random.normal(other_key, (1,), chain.position.dtype)

    def joint(row: jax.Array) -> jax.Array:
        return log_density(row[:1]) - 0.5 * row[1] ** 2

    both = DynamicHMCState(
        jnp.concatenate([chain.position, other]),
        chain.logdensity - 0.5 * other[0] ** 2,
        jnp.concatenate([chain.logdensity_grad, -other]),
        chain.random_generator_arg,
    )
    sigma = jnp.concatenate([metric.sigma, jnp.ones_like(metric.sigma)])
    metric = LowRankInverseMassMatrix(sigma, jnp.zeros((2, 0), sigma.dtype), metric.lam)
    new, info = microcanonical(key, both, joint, step_size, metric, most)
    log_density_alone = new.logdensity + 0.5 * new.position[1] ** 2
    place = new.random_generator_arg
    return DynamicHMCState(
        new.position[:1], log_density_alone, new.logdensity_grad[:1], place
    ), info


def mams_start(
    rows: jax.Array,
    counts: jax.Array,
    metric: SharedMetric,
    step_size: jax.Array,
    progress: Progress,
    scheme: Scheme,
) -> MAMSAdaptation:
    """Return the adaptation of chains that have not moved yet, from positions `(C, D)`."""
    widths = widths_of(rows, counts, metric)
    length = _length(widths, step_size, scheme)
    inner = scheme.rules()[0](step_size)
    first = per_chain((step_size, length, widths, jnp.zeros((), int), inner), len(rows))
    return MAMSAdaptation._make([*first[:2], metric, *first[2:], progress])


def mams_step(
    keys: jax.Array,
    chains: DynamicHMCState,
    adaptation: MAMSAdaptation,
    log_density: Callable,
    scheme: Scheme,
) -> tuple[DynamicHMCState, MAMSAdaptation, Any]:
    """Make one iteration of all chains, see `make_trajectories`."""
    adapt = partial(_adapt, scheme=scheme)
    return make_trajectories(microcanonical, adapt, keys, chains, adaptation, log_density)


def _adapt(
    before: DynamicHMCState, chains: DynamicHMCState, info: Any, a: MAMSAdaptation, scheme: Scheme
) -> MAMSAdaptation:
    """Adapt once, from one iteration of the chains."""
    widths, inner = shared((a.widths, a.inner))
    counts = counted(chains.logdensity, chains.position.shape[1])
    _, update, final = scheme.rules()
    counted_chains = counts & ~info.is_divergent
    accepted = jnp.maximum(info.acceptance_rate, LEAST_ACCEPTED)
    mean = 1.0 / (1.0 / accepted).mean(where=counted_chains)
    inner = update(inner, jnp.where(counted_chains.any(), mean, 0.0))
    step_size = jnp.where(a.progress.ending, final(inner), jnp.exp(inner.log_step_size))
    widths = averaged(widths, widths_of(chains.position, counts, a.metric), a.progress)
    length = _length(widths, step_size, scheme)
    new = per_chain((step_size, length, widths, inner), len(counts))
    old = a.step_size, a.trajectory_length, a.widths, a.inner
    new = jax.tree.map(lambda x, before: x.astype(before.dtype), new, old)
    metric = a.metric.observe(with_stand_ins(chains.position, counts), a.progress)
    changed = (*new[:2], metric, new[2], a.place, new[3], a.progress.next())
    return MAMSAdaptation._make(changed)


def averaged(average: jax.Array, now: jax.Array, progress: Progress) -> jax.Array:
    """Return an average over warm-up that forgets early values."""
    return average + _FORGETTING / (_FORGETTING + progress.iteration[0] + 1) * (now - average)


def widths_of(rows: jax.Array, counts: jax.Array, metric: SharedMetric) -> jax.Array:
    """Return the variances of the directions in which each coordinate moves, `(d,)`.

    C is the covariance in coordinates in which the metric is the identity. A coordinate's variance
    `C_ii` is shared among the eigenvectors of C. The average of their eigenvalues, weighted by
    these shares, is `(C C)_ii / C_ii`. A sample of n chains overestimates it by
    `(tr C - C_ii) / (n - 1)`, which is subtracted.
    """
    where, number = counts[:, None], counts.sum()
    whitened = metric.whiten(rows - rows.mean(axis=0, keepdims=True, where=where))
    whitened = jnp.where(where, whitened, 0.0)
    between = jnp.matmul(whitened, whitened.T, precision="highest")
    squares = (jnp.matmul(between, whitened, precision="highest") * whitened).sum(axis=0)
    variance = (whitened**2).sum(axis=0) / number
    made_up = (variance.sum() - variance) / (number - 1)
    return squares / number**2 / jnp.maximum(variance, jnp.finfo(rows.dtype).tiny) - made_up


def widest(widths: jax.Array) -> jax.Array:
    """Return the standard deviation of the widest of these directions, at least 1."""
    return jnp.sqrt(jnp.maximum(widths.max(), 1.0))


def _length(widths: jax.Array, step_size: jax.Array, scheme: Scheme) -> jax.Array:
    """Return the longest length: half a turn, so that the mean length is a quarter turn."""
    half_turn = jnp.pi * time_unit(len(widths)) * widest(widths)
    length = scheme.length_factor * half_turn
    return jnp.clip(length, step_size, scheme.max_steps * step_size)
