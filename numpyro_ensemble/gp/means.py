"""Means, and other functions of inputs, as pytrees of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers


@jax.tree_util.register_pytree_node_class
class Function:
    """A callable whose arrays are leaves and whose other parts are fixed.

    A module is a pytree already, but some of its leaves may be no arrays, such as activation
    functions. The arrays of a `functools.partial` are leaves too. A plain function has no leaves.
    """

    def __init__(self, fn: Callable) -> None:
        leaves, treedef = jax.tree.flatten(_opened(fn))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        self.arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
        self.rest = tuple(
            None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )
        self.is_array, self.treedef = tuple(is_array), treedef

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        arrays = iter(self.arrays)
        leaves = [
            next(arrays) if array else rest
            for rest, array in zip(self.rest, self.is_array, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)(*args)

    def tree_flatten(self) -> tuple[list, tuple]:
        """Return the arrays, and the fixed parts."""
        return self.arrays, (self.rest, self.is_array, self.treedef)

    @classmethod
    def tree_unflatten(cls, fixed: tuple, arrays: list) -> Function:
        """Rebuild the callable from its fixed parts and its arrays."""
        self = object.__new__(cls)
        self.arrays = list(arrays)
        self.rest, self.is_array, self.treedef = fixed
        return self

    def closes_over_tracers(self) -> bool:
        """Return whether a fixed part closes over traced values."""
        return any(
            has_tracers([cell.cell_contents for cell in getattr(part, "__closure__", None) or ()])
            for part in self.rest
            if part is not None
        )


def _opened(fn: Callable) -> Callable:
    if isinstance(fn, functools.partial) and not isinstance(fn, jax.tree_util.Partial):
        return jax.tree_util.Partial(_opened(fn.func), *fn.args, **fn.keywords)
    return fn


def as_mean(mean_fn: Any) -> Any:
    """Return a mean as None, one number, or a `Function` of the inputs.

    Raises:
        TypeError: if `mean_fn` is none of these.
    """
    if mean_fn is None or isinstance(mean_fn, Function):
        return mean_fn
    if callable(mean_fn):
        return Function(mean_fn)
    if jnp.shape(mean_fn) != ():
        raise TypeError(
            f"mean_fn takes one number or a function of the inputs, got shape {jnp.shape(mean_fn)}."
        )
    return mean_fn


def mean_at(mean_fn: Any, X: jax.Array) -> jax.Array:
    """Evaluate a mean at inputs `(N, D)`.

    Raises:
        ValueError: if the mean function does not return one number for each input.
    """
    if mean_fn is None:
        return jnp.zeros(len(X), X.dtype)
    mean = jnp.asarray(mean_fn(X) if callable(mean_fn) else mean_fn)
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        mean = mean.astype(X.dtype)
    if not callable(mean_fn):
        return jnp.broadcast_to(mean, (len(X),))
    if mean.shape != (len(X),):
        raise ValueError(
            f"mean_fn must return shape ({len(X)},) for {len(X)} inputs, got {mean.shape}."
        )
    return mean
