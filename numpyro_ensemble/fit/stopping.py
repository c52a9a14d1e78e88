"""Early stopping: which members have stopped, and their losses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.results import converged


class EarlyStopping(NamedTuple):
    """Stop a member when its mean loss no longer falls.

    Losses are averaged over windows of steps, since a single stochastic loss is mostly noise. A
    member that has stopped no longer changes. The run ends after the chunk in which the last
    member stops.

    Attributes:
        patience: number of windows without improvement after which a member stops.
        min_delta: how far a window's mean must be below the best one, to count as better.
        window: number of steps in a window.
        min_steps: number of steps before which no member stops.

    Example:
        >>> from numpyro_ensemble import EarlyStopping
        >>> EarlyStopping(patience=3, window=50)
        EarlyStopping(patience=3, min_delta=0.0, window=50, min_steps=0)
    """

    patience: int = 5
    min_delta: float = 0.0
    window: int = 100
    min_steps: int = 0

    def check(self) -> None:
        """Raise a ValueError where a field is out of range."""
        for name, least in (("patience", 1), ("window", 1), ("min_steps", 0), ("min_delta", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int | float | np.number) and math.isfinite(value)):
                raise TypeError(f"EarlyStopping's {name} takes a number, got {value!r}.")
            if name != "min_delta" and value != int(value):
                raise TypeError(f"EarlyStopping's {name} takes an integer, got {value!r}.")
            if value < least:
                raise ValueError(f"EarlyStopping's {name} must be at least {least}, got {value}.")


class Stop(NamedTuple):
    """Which members have stopped, and the counters of early stopping, each `(E,)`."""

    total: jax.Array  # sum of the finite losses in the current window
    number: jax.Array  # number of these losses
    best: jax.Array  # lowest mean of a window so far
    stale: jax.Array  # windows since then
    stopped: jax.Array
    taken: jax.Array  # steps of this run before the stop


def first_stop(state: Any, rule: EarlyStopping | None) -> Stop | None:
    """Return fresh counters, None where no member can stop before the run ends."""
    ended, shape = converged(state), jnp.shape(state.optim_state[0])
    if rule is None and ended is None:
        return None
    zeros, none = jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    stopped = jnp.zeros(shape, bool) if ended is None else ended | False  # its own buffer
    return Stop(zeros, none, zeros + jnp.inf, none + 0, stopped, none + 0)


def end_step(
    state: Any, new: Any, stop: Stop, losses: jax.Array, done: jax.Array, rule: EarlyStopping | None
) -> tuple[Any, jax.Array, Stop]:
    """Keep the members that had stopped before a step, and note those that stop in it."""
    losses = jnp.where(stop.stopped, 0.0, losses)  # see `without_stopped`
    if rule is None:
        stop = stop._replace(taken=stop.taken + ~stop.stopped)
    else:
        new = where_members(stop.stopped, state, new)
        stop = count(stop, losses, done, rule)
    ended = converged(new)
    if ended is not None:
        stop = stop._replace(stopped=stop.stopped | ended)
    return new, losses, stop


def count(stop: Stop, losses: jax.Array, done: jax.Array, rule: EarlyStopping) -> Stop:
    """Take the losses of step number `done` (from 1) into account."""
    good = jnp.isfinite(losses)
    total = stop.total + jnp.where(good, losses, 0.0)
    number = stop.number + good
    mean = total / jnp.maximum(number, 1)
    better = (number > 0) & (mean < stop.best - rule.min_delta)  # a window that failed is no better
    stale = jnp.where(better, 0, stop.stale + 1)
    closes = done % rule.window == 0
    stopped = stop.stopped | ((stale >= rule.patience) & (done >= rule.min_steps))
    taken = stop.taken + ~stop.stopped
    best = jnp.where(better, mean, stop.best)
    after = Stop(total * 0, number * 0, best, stale.astype(jnp.int32), stopped, taken)
    before = Stop(total, number, stop.best, stop.stale, stop.stopped, taken)
    return jax.tree.map(lambda a, b: jnp.where(closes, a, b), after, before)


def where_members(flags: jax.Array, chosen: Any, other: Any) -> Any:
    """Take the flagged members' leaves from one tree and the others' from another."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(flags.reshape(flags.shape + (1,) * (jnp.ndim(a) - 1)), a, b)

    return jax.tree.map(pick, chosen, other)


def without_stopped(losses: Any, done: int, flags: Any) -> Any:
    """Return losses `(steps, E)` with NaN for the steps after a member's stop.

    These NaN are not made in compiled programs, since `jax.debug_nans` would stop there.
    """
    if flags is None:
        return losses
    xp = jnp if isinstance(losses, jax.core.Tracer) else np
    steps = done + np.arange(len(losses))
    return xp.where(steps[:, None] < xp.asarray(flags[1])[None], losses, np.nan)
