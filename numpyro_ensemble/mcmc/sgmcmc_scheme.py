"""The pure step of SGNHT (Ding et al., 2014). Noise and step size are measured over all chains.

Chains move by BlackJAX's step, in coordinates in which their metric is the identity. Three things
differ from BlackJAX's kernel:

- The gradient is taken at the new position of the same step, which makes the step symplectic.
- Warm-up measures the gradient's noise, and the step adds only the noise that is missing (`beta`).
  The thermostat corrects the remaining error.
- The mean of `-x . gradient` is then `(1 - friction * step_size / 2)` times the mean square of the
  momentum, for any density. This follows from the step's covariances. The thermostat holds the mean
  square of the momentum at the inverse of that factor. So the mean of `-x . gradient` is 1 for each
  coordinate, as in the posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.sgmcmc import diffusions

from numpyro_ensemble.mcmc.counted import counted, largest_eigenvalue
from numpyro_ensemble.mcmc.mams_scheme import averaged
from numpyro_ensemble.mcmc.metric import SharedMetric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import all_finite, choose, per_chain

_FRICTION = 1.0  # per time unit of the slowest direction: at 2 the damping is critical
_NOISE = 0.8  # the gradient of the noisiest coordinate may make this part of the friction's noise
_CLIMBS, _NEAR = 30, 0.1  # most steps to the mode of all rows, and the gradient at which they end
_RENEWALS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # times of a new centre, in parts of warm-up


class Noise(NamedTuple):
    """Second moments of the gradient's noise, `(C, d)`, averaged over chains and warm-up.

    The moments are those of the noise at the chains' positions (`here`), of the noise at the centre
    for the same rows (`centre`), and the mixed ones (`both`).
    """

    here: jax.Array
    centre: jax.Array
    both: jax.Array


class SGMCMCAdaptation(NamedTuple):
    """What SGMCMC adapts, for each chain.

    Attributes:
        step_size: `(C,)`, in coordinates in which the metric is the identity.
        xi: `(C,)`, the friction that each chain's thermostat has reached: 1 on average if the
            gradient's noise is what warm-up measured.
        noise: `(C, d)`, the variance of the gradient's noise in these coordinates.
        weight: `(C,)`, the part of the control variate that is used; it minimises the noise.
        centre: `(C, d)`, the position of the control variate, or None.
        slope: `(C, d)`, the gradient of all rows at the centre, or None.
        stale: `(C,)`, whether `slope` may belong to other data.
        moments: the moments from which noise and weight are computed.
        bound: `(C,)`, the largest step size that the curvature allows.
        metric: the metric that all chains share.
        progress: how far warm-up has come.
    """

    step_size: jax.Array
    xi: jax.Array
    noise: jax.Array
    weight: jax.Array
    centre: jax.Array | None
    slope: jax.Array | None
    stale: jax.Array
    moments: Noise
    bound: jax.Array
    metric: SharedMetric
    progress: Progress


class Scheme(NamedTuple):
    """The constants of the scheme."""

    step_size: float = 0.25
    control_variates: bool = True
    metric: str | int = "auto"


class Walkers(NamedTuple):
    """Chains, in rows."""

    position: jax.Array  # (C, d)
    momentum: jax.Array  # (C, d), in coordinates in which the metric is the identity
    log_density: jax.Array  # (C,), computed from the last step's rows


def sgmcmc_start(
    rows: jax.Array, log_density: jax.Array, progress: Progress, scheme: Scheme
) -> SGMCMCAdaptation:
    """Return the adaptation of chains that have not moved yet, from positions `(C, d)`."""
    num_chains, size = rows.shape
    metric = SharedMetric.among(rows, counted(log_density, size), scheme.metric)
    none, zeros = jnp.zeros(num_chains, rows.dtype), jnp.zeros_like(rows)
    centre = zeros if scheme.control_variates else None
    moments = Noise(zeros, zeros, zeros)
    stale, xi = jnp.zeros(num_chains, bool), none + _FRICTION
    known = none, xi, zeros, none, centre, centre, stale, moments, none
    return SGMCMCAdaptation(*known, metric, progress)


def recentred(rows: jax.Array, density: Callable, scheme: Scheme) -> jax.Array:
    """Move all chains together to the mode of all rows, without changing their spread.

    Starts that were computed on some rows have about the spread of the posterior, but are off by
    many of its scales. The chains' mean goes up the gradient of all rows, in coordinates in which
    the chains have no correlation.
    """
    metric = SharedMetric.among(rows, jnp.ones(len(rows), bool), scheme.metric)
    centre = rows.mean(axis=0)

    def both(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = jax.value_and_grad(lambda row: density(row, None))(row)
        return value, metric.whiten_gradients(slope)

    def unfinished(walk: tuple) -> jax.Array:
        number, _, _, slope, _ = walk
        return (number < _CLIMBS) & (jnp.square(slope).mean() > _NEAR**2)

    def body(walk: tuple) -> tuple:
        number, at, value, slope, length = walk
        there = at + length * metric.colour(slope)
        new_value, new_slope = both(there)
        better = (new_value > value) & jnp.isfinite(new_slope).all()
        # Barzilai and Borwein's length: 1 if the chains' spread is that of the whole posterior
        bent = (slope * (slope - new_slope)).sum() / (slope**2).sum()
        longer = jnp.where(bent > 0.25, length / bent, 4.0 * length)
        new, old = (there, new_value, new_slope, longer), (at, value, slope, 0.25 * length)
        return number + 1, *(jnp.where(better, x, y) for x, y in zip(new, old, strict=True))

    value, slope = both(centre)
    first = jnp.zeros((), int), centre, value, slope, jnp.ones((), rows.dtype)
    at = jax.lax.while_loop(unfinished, body, first)[1]
    return rows + (at - centre)[None]


def sgmcmc_step(
    keys: jax.Array, chains: Walkers, a: SGMCMCAdaptation, density: Callable, scheme: Scheme
) -> tuple[Walkers, SGMCMCAdaptation, jax.Array]:
    """Make one iteration: adapt in warm-up, then make one step for each further row of keys.

    Args:
        keys: `(S + 1, C)`, the first row for the adaptation. Every chain draws its own rows of the
            data in every step.
        chains: positions and momenta.
        a: the state of the scheme.
        density: log density of one chain's row and a key that draws rows of the data. None takes
            all rows.
        scheme: its constants.

    Returns:
        Chains, adaptation, and how many steps of each chain ended without a finite result.
    """
    a = _centred(chains.position, a, density)
    a = jax.lax.cond(
        a.progress.warming,
        lambda a: _adapted(keys[0], chains.position, a, density, scheme),
        lambda a: a,
        a,
    )
    step = jax.vmap(_step(a, density), in_axes=(0, 0, 0, 0, 0))
    origin, zeros = chains.position, jnp.zeros_like(chains.position)

    def body(j: jax.Array, carry: tuple) -> tuple:
        moved, momentum, xi, value, lost = carry
        new = step(keys[j + 1], origin, moved, momentum, xi)
        whole = all_finite(*new)
        kept = moved, -momentum, jnp.full_like(xi, _FRICTION), value
        return (*choose(whole, new, kept), lost + ~whole)

    first = zeros, chains.momentum, a.xi, chains.log_density, jnp.zeros(len(zeros), int)
    moved, momentum, xi, value, lost = jax.lax.fori_loop(0, len(keys) - 1, body, first)
    chains = Walkers(origin + a.metric.colour(moved), momentum, value)
    a = a._replace(xi=xi)

    def observed(a: SGMCMCAdaptation) -> SGMCMCAdaptation:
        metric = a.metric.observe(chains.position, a.progress)
        return a._replace(metric=metric, progress=a.progress.next())

    return chains, jax.lax.cond(a.progress.warming, observed, lambda a: a, a), lost


def _gradient(a: SGMCMCAdaptation, density: Callable) -> Callable:
    """Return a function of a row and a key: log density, and gradient in the metric's coordinates.

    The mean of this gradient over keys is the gradient of all rows, for any centre and weight.
    """
    both = jax.value_and_grad(density)

    def gradient(row: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if a.centre is None or a.slope is None:
            value, grad = both(row, key)
            return value, a.metric.whiten_gradients(grad)
        places = jnp.stack([row, a.centre[0]])
        values, grads = jax.vmap(both, in_axes=(0, None))(places, key)  # of the same rows
        grad = grads[0] - a.weight[0] * (grads[1] - a.slope[0])
        return values[0], a.metric.whiten_gradients(grad)

    return gradient


def thermal(step_size: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return temperature, `alpha` and `beta` of BlackJAX's step for gradients with this noise.

    The step adds noise of variance `h T (2 alpha - h T beta)` to that of the gradient,
    `h**2 noise`. With this `alpha`, a normal density of scale 1 keeps the temperature at a friction
    of 1.
    """
    temperature = 1.0 / (1.0 - 0.5 * _FRICTION * step_size)
    alpha = _FRICTION * (1.0 - 0.5 * _FRICTION * step_size) - 0.25 * step_size**2 / _FRICTION
    beta = jnp.minimum(noise / temperature, 2.0 * alpha / step_size) / temperature
    return temperature, alpha, beta


def _step(a: SGMCMCAdaptation, density: Callable) -> Callable:
    """Return a function that makes one step of one chain. `moved` is its distance from `origin`."""
    gradient, step_size = _gradient(a, density), a.step_size[0]
    temperature, alpha, beta = thermal(step_size, a.noise[0])
    move = diffusions.sgnht(alpha, beta)

    def step(
        key: jax.Array, origin: jax.Array, moved: jax.Array, momentum: jax.Array, xi: jax.Array
    ) -> tuple[jax.Array, ...]:
        rows_key, noise_key = jax.random.split(key)
        there = origin + a.metric.colour(moved + step_size * momentum)
        value, grad = gradient(there, rows_key)
        state = moved, momentum, xi, grad, step_size, temperature
        moved, momentum, xi = move(noise_key, *state)
        # a chain that comes from far away is fast: its thermostat may stop, but not reverse it
        return moved, momentum, jnp.clip(xi, -_FRICTION, 1.0 / step_size), value

    return step


def _centred(rows: jax.Array, a: SGMCMCAdaptation, density: Callable) -> SGMCMCAdaptation:
    """Renew the centre when it is due, and its gradient then and when the data may have changed."""
    if a.centre is None:
        return a
    start, total = a.progress.iteration[0], a.progress.total
    due = jnp.stack([start == jnp.ceil(part * total) for part in _RENEWALS]).any()
    due &= a.progress.warming

    def renewed(a: SGMCMCAdaptation) -> SGMCMCAdaptation:
        assert a.centre is not None
        centre = jnp.where(due, rows.mean(axis=0), a.centre[0])
        slope = jax.grad(density)(centre, None).astype(centre.dtype)
        centre, slope = per_chain((centre, slope), len(rows))
        return a._replace(centre=centre, slope=slope, stale=jnp.zeros_like(a.stale))

    return jax.lax.cond(due | a.stale[0], renewed, lambda a: a, a)


def _adapted(
    keys: jax.Array, rows: jax.Array, a: SGMCMCAdaptation, density: Callable, scheme: Scheme
) -> SGMCMCAdaptation:
    """Measure the noise of the gradients, and find the step size."""
    start = a.progress.iteration[0]
    places = rows[:, None]  # (C, 1 or 2, d)
    if a.centre is not None:
        places = jnp.stack([rows, a.centre], axis=1)
    pairs = jax.vmap(jax.random.split)(keys)
    of_places = jax.vmap(jax.grad(density), in_axes=(0, None))
    of_pairs = jax.vmap(of_places, in_axes=(None, 0))
    grads = jax.vmap(of_pairs)(places, pairs)  # (C, 2, 1 or 2, d)
    white = a.metric.whiten_gradients
    here = [white(grads[:, i, 0]) for i in range(2)]
    centre = [jnp.zeros_like(rows)] * 2
    if a.slope is not None:
        centre = [white(grads[:, i, 1] - a.slope) for i in range(2)]
    # half the squared difference of two gradients has the noise's variance as its mean
    noise, at_centre = (0.5**0.5 * (x - y) for x, y in (here, centre))
    now = Noise(noise**2, at_centre**2, noise * at_centre)
    sound = all_finite(*now)
    now = jax.tree.map(lambda x: x.mean(axis=0, where=sound[:, None]), now)

    def average(before: jax.Array, now: jax.Array) -> jax.Array:
        now = jnp.where(jnp.isfinite(now), now, before[0])
        mean = jnp.where(start == 0, now, averaged(before[0], now, a.progress))
        return per_chain(mean.astype(before.dtype), len(before))

    moments = jax.tree.map(average, a.moments, now)
    tiny = jnp.finfo(rows.dtype).tiny
    weight = jnp.clip(moments.both[0].sum() / jnp.maximum(moments.centre[0].sum(), tiny), 0.0, 1.0)
    left = moments.here - 2.0 * weight * moments.both + weight**2 * moments.centre
    left = jnp.maximum(left, 0.0)
    mean = 0.5 * sum(x - weight * y for x, y in zip(here, centre, strict=True))
    mean = jnp.where(sound[:, None], mean, 0.0)
    steepest = jnp.maximum(largest_eigenvalue(mean, sound), 1.0)
    bound = average(a.bound, scheme.step_size / jnp.sqrt(steepest))
    step_size = jnp.minimum(bound, _NOISE * 2.0 * _FRICTION / jnp.maximum(left.max(), tiny))
    return a._replace(
        step_size=step_size.astype(rows.dtype),
        noise=left,
        weight=per_chain(weight.astype(rows.dtype), len(rows)),
        moments=moments,
        bound=bound,
    )
