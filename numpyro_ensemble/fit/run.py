"""One run: the start or an earlier state, the loop, and the result."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState
from numpyro.util import is_prng_key

from numpyro_ensemble.calls.arguments import has_tracers, traces
from numpyro_ensemble.checkpoint import Keeper
from numpyro_ensemble.fit.batches import batch_keys, first_order
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.loop import (
    Carry,
    Looks,
    capacity_for,
    chunk_ends,
    copy_buffers,
    train,
)
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.fit.resuming import keeping, kept, resume
from numpyro_ensemble.fit.state import SetupValues, check_size, check_state, plain, with_setup
from numpyro_ensemble.fit.stopping import first_stop, without_stopped
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.interrupts import Interrupts
from numpyro_ensemble.results import EnsembleResult, name_members

_STEEP = 0.01  # a longer gradient, relative to the loss, means that a point is no mode


class Start(NamedTuple):
    """Where a run begins, and what stays the same throughout."""

    carry: Carry
    step: Any  # of the optimiser
    values: SetupValues
    shuffles: Any  # keys of the batches' order


def fit(
    call: FitCall,
    rng_key: jax.Array,
    keys: jax.Array,
    num_steps: int,
    options: RunOptions,
) -> EnsembleResult:
    """Start, or go on from a state or a checkpoint, and take the steps of `run`."""
    start = _started(call, rng_key, keys, options)
    setup = call.setup_with(start.values)
    callback, stable = options.callback, options.stable_update
    if callback is not None:

        def report(step: int, state: SVIState, losses: Any) -> Any:
            said = callback(step, call.cut_state(with_setup(state, setup)), losses)
            return call.problem.placement.of_all(bool(said)).any()

        options = options._replace(callback=report)
    losses: Any
    if traces((start, call.arguments.leaves)):
        carry, losses = _traced(call, start, num_steps, options)
        stopped = taken = None
    else:
        interrupts = Interrupts(options.checkpoint is not None, call.problem.placement.mesh)
        with keeping(call, keys, options) as keeper:
            carry, losses, stopped, taken = _loop(
                call, start, num_steps, options, keeper, interrupts
            )
        interrupts.end_process()
        if interrupts.ended_a_run:
            warn(f"interrupted: {taken} of {num_steps} steps were taken.")
    params, finite, slope = call.outcome(
        carry.state, start.values, options.forward_mode_differentiation
    )
    state = call.cut_state(with_setup(carry.state, setup))
    finite, slope = home((finite, slope))
    if options.gather:
        params, state = home(params), call.home_state(state)
    result = EnsembleResult(params, state, jax.device_put(losses))
    result.completed_steps = taken
    if slope is not None and not has_tracers(slope):
        result.gradient_norm = np.asarray(slope)
    if stopped is not None:  # skipped steps are no failures
        result.stopped = stopped | stable
    if not has_tracers((finite, losses)):
        finite = np.asarray(finite) & np.asarray(result.finite)
        _warn_failed(finite, losses, stable)
        if result.converged is not None and callback is None:
            _warn_unconverged(finite & ~result.converged, call.problem.optim, losses)
            _warn_steep(finite & result.converged, call.problem.optim, result)
    return result


def _started(call: FitCall, rng_key: jax.Array, keys: jax.Array, options: RunOptions) -> Start:
    """Start all members, or take the state of an earlier run."""
    if options.init_state is None:
        state: SVIState = call.start(keys, options.init_params)
        step: Any = 0
    else:
        check_size(options.init_state, call.problem.ensemble_size)
        state = call.filled(options.init_state)
        check_state(state, call.forms.state, call.problem.places)
        step = jnp.max(state.optim_state[0])
    batches = call.batches
    single = rng_key if is_prng_key(rng_key) else keys[0]
    keys = call.problem.placement.fill(keys, 0)
    carry = Carry(
        plain(state),
        first_stop(state, options.early_stopping),
        None if batches is None else first_order(batches, call.problem.places),
    )
    shuffles = None if batches is None else batch_keys(keys, single, batches.shared)
    return Start(carry, step, call.values_of(state), shuffles)


def _traced(
    call: FitCall, start: Start, num_steps: int, options: RunOptions
) -> tuple[Carry, jax.Array]:
    """Take all steps under an outer transformation, as one chunk without a host."""
    for name in ("callback", "checkpoint"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} needs the host, which jit, vmap and grad do not have.")
    whole = call.chunk(num_steps, options, consume=False)
    carry, step, values, shuffles = start
    carry, (losses, flags) = whole(carry, num_steps, 0, step, values, call.dynamic, shuffles)
    return carry, call.cut(without_stopped(losses, 0, flags).T)


def _loop(
    call: FitCall,
    start: Start,
    num_steps: int,
    options: RunOptions,
    keeper: Keeper | None,
    interrupts: Interrupts,
) -> tuple[Carry, np.ndarray, np.ndarray, int]:
    """Run the compiled loop, and return the last carry, losses, who has stopped, and the steps."""
    carry, step, values, shuffles = start
    step, dynamic = int(step), call.dynamic
    call.problem.check_run(step, num_steps)
    watched = any((options.progress_bar, options.callback, options.early_stopping))
    size, capacity = capacity_for(num_steps, options.chunk_size, watched)
    compiled = call.chunk(capacity, options)
    before = None
    if keeper is not None:
        first = carry
        carry, before = resume(call, carry, keeper)
        if before is not None:
            number = min(2, len(before))
            again = copy_buffers(first), number, 0, step, values, dynamic, shuffles
            _, (losses, _) = compiled(*again)
            _check_same(keeper, before[:number], call.cut(losses.T).T[:number])
    if before is None:
        before = np.zeros((0, call.problem.ensemble_size), jnp.result_type(float))
        if options.init_state is not None or options.init_params is not None:
            carry = copy_buffers(carry)  # its arrays may be the user's own
    if len(before) > num_steps:
        raise ValueError(
            f"the checkpoints are of a run that has taken {len(before)} steps already: num_steps "
            f"takes that many or more, got {num_steps}."
        )

    def chunk(carry: Carry, number: int, done: int) -> tuple[Carry, Any]:
        return compiled(carry, number, done, step + done, values, dynamic, shuffles)

    keep = None if keeper is None else partial(_keep, call, keeper)
    every = None if keeper is None else keeper.checkpoint.every
    looks = Looks(
        progress_bar=options.progress_bar and call.problem.placement.speaks,
        callback=options.callback,
        keep=keep,
        every=every,
        stable=options.stable_update,
        holding_nan=call.arguments.holding_nan,
    )
    ends = chunk_ends(len(before), num_steps, size, every)
    with interrupts:
        carry, losses, stopped = train(chunk, carry, ends, num_steps, looks, before, interrupts)
    taken = len(losses)
    if keep is not None and taken > len(before) and not looks.keeps(taken):
        keep(taken, carry, losses)
    missing = np.full((num_steps - taken, losses.shape[1]), np.nan, losses.dtype)
    # in a run that was ended, missing losses are no failures
    ended = stopped | (np.isfinite(losses[-1]) & bool(len(missing)))
    return carry, np.ascontiguousarray(np.concatenate([losses, missing]).T), ended, taken


def _check_same(keeper: Keeper, before: np.ndarray, now: np.ndarray) -> None:
    """Raise a ValueError if the first two losses differ from those of the saved run.

    The second loss depends on the optimiser.
    """
    for i, tolerances in enumerate([(1e-9, 1e-4), (1e-6, 1e-3)][: len(before)]):
        keeper.compare_numbers(f"the loss of step {i + 1}", before[i], now[i], *tolerances)


def _keep(call: FitCall, keeper: Keeper, step: int, carry: Carry, losses: np.ndarray) -> None:
    keeper.save(step, kept(call, carry, losses))


def _warn_unconverged(open_ones: np.ndarray, optim: Any, losses: np.ndarray) -> None:
    """Name the members that have not met the criterion of their minimiser."""
    if not open_ones.any():
        return
    single = losses.dtype == np.float32
    narrow = " float32 may be too coarse for it: see result.gradient_norm, and jax_enable_x64."
    warn(
        f"{open_ones.sum()} of {open_ones.size} members have not met the criterion of {optim!r} "
        f"in {losses.shape[1]} steps: {name_members(open_ones)}. See result.converged; go on with "
        f"init_state=result.state.{narrow if single else ''}"
    )


def _warn_steep(ended: np.ndarray, optim: Any, result: EnsembleResult) -> None:
    """Name the members whose minimiser stopped away from a mode, by steps that were too short."""
    slope, loss = result.gradient_norm, home(getattr(result.state.optim_state[1], "loss", None))
    if slope is None or loss is None:
        return
    steep = ended & (slope > _STEEP * (1.0 + np.abs(np.asarray(loss))))
    if steep.any():
        warn(
            f"{steep.sum()} of {steep.size} members have met the criterion of {optim!r} where the "
            f"gradient is up to {slope[steep].max():.0e} long: {name_members(steep)}. The "
            f"minimiser's steps became too short before a mode. See result.gradient_norm; try "
            f"optimistix.LBFGS or other starts."
        )


def _warn_failed(finite: np.ndarray, losses: np.ndarray, stable: bool) -> None:
    """Name the members that have failed since their start."""
    failed = ~finite
    if not stable:
        failed &= np.isfinite(losses).any(axis=1)  # the others were named at their start
    if failed.any():
        warn(
            f"{failed.sum()} of {finite.size} members ended with values that are not finite: "
            f"{name_members(failed)}. See result.finite; stable_update=True keeps a member's last "
            f"good state."
        )
