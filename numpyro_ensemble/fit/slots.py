"""Slots of a guide: traced values of its set-up are taken out, and other values put in."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.opening import learnt_by, note_learnt
from numpyro_ensemble.calls.tracing import NUMPY_WANTED
from numpyro_ensemble.fit.guides import KeepsOrder, finish, parts_of
from numpyro_ensemble.fit.setup import SetupTemplate
from numpyro_ensemble.fit.state import GuideValues


class Slot(NamedTuple):
    """The place of a value in a guide: which kind of value, and which of them."""

    kind: str  # a field of GuideValues
    place: int


def take_out(guide: Callable, member_tracer: type) -> tuple[Any, GuideValues]:
    """Replace the tracers in a guide by slots, and return the guide and the tracers.

    Args:
        guide: a copy made by `fresh`, after its call.
        member_tracer: type of the tracers that the `vmap` over members has made; others are of
            values that all members share, arguments of the model for example.
    """
    values = GuideValues([], [], [])
    if not isinstance(guide, AutoGuide):
        return guide, values
    known: dict[int, Slot] = {}

    def put(kind: str) -> Callable:
        def slot(value: Any) -> Slot:
            if id(value) not in known:
                place = kind if isinstance(value, member_tracer) else "shared"
                values_of_kind = getattr(values, place)
                values_of_kind.append(value)
                known[id(value)] = Slot(place, len(values_of_kind) - 1)
            return known[id(value)]

        return slot

    return _Walk(jax.core.Tracer, put).guide(guide), values


def fill(guide: Callable, values: GuideValues) -> Callable:
    """Return a guide with values in place of its slots."""
    if not isinstance(guide, AutoGuide):
        return guide
    return _Walk(Slot, lambda _: lambda slot: getattr(values, slot.kind)[slot.place]).guide(guide)


def filled_guide(template: SetupTemplate, values: GuideValues) -> Callable:
    """Return one member's guide: the template's, with the member's values in its slots."""
    return fill(template.guide, template.fill_values(values))


def drop_unread(
    guide: Callable, values: GuideValues, params: dict, args: tuple, kwargs: dict
) -> GuideValues:
    """Return the values, with None for those that no step and no draw of the guide reads.

    Of start values, for example, only the shape is used once the parameters exist. Most guides
    never read the data of their set-up.
    """
    leaves, treedef = jax.tree.flatten(values)
    if not leaves or not _of_numpyro(
        guide
    ):  # a user's own guide may read them in a branch that was not taken here
        return values

    def read(leaves: list[Any]) -> Any:
        filled = fill(guide, jax.tree.unflatten(treedef, leaves))
        seeded = handlers.seed(filled, jax.random.key(0))
        log_probs, trace = compute_log_probs(seeded, args, kwargs, params)
        sites = {n: s["value"] for n, s in trace.items() if s["type"] in ("sample", "plate")}
        key = jax.random.key(0)
        draws = filled.sample_posterior(key, params, *args, **kwargs)  # type: ignore[attr-defined]
        return log_probs, sites, draws

    try:
        jaxpr = jax.make_jaxpr(read)(leaves).jaxpr
    except (
        *NUMPY_WANTED,
        ValueError,
        NotImplementedError,
    ):  # cannot be traced alone: all values are kept
        return values
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    used |= {id(v) for v in jaxpr.outvars}
    kept = [x if id(v) in used else None for x, v in zip(leaves, jaxpr.invars, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def _of_numpyro(guide: Callable) -> bool:
    """Return whether an autoguide and its parts are of NumPyro's own classes."""
    if not isinstance(guide, AutoGuide):
        return False
    own = type(guide).__module__.startswith("numpyro.")
    lists = [part for v in vars(guide).values() if isinstance(v, list) for part in v]
    return own and all(map(_of_numpyro, [*parts_of(guide), *filter(callable, lists)]))


class _Walk:
    """Copy what a set-up made, with one kind of leaf replaced."""

    def __init__(self, leaf: type, put: Callable) -> None:
        self.leaf, self.put = leaf, put
        self.memo: dict[int, Any] = {}
        self.held: list[Any] = []  # keeps the memo's ids from being used again

    def guide(self, guide: AutoGuide) -> AutoGuide:
        new = self._note(guide, copy.copy(guide))
        learnt = finish(new) if isinstance(new, KeepsOrder) else learnt_by(guide)
        for name, value in sorted(vars(new).items()):  # slots are numbered alike each time
            if name == "prototype_trace" and value is not None:
                value = self._trace(value)
            setattr(new, name, self.copy(value, self.put("own")))
        note_learnt(new, learnt)
        return new

    def _trace(self, trace: dict) -> dict:
        """Copy a prototype trace; supports that depend on the start differ between members."""
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
