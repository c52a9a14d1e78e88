"""Checks of posterior draws and of calls that need concrete values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.inputs import contradictions
from numpyro_ensemble.gp.sites import Site
from numpyro_ensemble.results import EnsembleResult

_FAILURES = {  # flag: what its failure means, and the remedy
    "finite": ("has values that are not finite", "Leave these draws out"),
    "valid": (
        "has hyperparameters out of their range, such as ones that are not positive",
        "Give them a support within it",
    ),
    "agrees": (
        "has different values at equal inputs without noise",
        "Give the process the noise's variance, or average them",
    ),
    "solved": (
        "has a kernel matrix that could not be solved with",
        "More noise or jitter, double precision (numpyro.enable_x64()), or with solver='cg' a "
        "larger tolerance",
    ),
}


def flags_of(sites: dict[str, Site], solved: dict[str, jax.Array]) -> dict[str, Any]:
    """Return, for each site, a flag for each check of `_FAILURES`: true if it passes."""
    flags = {}
    for name, site in sites.items():
        process = site.process
        observed = process.observed
        values = site.flat() if observed is None else jnp.where(observed[None], site.flat(), 0)
        agrees = jnp.asarray(True)
        if isinstance(process, GaussianProcess):  # a CollapsedSparseGP always has noise
            noise = process.variances if observed is None else process.variances + ~observed
            agrees = ~contradictions(process.X, values, noise, process.extra)
        flags[name] = {
            "finite": jnp.isfinite(values).all(),
            "valid": process.kernel.is_valid() & (process.variances >= 0).all(),
            "agrees": agrees,
            "solved": solved[name],
        }
    return flags


def check_flags(
    flags: dict[str, dict[str, jax.Array]], num_draws: int, places: np.ndarray | None = None
) -> None:
    """Raise a ValueError that counts and lists the draws that fail a check.

    Args:
        flags: flags that `flags_of` returned, of all draws or of those at `places`.
        num_draws: number of draws.
        places: indices of the draws that the flags belong to (default: all draws).
    """
    for name, of_site in flags.items():
        for flag, (said, remedy) in _FAILURES.items():
            if has_tracers(of_site[flag]):
                continue
            bad = np.flatnonzero(~np.asarray(of_site[flag]))
            bad = bad if places is None else np.unique(places[bad])
            if len(bad):
                some = f"{bad[:5].tolist()}{' and more' if len(bad) > 5 else ''}"
                raise ValueError(
                    f"{name!r} {said} in {len(bad)} of {num_draws} posterior draws: {some}. "
                    f"{remedy}."
                )


def check_inputs(finite: dict[str, jax.Array]) -> None:
    """Raise a ValueError for a process whose inputs in a call are not all finite."""
    for name, flags in finite.items():
        if not has_tracers(flags) and not holds(flags):
            raise ValueError(
                f"the inputs of {name!r} in this call are not all finite: leave out the rows "
                f"with NaN or infinity, or impute them."
            )


_PART = 1 << 20  # largest number of entries read at once


def arrays_of(*given: Any) -> list[Any]:
    """Return the arrays among arguments."""
    return [x for x in jax.tree.leaves(given) if np.ndim(x)]


def digest_in_parts(arrays: list[Any]) -> np.uint32:
    """Compute `digest` on the host, in parts, for arrays that may not fit on a device."""
    total = np.zeros((), np.uint64)
    for x in arrays:
        if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool:
            summed = np.zeros((), np.uint64)
            for start in range(0, len(x), rows := max(_PART // max(x[:1].size, 1), 1)):
                part = np.asarray(x[start : start + rows]).astype(np.float32).ravel()
                first = start * x[:1].size
                places = 2 * np.arange(first, first + part.size, dtype=np.uint64) + 1
                summed += (part.view(np.uint32) * places.astype(np.uint32)).sum(dtype=np.uint64)
            total = (np.uint64(2654435761) * total + summed) & np.uint64(0xFFFFFFFF)
    return np.uint32(total)


def digest(arrays: list[Any]) -> jax.Array:
    """Return a hash of the contents of arrays."""
    total = jnp.zeros((), jnp.uint32)
    for x in arrays:
        if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool:
            bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32).ravel(), jnp.uint32)
            places = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
            total = np.uint32(2654435761) * total + (bits * places).sum(dtype=jnp.uint32)
    return total


def holds(flags: Any) -> bool:
    """Return whether all flags are true."""
    return bool(np.asarray(flags).all())


def flat_samples(samples: Any, batch_ndims: int) -> tuple[dict[str, jax.Array], int, int]:
    """Return samples with one leading axis, the number of draws and the number of members."""
    fitted = isinstance(samples, EnsembleResult)
    if isinstance(samples, EnsembleResult):
        samples, batch_ndims = samples.params, 1
    if not isinstance(samples, dict):
        raise TypeError(
            f"posterior_samples takes a dict by site name or an EnsembleResult, got "
            f"{type(samples).__name__}."
        )
    if batch_ndims not in (0, 1, 2):
        raise ValueError(f"batch_ndims takes 0, 1 or 2, got {batch_ndims}.")
    samples = jax.tree.map(jnp.asarray, dict(samples))  # values may be trees of network parameters
    lead = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value.shape[:batch_ndims]
        for path, value in jax.tree.leaves_with_path(samples)
    }
    if len(set(lead.values())) > 1 or any(len(shape) < batch_ndims for shape in lead.values()):
        raise ValueError(
            f"posterior_samples must lead with the same {batch_ndims} axes, got {lead}: "
            f"batch_ndims is the number of leading axes, 0 for one draw without an axis of draws."
        )
    shape: tuple[int, ...] = next(iter(lead.values()), ())
    number = int(np.prod(shape))
    if not number:
        raise ValueError("posterior_samples hold no draw.")
    flat = jax.tree.map(lambda x: x.reshape(number, *x.shape[batch_ndims:]), samples)
    members = number if fitted else shape[0] if batch_ndims == 2 else 1
    return flat, number, members
