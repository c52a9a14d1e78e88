"""Declarations of a kernel class: its hyperparameters, and the methods it must define."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numpyro_ensemble.gp.inputs import check_given


def to_define(method: Any) -> Any:
    """Mark a method that a subclass has to define."""
    method.is_missing = True
    return method


def declared(cls: type) -> dict[str, Any]:
    """Return the hyperparameters that a class declares by annotations, with their defaults."""
    names = inspect.get_annotations(cls)
    own = [name for name, kind in names.items() if "ClassVar" not in str(kind)]
    return {name: vars(cls).get(name, inspect.Parameter.empty) for name in own}


def is_fixed(cls: type, name: str) -> bool:
    """Return whether a class declares a field as int, bool or str."""
    return inspect.get_annotations(cls)[name] in (int, bool, str, "int", "bool", "str")


def made_init(cls: type, own: dict[str, Any]) -> Callable:
    """Return an `__init__` with the arguments of the base class, then the class's own fields."""
    above: Callable = cls.__mro__[1].__init__  # type: ignore[misc]
    found = [] if above is object.__init__ else list(inspect.signature(above).parameters.values())
    others = [p for p in found[1:] if p.name not in own]
    given = [p for p in others if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in others if p.kind is p.KEYWORD_ONLY]
    redeclared = {p.name for p in found} & own.keys()
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if any(p.default is not p.empty for p in given) and inspect.Parameter.empty in own.values():
        kind = inspect.Parameter.KEYWORD_ONLY  # a default precedes one without
    mine = [inspect.Parameter(name, kind, default=value) for name, value in own.items()]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = sorted([*given, *mine, *named], key=lambda p: p.kind)
    signature = inspect.Signature([first, *order])

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        for name in own:
            check_given(f"{cls.__name__}: {name}", values[name])
        own_values = {name: values.pop(name) for name in own if name not in redeclared}
        above(self, **values)
        for name, value in own_values.items():
            setattr(self, name, value)

    init.__signature__ = signature  # type: ignore[attr-defined]
    return init
