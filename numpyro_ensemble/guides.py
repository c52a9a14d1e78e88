"""Autoguides are set up by their first call: here that happens to copies, and leaves no tracer.

An autoguide keeps what it learns of the model (a trace, start values, closures over both) in its
attributes. `fresh` copies a guide without it. After the copy was called inside a compiled program,
`take_out` replaces every tracer in it by a numbered slot; `fill` puts arrays there: traced ones
inside the next program, concrete ones to set up the user's own guide.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from numpyro_ensemble.arguments import has_tracers
from numpyro_ensemble.fingerprints import open_up

# what a guide only needs for names and shapes once its parameters exist
_STRUCTURE = ("prototype_trace", "_init_locs", "_init_latent")
_WRITTEN = ("_event_dims", "_init_locs")  # dictionaries that a set-up writes into


class Slot(NamedTuple):
    """The place of a value in a guide: which kind of value, and which of them."""

    kind: str  # a field of Filling, or the kind of an argument
    place: int


class Filling(NamedTuple):
    """The values for a guide's slots."""

    supports: list[Any]  # of the member's own: what its constrained values depend on
    own: list[Any]  # of the member's own start
    first: list[Any]  # of the first member's start


def fresh(guide: Callable) -> Callable:
    """Copy an autoguide, and those it is made of, as it was before it was set up."""
    if not isinstance(guide, AutoGuide):
        return guide
    new = copy.copy(guide)
    new.prototype_trace = None
    for name, value in vars(guide).items():
        if isinstance(value, AutoGuide):
            setattr(new, name, fresh(value))
        elif isinstance(value, list):
            setattr(new, name, [fresh(part) for part in value])
        elif isinstance(value, dict) and (name.startswith("_prototype") or name in _WRITTEN):
            setattr(new, name, {})
    return new


def is_set_up(guide: Callable) -> bool:
    """Say whether an autoguide has been called; functions have nothing to set up."""
    return not isinstance(guide, AutoGuide) or guide.prototype_trace is not None


def check_hidden(guide: Callable) -> None:
    """Raise a ValueError where a hand-written guide calls an autoguide that was not set up yet.

    No copy of that one could be made: its first call would leave tracers in it.
    """
    if isinstance(guide, AutoGuide):
        return
    met: set[int] = set()
    ahead: list[Any] = [guide]
    while ahead:
        value = ahead.pop()
        if id(value) in met or isinstance(value, np.ndarray | jax.Array):
            continue
        met.add(id(value))
        if isinstance(value, AutoGuide) and not is_set_up(value):
            name = type(value).__name__
            raise ValueError(
                f"the guide calls an {name} that was not set up yet. Give EnsembleVI the {name} "
                f"itself, or one AutoGuideList of all parts."
            )
        ahead += open_up(value)[1]


def take_out(guide: Callable, arguments: dict[str, list[Any]]) -> tuple[Any, Filling]:
    """Replace the tracers in a guide by slots, and return the guide and the tracers.

    Args:
        guide: a copy made by `fresh`, after its call.
        arguments: the model's traced arguments by kind, which fill slots of their own.
    """
    filling = Filling([], [], [])
    if not isinstance(guide, AutoGuide):
        return guide, filling
    known = {
        id(leaf): Slot(kind, i)
        for kind, leaves in arguments.items()
        for i, leaf in enumerate(leaves)
    }

    def put(kind: str) -> Callable:
        def slot(value: Any) -> Slot:
            if id(value) not in known:
                values = getattr(filling, kind)
                values.append(value)
                known[id(value)] = Slot(kind, len(values) - 1)
            return known[id(value)]

        return slot

    return _Walk(jax.core.Tracer, put).guide(guide), filling


def fill(guide: Callable, filling: Filling, arguments: dict[str, list[Any]]) -> Callable:
    """Return a guide with values in place of its slots."""
    if not isinstance(guide, AutoGuide):
        return guide
    values = {**filling._asdict(), **arguments}
    return _Walk(Slot, lambda _: lambda slot: values[slot.kind][slot.place]).guide(guide)


def set_up(guide: Callable, other: Callable) -> None:
    """Give a guide that was not set up yet what its copy has learnt."""
    if is_set_up(guide):
        return
    for name, value in vars(other).items():
        mine = vars(guide).get(name)
        if isinstance(mine, AutoGuide):
            set_up(mine, value)
        elif isinstance(mine, list) and any(isinstance(part, AutoGuide) for part in mine):
            for part, part_of_other in zip(mine, value, strict=True):
                set_up(part, part_of_other)
        else:
            setattr(guide, name, value)


class _Walk:
    """Copy what a set-up made, with one kind of leaf replaced."""

    def __init__(self, leaf: type, put: Callable) -> None:
        self.leaf, self.put = leaf, put
        self.memo: dict[int, Any] = {}
        self.held: list[Any] = []  # keeps the memo's ids from being used again

    def guide(self, guide: AutoGuide) -> AutoGuide:
        new = self._note(guide, copy.copy(guide))
        for name, value in vars(guide).items():
            kind = "first" if name in _STRUCTURE else "own"
            if name == "prototype_trace" and value is not None:
                value = self._trace(value)
            setattr(new, name, self.copy(value, self.put(kind)))
        return new

    def _trace(self, trace: dict) -> dict:
        """Copy a prototype trace; supports that stem from the start differ between members."""
        new = copy.copy(trace)
        for name, site in trace.items():
            fn = site.get("fn")
            if site["type"] == "sample" and not site["is_observed"] and self._depends(fn):
                new[name] = {**site, "fn": self.copy(fn, self.put("supports"))}
        return new

    def _depends(self, fn: Any) -> bool:
        leaves = jax.tree.leaves(fn, is_leaf=lambda x: isinstance(x, Slot))
        if any(isinstance(leaf, Slot) for leaf in leaves):
            return False  # a slot knows its kind
        return has_tracers(fn.support)

    def _note(self, old: Any, new: Any) -> Any:
        self.memo[id(old)] = new
        self.held.append(old)
        return new

    def copy(self, value: Any, put: Callable) -> Any:
        """Return the value with its leaves replaced, itself where it holds none."""
        if isinstance(value, self.leaf):
            return put(value)
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, AutoGuide):
            return self.guide(value)
        if isinstance(value, dict):
            new = self._note(value, copy.copy(value))
            for key, item in value.items():
                new[key] = self.copy(item, put)
            return new
        if isinstance(value, list):
            return self._note(value, [self.copy(item, put) for item in value])
        if isinstance(value, tuple):
            items = [self.copy(item, put) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, partial):
            args = [self.copy(arg, put) for arg in value.args]
            keywords = {k: self.copy(v, put) for k, v in value.keywords.items()}
            return partial(self.copy(value.func, put), *args, **keywords)
        if isinstance(value, Messenger):
            new = self._note(value, copy.copy(value))
            for name, item in vars(value).items():
                setattr(new, name, self.copy(item, put))
            return new
        if isinstance(value, types.FunctionType):
            return self._function(value, put)
        if isinstance(value, np.ndarray | jax.Array | str | int | float | type):
            return value
        return self._pytree(value, put)

    def _function(self, fn: types.FunctionType, put: Callable) -> Any:
        """Copy one of NumPyro's closures, such as the loss that a Laplace guide keeps."""
        if fn.__closure__ is None or not fn.__module__.startswith("numpyro."):
            return fn
        cells = tuple(types.CellType() for _ in fn.__closure__)
        new = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
        new.__kwdefaults__ = fn.__kwdefaults__
        self._note(fn, new)
        for cell, old in zip(cells, fn.__closure__, strict=True):
            cell.cell_contents = self.copy(old.cell_contents, put)
        return new

    def _pytree(self, value: Any, put: Callable) -> Any:
        leaves, treedef = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, self.leaf))
        if not any(isinstance(leaf, self.leaf) for leaf in leaves):
            return value
        return jax.tree.unflatten(
            treedef, [put(x) if isinstance(x, self.leaf) else x for x in leaves]
        )
