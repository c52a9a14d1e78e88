"""The chains of NumPyro's `MCMC`, and the members that they started at."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import MCMC

_ARVIZ_NAMES = {  # of what MCMC collects
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "adapt_state.step_size": "step_size",
}


def chains_of(mcmc: MCMC) -> tuple[Any, dict[str, Any]]:
    """Return the draws of a run, and what else it has collected of each, chains leading.

    Raises:
        ValueError: if it has not run.
    """
    if mcmc.last_state is None:
        raise ValueError("result is an MCMC without draws: call its run first.")
    fields = mcmc.get_extra_fields(group_by_chain=True)
    stats = {
        _ARVIZ_NAMES.get(name, name): value
        for name, value in fields.items()
        if np.ndim(value) == 2  # one number for each draw
    }
    return mcmc.get_samples(group_by_chain=True), stats


def checked_members(members: ArrayLike, num_chains: int) -> np.ndarray:
    """Return one member's number for each chain.

    Raises:
        ValueError: if there is not one for each.
    """
    numbers = np.asarray(members)
    if numbers.shape != (num_chains,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"members takes a member's number for each of {num_chains} chains, as "
            f"mcmc.starts.chain_members gives them; got {numbers.dtype} of shape {numbers.shape}."
        )
    return numbers
