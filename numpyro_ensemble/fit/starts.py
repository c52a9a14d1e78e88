"""Checks of start values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.module import ParamShape

from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.results import name_members


def start_forms(init_params: Any, keys: jax.Array) -> dict[str, Any]:
    """Return one member's start values by name, or their shapes where they come from its key."""
    if callable(init_params):
        init_params = jax.eval_shape(lambda k: init_params(k[0]), keys)
    return init_params if isinstance(init_params, dict) else {}


def arrays_alone(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters without the placeholders of latents in NumPyro's random modules.

    A parameter of placeholders alone is left out. In other parameters zeros stand for them, since
    the module uses its latents there.
    """

    def is_place(leaf: Any) -> bool:
        return isinstance(leaf, ParamShape)

    def fill(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape) if is_place(leaf) else leaf

    held = {
        name: value
        for name, value in params.items()
        if jax.tree.leaves(value)
        or not any(map(is_place, jax.tree.leaves(value, is_leaf=is_place)))
    }
    return jax.tree.map(fill, held, is_leaf=is_place)


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
    given = arrays_alone(given)
    unknown = sorted(given.keys() - form.keys())
    if unknown:
        raise ValueError(
            f"init_params names {unknown}; the fit's parameters are {sorted(form)}, in the form of "
            f"result.params."
        )
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


def kept(given: dict[str, Any], reached: dict[str, Any]) -> dict[str, jax.Array]:
    """Return for each start value of one member whether the fit uses it unchanged."""

    def same(a: jax.Array, b: jax.Array) -> jax.Array:
        if not is_inexact(a):
            return jnp.asarray(True)
        # values that are not finite are found by the loss at the start
        return (jnp.isclose(a, b, rtol=1e-3, atol=1e-3) | ~jnp.isfinite(a)).all()

    def every(a: Any, b: Any) -> jax.Array:
        return jnp.stack([jnp.asarray(True), *jax.tree.leaves(jax.tree.map(same, a, b))]).all()

    return {name: every(value, reached[name]) for name, value in given.items()}


def check_kept(inside: dict[str, jax.Array]) -> None:
    """Raise a ValueError where start values lie outside the support; flags are `(E,)` by name."""
    for name, flags in inside.items():
        if not np.asarray(flags).all():
            raise ValueError(
                f"init_params[{name!r}] is outside the support of {name!r} for members "
                f"{name_members(~np.asarray(flags))}. It takes constrained values, in the form of "
                f"result.params."
            )


def all_alike(params: dict[str, Any]) -> jax.Array:
    """Return whether all members agree in every parameter, or in all of those of one module."""

    def same(tree: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
        return jnp.stack([(leaf == leaf[:1]).all() for leaf in leaves]).all()

    def is_module(name: str) -> bool:
        # the parameters of a random module serve as shapes only: latents stand in for them
        stem = name.removesuffix("$params")
        latents = any(other.startswith(stem) and other != name for other in params)
        return not isinstance(params[name], jax.Array) and not latents

    filled = {k: v for k, v in params.items() if any(map(is_inexact, jax.tree.leaves(v)))}
    if not filled:
        return jnp.asarray(False)
    modules = [same(v) for k, v in filled.items() if is_module(k)]
    return jnp.stack([same(filled), *modules]).any()
