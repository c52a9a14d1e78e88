"""Model arguments: which stay concrete, which are traced, and when two sets of them are equal."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    def rebuild(self, dynamic: dict[str, Sequence[Any]]) -> tuple[tuple, dict]:
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
        """Return a hashable that is equal for arguments of equal structure, shapes and dtypes."""
        marks = [
            (np.shape(leaf), str(leaf.dtype)) if is_array(leaf) else fingerprint(leaf)
            for leaf in self.leaves
        ]
        return (self.treedef, self.kinds, tuple(marks))


NO_ARGUMENTS = Arguments(jax.tree.structure(((), {})), (), (), ())


def has_tracers(tree: Any) -> bool:
    """Say whether any leaf is a tracer, so that nothing about its value is known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


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

_BY_VALUE = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype, type)
_BY_IDENTITY = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
)
_LIBRARIES = ("jax", "jaxlib", "numpy", "numpyro", "numpyro_ensemble", "optax")


def fingerprint(leaf: Any) -> Any:
    """Return a hashable that is equal for leaves of equal contents.

    Arrays are hashed by their contents, never by identity: one that was changed in place is
    another. What cannot be compared by contents equals nothing, itself included.
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ("key", str(leaf.dtype), fingerprint(jax.random.key_data(leaf)))
    if _has_contents(leaf):
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
    if _is_function(leaf):
        return ("function", *captured(leaf))
    return object()


def _has_contents(leaf: Any) -> bool:
    """Say whether a leaf is an array whose bytes are all there is to it."""
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
        return False
    return not leaf.dtype.hasobject and not isinstance(leaf, np.ma.MaskedArray)


def _is_function(value: Any) -> bool:
    """Say whether a value is a function, or one that JAX has wrapped (jit, custom_jvp, ...)."""
    wraps = _library(type(value)) in ("jax", "jaxlib") and hasattr(value, "__wrapped__")
    return isinstance(value, _BY_IDENTITY) or wraps


def _library(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def captured(fn: Any, depth: int = 5) -> tuple:
    """Fingerprint what a function takes from its surroundings.

    A model often reads its data from the enclosing scope. Rebinding or changing such data must not
    leave a stale program behind, so what a function closes over, its defaults, the globals that
    its code names and the functions among these are part of what a program is keyed by: arrays
    and numbers by their contents, functions and classes by identity. The attributes of modules
    and of the user's objects are followed only where such an object is the function itself.
    """
    marks: list[Any] = []
    _collect(fn, marks, set(), depth)
    return tuple(marks)


def _collect(value: Any, marks: list, met: set[int], depth: int) -> None:
    if depth < 0 or id(value) in met or isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, (*_BY_VALUE, np.ndarray, np.generic, jax.Array)):
        marks.append(fingerprint(value))
        return
    met.add(id(value))
    parts = _parts(value)
    # a bound method is a new object wherever it is looked up; its function and object are parts
    named = _is_function(value) and not isinstance(value, types.MethodType | functools.partial)
    marks.append(value if named else (type(value), len(parts)))
    for part in parts:
        _collect(part, marks, met, depth - 1)


def _parts(value: Any) -> list[Any]:
    """List what may hold data inside a function, a wrapper or a container."""
    if isinstance(value, list | tuple | set | frozenset | range):
        return list(value)[:1000]
    if isinstance(value, dict):
        return [*list(value)[:1000], *list(value.values())[:1000]]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, *getattr(value.__self__, "__dict__", {}).values()]
    if isinstance(value, types.FunctionType):
        return [] if _library(value) in _LIBRARIES else _surroundings(value)
    if not jax.tree_util.all_leaves([value]):  # a distribution, an Equinox or NNX module
        return jax.tree.leaves(value)
    if callable(getattr(value, "fn", None)):  # a NumPyro handler around a model
        return list(getattr(value, "__dict__", {}).values())
    return [value.__wrapped__] if _is_function(value) and hasattr(value, "__wrapped__") else []


def _surroundings(fn: types.FunctionType) -> list[Any]:
    """List what a function closes over, the globals it names and its defaults."""
    cells = [c.cell_contents for c in fn.__closure__ or () if _filled(c)]
    names = [fn.__globals__[n] for n in sorted(_names(fn.__code__)) if n in fn.__globals__]
    return [*cells, *names, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)
