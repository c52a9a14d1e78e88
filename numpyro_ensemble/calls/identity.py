"""When two values are equal, and which values a function takes from its surroundings.

Contents are compared if they can be listed: numbers, text, arrays, containers, functions
with what they close over, and simple objects of these. Everything else is `Unknown`: it equals
nothing, and a program that depends on it is traced anew, and found by its lowered code.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.marks import BY_VALUE, ByIdentity, Hashed, Unknown
from numpyro_ensemble.calls.opening import children_of


class _Constant:
    """An array of JAX, which cannot change: it is read only where another one might be equal."""

    __slots__ = ("array", "form")

    def __init__(self, array: jax.Array) -> None:
        self.array = array
        self.form = (array.shape, str(array.dtype), getattr(array, "weak_type", False))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant) or self.form != other.form:
            return False
        if self.array is other.array:
            return True
        readable = self.array.is_fully_addressable and other.array.is_fully_addressable
        return readable and _digest(self.array) == _digest(other.array)

    def __hash__(self) -> int:
        return hash(self.form)


class _Digests:
    """Digests of arrays, each remembered for as long as the array lives."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref, str]] = {}

    def get(self, array: Any) -> str | None:
        reference, digest = self._kept.get(id(array), (None, None))
        return digest if reference is not None and reference() is array else None

    def put(self, array: Any, digest: str) -> None:
        number = id(array)
        self._kept[number] = weakref.ref(array, lambda _: self._kept.pop(number, None)), digest


_constants = _Digests()  # arrays of JAX that were read
_casts = _Digests()  # NumPy's arrays that JAX casts in single precision


def _digest(array: jax.Array) -> str:
    """Return a digest of an array's contents, read once."""
    known = _constants.get(array)
    if known is not None:
        return known
    with jax.ensure_compile_time_eval():  # also inside a transformation
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        digest = contents(np.asarray(jax.random.key_data(array) if is_key else array))
    _constants.put(array, digest)
    return digest


def contents(array: np.ndarray) -> str:
    """Return a digest of an array's bytes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.blake2b(flat.view(np.uint8).data, digest_size=16).hexdigest()


def fingerprint(leaf: Any) -> Any:
    """Return a hashable that is equal for leaves of equal contents.

    NumPy's arrays are hashed by their contents, never by identity: an array that was changed in
    place is a different value.
    """
    mark = _mark(leaf)
    return closure_fingerprint(leaf) if mark is None else mark


def _mark(value: Any) -> Any:
    """Return the mark of a number, text or an array, None of what is made of parts."""
    kind = type(value)
    if kind in BY_VALUE or isinstance(value, np.dtype):
        return (kind, repr(value) if kind in (float, complex) else value)
    if isinstance(value, jax.core.Tracer):
        return ByIdentity(value)
    if isinstance(value, jax.Array):
        return _Constant(value)
    if (kind is np.ndarray or isinstance(value, np.generic)) and not value.dtype.hasobject:
        digest = contents(np.asarray(value))
        if kind is np.ndarray:
            _drop_old_cast(value, digest)
        return ("numpy", str(value.dtype), value.shape, digest)
    return None


def _drop_old_cast(array: np.ndarray, digest: str) -> None:
    """Clear JAX's caches where an array that it casts was changed in place.

    In single precision JAX casts an array of 64 bits once, and takes the same cast in each new
    trace for as long as a program holds it: the new trace would compute with the old contents.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype:
        return
    known = _casts.get(array)
    if known == digest:
        return
    if known is not None:
        jax.clear_caches()
    _casts.put(array, digest)


def closure_fingerprint(value: Any) -> tuple:
    """Return marks of a value and of the data that it takes from its surroundings.

    A model often reads its data from the enclosing scope. Rebinding or changing such data must not
    leave a stale program behind, so what a function closes over, its defaults and attributes, the
    globals that its code names and the functions among these are part of what a program is kept by.
    """
    marks: list[Any] = []
    _collect(value, marks, {})
    return tuple(marks)


def may_differ(mine: Any, theirs: Any) -> bool:
    """Return whether two functions may differ.

    A function is the same as itself, even if it reads values that cannot be compared.
    """
    return mine is not theirs and closure_fingerprint(mine) != closure_fingerprint(theirs)


def is_unknown(marks: Any) -> bool:
    """Return whether anything that `closure_fingerprint` has met cannot be compared."""
    return _holds(marks, lambda mark: isinstance(mark, Unknown))


def holds_tracers(marks: Any) -> bool:
    """Return whether anything that `closure_fingerprint` has met is a tracer."""
    return _holds(
        marks, lambda mark: isinstance(mark, ByIdentity) and isinstance(mark.value, jax.core.Tracer)
    )


def can_return(marks: Any) -> bool:
    """Return whether an equal key can come again.

    A model may close over values of a transformation around the call, and over what cannot be
    compared.
    """
    return not (holds_tracers(marks) or is_unknown(marks))


def _holds(marks: Any, wanted: Any) -> bool:
    if isinstance(marks, Hashed):
        marks = marks.value
    if isinstance(marks, tuple):
        return any(_holds(mark, wanted) for mark in marks)
    return bool(wanted(marks))


def _collect(value: Any, marks: list, met: dict[int, int]) -> None:
    mark = _mark(value)
    if mark is not None:
        marks.append(mark)
        return
    if id(value) in met:
        marks.append(("again", met[id(value)]))
        return
    met[id(value)] = len(met)
    mark, parts = children_of(value)
    marks.append((mark, len(parts)))
    for part in parts:
        _collect(part, marks, met)
