"""The chains of NumPyro's `MCMC`, and the members that they started at."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import MCMC

from numpyro_ensemble._compat import call_of

_ARVIZ_NAMES = {  # of what MCMC collects
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "adapt_state.step_size": "step_size",
}


def chains_of(mcmc: MCMC) -> tuple[Any, dict[str, Any]]:
    """Return the draws of a run and its extra fields, with a leading chain axis.

    Raises:
        ValueError: if it has not run.
    """
    check_run(mcmc)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    stats = {
        _ARVIZ_NAMES.get(name, name): value
        for name, value in fields.items()
        if np.ndim(value) == 2  # one number for each draw
    }
    return mcmc.get_samples(group_by_chain=True), stats


def settings_of(mcmc: MCMC) -> dict[str, Any]:
    """Return attributes that say how chains were run."""
    return {
        "kernel": type(mcmc.sampler).__name__,
        "num_warmup": mcmc.num_warmup,
        "thinning": mcmc.thinning,
    }


class Run(NamedTuple):
    """A run of chains as `to_arviz` takes one: of a model, and with the arguments of its call."""

    model: Any
    mcmc: MCMC
    args: tuple
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, mcmc: MCMC, result: Any, args: tuple, kwargs: dict[str, Any]) -> Run:
        """Find the model and the arguments of a run.

        Raises:
            TypeError: if other arguments are given besides.
            ValueError: if it has not run, or is of a potential energy.
        """
        if result is not None or args or kwargs:
            raise TypeError(
                "to_arviz(mcmc) uses the arguments of its run. For other arguments or another "
                "model, write to_arviz(model, mcmc, *args)."
            )
        check_run(mcmc)
        model = getattr(mcmc.sampler, "model", None)
        if model is None:
            raise ValueError(
                "the chains are of a potential energy, which has no sites of a model. Write "
                "az.convert_to_dataset(mcmc.get_samples(group_by_chain=True))."
            )
        return cls(model, mcmc, *call_of(mcmc))


def check_run(mcmc: MCMC) -> None:
    """Raise a ValueError for an `MCMC` without draws."""
    if mcmc.last_state is None:
        raise ValueError("result is an MCMC without draws: call its run first.")


def checked_members(members: ArrayLike, num_chains: int) -> np.ndarray:
    """Return one member's number for each chain.

    Raises:
        ValueError: if there is not one for each.
    """
    numbers = np.asarray(members)
    if numbers.shape != (num_chains,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"members takes one integer for each of {num_chains} chains, as "
            f"mcmc.starts.chain_members returns them; got {numbers.dtype} of shape {numbers.shape}."
        )
    return numbers
