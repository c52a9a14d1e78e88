"""The pure step of MCLMC (Robnik et al., 2023). The step size is adapted to an energy error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import mclmc
from blackjax.mcmc.integrators import IntegratorState, isokinetic_velocity_verlet
from jax.typing import ArrayLike

from numpyro_ensemble.mcmc.counted import counted, with_stand_ins
from numpyro_ensemble.mcmc.mams_scheme import averaged, time_unit, widest, widths_of
from numpyro_ensemble.mcmc.metric import SharedMetric
from numpyro_ensemble.mcmc.mixing import CollectedEnergy
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import all_finite, choose, per_chain, shared

# The variance of the energy change grows with the sixth power of the step size.
_POWER = 6.0
_CHANGE = 1.0  # largest change of the log step size in one iteration
_DIVERGED = 1000.0  # a step with a larger change of energy is a divergence, as in BlackJAX's HMC
# Constants for chains that are adapted alone, as in BlackJAX's mclmc_find_L_and_step_size:
_MEMORY = 149.0 / 151.0  # decay of the averages, which leaves 150 effective steps
_TRUST = 1.5  # a step counts less if its energy change is far from the desired one; width in logs
_FIRST_STEP = 0.25  # the first step size, in time units
_WINDOWS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # when a chain's own metric is renewed, in parts of warm-up
_FEWEST = 10  # positions that are needed to renew the metric
_UNKNOWN = 5.0  # the previous metric counts as 5 independent positions, as in Stan's adaptation
# A chain that is adapted alone refuses a step whose squared energy change is more than this many
# times the desired one. Otherwise its first step could leave a narrow mode of many dimensions.
_HOPELESS = 1e4


class Alone(NamedTuple):
    """Each chain's own metric, and the sums from which its metric and step size are computed."""

    variance: jax.Array  # (C, d), the metric
    weight: jax.Array  # (C,), sum of the weights of the steps in `curvature`
    curvature: jax.Array  # (C,), weighted sum of energy variance / step_size**6
    number: jax.Array  # (C,), number of positions
    mean: jax.Array  # (C, d), their mean
    squares: jax.Array  # (C, d), sum of their squared differences from the mean


class MCLMCAdaptation(NamedTuple):
    """What MCLMC adapts, for each chain.

    Attributes:
        step_size: `(C,)`. This and all lengths are in coordinates in which the metric is the
            identity.
        decoherence_length: `(C,)`, the distance in which a chain forgets its direction.
        metric: the metric that all chains share, or None.
        widths: `(C, d)`, variances of the directions in which each coordinate moves.
        curvature: `(C,)`, sum of `error / step_size**6` over the last half of warm-up, or over the
            last quarter for a chain that is adapted alone.
        error: `(C,)`, the mean square of the last steps' energy changes, per dimension.
        desired: `(C,)`, the value of `error` that the step size is adapted to.
        progress: how far warm-up has come.
        alone: metric and sums of chains that are adapted alone, or None.
    """

    step_size: jax.Array
    decoherence_length: jax.Array
    metric: SharedMetric | None
    widths: jax.Array
    curvature: jax.Array
    error: jax.Array
    desired: jax.Array
    progress: Progress
    alone: Alone | None = None

    @property
    def energy_var(self) -> Any:
        """`error`, in the form that is checked at the end of a run."""
        return CollectedEnergy({"": self.error, "asked": self.desired}, "MCLMC")


class Scheme(NamedTuple):
    """The constants of the scheme.

    Attributes:
        desired_energy_var: the energy variance at which draws are made.
        length_factor: multiplies the distance in which a chain forgets its direction.
        each: whether each chain is adapted alone.
        metric: the kind of the metric that all chains share.
        first_energy_var: the energy variance at which warm-up begins; None for the same one.
    """

    desired_energy_var: float = 5e-4
    length_factor: float = 1.0
    each: bool = False
    metric: str | int = "auto"
    first_energy_var: float | None = None

    def wanted(self, progress: Progress) -> Any:
        """Return the desired energy variance of this iteration: it changes by equal ratios."""
        if self.first_energy_var is None:
            return self.desired_energy_var
        done = (progress.iteration[0] + 1) / progress.total
        ratio = self.desired_energy_var / self.first_energy_var
        return self.first_energy_var * jnp.exp(done * jnp.log(ratio))


_move = mclmc.build_kernel(integrator=isokinetic_velocity_verlet)


class Outcome(NamedTuple):
    """Statistics of the steps of an iteration: each field is `(C,)`."""

    error: jax.Array  # mean square of the energy changes
    num_divergences: jax.Array


def mclmc_start(
    rows: jax.Array, log_density: jax.Array, grad: jax.Array, progress: Progress, scheme: Scheme
) -> MCLMCAdaptation:
    """Return the adaptation of chains that have not moved yet, from positions `(C, D)`."""
    num_chains, size = rows.shape
    unit, none = jnp.asarray(time_unit(size), rows.dtype), jnp.zeros(num_chains, rows.dtype)
    counts = counted(log_density, size)
    metric, alone, widths = None, None, jnp.ones(size, rows.dtype)
    if scheme.each:
        step_size = _FIRST_STEP * unit
        zeros = jnp.zeros_like(rows)
        alone = Alone(jnp.ones_like(rows), none, none, none, zeros, zeros)
    else:
        metric = SharedMetric.among(rows, counts, scheme.metric)
        step_size = unit * metric.first_step_size(grad, counts)
        widths = widths_of(rows, counts, metric)
    length = scheme.length_factor * unit * widest(widths)
    first = jax.tree.map(lambda x: x.astype(rows.dtype), (step_size, length, widths))
    step_size, length, widths = per_chain(first, num_chains)
    desired = none + scheme.desired_energy_var
    return MCLMCAdaptation(step_size, length, metric, widths, none, none, desired, progress, alone)


def mclmc_step(
    keys: jax.Array,
    chains: IntegratorState,
    a: MCLMCAdaptation,
    log_density: Callable,
    scheme: Scheme,
) -> tuple[IntegratorState, MCLMCAdaptation, Outcome]:
    """Make one iteration: one step in warm-up, else one step for each row of keys.

    Args:
        keys: `(S, C)`.
        chains: BlackJAX's state, with a leading chain axis and positions in rows.
        a: the state of the scheme.
        log_density: log density of one chain's row.
        scheme: its constants.

    Returns:
        Chains, adaptation, and statistics of the steps.
    """
    warming = a.progress.warming
    num_steps = jnp.where(warming, 1, keys.shape[0])
    zeros = jnp.zeros_like(chains.logdensity)
    last = scheme.desired_energy_var
    asked = jnp.where(warming, max(last, scheme.first_energy_var or 0.0), last)
    most = _HOPELESS * asked * chains.position.shape[1]
    cutoff = jnp.sqrt(most) if scheme.each else jnp.inf

    def body(j: jax.Array, carry: tuple) -> tuple:
        chains, so_far = carry
        new, this = move(keys[j], chains, a, log_density, cutoff)
        return new, jax.tree.map(jnp.add, so_far, this)

    nothing = Outcome(zeros, jnp.zeros(zeros.shape, int))
    new, outcome = jax.lax.fori_loop(0, num_steps, body, (chains, nothing))
    outcome = outcome._replace(error=outcome.error / num_steps)
    a = a._replace(error=outcome.error / chains.position.shape[1])
    adapt = _adapt_each if scheme.each else _adapt_all
    a = jax.lax.cond(warming, lambda a: adapt(new, outcome, a, scheme), lambda a: a, a)
    return new, a, outcome


def move(
    keys: jax.Array,
    chains: IntegratorState,
    a: MCLMCAdaptation,
    log_density: Callable,
    cutoff: ArrayLike = jnp.inf,
) -> tuple[IntegratorState, Outcome]:
    """Make one step of BlackJAX's MCLMC with every chain.

    A chain stays and reverses its direction if its step ends without a finite density or gradient,
    or changes the energy by more than the cutoff.
    """
    metric: Any = a.alone.variance if a.alone is not None else None
    if a.metric is not None:
        metric = a.metric.inverse_mass
    step = jax.vmap(_move, in_axes=(0, 0, None, None if a.alone is None else 0, 0, 0))
    new, info = step(keys, chains, log_density, metric, a.decoherence_length, a.step_size)
    whole = all_finite(new.logdensity_grad) & info.nonans & (jnp.abs(info.energy_change) <= cutoff)
    new = choose(whole, new, chains._replace(momentum=-chains.momentum))
    change = jnp.where(whole, info.energy_change, 0.0)
    diverged = ~whole | (jnp.abs(change) > _DIVERGED)
    return new, Outcome(change**2, diverged.astype(int))


def _adapt_all(
    chains: IntegratorState, outcome: Outcome, a: MCLMCAdaptation, scheme: Scheme
) -> MCLMCAdaptation:
    """Adapt step size, metric and length from all chains, as LAPS does in its first phase."""
    assert a.metric is not None
    step_size, widths, curvature = shared((a.step_size, a.widths, a.curvature))
    counts = counted(chains.logdensity, chains.position.shape[1])
    lost = (outcome.num_divergences > 0) & counts
    error = a.error.mean(where=counts & ~lost)
    factor = (jnp.log(scheme.wanted(a.progress)) - jnp.log(error)) / _POWER
    factor = jnp.clip(jnp.nan_to_num(factor, nan=0.0), -_CHANGE, _CHANGE)
    many = lost.sum() > 0.02 * counts.sum()
    # errors have heavy tails, so the last step size is set by the mean error of the last half
    half = a.progress.total // 2
    late = (a.progress.iteration[0] >= half) & ~many
    curvature = curvature + jnp.where(late, jnp.nan_to_num(error / step_size**_POWER), 0.0)
    mean = curvature / (a.progress.total - half)
    settled = (scheme.desired_energy_var / mean) ** (1.0 / _POWER)
    now = step_size * jnp.exp(jnp.where(many, jnp.log(0.5), factor))
    ending = a.progress.ending & jnp.isfinite(settled) & (mean > 0.0)
    step_size = jnp.where(ending, settled, now)
    widths = averaged(widths, widths_of(chains.position, counts, a.metric), a.progress)
    length = scheme.length_factor * time_unit(len(widths)) * widest(widths)
    new = per_chain((step_size, length, widths, curvature), len(counts))
    old = a.step_size, a.decoherence_length, a.widths, a.curvature
    step_size, length, widths, curvature = (
        x.astype(before.dtype) for x, before in zip(new, old, strict=True)
    )
    return a._replace(
        step_size=step_size,
        decoherence_length=length,
        metric=a.metric.observe(with_stand_ins(chains.position, counts), a.progress),
        widths=widths,
        curvature=curvature,
        progress=a.progress.next(),
    )


def _adapt_each(
    chains: IntegratorState, outcome: Outcome, a: MCLMCAdaptation, scheme: Scheme
) -> MCLMCAdaptation:
    """Adapt step size and metric of each chain alone, as BlackJAX's `mclmc_find_L_and_step_size`.

    A chain uses the metric of its previous window. Each window estimates the step size anew.
    """
    assert a.alone is not None
    seen, step, total = a.alone, a.progress.iteration[0] + 1, a.progress.total
    lost = outcome.num_divergences > 0
    wanted = scheme.wanted(a.progress)
    ratio = a.error / wanted + 1e-8
    trust = jnp.exp(-0.5 * (jnp.log(ratio) / (_POWER * _TRUST)) ** 2) * ~lost
    curvature = _MEMORY * seen.curvature + trust * ratio * wanted / a.step_size**_POWER
    weight = _MEMORY * seen.weight + trust
    mean = jnp.maximum(curvature, jnp.finfo(weight.dtype).tiny) / weight
    found = (wanted / mean) ** (1.0 / _POWER)
    found = jnp.where(weight > 0.0, found, a.step_size)
    step_size = jnp.where(lost, 0.8 * a.step_size, found)
    # Welford's sums since the last renewal
    number = seen.number + 1.0
    apart = chains.position - seen.mean
    centre = seen.mean + apart / number[:, None]
    squares = seen.squares + apart * (chains.position - centre)
    due = jnp.stack([step == jnp.ceil(part * total) for part in _WINDOWS]).any()
    switch = due & (number[0] >= _FEWEST)
    own = squares / number[:, None]
    own = jnp.where((own > 0.0) & jnp.isfinite(own), own, seen.variance)
    # A chain that has not gone around its mode, as in thousands of dimensions, cannot estimate
    # widths: on a straight line of length l the variances add up to l**2 / 12.
    straight = jnp.sqrt(12.0 * (own / seen.variance).sum(axis=1))
    ways = number * a.step_size / jnp.minimum(straight, time_unit(own.shape[1]))
    turns = jnp.maximum(ways - 1.0, 0.0)
    known = (turns / (turns + _UNKNOWN))[:, None]
    own = jnp.exp(known * jnp.log(own) + (1.0 - known) * jnp.log(seen.variance))
    change = jnp.sqrt((own / seen.variance).mean(axis=1))
    step_size = jnp.where(switch, step_size / change, step_size)
    sums = jax.tree.map(
        lambda x: jnp.where(switch, 0.0, x).astype(x.dtype),
        (weight, curvature, number, centre, squares),
    )
    variance = jnp.where(switch, own, seen.variance)
    # as in `_adapt_all`: the weights above suppress large errors, but draws have these errors too
    late = step > jnp.ceil(_WINDOWS[-1] * total)
    rate = jnp.where(lost, 0.0, a.error / a.step_size**_POWER)
    late_errors = jnp.where(late, a.curvature + rate, 0.0).astype(a.curvature.dtype)
    mean_rate = late_errors / (total - jnp.ceil(_WINDOWS[-1] * total))
    settled = (scheme.desired_energy_var / mean_rate) ** (1.0 / _POWER)
    ending = a.progress.ending & jnp.isfinite(settled) & (settled > 0.0) & (mean_rate > 0.0)
    step_size = jnp.where(ending, jnp.minimum(settled, step_size), step_size)
    return a._replace(
        step_size=step_size.astype(a.step_size.dtype),
        curvature=late_errors,
        progress=a.progress.next(),
        alone=Alone(variance, *sums),
    )
