"""Private names of NumPyro, each behind a name of ours, with the reason why it is needed.

`tests/test_compat.py` fails when one of them moves. `fit.point_guide` and `fit.guides` derive from
`AutoGuide` and override its `_setup_prototype`, as every autoguide of NumPyro does.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import jax
from numpyro.infer import HMC, MCMC
from numpyro.infer.autoguide import AutoGuide
from numpyro.optim import _NumPyroOptim
from numpyro.primitives import _PYRO_STACK
from numpyro.util import _validate_model

# The handlers around a call: a program traced inside `with handlers.scale(...)` differs.
HANDLERS: list[Any] = _PYRO_STACK

# `SVI` uses optimisers of this class unchanged. It wraps all others, which suits only optimisers
# that need nothing but a gradient.
NumPyroOptimiser = _NumPyroOptim

# Attributes of an autoguide that its set-up fills key by key: a fresh copy begins with none.
PROTOTYPES = "_prototype"


def latent_starts(guide: AutoGuide) -> dict[str, Any]:
    """Return an autoguide's start values by latent: their order is that of its flat vector."""
    return vars(guide).get("_init_locs") or {}


def hessian_of(guide: Any) -> Callable:
    """Return the `hessian_fn` that a Laplace guide was made with, or JAX's own."""
    return getattr(guide, "_hessian_fn", lambda loss, point: jax.hessian(loss)(point))


def check_plates(trace: dict[str, Any]) -> None:
    """Raise a ValueError where an axis of a sample site has no plate, which enumeration needs."""
    _validate_model(trace, plate_warning="error")


def distribution_mask(fn: Any) -> Any:
    """Return the mask of a masked distribution: log likelihoods leave out what it hides."""
    return fn._mask


def call_of(mcmc: MCMC) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of the model in the last run."""
    return mcmc._args, dict(mcmc._kwargs)


def copy_of(mcmc: MCMC) -> MCMC:
    """Return a copy with a kernel of its own that has started nothing yet."""
    own = copy(mcmc)
    own.sampler, own._cache = copy(mcmc.sampler), {}
    return own


def collect_nothing(mcmc: MCMC) -> None:
    """Let the next `mcmc.run` start its chains, and collect zeros in place of one draw."""
    kernel = mcmc.sampler
    if isinstance(kernel, HMC) and kernel._sample_fn is not None:
        # started twice, it would map its step over vectorized chains twice
        mcmc.sampler, mcmc._cache = copy(kernel), {}
    mcmc._set_collection_params(0, 0, mcmc.thinning, "warmup")


def collected_by(mcmc: MCMC) -> Any:
    """Return what a run has collected, by field, each array `(C, N, ...)`."""
    return mcmc._states


def set_outcome(mcmc: MCMC, collected: Any, state: Any) -> None:
    """Make these draws, and a state, those of the last run of `mcmc`."""
    mcmc._states, mcmc._states_flat, mcmc._last_state = collected, None, state
    mcmc._set_collection_params()
