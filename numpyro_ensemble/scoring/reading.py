"""Draws and observations, from arrays or from ArviZ data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.draws import check_mixture


def is_array(value: Any) -> bool:
    """Say whether a value is an array rather than ArviZ data."""
    return isinstance(value, np.ndarray | jax.Array | list | tuple)


def group_of(data: Any, name: str) -> Any:
    """Return a group of ArviZ data of either kind, None where it has none."""
    names = getattr(data, "children", None)
    known = set(names) if names is not None else set(data.groups())
    return data[name] if name in known else None


def variable(data: Any, group: str, var_name: str | None) -> jax.Array:
    """Return a variable of ArviZ data, with chains and draws as one leading axis."""
    found = group_of(data, group)
    if found is None:
        raise ValueError(f"the ArviZ data has no group {group!r}.")
    names = list(found.data_vars)
    if var_name is None and len(names) != 1:
        raise ValueError(f"var_name must be one of {names}.")
    values = found[var_name or names[0]].values
    return jnp.asarray(values.reshape(-1, *values.shape[2:]))


def read(
    draws: Any,
    y: ArrayLike | None,
    *,
    group: str = "posterior_predictive",
    var_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return draws `(S, N)` and observations `(N,)`."""
    if not is_array(draws):
        data = draws
        draws = variable(data, group, var_name)
        if y is None:
            seen = group_of(data, "observed_data")
            name = var_name or next(iter(group_of(data, group).data_vars))
            y = seen[name].values
    if y is None:
        raise ValueError("y, the observations, is missing.")
    draws, y = jnp.asarray(draws), jnp.asarray(y)
    if draws.shape[1:] != y.shape:
        raise ValueError(
            f"draws have shape {draws.shape} and y {y.shape}: draws must lead, (S, N) for (N,)."
        )
    return draws.reshape(len(draws), -1), y.reshape(-1)


def check_draw_weights(weights: Any, draws: jax.Array) -> jax.Array | None:
    """Return one weight for each draw; they need not add up to 1."""
    return None if weights is None else jnp.asarray(check_mixture(weights, len(draws), "draws"))
