"""Model arguments: which stay concrete, which are traced, and when two sets are equal."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ensemble.calls.arrays import is_array, is_traceable
from numpyro_ensemble.calls.identity import fingerprint
from numpyro_ensemble.primitives import is_inexact

FIXED, TRACED, BATCH, MEMBER, MEMBER_BATCH = "fixed", "traced", "batch", "member", "member batch"
ROW_AXES = {BATCH: 0, MEMBER_BATCH: 1}  # which batches cut, before members are told apart
MEMBER_AXES = {TRACED: None, BATCH: None, MEMBER: 0, MEMBER_BATCH: 0}


class Arguments(NamedTuple):
    """The flattened arguments of a model; leaves are fixed, traced, batched, per member or both."""

    treedef: Any
    kinds: tuple[str, ...]
    leaves: tuple[Any, ...]
    names: tuple[str, ...] = ()  # of the model's positional parameters
    order: Any = None  # of the keys of dictionaries, where it is not the alphabet's

    def select(self, kind: str) -> list[Any]:
        """Return the leaves of one kind."""
        return [leaf for leaf, k in zip(self.leaves, self.kinds, strict=True) if k == kind]

    @property
    def labels(self) -> tuple[str, ...]:
        """The user's name of each leaf."""
        return tuple(
            _owner(path, self.names)[0] + jax.tree_util.keystr(path[2:])
            for path in _paths(self.treedef)
        )

    def labelled(self, *kinds: str) -> list[tuple[str, Any]]:
        """Return names and values of the leaves of some kinds."""
        if not set(kinds) & set(self.kinds):
            return []
        triples = zip(self.labels, self.leaves, self.kinds, strict=True)
        return [(label, leaf) for label, leaf, kind in triples if kind in kinds]

    def check_members(self, ensemble_size: int) -> None:
        """Raise a ValueError for leaves of the members whose number is not the ensemble size."""
        for label, leaf in self.labelled(MEMBER, MEMBER_BATCH):
            if np.shape(leaf)[0] != ensemble_size:
                raise ValueError(
                    f"member_args names {label!r} of shape {np.shape(leaf)}; its leading length "
                    f"must be ensemble_size={ensemble_size}."
                )

    def holding_nan(self) -> list[str]:
        """Return the user's names of the arrays that hold a NaN."""
        return [
            label
            for label, leaf in zip(self.labels, self.leaves, strict=True)
            if _is_readable(leaf) and np.isnan(np.asarray(leaf)).any()
        ]

    @property
    def dynamic(self) -> dict[str, list[Any]]:
        """Return the leaves that a compiled program takes as its inputs."""
        return {kind: self.select(kind) for kind in MEMBER_AXES}

    def of_member(self, leaves: Sequence[Any]) -> tuple[tuple, dict]:
        """Return `(args, kwargs)` of one member, whose own leaves are given."""
        return self.rebuild({**self.dynamic, MEMBER: leaves})

    def rebuild(self, dynamic: Mapping[str, Sequence[Any]]) -> tuple[tuple, dict]:
        """Put `(args, kwargs)` together again, with the given values of the dynamic leaves."""
        streams = {kind: iter(leaves) for kind, leaves in dynamic.items()}
        leaves = [
            leaf if kind == FIXED else next(streams[kind])
            for leaf, kind in zip(self.leaves, self.kinds, strict=True)
        ]
        return _in_order(jax.tree.unflatten(self.treedef, leaves), self.order)

    def without_inputs(self) -> Arguments:
        """Return the arguments without the leaves that a program takes as its inputs."""
        pairs = zip(self.leaves, self.kinds, strict=True)
        return self._replace(leaves=tuple(x if kind == FIXED else None for x, kind in pairs))

    def key(self) -> tuple:
        """Return a hashable that is equal for arguments that can share a compiled program."""
        marks = [
            fingerprint(leaf) if kind == FIXED else (np.shape(leaf), str(leaf.dtype))
            for leaf, kind in zip(self.leaves, self.kinds, strict=True)
        ]
        return (self.treedef, self.kinds, tuple(marks), self.order)


def with_nan(named: Sequence[str], remedy: str) -> str:
    """Return advice that names the arguments with NaN first; they may be masked already."""
    if not named:
        return remedy
    rows = f"The data hold NaN: {', '.join(named)}. Leave these rows out, or mask them."
    return f"{rows} If they are masked: {remedy}"


NO_ARGUMENTS = Arguments(jax.tree.structure(((), {})), (), ())


class CallForm:
    """The arguments of a call without those that a program takes as inputs.

    Two are equal, and have equal hashes, if their contents are equal.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments.without_inputs()
        self.key = arguments.key()
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, CallForm) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple:
        return _unpickled_form, (self.arguments,)

    def rebuild(self, dynamic: Mapping[str, Sequence[Any]]) -> tuple[tuple, dict]:
        """Put `(args, kwargs)` together, with the given values of the inputs."""
        return self.arguments.rebuild(dynamic)


def _unpickled_form(arguments: Arguments) -> CallForm:
    form = CallForm(NO_ARGUMENTS)
    form.arguments, form.key = arguments, (object(),)  # equal only to itself
    form._hash = hash(form.key)
    return form


def _is_readable(leaf: Any) -> bool:
    """Return whether a leaf holds real or complex numbers that this process can read."""
    if has_tracers(leaf) or not (isinstance(leaf, float) or is_inexact(leaf)):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def has_tracers(tree: Any) -> bool:
    """Return whether any leaf is a tracer, whose value is unknown."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def traces(tree: Any) -> bool:
    """Return whether the call is inside a JAX transformation, which would trace new programs."""
    return has_tracers(tree) or isinstance(jax.lax.full((), 0), jax.core.Tracer)


def arrange(
    model: Callable | None,
    args: tuple,
    kwargs: dict,
    *,
    batched: bool = False,
    batch_args: Iterable[str | int] | None = None,
    member_args: Iterable[str | int] = (),
    traced: bool = True,
    placed: bool = True,
    batch_option: str = "batch_args",
) -> Arguments:
    """Sort the leaves of `(args, kwargs)` by how a compiled program sees them.

    With `traced`, arrays are inputs of the program; without, they are concrete, for models that
    look at their values. Batches are cut along the first axis, in arguments of `member_args` along
    the second. Inputs are put on the device, unless `placed` is False.

    Raises:
        ValueError: if `batch_args` or `member_args` name no argument, or one without an array that
            has the axis. `batch_option` is the user's name of `batch_args`.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    names = _positional_names(model)
    member_args = [member_args] if isinstance(member_args, str | int) else list(member_args)
    owners = []
    if member_args or batched:
        owners = [_owner(path, names) for path in _paths(treedef)]
    arrays = {i for i, leaf in enumerate(leaves) if is_array(leaf) and np.ndim(leaf)}
    member = _named("member_args", member_args, owners, arrays)
    batch: set[int] = set()
    if batched:
        batch = {i for i in arrays if i not in member or np.ndim(leaves[i]) > 1}
        if batch_args is not None:
            batch = _named(batch_option, batch_args, owners, batch, member)
    kinds = tuple(
        MEMBER_BATCH if i in member & batch else MEMBER if i in member else BATCH if i in batch
        else TRACED if isinstance(leaf, jax.core.Tracer) or (traced and is_traceable(leaf))
        else FIXED
        for i, leaf in enumerate(leaves)
    )  # fmt: skip
    inputs = zip(leaves, kinds, strict=True)
    on_device = tuple(_on_device(x) if placed and k != FIXED else x for x, k in inputs)
    return Arguments(treedef, kinds, on_device, names, _key_order((args, kwargs)))


def _key_order(tree: Any) -> Any:
    """Return the order of the keys of dictionaries, which JAX sorts; None where all are sorted."""
    if type(tree) is dict:
        inner = tuple(_key_order(value) for value in tree.values())
        keys = tuple(tree)
        in_order = all(isinstance(k, str) for k in keys) and list(keys) == sorted(keys)
        return None if in_order and not any(inner) else (keys, inner)
    if type(tree) in (list, tuple):
        inner = tuple(_key_order(value) for value in tree)
        return inner if any(inner) else None
    return None


def _in_order(tree: Any, order: Any) -> Any:
    """Return a tree with the keys of its dictionaries in their order."""
    if order is None:
        return tree
    if type(tree) is dict:
        pairs = zip(*order, strict=True)
        return {key: _in_order(tree[key], inner) for key, inner in pairs}
    return type(tree)(_in_order(part, o) for part, o in zip(tree, order, strict=True))


def _on_device(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    with jax.ensure_compile_time_eval():  # or a transformation around the call would trace it
        return jax.device_put(leaf)


@functools.lru_cache(maxsize=256)
def _paths(treedef: Any) -> list[tuple]:
    """Return the path to each leaf of `(args, kwargs)`."""
    tree = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _positional_names(model: Callable | None) -> tuple[str, ...]:
    code = getattr(model, "__code__", None)
    if code is not None and not {"__wrapped__", "__signature__"} & vars(model).keys():
        return code.co_varnames[: code.co_argcount]
    if model is None:
        return ()
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)


def _owner(path: tuple, names: tuple[str, ...]) -> tuple[str, int | None]:
    """Return the name and the position (None for a keyword) of the argument that owns a leaf."""
    entry = path[1]
    if isinstance(entry, jax.tree_util.DictKey):
        return str(entry.key), None
    return (names[entry.idx] if entry.idx < len(names) else f"argument {entry.idx}"), entry.idx


def _named(
    option: str,
    wanted: Iterable[str | int],
    owners: list[tuple[str, int | None]],
    arrays: set[int],
    member: Collection[int] = (),
) -> set[int]:
    """Return the arrays that belong to some arguments; those of a member lead with its axis."""
    wanted = [wanted] if isinstance(wanted, str | int) else list(wanted)
    found: set[int] = set()
    for item in wanted:
        mine = [i for i, owner in enumerate(owners) if item in owner]
        chosen = arrays.intersection(mine)
        if not mine:
            known = sorted({name for name, _ in owners})
            raise ValueError(f"{option} names {item!r}; the model was called with {known}.")
        if not chosen and set(mine) & set(member):
            raise ValueError(
                f"{option} names {item!r}, which holds no array with a second axis; the first axis "
                f"of what member_args names is that of the members."
            )
        if not chosen:
            raise ValueError(f"{option} names {item!r}, which holds no array with a leading axis.")
        found.update(chosen)
    return found
