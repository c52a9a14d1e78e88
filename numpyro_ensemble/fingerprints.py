"""When two values are equal, and what a function takes from its surroundings."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

_BY_VALUE = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype)
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")
_CONFIGURATION = (  # what an autoguide is made with; the rest of it comes from its set-up
    "model", "init_loc_fn", "create_plates", "_init_scale", "_guides",
    "local_model", "global_guide", "local_guide", "surrogate_model",
)  # fmt: skip


class Hashed:
    """A hashable value that is hashed once."""

    __slots__ = ("value", "_hash")

    def __init__(self, value: Any) -> None:
        self.value, self._hash = value, hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Hashed) and self.value == other.value)

    def __hash__(self) -> int:
        return self._hash


class Same:
    """Equal to another one of the very same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(leaf: Any) -> Any:
    """Return a hashable that is equal for leaves of equal contents.

    Arrays are hashed by their contents, never by identity: one that was changed in place is
    another. What cannot be compared by contents equals nothing, itself included.
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():  # inside a transformation as well
            return ("key", str(leaf.dtype), fingerprint(jax.random.key_data(leaf)))
    if isinstance(leaf, np.ma.MaskedArray):
        return object()
    if isinstance(leaf, np.ndarray | np.generic | jax.Array) and not leaf.dtype.hasobject:
        contents = np.ascontiguousarray(leaf)
        kind = "jax" if isinstance(leaf, jax.Array) else "numpy"
        digest = hashlib.blake2b(contents.reshape(-1).view(np.uint8).data).hexdigest()
        return (
            kind,
            str(contents.dtype),
            np.shape(leaf),
            getattr(leaf, "weak_type", False),
            digest,
        )
    if isinstance(leaf, _BY_VALUE):
        return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)
    if callable(leaf):
        return captured(leaf)
    if hasattr(leaf, "to_numpy"):  # a pandas object
        values = leaf.to_numpy()
        names = [tuple(getattr(leaf, axis, ())) for axis in ("index", "columns")]
        return (type(leaf), fingerprint(values) if values.dtype != object else object(), *names)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = dataclasses.fields(leaf)
        return (type(leaf), *(fingerprint(getattr(leaf, field.name)) for field in fields))
    return object()


def captured(fn: Any) -> tuple:
    """Fingerprint a function with the data that it takes from its surroundings.

    A model often reads its data from the enclosing scope. Rebinding or changing such data must not
    leave a stale program behind, so what a function closes over, its defaults, the globals that
    its code names and the functions among these are part of what a program is keyed by.
    """
    marks: list[Any] = []
    _collect(fn, marks, {})
    return tuple(marks)


def holds_tracers(marks: Any) -> bool:
    """Return whether what `captured` has returned refers to a tracer."""
    if isinstance(marks, tuple):
        return any(map(holds_tracers, marks))
    return isinstance(marks, Same) and isinstance(marks.value, jax.core.Tracer)


def _collect(value: Any, marks: list, met: dict[int, int]) -> None:
    if isinstance(value, jax.core.Tracer):
        marks.append(Same(value))
        return
    if isinstance(value, (np.ndarray, np.generic, jax.Array, *_BY_VALUE)):
        marks.append(fingerprint(value))
        return
    if id(value) in met:
        marks.append(("again", met[id(value)]))
        return
    met[id(value)] = len(met)
    mark, parts = open_up(value)
    marks.append((mark, len(parts)))
    for part in parts:
        _collect(part, marks, met)


def open_up(value: Any) -> tuple[Any, list[Any]]:
    """Return what tells a value apart by itself, and the parts that it is made of."""
    if isinstance(value, list | tuple):
        return type(value), list(value)
    if isinstance(value, set | frozenset):
        return type(value), sorted(value, key=repr)
    if isinstance(value, dict):
        return (type(value), tuple(map(repr, value))), list(value.values())
    if isinstance(value, functools.partial):
        keywords = tuple(value.keywords)
        return ("partial", keywords), [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return "method", [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod):
        return type(value), [value.__func__]
    if isinstance(value, property):
        return "property", [value.fget]
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType) or _in_library(value):
        return Same(value), []
    if isinstance(value, types.FunctionType):
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        names = [n for n in _names(value.__code__) if n in value.__globals__]
        reached = [value.__globals__[n] for n in names]
        defaults = [value.__defaults__, value.__kwdefaults__]
        return (value.__code__, tuple(names)), [*cells, *reached, *defaults]
    if isinstance(value, type):  # a class of the user's own: its functions and attributes
        own = {n: v for n, v in vars(value).items() if n not in _OF_CLASSES}
        return (Same(value), tuple(own)), [*own.values(), *value.__bases__]
    if isinstance(value, AutoGuide):
        held = {name: v for name, v in vars(value).items() if name in _CONFIGURATION}
        return Same(value), list(held.values())
    if hasattr(value, "to_numpy"):
        return fingerprint(value), []
    leaves, treedef = jax.tree.flatten(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return treedef, leaves
    if isinstance(value, Messenger):  # a handler around a model: its state in use does not count
        held = {n: v for n, v in vars(value).items() if not n.startswith("_")}
        return (type(value), tuple(held)), list(held.values())
    return _open_object(value)


def _open_object(value: Any) -> tuple[Any, list[Any]]:
    """Open an object by its attributes, and those of its class; one that hides them is new."""
    wrapped = getattr(value, "__wrapped__", None)
    parts = [] if wrapped is None else [wrapped]
    if _is_library(type(value).__module__):
        return Same(value), parts + list(getattr(value, "__dict__", {}).values())
    slots = [n for cls in type(value).__mro__ for n in getattr(cls, "__slots__", ())]
    names = [n for n in slots if n not in ("__dict__", "__weakref__") and hasattr(value, n)]
    if not hasattr(value, "__dict__") and not slots and not callable(value):
        return object(), []
    held = [getattr(value, n) for n in names] + list(getattr(value, "__dict__", {}).values())
    return Same(value), [*parts, *held, type(value)]


def _in_library(value: Any) -> bool:
    """Say whether a function or class comes from a library whose code does not change."""
    if not isinstance(value, types.FunctionType | type) or getattr(value, "__closure__", None):
        return False
    return _is_library(value.__module__)


@functools.cache
def _is_library(module: str | None) -> bool:
    """Say whether a module is installed, or Python's own, rather than the user's code."""
    name = (module or "").partition(".")[0]
    if name == __name__.partition(".")[0] or name in sys.stdlib_module_names:
        return name != "__main__"
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code and the code within it take from elsewhere, in order."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(sorted(set(code.co_names).union(*inner)))
