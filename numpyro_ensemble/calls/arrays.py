"""Which leaves of arguments are arrays, and which of these a compiled program can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array that a program could take as an input."""
    return isinstance(leaf, np.ndarray | jax.Array)


def is_traceable(leaf: Any) -> bool:
    """Return whether a leaf is an array that JAX can take: not one of text, objects or masks."""
    if isinstance(leaf, jax.Array):
        return True
    if not isinstance(leaf, np.ndarray) or isinstance(leaf, np.ma.MaskedArray):
        return False
    numeric = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool
    return bool(numeric) and not _loses_by_narrowing(leaf)


def _loses_by_narrowing(array: np.ndarray) -> bool:
    """Return whether the values of a NumPy array change in the precision of JAX.

    Seconds since 1970 change in float32, for example; a model may subtract the first in NumPy.
    """
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow == array.dtype or not array.size:
        return False
    if jnp.issubdtype(narrow, jnp.integer):
        limits = jnp.iinfo(narrow)
        return bool(array.min() < limits.min or array.max() > limits.max)
    finite = array[np.isfinite(array)]
    if not finite.size:
        return False
    with np.errstate(over="ignore"):
        lost = np.abs(finite - finite.astype(narrow)).max()
    return bool(lost > 1e-4 * np.abs(finite - finite[0]).max() and lost > 0)
