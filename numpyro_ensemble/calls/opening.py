"""The parts of a value: of functions, classes and objects whose contents can be listed."""

from __future__ import annotations

import dis
import functools
import importlib.metadata
import importlib.util
import sys
import types
import weakref
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.tree_util import default_registry
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from numpyro_ensemble.calls.marks import BY_VALUE, ByIdentity, Unknown

_PARTS_OF_CLASSES = {
    "__abstractmethods__", "__annotate_func__", "__annotations__", "__annotations_cache__",
    "__dataclass_fields__", "__dataclass_params__", "__dict__", "__doc__", "__firstlineno__",
    "__match_args__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
    "__static_attributes__", "__weakref__", "_abc_impl",
}  # fmt: skip
# the code that calls these does not show what they reach
_REFLECTION = {
    "__import__", "compile", "delattr", "dir", "eval", "exec", "getattr", "globals", "hasattr",
    "id", "input", "locals", "open", "setattr", "vars",
}  # fmt: skip
# Python's own modules whose functions depend only on their arguments
_PURE = {
    "abc", "builtins", "cmath", "collections", "contextlib", "copy", "dataclasses", "enum",
    "fractions", "functools", "itertools", "math", "numbers", "operator", "re", "statistics",
    "string", "textwrap", "types", "typing", "warnings",
}  # fmt: skip
_OPERATIONS = ("GLOBAL", "LOAD_NAME"), ("ATTR", "LOAD_METHOD"), ("IMPORT_NAME",)  # see _names
# packages whose objects have no hidden state
_PLAIN_PACKAGES = {"jax", "numpyro", __name__.partition(".")[0]}
_LIBRARIES = {"jax", "jaxlib", "numpy", "numpyro", "optax"}  # also where they are checkouts


def children_of(value: Any) -> tuple[Any, list[Any]]:
    """Return what tells a value apart by itself, and the parts that it is made of."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, list(value)
    if kind in (set, frozenset):
        return kind, sorted(value, key=repr)
    if kind in (range, slice):
        return kind, [value.start, value.stop, value.step]
    if kind in (dict, OrderedDict, defaultdict):
        extra = [value.default_factory] if kind is defaultdict else []
        return (kind, len(value)), [*value.keys(), *value.values(), *extra]
    if kind is functools.partial:
        parts = [value.func, *value.args, *value.keywords.values()]
        return (kind, tuple(value.keywords)), parts
    if kind is types.MethodType:
        return kind, [value.__func__, value.__self__]
    if kind in (staticmethod, classmethod):
        return kind, [value.__func__]
    if kind is property:
        return kind, [value.fget]
    if kind is ByIdentity:
        return value, []
    if kind is types.BuiltinFunctionType:
        return (kind, value.__name__), [value.__self__]
    if isinstance(value, types.ModuleType):
        return (ByIdentity(value) if _is_fixed(value.__name__) else Unknown()), []
    if isinstance(value, types.FunctionType):
        return _open_function(value)
    if isinstance(value, type):
        return _open_class(value)
    return _open_object(value)


def _open_function(fn: types.FunctionType) -> tuple[Any, list[Any]]:
    if _is_fixed(fn.__module__) and not fn.__closure__:
        return ByIdentity(fn), []
    reached, hides = _reached(fn)
    if hides:
        return Unknown(), []
    cells = [_cell_contents(cell) for cell in fn.__closure__ or ()]
    own = [v for name, v in vars(fn).items() if name != "__signature__"]
    return (fn.__code__, len(cells)), [*cells, *reached, fn.__defaults__, fn.__kwdefaults__, *own]


def _reached(fn: types.FunctionType) -> tuple[list[Any], bool]:
    """Return the values that a function's code names, and whether it may use others."""
    names, attributes, imports = _names(fn.__code__)
    found: list[Any] = []
    hides = not all(map(_is_fixed, imports))
    for name in names:
        if name not in fn.__globals__:
            hides |= name in _REFLECTION
            continue
        value = fn.__globals__[name]
        if isinstance(value, types.ModuleType) and _is_users(value.__name__):
            found += [ByIdentity(value), *(vars(value)[n] for n in attributes if n in vars(value))]
        else:
            found.append(value)
    return found, hides


def _open_class(cls: type) -> tuple[Any, list[Any]]:
    """Open a class of the user's own: its functions and attributes."""
    if not _is_users(cls.__module__):
        return ByIdentity(cls), []
    own = {name: v for name, v in vars(cls).items() if name not in _PARTS_OF_CLASSES}
    return (ByIdentity(cls), tuple(own)), [*own.values(), *cls.__bases__, type(cls)]


def _open_object(value: Any) -> tuple[Any, list[Any]]:
    """Open an object whose state is in its attributes."""
    kind = type(value)
    if isinstance(value, AutoGuide):
        learnt = learnt_by(value)
        held = {name: v for name, v in vars(value).items() if name not in learnt}
        return (ByIdentity(value), tuple(held)), list(held.values())
    if isinstance(value, Messenger):  # a handler around a model: its state in use does not count
        held = {n: v for n, v in vars(value).items() if not n.startswith("_")}
        return (kind, tuple(held)), list(held.values())
    level = default_registry.flatten_one_level(value)
    if level is not None:
        return kind, [*level[0], level[1], kind]
    if kind is object:
        return ByIdentity(value), []
    if hasattr(value, "__dict__") and all(map(_hides_nothing, kind.__mro__[:-1])):
        return (kind, tuple(vars(value))), [*vars(value).values(), kind]
    return (Unknown(), []) if _is_users(kind.__module__) else _open_installed(value)


def _open_installed(value: Any) -> tuple[Any, list[Any]]:
    """Open an object of an installed class: one of its names, a wrapped function, or a value."""
    if _is_of_library(value):
        return ByIdentity(value), []
    wrapped = getattr(value, "__wrapped__", None)
    if wrapped is not None and _package(type(value).__module__) in ("jax", "jaxlib"):
        return type(value), [wrapped]
    return ((type(value), value) if _is_value(value) else Unknown()), []


def _hides_nothing(cls: type) -> bool:
    """Return whether the attributes of a class's objects are in their `__dict__` and its own."""
    if cls.__module__ in ("abc", "enum", "typing"):
        return True
    if not (_is_users(cls.__module__) or _package(cls.__module__) in _PLAIN_PACKAGES):
        return False
    return not vars(cls).keys() & {"__slots__", "__getattr__", "__getattribute__"}


def _is_value(value: Any) -> bool:
    """Return whether an installed package gives a class equality and a hash of values."""
    kind = type(value)
    own = {"__eq__", "__hash__"} & set().union(*(vars(cls) for cls in kind.__mro__[:-1]))
    package = _package(kind.__module__)
    if not own or package in sys.stdlib_module_names or _is_users(kind.__module__):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_of_library(value: Any) -> bool:
    """Return whether an object is one that an installed module gives its name to."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not (isinstance(module, str) and isinstance(name, str) and _is_fixed(module)):
        return isinstance(value, np.ufunc)
    return getattr(sys.modules.get(module), name, None) is value


# Attributes that the set-up of autoguides has written ---------------------------------------------

_learnt: weakref.WeakKeyDictionary[AutoGuide, dict[str, Any]] = weakref.WeakKeyDictionary()


def note_learnt(guide: AutoGuide, names: frozenset[str]) -> None:
    """Note which attributes of a guide its set-up has written: no program depends on those."""
    _learnt[guide] = {name: _held(vars(guide).get(name)) for name in names}


def learnt_by(guide: Any) -> frozenset[str]:
    """Return which attributes of a guide its set-up has written, as far as is known."""
    written = _learnt.get(guide, {})
    return frozenset(n for n, held in written.items() if _held(vars(guide).get(n)) == held)


def _held(value: Any) -> Any:
    return (type(value), value) if type(value) in BY_VALUE else id(value)


# Code and where it comes from ---------------------------------------------------------------------


@functools.cache
def _is_fixed(module: str | None) -> bool:
    """Return whether a module is one whose functions and constants do not change."""
    package = _package(module)
    if package in sys.stdlib_module_names:
        return package in _PURE
    return not _is_users(module)


@functools.cache
def _is_users(module: str | None) -> bool:
    """Return whether a module is the user's own code, neither Python's nor an installed one."""
    package = _package(module)
    if package in ("__main__", ""):
        return True
    if package in sys.stdlib_module_names or package == _package(__name__):
        return False
    path = Path(_file_of(package))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    folder = path.parent.parent if path.stem == "__init__" else path.parent
    return package not in _LIBRARIES and package not in _installed_in(str(folder))


@functools.cache
def _installed_in(folder: str) -> frozenset[str]:
    """Return the packages that an installer has put into a folder, as `pip install --target` does.

    A user's own files may stand beside them.
    """
    names = set()
    for distribution in importlib.metadata.distributions(path=[folder]):
        for line in (distribution.read_text("RECORD") or "").splitlines():
            names.add(line.partition(",")[0].partition("/")[0].partition(".")[0])
    return frozenset(names)


def _file_of(package: str) -> str:
    """Return where a package is, which a function may import only when it is called."""
    if package in sys.modules:
        return getattr(sys.modules[package], "__file__", None) or ""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ""
    return (found and found.origin) or ""


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Return the globals, attributes and imports that code, and code within it, names."""
    found: tuple[set[str], set[str], set[str]] = (set(), set(), set())
    for instruction in dis.get_instructions(code):
        if not isinstance(instruction.argval, str):
            continue  # SET_FUNCTION_ATTRIBUTE, of a closure or of defaults, names nothing
        for names, operations in zip(found, _OPERATIONS, strict=True):
            if any(operation in instruction.opname for operation in operations):
                names.add(instruction.argval)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            for names, inner in zip(found, _names(const), strict=True):
                names.update(inner)
    return tuple(tuple(sorted(names)) for names in found)
