"""States that are gone on from, and what is wrong with them."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from numpyro.infer.svi import SVIState


def check_state(state: Any, wanted: SVIState, ensemble_size: int) -> None:
    """Raise where a state to go on from is of another ensemble size or another model."""
    if not isinstance(state, SVIState):
        raise TypeError(
            f"init_state takes the state of an earlier run, result.state; got "
            f"{type(state).__name__}."
        )
    expected, given = ((s.optim_state, s.mutable_state) for s in (wanted, state))
    if jax.tree.structure(expected) != jax.tree.structure(given):
        raise _other_state(wanted, state)
    check_size(state, ensemble_size)
    for want, leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True):
        if want.shape != np.shape(leaf):
            raise ValueError(
                f"init_state is of another model: a leaf has shape {np.shape(leaf)} where "
                f"{want.shape} is expected."
            )


def _other_state(wanted: SVIState, state: SVIState) -> ValueError:
    """Return the error for a state of another form, with the names that differ if some do."""

    def names(state: SVIState) -> set[str]:
        # the states of some optimisers keep the names in the structure, as text here
        text = str(jax.tree.structure((state.optim_state, state.mutable_state)))
        return set(re.findall(r"'([^']+)': ", text))

    expected, given = names(wanted), names(state)
    if expected == given:
        return ValueError("init_state is of another optimiser: the fields of its state differ.")
    lacks, more = sorted(expected - given), sorted(given - expected)
    said = [f"it lacks {lacks}"] * bool(lacks)
    said += [f"it has {more}, which this fit does not know"] * bool(more)
    return ValueError(f"init_state is of another model or guide: {' and '.join(said)}.")


def check_size(state: SVIState, ensemble_size: int) -> None:
    """Raise where a state is none, or of another ensemble size."""
    if not isinstance(state, SVIState):
        raise TypeError(
            f"state takes what init, update or run of a runner returned; got "
            f"{type(state).__name__}."
        )
    leading = np.shape(state.optim_state[0])
    if leading != (ensemble_size,):
        raise ValueError(
            f"the state is of another ensemble size: its leaves lead with {leading}, and "
            f"ensemble_size={ensemble_size}."
        )
