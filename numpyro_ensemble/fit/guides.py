"""Setting autoguides up: a copy is called in a compiled program, and no tracer stays behind.

An autoguide keeps the values of its set-up in its attributes: a trace of the model, start values,
closures over both. `fresh` copies a guide without these. After the copy was called
inside a compiled program, `take_out` replaces every tracer in it by a numbered slot. `fill` puts
arrays there: traced ones inside the next program, concrete ones to set up the user's own guide.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import numpy as np
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble._compat import PROTOTYPES, latent_starts
from numpyro_ensemble.calls.opening import children_of, learnt_by, note_learnt


class KeepsOrder(AutoGuide):
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
    return type(cls.__name__, (cls, KeepsOrder), {"__module__": cls.__module__})


def latent_order(guide: Callable) -> tuple:
    """Return the order of a guide's latents, and of those of its parts; empty if not set up."""
    if not isinstance(guide, AutoGuide):
        return ()
    mine = _own_order(guide)
    parts = tuple(latent_order(part) for part in parts_of(guide))
    return (mine, *parts) if mine or any(parts) else ()


def _own_order(guide: AutoGuide) -> tuple[str, ...]:
    return tuple(latent_starts(guide)) if is_set_up(guide) else ()


def parts_of(guide: AutoGuide) -> list[AutoGuide]:
    """Return the autoguides that an autoguide is made of."""
    learnt = learnt_by(guide)
    given = [v for name, v in vars(guide).items() if name not in learnt]
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


def finish(guide: AutoGuide) -> frozenset[str]:
    """Undo what `fresh` has added to a copy, and return what the set-up has written since."""
    own_class, _ = vars(guide).pop("_own_class"), vars(guide).pop("_order")
    before = vars(guide).pop("_before")
    guide.__class__ = own_class

    def same(name: str, now: list[Any]) -> bool:
        was = before.get(name, [])
        return len(was) == len(now) and all(a is b for a, b in zip(was, now, strict=True))

    return frozenset(n for n, now in _contents(guide).items() if not same(n, now))


def is_set_up(guide: Callable) -> bool:
    """Return whether an autoguide has been called; functions have nothing to set up."""
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
        ahead += children_of(value)[1]


def set_up(guide: Callable, other: Callable) -> None:
    """Set a guide up with the values that its copy has computed, if it was not set up yet."""
    if is_set_up(guide):
        return
    for part, of_other in zip(parts_of(guide), parts_of(other), strict=True):
        set_up(part, of_other)
    for name in sorted(learnt_by(other)):
        setattr(guide, name, vars(other)[name])
    note_alike(guide, other)


def note_alike(guide: Callable, other: Callable) -> None:
    """Note that a guide's set-up writes what its copy's has written."""
    if not isinstance(guide, AutoGuide) or learnt_by(guide):
        return
    for part, of_other in zip(parts_of(guide), parts_of(other), strict=True):
        note_alike(part, of_other)
    note_learnt(guide, learnt_by(other))
