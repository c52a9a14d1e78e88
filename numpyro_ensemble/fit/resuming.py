"""What the checkpoints of a run hold, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from numpyro_ensemble.checkpoint import (
    Keeper,
    describe,
    describe_all,
    describe_arguments,
    describe_sites,
)
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.loop import Carry
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.hosts import home
from numpyro_ensemble.storage import Leaves, restored

_SETTINGS = (
    "batch_size",
    "batch_args",
    "shared_batches",
    "member_args",
    "stable_update",
    "forward_mode_differentiation",
    "early_stopping",
)


@contextmanager
def keeping(call: FitCall, keys: jax.Array, options: RunOptions) -> Iterator[Keeper | None]:
    """Open the folder of checkpoints of a run, None without `checkpoint=`.

    Raises:
        ValueError: for checkpoints that are in use, or processes that run different things.
    """
    placement, fingerprint = (
        call.problem.placement,
        cache(partial(_fingerprint, call, keys, options)),
    )
    placement.check_alike(fingerprint)
    if options.checkpoint is None:
        yield None
        return
    keeper = Keeper(options.checkpoint, fingerprint(), placement)
    try:
        yield keeper
    finally:
        keeper.close()


def kept(call: FitCall, carry: Carry, losses: np.ndarray) -> dict[str, Any]:
    """Return what a checkpoint holds: the members without added copies, and all losses.

    The order of the batches is not saved: it follows from the keys and the step.
    """
    state, stop = home((call.cut(carry.state), call.cut(carry.stop)))
    return {"state": state, "stop": stop, "losses": losses}


def resume(call: FitCall, carry: Carry, keeper: Keeper) -> tuple[Carry, np.ndarray | None]:
    """Return where the newest checkpoint goes on, and the losses before it, None without one."""
    leaves = keeper.newest()
    if leaves is None:
        return carry, None
    tree = restored(leaves, kept(call, carry, np.zeros(())))
    state, stop = call.problem.placement.fill((tree["state"], tree["stop"]), 0)
    return carry._replace(state=state, stop=stop), np.asarray(tree["losses"])


def _fingerprint(call: FitCall, keys: jax.Array, options: RunOptions) -> dict[str, dict[str, str]]:
    """Return texts that identify a run."""
    problem = call.problem
    forms = Leaves.of(call.forms.state)
    state = {
        path: f"{form.dtype} of shape {form.shape[1:]}"
        for path, form in zip(forms.paths, forms.leaves, strict=True)
    }
    settings = {name: repr(getattr(options, name)) for name in _SETTINGS}
    settings |= {
        "ensemble_size": str(problem.ensemble_size),
        "guide": type(problem.guide).__name__,
        "loss": type(problem.loss).__name__,
        "prior_weight": describe(problem.prior_weight),
        "repulsion": _of_repulsion(problem.repulsion),
        "kl_weight": describe(getattr(problem, "kl_weight", None)),
        "rng_key": describe(keys),
        "init_state": describe_all(options.init_state),
        "init_params": describe_all(options.init_params),
    }
    return {
        "site": describe_sites(call.programs.sites),
        "argument": describe_arguments(call.given),
        "part of the state": state,
        "setting": settings,
    }


def _of_repulsion(repulsion: Any) -> str:
    """Return a text that identifies the options of a repulsion."""
    if repulsion is None:
        return "none"
    return ", ".join(
        f"{f.name}: {describe_all(getattr(repulsion, f.name))}" for f in fields(repulsion)
    )
