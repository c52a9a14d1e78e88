"""One run: the start, or a state to go on from, the loop, and what comes out."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState
from numpyro.util import is_prng_key

from numpyro_ensemble.calls.arguments import has_tracers, traces
from numpyro_ensemble.fit.batches import batch_keys, first_order
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.loop import Carry, capacity_for, copy_buffers, train
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.fit.setup import SetupValues, plain, with_setup
from numpyro_ensemble.fit.states import check_state
from numpyro_ensemble.fit.stopping import first_stop, without_stopped
from numpyro_ensemble.results import EnsembleResult, name_members


def fit(
    call: FitCall,
    rng_key: jax.Array,
    keys: jax.Array,
    num_steps: int,
    options: RunOptions,
) -> EnsembleResult:
    """Start, or go on from a state, and take the steps of `run`."""
    if options.init_state is None:
        state: SVIState = call.start(keys, options.init_params)
        step: Any = 0
    else:
        state = options.init_state
        check_state(state, call.forms.state, call.problem.ensemble_size)
        step = jnp.max(state.optim_state[0])
    values = call.values_of(state)
    setup = call.setup_with(values)
    batches, stable = call.batches, options.stable_update
    single = rng_key if is_prng_key(rng_key) else keys[0]
    shuffles = None if batches is None else batch_keys(keys, single, batches.shared)
    carry = Carry(
        plain(state),
        first_stop(state, options.early_stopping),
        None if batches is None else first_order(batches, call.problem.ensemble_size),
    )
    callback = options.callback
    if callback is not None:

        def report(step: int, state: SVIState, losses: Any) -> Any:
            return callback(step, with_setup(state, setup), losses)

        options = options._replace(callback=report)
    carry, losses, stopped = _loop(call, carry, num_steps, options, step, values, shuffles)
    params, finite, slope = call.outcome(carry.state, values, options.forward_mode_differentiation)
    result = EnsembleResult(params, with_setup(carry.state, setup), jax.device_put(losses))
    if slope is not None and not has_tracers(slope):
        result.gradient_norm = np.asarray(slope)
    if stopped is not None:  # steps that were left out on purpose are no failures either
        result.stopped = stopped | stable
    if not has_tracers((finite, losses)):
        finite = np.asarray(finite) & np.asarray(result.finite)
        _warn_failed(finite, losses, stable)
        if result.converged is not None and callback is None:
            _warn_unconverged(finite & ~result.converged, call.problem.optim, losses)
    return result


def _loop(
    call: FitCall,
    carry: Carry,
    num_steps: int,
    options: RunOptions,
    step: Any,
    values: SetupValues,
    shuffles: Any,
) -> tuple[Carry, Any, Any]:
    """Run the compiled loop; under an outer transformation as one chunk without a host."""
    dynamic = call.dynamic
    if traces((carry, step, values, shuffles, call.arguments.leaves)):
        if options.callback is not None:
            raise ValueError("callback cannot be called from inside jit, vmap or grad.")
        whole = call.chunk(num_steps, options, consume=False)
        carry, (losses, flags) = whole(carry, num_steps, 0, step, values, dynamic, shuffles)
        return carry, without_stopped(losses, 0, flags).T, None
    step = int(step)
    call.problem.check_run(step, num_steps)
    looks = (options.progress_bar, options.callback, options.early_stopping)
    size, capacity = capacity_for(num_steps, options.chunk_size, any(looks))
    compiled = call.chunk(capacity, options)
    if options.init_state is not None or options.init_params is not None:
        carry = copy_buffers(carry)  # its arrays may be the user's own

    def chunk(carry: Carry, number: int, done: int) -> tuple[Carry, Any]:
        return compiled(carry, number, done, step + done, values, dynamic, shuffles)

    return train(
        chunk,
        carry,
        num_steps,
        size,
        progress_bar=options.progress_bar,
        callback=options.callback,
        stable=options.stable_update,
        holding_nan=call.arguments.holding_nan,
    )


def _warn_unconverged(open_ones: np.ndarray, optim: Any, losses: np.ndarray) -> None:
    """Name the members that have not met the criterion of their minimiser."""
    if not open_ones.any():
        return
    single = losses.dtype == np.float32
    narrow = " float32 may be too coarse for it: see result.gradient_norm, and jax_enable_x64."
    warnings.warn(
        f"{open_ones.sum()} of {open_ones.size} members have not met the criterion of {optim!r} "
        f"in {losses.shape[1]} steps: {name_members(open_ones)}. See result.converged; go on with "
        f"init_state=result.state.{narrow if single else ''}",
        stacklevel=4,
    )


def _warn_failed(finite: np.ndarray, losses: np.ndarray, stable: bool) -> None:
    """Name the members that have failed since their start."""
    failed = ~finite
    if not stable:
        failed &= np.isfinite(losses).any(axis=1)  # the others were named at their start
    if failed.any():
        warnings.warn(
            f"{failed.sum()} of {finite.size} members ended with values that are not finite: "
            f"{name_members(failed)}. See result.finite; stable_update=True keeps a member's last "
            f"good state.",
            stacklevel=4,
        )
