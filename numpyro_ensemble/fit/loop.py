"""The compiled training loop: chunks of steps, batches, stopping, progress."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax

from numpyro_ensemble.calls.arguments import with_nan
from numpyro_ensemble.fit.batches import Batches, Order, draw
from numpyro_ensemble.fit.stopping import (
    EarlyStopping,
    Stop,
    end_step,
    without_stopped,
)
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.interrupts import Interrupts
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.results import name_members

_CHUNKS = 20  # a run is cut into about so many chunks, as SVI.run updates its bar
_CAPACITY = 2048  # the least number of steps that a chunk is compiled for


class Carry(NamedTuple):
    """What one chunk passes on to the next."""

    state: Any
    stop: Stop | None
    order: Order | None


def keep_good(old: Any, new: Any, loss: jax.Array, counts: bool) -> tuple[Any, jax.Array]:
    """Keep one member's old state, except its key, if the new one or the loss is not finite.

    With `counts` the optimiser counts the failed step, since batches follow its count.
    """
    leaves = [leaf for leaf in jax.tree.leaves((new, loss)) if is_inexact(leaf)]
    good = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    held = old._replace(rng_key=new.rng_key)
    state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, held)
    if counts:
        state = state._replace(optim_state=(old.optim_state[0] + 1, state.optim_state[1]))
    return state, jnp.where(good, loss, jnp.nan)


def make_chunk(
    update: Callable,
    ensemble_size: int,
    capacity: int,
    batches: Batches | None,
    rule: EarlyStopping | None,
) -> Callable:
    """Build the function that a chunk of steps compiles to.

    Args:
        update: `(state, values, dynamic, rows) -> (state, losses)`, for all members at once.
        ensemble_size: number of members that are computed.
        capacity: number of losses a chunk has room for.
        batches: how the data are cut, or None.
        rule: when members stop, or None.

    Returns:
        `chunk(carry, number, done, step, values, dynamic, keys) -> (carry, (losses, flags))`:
        takes `number` steps, after `done` steps of this run and `step` steps of the optimiser. The
        losses are `(capacity, E)`. The flags tell which members have stopped, and after how many
        steps.
    """

    def chunk(
        carry: Carry, number: Any, done: Any, step: Any, values: Any, dynamic: Any, keys: Any
    ) -> tuple[Carry, tuple[jax.Array, Any]]:
        def going_on(loop: tuple[jax.Array, Carry, jax.Array]) -> jax.Array:
            i, (_, stop, _), _ = loop
            return (i < number) if stop is None else (i < number) & ~stop.stopped.all()

        def body(loop: tuple[jax.Array, Carry, jax.Array]) -> tuple[jax.Array, Carry, jax.Array]:
            i, (state, stop, order), buffer = loop
            step_on = partial(update, state, values, dynamic)
            if batches is None or order is None:
                new, losses = step_on(None)
            else:
                order, (new, losses) = draw(batches, order, step + i, keys, step_on)
            if stop is not None:
                new, losses, stop = end_step(state, new, stop, losses, done + i + 1, rule)
            buffer = lax.dynamic_update_index_in_dim(buffer, losses.astype(buffer.dtype), i, 0)
            return i + 1, Carry(new, stop, order), buffer

        buffer = jnp.zeros((capacity, ensemble_size))
        begin = jnp.zeros((), jnp.result_type(int))
        _, carry, buffer = lax.while_loop(going_on, body, (begin, carry, buffer))
        if carry.stop is None:
            return carry, (buffer, None)
        return carry, (buffer, (carry.stop.stopped | False, carry.stop.taken + 0))  # own buffers

    return chunk


def capacity_for(num_steps: int, chunk_size: int | None, watched: bool) -> tuple[int, int]:
    """Return the number of steps in a chunk, and the number that its program is compiled for.

    If nothing happens between chunks, a chunk is as long as its program allows. Programs are
    compiled for powers of two from 2048 on, so that runs of other lengths use the same one.
    """
    if chunk_size is None:
        chunk_size = -(-num_steps // _CHUNKS) if watched else _CAPACITY
    size = min(chunk_size, num_steps)
    return size, max(_CAPACITY, 1 << (size - 1).bit_length())


def chunk_ends(first: int, num_steps: int, size: int, every: int | None) -> list[int]:
    """Return the steps after which chunks end: `size` apart, and where a checkpoint is due."""
    ends: list[int] = []
    done = first
    while done < num_steps:
        done = min(done + size, num_steps, (done // every + 1) * every if every else num_steps)
        ends.append(done)
    return ends


class Looks(NamedTuple):
    """What happens between chunks.

    Attributes:
        progress_bar: show mean, best and worst loss.
        callback: `callback(step, state, losses)`; a true value returned ends the run.
        keep: `keep(step, carry, losses)` writes a checkpoint.
        every: number of steps between two checkpoints.
        stable: whether failed steps are skipped, so that a bad first step is no failed start.
        holding_nan: returns the names of arguments that hold a NaN, for the error of a start.
    """

    progress_bar: bool
    callback: Callable | None
    keep: Callable | None
    every: int | None
    stable: bool
    holding_nan: Callable[[], list[str]]

    def keeps(self, done: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        return self.every is not None and done % self.every == 0

    def waits(self, done: int) -> bool:
        """Return whether the state after this step is needed before the next chunk begins."""
        return self.callback is not None or self.keeps(done)


def train(
    chunk: Callable,
    carry: Carry,
    ends: list[int],
    num_steps: int,
    looks: Looks,
    before: np.ndarray,
    interrupts: Interrupts,
) -> tuple[Carry, np.ndarray, np.ndarray]:
    """Run chunks until all steps are done, all members have stopped, or the run is ended.

    Args:
        chunk: `(carry, number, done) -> (carry, (losses, stopped))`, compiled; it consumes the
            carry.
        carry: where the run begins.
        ends: the steps after which chunks end.
        num_steps: number of steps.
        looks: what happens between chunks.
        before: losses `(steps, E)` of the steps before a checkpoint that the run goes on from.
        interrupts: signals that end the run.

    Returns:
        The last carry, the losses `(steps, E)` of the steps taken, and which members have stopped
        early.
    """
    size = before.shape[1]
    parts, done = [before], len(before)
    stopped = np.zeros(size, bool)
    if carry.stop is not None:
        stopped = np.array(home(carry.stop.stopped))[:size]
    with tqdm.tqdm(total=num_steps, initial=done, disable=not looks.progress_bar) as bar:
        for latest, end, (buffer, flags) in _dispatched(
            chunk, carry, done, ends, looks, interrupts
        ):
            carry, number = latest, end - done
            flags = jax.tree.map(lambda flag: np.asarray(flag)[:size], flags)
            part = without_stopped(np.asarray(buffer)[:number, :size], done, flags)
            if flags is not None:
                stopped = flags[0]
            if not done:
                _check_start(part, flags, looks.stable, looks.holding_nan)
            parts.append(part)
            done = end
            if looks.progress_bar:
                bar.update(number)
                bar.set_postfix_str(_summary(part), refresh=False)
            if looks.keep is not None and looks.keeps(done):
                looks.keep(done, carry, np.concatenate(parts))
            if stopped.all():
                break
            if looks.callback and looks.callback(done, home(copy_buffers(carry.state)), part.T):
                break
    return carry, np.concatenate(parts), stopped


def _dispatched(
    chunk: Callable,
    carry: Carry,
    done: int,
    ends: list[int],
    looks: Looks,
    interrupts: Interrupts,
) -> Iterator[tuple[Carry, int, Any]]:
    """Yield each chunk's outcome; the next chunk runs already if the state is not needed."""
    ahead: tuple[int, Any] | None = None
    for end in ends:
        if interrupts.ended():
            break
        carry, outcome = chunk(carry, end - done, done)
        if ahead is not None:
            yield carry, *ahead
        ahead, done = (end, outcome), end
        if looks.waits(end):
            yield carry, *ahead
            ahead = None
    if ahead is not None:
        yield carry, *ahead


def _check_start(
    losses: np.ndarray, flags: Any, stable: bool, holding_nan: Callable[[], list[str]]
) -> None:
    """Name the members that have had no finite loss since their start; `losses` is (steps, E)."""
    failed = ~np.isfinite(losses).any(axis=0)
    if flags is not None:
        failed &= np.asarray(flags[1]) > 0  # others had ended before this run
    size = losses.shape[1]
    remedy = "Give other starts by init_params= or the guide's init_loc_fn=, or check the data."
    if failed.any():
        remedy = with_nan(holding_nan(), remedy)
    if failed.all():
        raise ValueError(f"All {size} members start where the loss is not finite. {remedy}")
    if failed.any() and not stable:
        warn(
            f"{failed.sum()} of {size} members start where the loss is not finite: "
            f"{name_members(failed)}. {remedy}"
        )


def _summary(losses: np.ndarray) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of a member without any loss
        means = np.nanmean(losses, axis=0)
    good = means[np.isfinite(means)]
    if not good.size:
        return "no member left: all have stopped or failed"
    failed = f", {means.size - good.size} not finite or stopped" if good.size < means.size else ""
    return f"loss: mean {good.mean():.4f}, best {good.min():.4f}, worst {good.max():.4f}{failed}"


@jax.jit
def copy_buffers(tree: Any) -> Any:
    """Copy the arrays of a tree, so that the loop may consume them."""
    return jax.tree.map(jnp.copy, tree)
