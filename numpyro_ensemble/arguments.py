"""Model arguments: which stay concrete, which are traced, and when two sets of them are equal."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

FIXED, TRACED, BATCH, MEMBER = "fixed", "traced", "batch", "member"


class Arguments(NamedTuple):
    """The flattened arguments of a model; each leaf is fixed, traced, batched or per member."""

    treedef: Any
    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    leaves: tuple[Any, ...]

    def select(self, kind: str) -> list[Any]:
        """Return the leaves of one kind."""
        return [leaf for leaf, k in zip(self.leaves, self.kinds, strict=True) if k == kind]

    def labelled(self, kind: str) -> list[tuple[str, Any]]:
        """Return names and values of the leaves of one kind."""
        triples = zip(self.labels, self.leaves, self.kinds, strict=True)
        return [(label, leaf) for label, leaf, k in triples if k == kind]

    @property
    def dynamic(self) -> dict[str, list[Any]]:
        """Return the leaves that a compiled program takes as its inputs."""
        return {kind: self.select(kind) for kind in (TRACED, BATCH, MEMBER)}

    def rebuild(self, dynamic: Mapping[str, Sequence[Any]]) -> tuple[tuple, dict]:
        """Put `(args, kwargs)` together again, with the given values of the dynamic leaves."""
        streams = {kind: iter(leaves) for kind, leaves in dynamic.items()}
        leaves = [
            leaf if kind == FIXED else next(streams[kind])
            for leaf, kind in zip(self.leaves, self.kinds, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def key(self) -> tuple:
        """Return a hashable that is equal for arguments that one compiled program can serve."""
        return (self.treedef, self.kinds, tuple(fingerprint(leaf) for leaf in self.select(FIXED)))

    def form(self) -> tuple:
        """Return a hashable like `key`, for arguments some of which are tracers."""
        marks = [
            (np.shape(leaf), str(leaf.dtype))
            if kind != FIXED or isinstance(leaf, jax.core.Tracer)
            else fingerprint(leaf)
            for leaf, kind in zip(self.leaves, self.kinds, strict=True)
        ]
        return (self.treedef, self.kinds, tuple(marks))


NO_ARGUMENTS = Arguments(jax.tree.structure(((), {})), (), (), ())


def has_tracers(tree: Any) -> bool:
    """Say whether any leaf is a tracer, so that nothing about its value is known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def traces(tree: Any) -> bool:
    """Say whether a transformation is under way that programs made now would be part of."""
    return has_tracers(tree) or isinstance(jax.lax.full((), 0), jax.core.Tracer)


def arrange(
    model: Callable,
    args: tuple,
    kwargs: dict,
    *,
    batched: bool = False,
    batch_args: Iterable[str | int] | None = None,
    member_args: Iterable[str | int] = (),
    jit_model_args: bool = False,
) -> Arguments:
    """Sort the leaves of `(args, kwargs)` by how a compiled program sees them.

    Raises:
        ValueError: if `batch_args` or `member_args` name what is no argument, or no array.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    names = _positional_names(model)
    owners = [_owner(path, names) for path, _ in paths]
    leaves = tuple(leaf for _, leaf in paths)
    member = _named("member_args", member_args, owners, leaves)
    batch: set[int] = set()
    if batched and batch_args is not None:
        batch = _named("batch_args", batch_args, owners, leaves) - member
    elif batched:
        batch = {i for i, leaf in enumerate(leaves) if is_array(leaf) and np.ndim(leaf)} - member
    kinds = tuple(
        MEMBER if i in member else BATCH if i in batch
        else TRACED if jit_model_args and is_array(leaf) else FIXED
        for i, leaf in enumerate(leaves)
    )  # fmt: skip
    labels = tuple(
        name + jax.tree_util.keystr(path[2:])
        for (path, _), (name, _) in zip(paths, owners, strict=True)
    )
    leaves = tuple(
        jax.device_put(leaf) if kind != FIXED and isinstance(leaf, np.ndarray) else leaf
        for leaf, kind in zip(leaves, kinds, strict=True)
    )
    return Arguments(treedef, kinds, labels, leaves)


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is an array that a program could take as an input."""
    return isinstance(leaf, np.ndarray | jax.Array)


def _positional_names(model: Callable) -> list[str]:
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional]


def _owner(path: tuple, names: list[str]) -> tuple[str, int | None]:
    """Return the name and the position (None for a keyword) of the argument that owns a leaf."""
    entry = path[1]
    if isinstance(entry, jax.tree_util.DictKey):
        return str(entry.key), None
    return (names[entry.idx] if entry.idx < len(names) else f"argument {entry.idx}"), entry.idx


def _named(
    option: str, wanted: Iterable[str | int], owners: list[tuple[str, int | None]], leaves: tuple
) -> set[int]:
    wanted = [wanted] if isinstance(wanted, str | int) else list(wanted)
    found: set[int] = set()
    for item in wanted:
        mine = [i for i, owner in enumerate(owners) if item in owner]
        arrays = [i for i in mine if is_array(leaves[i]) and np.ndim(leaves[i])]
        if not mine:
            known = sorted({name for name, _ in owners})
            raise ValueError(f"{option} names {item!r}; the model was called with {known}.")
        if not arrays:
            raise ValueError(f"{option} names {item!r}, which holds no array with a leading axis.")
        found.update(arrays)
    return found


# Fingerprints -----------------------------------------------------------------------------------

_BY_VALUE = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype)
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")
_CONFIGURATION = (  # what an autoguide is made with; the rest of it comes from its set-up
    "model", "init_loc_fn", "create_plates", "_init_scale", "_guides",
    "local_model", "global_guide", "local_guide", "surrogate_model",
)  # fmt: skip


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
        names = [n for n in sorted(_names(value.__code__)) if n in value.__globals__]
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


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)
