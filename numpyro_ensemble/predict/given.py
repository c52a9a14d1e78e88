"""The user's samples and parameters of members, from which predictions are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.fit.state import Setup, setup_of
from numpyro_ensemble.mapping import check_failed, check_mixture, finite_members, pick
from numpyro_ensemble.results import EnsembleResult, check_gathered


class Given(NamedTuple):
    """Samples and parameters of members; every array leads with the member axis.

    Attributes:
        samples: by site name, with an axis of draws besides if `ndims` is 2.
        params: of the model and the guide.
        size: number of members, None where none were given.
        number: number of draws from each member.
        ndims: number of leading axes that the user's samples had.
        fitted: names of the parameters of a fit.
        finite: which members were given with finite numbers; the others have been left out.
        known: names of the fitted model's sites, None where they are not known.
    """

    samples: dict[str, Any]
    params: dict[str, Any]
    size: int | None
    number: int
    ndims: int
    fitted: frozenset[str]
    finite: np.ndarray
    known: frozenset[str] | None = None
    setup: Setup | None = None  # of the members' guides

    def finite_weights(self, weights: ArrayLike | None) -> np.ndarray | None:
        """Return the weights of the members that are left, adding up to 1."""
        if weights is None:
            return None
        if has_tracers(weights):
            raise ValueError("weights set each member's number of draws, so they cannot be traced.")
        values = np.asarray(check_mixture(weights, self.finite.size, "members"))[self.finite]
        if not values.sum() > 0:
            raise ValueError("weights add up to 0 over the finite members.")
        return values / values.sum()


def read_given(
    posterior_samples: Any,
    params: Any,
    guide: Callable | None,
    num_samples: int | None,
    batch_ndims: int | None,
    on_failed: str,
) -> Given:
    """Read the arguments of `EnsemblePredictive`, and leave out members that are not finite."""
    samples, fitted = posterior_samples, frozenset[str]()
    ended_well: Any = True
    known = setup = None
    if isinstance(posterior_samples, EnsembleResult):
        if params is not None:
            raise ValueError("the EnsembleResult has the params: leave params out.")
        if batch_ndims not in (None, 1):
            raise ValueError(f"an EnsembleResult has batch_ndims=1, got {batch_ndims}.")
        result = posterior_samples
        check_gathered(result)
        fitted, ended_well = frozenset(result.params), result.finite
        setup = setup_of(result.state)
        if setup is not None and setup.template is not None:
            known = frozenset(setup.template.sites)
        samples, params = result.params, result.state.mutable_state or {}
        if guide is not None:
            samples, params = None, {**result.params, **params}
    samples, params = _sorted(samples, params)
    if samples is not None and guide is not None:
        raise ValueError("give either posterior_samples or a guide, not both.")
    if batch_ndims not in (None, 0, 1, 2):
        raise ValueError(f"batch_ndims takes 0, 1 or 2, got {batch_ndims}.")
    ndims = 1 if batch_ndims is None else batch_ndims
    if ndims == 2 and samples is None:
        raise ValueError("batch_ndims=2 needs posterior_samples, of leading axes (E, S).")
    samples, params = samples or {}, params or {}
    if num_samples is None and not samples and (guide is not None or not fitted):
        raise ValueError(
            "num_samples is needed with a guide, and for predictions from the prior: pass "
            "num_samples=100."
        )
    if ndims == 0:
        samples, params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (samples, params))
    size, number = _size(samples, params, num_samples, ndims)
    finite = np.ones(size or 1, bool)
    if size is not None and not has_tracers((samples, params, ended_well)):
        finite = finite_members((samples, params), size) & np.asarray(ended_well)
        check_failed(finite, on_failed)
        if not finite.all():
            left = np.flatnonzero(finite)
            samples, params = pick((samples, params), left)
            setup = None if setup is None else setup.of_members(left)
            size = int(finite.sum())
    return Given(samples, params, size, number, ndims, fitted, finite, known, setup)


def _sorted(samples: Any, params: Any) -> tuple[dict | None, dict | None]:
    """Check the types; the parameters of a module are a tree, which NumPyro takes as params."""
    for name, value in (("posterior_samples", samples), ("params", params)):
        if value is not None and not isinstance(value, dict):
            raise TypeError(
                f"{name} takes a dict by site name"
                + (" or an EnsembleResult" if name == "posterior_samples" else "")
                + f", got {type(value).__name__}."
            )
    trees = {k: v for k, v in (samples or {}).items() if not jax.tree_util.all_leaves([v])}
    if trees:
        samples = {k: v for k, v in samples.items() if k not in trees}
        params = {**trees, **(params or {})}
    return samples, params


def _size(
    samples: dict, params: dict, num_samples: int | None, ndims: int
) -> tuple[int | None, int]:
    """Return the number of members, None without members, and the draws of each."""
    lead = _leading(samples, 2 if ndims == 2 else 1, "posterior_samples")
    size = _leading(params, 1, "params")
    if lead and size and lead[:1] != size:
        raise ValueError(
            f"posterior_samples have {lead[0]} members, and params {size[0]}: give as many of both."
        )
    number = num_samples or 1
    if lead and ndims == 2:
        if num_samples not in (None, lead[1], lead[0] * lead[1]):
            raise ValueError(
                f"num_samples={num_samples}, and posterior_samples lead with {lead}: leave "
                f"num_samples out."
            )
        number = lead[1]
    return (lead or size or (None,))[0], number


def _leading(tree: dict[str, Any], ndims: int, option: str) -> tuple[int, ...]:
    """Return the leading shape of all arrays, `()` if there are no arrays."""
    shapes = {
        name: {np.shape(leaf)[:ndims] for leaf in jax.tree.leaves(value)}
        for name, value in tree.items()
    }
    found = set().union(*shapes.values()) if shapes else set()
    if len(found) > 1 or any(len(shape) < ndims for shape in found):
        named = {name: sorted(values) for name, values in shapes.items()}
        raise ValueError(
            f"{option} must have the same leading axes, of members"
            f"{' and draws' if ndims == 2 else ''}; got {named}."
        )
    return next(iter(found), ())
