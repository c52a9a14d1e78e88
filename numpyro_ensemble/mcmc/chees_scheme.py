"""The pure step of ChEES (Hoffman et al., 2021), with a metric from the positions of the chains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from blackjax.adaptation import chees_adaptation
from blackjax.mcmc import dynamic_hmc
from blackjax.mcmc.dynamic_hmc import DynamicHMCState

from numpyro_ensemble.mcmc.counted import counted, with_stand_ins
from numpyro_ensemble.mcmc.metric import SharedMetric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import per_chain, shared
from numpyro_ensemble.mcmc.trajectories import (
    LEAST_ACCEPTED,
    halton,
    leapfrogs,
    make_trajectories,
)

# The longest trajectory for draws is half a turn or more. ChEES maximises changes of squares, and
# chooses 2.25 scales on a standard normal. If trajectories are random parts of 2.25 scales, draws
# have an autocorrelation of 0.35. If trajectories are random parts of half a turn, draws have none.
_HALF_TURN = 3.1416


class ChEESAdaptation(NamedTuple):
    """What ChEES adapts, the same for each chain.

    Attributes:
        step_size: `(C,)`.
        trajectory_length: `(C,)`, the longest length; each trajectory is a part of it.
        metric: the metric that all chains share.
        place: `(C,)`, index in the Halton sequence of these parts.
        log_step_size, log_length: `(C,)`, averages that draws are made with.
        inner: BlackJAX's state of the adaptation.
        progress: how far warm-up has come.
    """

    step_size: jax.Array
    trajectory_length: jax.Array
    metric: SharedMetric
    place: jax.Array
    log_step_size: jax.Array
    log_length: jax.Array
    inner: Any
    progress: Progress


class Scheme(NamedTuple):
    """The constants of the scheme.

    `plain` is BlackJAX's own scheme: the metric is the identity, and each step starts from the
    average of the lengths so far.
    """

    learning_rate: float = 0.025
    target_accept_prob: float = 0.8
    metric: str | int = "diagonal"
    decay_rate: float = 0.5
    max_leapfrog_steps: int = 1000
    momentum: float = 0.0  # momentum and memory are those of Adam in Hoffman et al.
    memory: float = 0.95
    plain: bool = False

    def rules(self) -> tuple[Callable, Callable]:
        """Return BlackJAX's `init` and `update` of the adaptation."""
        return chees_adaptation.base(
            halton,
            lambda i: i + 1,
            optax.adam(self.learning_rate, b1=self.momentum, b2=self.memory),
            self.target_accept_prob,
            self.decay_rate,
            self.max_leapfrog_steps,
        )


_move = dynamic_hmc.build_kernel(
    next_random_arg_fn=lambda index: index + 1, integration_steps_fn=leapfrogs
)


def _hmc(*given: Any) -> tuple[DynamicHMCState, Any]:
    """Make one trajectory of dynamic HMC. BlackJAX takes the largest number of steps in a tuple."""
    return _move(*given[:-1], given[-1:])


def first_metric(rows: jax.Array, counts: jax.Array, scheme: Scheme) -> SharedMetric:
    """Return the metric of chains that have not moved yet, from positions `(C, D)`.

    `counts`, `(C,)`, says which chains count.
    """
    if scheme.plain:
        return SharedMetric.identity(len(rows), rows.shape[1], 0, rows.dtype)
    return SharedMetric.among(rows, counts, scheme.metric)


def chees_start(
    metric: SharedMetric,
    step_size: jax.Array,
    length: jax.Array,
    progress: Progress,
    scheme: Scheme,
) -> ChEESAdaptation:
    """Return the adaptation of chains that have not moved yet, in units of the metric."""
    num_chains = metric.number.size
    index = jnp.zeros((), int)
    inner = scheme.rules()[0](index, step_size)
    inner = inner._replace(trajectory_length=length)
    zero = jnp.zeros_like(step_size)
    first = per_chain((step_size, length, index, zero, zero, inner), num_chains)
    return ChEESAdaptation._make([*first[:2], metric, *first[2:], progress])


def chees_step(
    keys: jax.Array,
    chains: DynamicHMCState,
    adaptation: ChEESAdaptation,
    log_density: Callable,
    scheme: Scheme,
) -> tuple[DynamicHMCState, ChEESAdaptation, Any]:
    """Make one iteration of all chains, see `make_trajectories`."""
    adapt = partial(_adapt, scheme=scheme)
    return make_trajectories(_hmc, adapt, keys, chains, adaptation, log_density)


def _adapt(
    chains: DynamicHMCState, after: DynamicHMCState, info: Any, a: ChEESAdaptation, scheme: Scheme
) -> ChEESAdaptation:
    """Adapt once, from one iteration of the chains."""
    inner, num_chains = shared(a.inner), a.step_size.shape[0]
    before, left_out = chains.position, info.is_divergent
    step, accepted = inner.step, info.acceptance_rate
    counts = counted(chains.logdensity, before.shape[1])[:, None]
    if not scheme.plain:
        before = jnp.where(counts, before, before.mean(axis=0, keepdims=True, where=counts))
        left_out = left_out | ~counts[:, 0]
        accepted = jnp.maximum(accepted, LEAST_ACCEPTED)
        # BlackJAX starts each step from the average so far, and moves the average by
        # 1 / sqrt(step) of the step. A length then grows by exp(2 * learning_rate * sqrt(steps))
        # at most. With step = 1 BlackJAX does not average, and the average is computed below.
        inner = inner._replace(step=jnp.ones_like(step))
    middle = before.mean(axis=0, keepdims=True)
    ends = a.metric.whiten(info.proposal.position - middle), a.metric.whiten(before - middle)
    momentum = a.metric.whiten_gradients(info.proposal.momentum)
    identity = jnp.ones_like(before[0])
    with jax.numpy_rank_promotion("allow"):  # BlackJAX needs it, whatever the user's setting
        inner = scheme.rules()[1](inner, ends[0], momentum, ends[1], accepted, left_out, identity)
    log_step_size = inner.log_step_size_moving_average
    log_length = inner.log_trajectory_length_moving_average
    metric = a.metric
    if not scheme.plain:
        weight = step**-scheme.decay_rate
        log_step_size = a.log_step_size[0] + weight * (log_step_size - a.log_step_size[0])
        log_length = a.log_length[0] + weight * (jnp.log(inner.trajectory_length) - a.log_length[0])
        inner = inner._replace(step=step + 1)
        metric = metric.observe(with_stand_ins(after.position, counts[:, 0]), a.progress)
    ending = a.progress.ending
    step_size = jnp.where(ending, jnp.exp(log_step_size), inner.step_size)
    longest = scheme.max_leapfrog_steps * step_size  # length and step size were averaged separately
    length = jnp.where(ending, jnp.exp(log_length), inner.trajectory_length)
    if not scheme.plain:
        length = jnp.where(ending, jnp.maximum(length, _HALF_TURN), length)
        length = jnp.minimum(length, longest)
    new = per_chain((step_size, length, log_step_size, log_length, inner), num_chains)
    names = ("step_size", "trajectory_length", "log_step_size", "log_length", "inner")
    old = tuple(getattr(a, name) for name in names)
    new = jax.tree.map(lambda x, before: x.astype(before.dtype), new, old)
    values = dict(zip(names, new, strict=True))
    return a._replace(metric=metric, progress=a.progress.next(), **values)
