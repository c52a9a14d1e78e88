"""Autoguides are set up by their first call: here that happens to copies, and leaves no tracer.

An autoguide keeps what it learns of the model (a trace, start values, closures over both) in its
attributes. `fresh` copies a guide without it. After the copy was called inside a compiled program,
`take_out` replaces every tracer in it by a numbered slot; `fill` puts arrays there: traced ones
inside the next program, concrete ones to set up the user's own guide.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from numpyro_ensemble._compat import PROTOTYPES, latent_starts
from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.identity import learnt_by, note_learnt, open_up
from numpyro_ensemble.calls.tracing import NUMPY_WANTED
from numpyro_ensemble.fit.setup import GuideValues, SetupTemplate


class Slot(NamedTuple):
    """The place of a value in a guide: which kind of value, and which of them."""

    kind: str  # a field of GuideValues
    place: int


class _KeepsOrder(AutoGuide):
    """The set-up of an autoguide whose latents keep the order that the model meets them in.

    NumPyro's search for a valid start passes the latents through a `while_loop` when it is traced,
    and dictionaries come back from that with sorted keys. Guides that lay latents side by side
    would exchange them. A class made of a guide's own and this one has this set-up between those
    of the guide's class and of `AutoGuide`.
    """

    _order: tuple[str, ...]
    _init_locs: dict[str, Any]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        order = self._order
        if set(order) != self._init_locs.keys():
            order = tuple(name for name in self.prototype_trace if name in self._init_locs)
        self._init_locs = {name: self._init_locs[name] for name in order}


@functools.cache
def _order_keeping(cls: type[AutoGuide]) -> type[AutoGuide]:
    return type(cls.__name__, (cls, _KeepsOrder), {"__module__": cls.__module__})


def latent_order(guide: Callable) -> tuple:
    """Return the order of a guide's latents, and of those of its parts; empty if not set up."""
    if not isinstance(guide, AutoGuide):
        return ()
    mine = _own_order(guide)
    parts = tuple(latent_order(part) for part in _parts(guide))
    return (mine, *parts) if mine or any(parts) else ()


def _own_order(guide: AutoGuide) -> tuple[str, ...]:
    return tuple(latent_starts(guide)) if is_set_up(guide) else ()


def _parts(guide: AutoGuide) -> list[AutoGuide]:
    """Return the autoguides that an autoguide is made of."""
    given = [v for name, v in vars(guide).items() if name not in learnt_by(guide)]
    held = [v for v in given if isinstance(v, AutoGuide)]
    lists = [v for v in given if isinstance(v, list)]
    return held + [part for items in lists for part in items if isinstance(part, AutoGuide)]


def fresh(guide: Callable) -> Callable:
    """Copy an autoguide, and those it is made of, as it was before it was set up.

    The copy lays its latents out in the order of the guide, if that was set up before.
    """
    if not isinstance(guide, AutoGuide):
        return guide
    new = copy.copy(guide)
    for name, value in vars(guide).items():  # a set-up writes into dictionaries and lists
        if isinstance(value, AutoGuide):
            setattr(new, name, fresh(value))
        elif isinstance(value, list):
            setattr(new, name, [fresh(part) for part in value])
        elif isinstance(value, dict):
            setattr(new, name, {} if name.startswith(PROTOTYPES) else copy.copy(value))
    new.prototype_trace = None
    new._order = _own_order(guide)  # type: ignore[attr-defined]
    new._own_class = type(guide)  # type: ignore[attr-defined]
    new._before = _contents(new)  # type: ignore[attr-defined]
    new.__class__ = _order_keeping(cast(Hashable, type(guide)))
    return new


def _contents(guide: AutoGuide) -> dict[str, list[Any]]:
    """Return the attributes of a guide, with what its dictionaries and lists hold."""

    def inside(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value, *value.keys(), *value.values()]
        return [value, *value] if isinstance(value, list) else [value]

    return {name: inside(value) for name, value in vars(guide).items()}


def _finish(guide: AutoGuide) -> frozenset[str]:
    """Undo what `fresh` has added to a copy, and return what the set-up has written since."""
    own_class, _ = vars(guide).pop("_own_class"), vars(guide).pop("_order")
    before = vars(guide).pop("_before")
    guide.__class__ = own_class

    def same(name: str, now: list[Any]) -> bool:
        was = before.get(name, [])
        return len(was) == len(now) and all(a is b for a, b in zip(was, now, strict=True))

    return frozenset(n for n, now in _contents(guide).items() if not same(n, now))


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
    """Return the values with None for those that neither a step nor a draw of the guide reads.

    Start values, for example, serve for their shape alone once the parameters exist, and most
    guides never read the data that they were set up with.
    """
    leaves, treedef = jax.tree.flatten(values)
    if not leaves or not _of_numpyro(guide):  # another's may read them in a branch not taken here
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
    except (*NUMPY_WANTED, ValueError, NotImplementedError):  # not to be traced alone: all are kept
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
    return own and all(map(_of_numpyro, [*_parts(guide), *filter(callable, lists)]))


def set_up(guide: Callable, other: Callable) -> None:
    """Give a guide that was not set up yet what its copy has learnt."""
    if is_set_up(guide):
        return
    for part, of_other in zip(_parts(guide), _parts(other), strict=True):
        set_up(part, of_other)
    for name in learnt_by(other):
        setattr(guide, name, vars(other)[name])
    note_alike(guide, other)


def note_alike(guide: Callable, other: Callable) -> None:
    """Note that a guide's set-up writes what its copy's has written."""
    if not isinstance(guide, AutoGuide) or learnt_by(guide):
        return
    for part, of_other in zip(_parts(guide), _parts(other), strict=True):
        note_alike(part, of_other)
    note_learnt(guide, learnt_by(other))


class _Walk:
    """Copy what a set-up made, with one kind of leaf replaced."""

    def __init__(self, leaf: type, put: Callable) -> None:
        self.leaf, self.put = leaf, put
        self.memo: dict[int, Any] = {}
        self.held: list[Any] = []  # keeps the memo's ids from being used again

    def guide(self, guide: AutoGuide) -> AutoGuide:
        new = self._note(guide, copy.copy(guide))
        learnt = _finish(new) if isinstance(new, _KeepsOrder) else learnt_by(guide)
        for name, value in list(vars(new).items()):
            if name == "prototype_trace" and value is not None:
                value = self._trace(value)
            setattr(new, name, self.copy(value, self.put("own")))
        note_learnt(new, learnt)
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
