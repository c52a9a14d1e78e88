"""Checks of a call's keywords: of an option, of the model, of both or of neither."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


def checked_keywords(fn: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """Make a function of a model, or a method of a runner, check the keywords of each call.

    Before the model is called, it raises an error for a keyword that is both an option and a
    parameter of the model, and for one that is neither.
    """
    signature = inspect.signature(fn)
    parameters = signature.parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    owner = fn.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(fn)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        if kwargs:
            bound = signature.bind_partial(*args, **kwargs).arguments
            functions = _functions(bound)
            _refuse_clashes(owner, kwargs.keys() & set(options), functions)
            if passes_on:
                unknown = [name for name in kwargs if name not in signature.parameters]
                _refuse_unknown(owner, unknown, options, functions, bound)
        return fn(*args, **kwargs)

    return checked


def check_call(model: Any, args: tuple, kwargs: dict, hint: str = "") -> None:
    """Raise a TypeError where a model does not take so many arguments, or lacks one."""
    signature = _signature(model)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"the model cannot be called with these arguments: {error}.{hint}"
        ) from None


def _functions(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model, and a runner's guide, that a call is about."""
    if "model" in known:
        return {"model": known["model"]}
    holder = known.get("runner", known.get("self"))
    found = {kind: getattr(holder, kind, None) for kind in ("model", "guide")}
    return {kind: function for kind, function in found.items() if function is not None}


def _refuse_clashes(owner: str, given: Iterable[str], functions: Mapping[str, Any]) -> None:
    for kind, function in functions.items():
        clash = sorted(set(given) & _free_keywords(function))
        if clash:
            raise ValueError(
                f"{clash[0]!r} is both an option of {owner} and a keyword of the {kind}: pass the "
                f"{kind}'s own by position, or bind it with functools.partial."
            )


def _places_of_settings(bound: Mapping[str, Any]) -> dict[str, str]:
    """Return where a keyword belongs: to `run`, to the guide, or to the runner's settings."""
    run = _signature(getattr(type(bound.get("self")), "run", None))
    places = {name: " It is an option of run." for name in (run.parameters if run else ())}
    guide = bound.get("guide")
    of_guide = None if guide is None else _signature(type(guide))
    if of_guide is not None:
        call = f"{type(guide).__name__}(model, "
        places |= {n: f" Give it to the guide: {call}{n}=...)." for n in of_guide.parameters}
    classes = type(bound["self"]).__mro__ if "self" in bound else ()
    public = next((cls for cls in classes if not cls.__name__.startswith("_")), None)
    if public is not None:
        call = f"{public.__name__}(..., "
        places |= {n: f" It is a setting: {call}{n}=...)." for n in _free_keywords(public)}
    return places


def _refuse_unknown(
    owner: str,
    unknown: Iterable[str],
    options: list[str],
    functions: Mapping[str, Any],
    bound: Mapping[str, Any],
) -> None:
    for name in unknown:
        for kind, function in functions.items():
            signature = _signature(function)
            if signature is None:
                continue
            parameters = signature.parameters
            if name in parameters:
                continue
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            known = {word.lower(): word for word in (*options, *parameters)}
            close = difflib.get_close_matches(name.lower(), known, 1)
            meant = f" Did you mean {known[close[0]]}?" if close else ""
            meant = _places_of_settings(bound).get(name, meant)
            raise TypeError(
                f"{owner} has no option {name!r}, and the {kind} takes no such keyword.{meant}"
            )


def _signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def _free_keywords(fn: Any) -> set[str]:
    """Name the parameters of a callable that functools.partial has not bound."""
    held: set[str] = set()
    while isinstance(fn, functools.partial):
        held |= fn.keywords.keys()
        fn = fn.func
    signature = _signature(fn)
    return set() if signature is None else set(signature.parameters) - held
