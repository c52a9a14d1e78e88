"""Checks that a loss has no noise, as optimisers that compare losses need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.fit.batches import Batches

_REMEDY = "Take an optimiser that needs no comparison, numpyro.optim.Adam(0.01) say"


def check_exact(
    optim: Any,
    loss: Callable,
    state: SVIState,
    values: Any,
    dynamic: dict,
    batches: Batches | None,
    repels: bool = False,
) -> None:
    """Raise a ValueError where an optimiser compares losses and the loss is not exact.

    Args:
        optim: the optimiser.
        loss: the members' losses, a function of the next three.
        state: shapes and dtypes of the state of all members.
        values: shapes and dtypes of the values of the set-up.
        dynamic: arrays among the arguments.
        batches: how the data is cut, None where each step takes all of it.
        repels: whether members repel each other.
    """
    compares = getattr(optim, "compares_losses", None)
    if compares is None or not compares(state.optim_state[1]):
        return
    if repels:
        raise ValueError(
            f"repulsion does not go with {optim!r}, which compares the losses of different points: "
            f"members that push each other apart do not go where their own losses are lowest. Take "
            f"an optimiser that follows a gradient, numpyro.optim.Adam(0.01) say."
        )
    if batches is not None:
        raise ValueError(
            f"batch_size={batches.size} does not go with {optim!r}, which compares the losses of "
            f"different points: the losses of two batches differ by more than their points do. "
            f"Leave batch_size out. {_REMEDY}, to fit in batches."
        )
    noisy, moving = _depends(loss, state, values, dynamic)
    if noisy:
        raise ValueError(
            f"{optim!r} compares the losses of different points, and the loss of this fit is "
            f"noisy: the guide, or the model, draws random numbers at each step (a guide with a "
            f"scale, a subsampled plate, dropout). Use a guide of points (AutoDelta, "
            f"AutoLaplaceApproximation, or EnsembleMAP) and all the data. {_REMEDY}, to fit a "
            f"noisy loss."
        )
    if moving:
        raise ValueError(
            f"{optim!r} compares the losses of different steps, and a schedule of this fit "
            f"(kl_weight=) changes the loss from step to step. Give a number. {_REMEDY}, to "
            f"follow a schedule."
        )


def _depends(loss: Callable, state: SVIState, values: Any, dynamic: dict) -> tuple[bool, bool]:
    """Return whether losses depend on the random key, and on the number of the step."""
    inputs = (state, values, dynamic)
    jaxpr = jax.make_jaxpr(tracing_alone(loss))(*inputs).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    marks = jax.tree.unflatten(jax.tree.structure(inputs), used)[0]
    return any(jax.tree.leaves(marks.rng_key)), any(jax.tree.leaves(marks.optim_state[0]))
