"""Weights of the sites of processes, from `reweight`, `scale` and masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.density import plate_of
from numpyro_ensemble.gp.process import Process
from numpyro_ensemble.handlers import is_zero


def site_weight(msg: Mapping[str, Any], plates: Mapping[str, int]) -> Any:
    """Return the weight of a site's log density, without the scale of subsampled plates.

    Args:
        msg: the message of a sample site.
        plates: sizes of the plates met so far. The scale of a subsampled plate does not count: the
            functions of each copy of a process use the copy's own data once.
    """
    weight = 1.0 if msg.get("scale") is None else msg["scale"]
    subsampled = 1.0
    for frame in msg.get("cond_indep_stack", ()):
        plate = plate_of(frame.name, plates)
        if plate is not None and plates[plate] != frame.size:
            subsampled = subsampled * (plates[plate] / frame.size)
    return weight / subsampled


def mask_of(fn: dist.Distribution) -> Any:
    """Return the mask of the log density of a process, or True if there is none."""
    while not isinstance(fn, Process):
        mask = getattr(fn, "_mask", True)
        if mask is not True:
            return mask
        if not hasattr(fn, "base_dist"):
            return True
        fn = fn.base_dist
    return True if fn.observed is None else fn.observed


def _is_one(weight: Any) -> bool:
    return not has_tracers(weight) and jnp.ndim(weight) == 0 and bool(weight == 1)


def _check_number(name: str, weight: Any) -> None:
    if jnp.ndim(weight):
        raise ValueError(
            f"{name!r} has a weight of shape {jnp.shape(weight)}: a process, with all its copies, "
            f"takes one number. Give copies of different weights sites of their own."
        )


def weighted_likelihood(name: str, process: Process, weight: Any) -> Process:
    """Return a process with a weight on its observations: the noise is divided by the weight.

    Raises:
        ValueError: for a process without noise, or a weight for each copy.
    """
    if _is_one(weight):
        return process
    _check_number(name, weight)
    if jnp.ndim(process.noise) == 0 and is_zero(process.noise):
        raise ValueError(
            f"{name!r} has a likelihood of weight {weight}, and no noise that the weight could "
            f"divide: its values are known exactly. Give GaussianProcess(..., noise=), or leave "
            f"the weight out."
        )
    return process.tempered(weight)


def weighted_prior(name: str, process: Process, weights: Sequence[tuple[Any, Any]]) -> Process:
    """Return a latent process with a weight on its prior: the kernel is divided by the weight.

    A normal density to the power w is, up to a constant, a normal density whose covariance is
    divided by w. So the process at other inputs follows the divided kernel too.

    Args:
        name: name of the process.
        process: a process of latent values.
        weights: weight and mask of each site of the process.

    Raises:
        ValueError: for a prior that is masked, values of several sites, a weight for each copy, or
            a process with noise.
    """
    if any(mask is not True for _, mask in weights):
        raise ValueError(
            f"the prior of the latent process {name!r} is masked or has weight 0, so that its "
            f"values say nothing of the function elsewhere: mask its likelihood, not the process."
        )
    if all(_is_one(weight) for weight, _ in weights):
        return process
    weight = weights[0][0]
    _check_number(name, weight)
    noise_free = jnp.ndim(process.noise) == 0 and is_zero(process.noise)
    if not noise_free or len(weights) > 1:
        raise ValueError(
            f"the prior of the latent process {name!r} has a weight, which is understood for a "
            f"process without noise, whose values are one site: put the noise into the likelihood."
        )
    process = copy.copy(process)
    process.kernel = process.kernel * (1.0 / weight)
    if process.jitter is not None:
        process.jitter = process.jitter / weight
    return process
