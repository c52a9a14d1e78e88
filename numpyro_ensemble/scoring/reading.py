"""Draws and observations, from arrays or from ArviZ data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.mapping import check_mixture


def is_array(value: Any) -> bool:
    """Return whether a value is an array rather than ArviZ data."""
    return isinstance(value, np.ndarray | jax.Array | list | tuple)


def group_of(data: Any, name: str) -> Any:
    """Return a group of ArviZ data of either line, None if the data lacks it.

    Raises:
        TypeError: if `data` is not ArviZ data.
    """
    names = getattr(data, "children", None)
    if names is None and not callable(getattr(data, "groups", None)):
        raise TypeError(
            f"draws takes an array (S, N), or ArviZ data (from to_arviz, for example); got "
            f"{type(data).__name__}."
        )
    known = set(names) if names is not None else set(data.groups())
    return data[name] if name in known else None


def holds_all_members(data: Any) -> bool:
    """Return whether the data has the chains of all members, as mixture densities assume."""
    posterior = group_of(data, "posterior")
    chains = posterior.sizes["chain"]
    return bool(posterior.attrs.get("num_chains", chains) == chains)


def name_of(found: Any, var_name: str | None) -> str:
    """Return the name of a group's variable, which must be given if there are several."""
    names = list(found.data_vars)
    if var_name is None and len(names) == 1:
        return names[0]
    if var_name is None or var_name not in names:
        raise ValueError(f"var_name takes one of {names}, got {var_name!r}.")
    return var_name


def variable(data: Any, group: str, var_name: str | None) -> tuple[str, jax.Array]:
    """Return a variable of ArviZ data, with chains and draws as one leading axis, and its name."""
    found = group_of(data, group)
    if found is None:
        raise ValueError(f"the ArviZ data has no group {group!r}.")
    name = name_of(found, var_name)
    values = found[name].values
    return name, jnp.asarray(values.reshape(-1, *values.shape[2:]))


def observed(data: Any, name: str) -> np.ndarray | None:
    """Return the observations of ArviZ data, NaN where they are masked; None if there are none."""
    found = group_of(data, "observed_data")
    return None if found is None or name not in found else found[name].values


def read(
    draws: Any, y: ArrayLike | None, weights: Any = None, **where: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return draws `(S, N)`, observations `(N,)` and weights `(S,)`.

    Masked observations of ArviZ data, and draws that are not finite, are left out.
    """
    draws, name, data = find_draws(draws, **where)
    if y is None and data is not None:
        y = observed(data, name)
    if y is None:
        raise ValueError("y is missing: pass the observations, (N,) for draws (S, N).")
    y = _real("y", y)
    if draws.shape[1:] != y.shape:
        raise ValueError(
            f"draws have shape {draws.shape} and y {y.shape}: draws takes (S, N) for y of (N,)."
        )
    draws, y = draws.reshape(len(draws), -1), y.reshape(-1)
    draws, p = without_failed(draws, weights, data, jnp.isfinite)
    if has_tracers(y):
        return draws, y, p
    seen = ~np.isnan(np.asarray(y))
    if data is None and not seen.all():
        raise ValueError(
            f"y has NaN at {np.flatnonzero(~seen)[:10].tolist()}: leave these observations out, "
            f"and their columns of the draws."
        )
    return (draws, y, p) if seen.all() else (draws[:, seen], y[seen], p)


def find_draws(
    draws: Any, *, group: str = "posterior_predictive", var_name: str | None = None, **unknown: Any
) -> tuple[jax.Array, str, Any]:
    """Return draws `(S, ...)`, the variable's name, and their ArviZ data or None."""
    if unknown:
        raise TypeError(
            f"unknown options {sorted(unknown)}: the options are weights, group and var_name."
        )
    name, data = "", None
    if not is_array(draws):
        data = draws
        name, draws = variable(data, group, var_name)
    draws = _real("draws", draws)
    if draws.ndim < 1 or not draws.size:
        raise ValueError(f"draws takes shape (S, N), for S draws; got {draws.shape}.")
    return draws, name, data


def without_failed(
    rows: jax.Array, weights: Any, data: Any, good: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Return the rows that are good everywhere and their weights, and warn of the others."""
    p = _check_weights(weights, len(rows), data)
    if has_tracers(rows):
        return rows, p
    kept = np.asarray(good(rows).reshape(len(rows), -1).all(axis=1))
    if kept.all():
        return rows, p
    if not kept.any():
        raise ValueError(f"none of the {kept.size} draws is finite.")
    warn(f"{(~kept).sum()} of {kept.size} draws are not finite and are left out.")
    return rows[kept], None if p is None else p[kept]


def _check_weights(weights: Any, number: int, data: Any) -> jax.Array | None:
    """Return one weight for each draw; a member's weight is that of each of its draws."""
    if weights is None:
        return None
    if data is not None:
        weights = _spread(weights, data)
    return jnp.asarray(check_mixture(weights, number, "draws"))


def _spread(weights: Any, data: Any) -> Any:
    posterior = group_of(data, "posterior")
    if posterior is None or np.ndim(weights) != 1:
        return weights
    sizes = posterior.sizes
    weights = jnp.asarray(weights)
    if len(weights) == posterior.attrs.get("ensemble_size", sizes["chain"]) > sizes["chain"]:
        weights = weights[posterior.coords["chain"].values]
    return jnp.repeat(weights, sizes["draw"]) if len(weights) == sizes["chain"] else weights


def _real(name: str, values: Any) -> jax.Array:
    values = jnp.asarray(values)
    if jnp.iscomplexobj(values):
        raise TypeError(f"{name} takes real numbers, got {values.dtype}.")
    return values.astype(float) if values.dtype == bool else values
