"""Checking the start values that a user gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_starts(given: Any, form: dict[str, Any], ensemble_size: int | None) -> tuple[dict, dict]:
    """Check start values by name against the form of one member's parameters.

    Args:
        given: a dict in the form of `result.params`, or part of one.
        form: shape and dtype of each parameter of one member.
        ensemble_size: number of members, None where the values are those of one member.

    Returns:
        The values, converted, and for each leaf 0 if it has a member axis, None if it is shared.

    Raises:
        ValueError: for unknown names, other tree structures or other shapes.
    """
    if not isinstance(given, dict):
        raise TypeError(
            f"init_params takes a dict by name, or a callable of a key that returns one; got "
            f"{type(given).__name__}."
        )
    unknown = sorted(given.keys() - form.keys())
    if unknown:
        raise ValueError(f"init_params names {unknown}; the fit has {sorted(form)}.")
    values: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for name, value in given.items():
        values[name], axes[name] = _check_one(name, value, form[name], ensemble_size)
    return values, axes


def _check_one(name: str, value: Any, form: Any, size: int | None) -> tuple[Any, Any]:
    if isinstance(form, jax.ShapeDtypeStruct) and isinstance(value, list | tuple):
        value = np.asarray(value)
    leaves, treedef = jax.tree.flatten(value)
    wanted, expected = jax.tree.flatten(form)
    if treedef != expected:
        raise ValueError(f"init_params[{name!r}] has structure {treedef}, expected {expected}.")
    axes = []
    for leaf, want in zip(leaves, wanted, strict=True):
        shape = np.shape(leaf)
        if shape != want.shape and (size is None or shape != (size, *want.shape)):
            per_member = "" if size is None else f" or, per member, {(size, *want.shape)}"
            raise ValueError(
                f"init_params[{name!r}] has shape {shape}; it takes {want.shape}{per_member}."
            )
        axes.append(None if shape == want.shape else 0)
    converted = [
        leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf, want.dtype)
        for leaf, want in zip(leaves, wanted, strict=True)
    ]
    return jax.tree.unflatten(treedef, converted), jax.tree.unflatten(treedef, axes)
