"""Compiled programs, kept for arguments that they can serve again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from numpyro_ensemble._compat import HANDLERS
from numpyro_ensemble.calls.arguments import Arguments, arrange, has_tracers
from numpyro_ensemble.calls.executables import Executables, keep
from numpyro_ensemble.calls.identity import can_return, closure_fingerprint, is_unknown
from numpyro_ensemble.calls.tracing import NUMPY_WANTED, TRACING, tracing_alone
from numpyro_ensemble.sharding import Placement

KEPT = 8  # sets of arguments whose programs are kept
REMEMBERED = 256  # sets of arguments with which a model is known to look at values


def surroundings() -> tuple:
    """Return marks of the handlers around a call, which its programs depend on."""
    with TRACING:  # or another thread's are taken for this call's
        return closure_fingerprint(tuple(HANDLERS))


class Programs:
    """The programs made for the last few sets of arguments."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._looks: OrderedDict[Any, None] = OrderedDict()
        self._executables = Executables()

    def __getstate__(self) -> dict[str, Any]:
        return vars(Programs())

    def get(
        self,
        build: Callable[[], Any],
        model: Callable | None,
        args: tuple,
        kwargs: dict,
        *others: Any,
    ) -> Any:
        """Return the value that was built for arguments of equal contents, or build it."""
        arguments = arrange(model, args, kwargs, traced=False)
        if has_tracers(arguments.leaves):
            return build()
        return self._find(self._key(arguments, model, *others), build)

    def call(
        self,
        fn: Callable,
        inputs: tuple,
        model: Callable | None,
        args: tuple,
        kwargs: dict,
        *others: Any,
        prepare: Callable[[], None] | None = None,
        placement: Placement | None = None,
    ) -> Any:
        """Run `fn((args, kwargs), *inputs)` compiled; arguments of other contents use it too.

        Arrays among the arguments are inputs of the program. A model that looks at their values
        gets them concretely, and its program is used again only for equal values.

        Args:
            fn: the function.
            inputs: arrays besides the arguments.
            model: the model that `fn` calls.
            args: its arguments.
            kwargs: its keyword arguments.
            *others: what else the program depends on.
            prepare: checks to make before a program is compiled.
            placement: where the arguments are put; the caller has put the other inputs there.
        """
        for traced in (True, False):
            arguments = arrange(model, args, kwargs, traced=traced)
            key = self._key(arguments, model, *others)
            if traced and key in self._looks:
                continue
            if placement is not None:
                arguments = placement.place(arguments)
            form = arguments.without_inputs()

            def program(dynamic: Any, *inputs: Any, form: Any = form) -> Any:
                return fn(form.rebuild(dynamic), *inputs)

            def build(program: Callable = program, key: tuple = key) -> Any:
                if prepare is not None:
                    prepare()
                compiled = jax.jit(tracing_alone(program))
                return self._executables.wrap(compiled) if is_unknown(key) else compiled

            try:
                return self._find(key, build)(arguments.dynamic, *inputs)
            except NUMPY_WANTED:
                self._kept.pop(key, None)
                if not traced:
                    raise
            keep(self._looks, key, None, REMEMBERED)
        raise AssertionError("the last attempt returns or raises")

    def _key(self, arguments: Arguments, model: Callable | None, *others: Any) -> tuple:
        return (arguments.key(), closure_fingerprint(model), surroundings(), *others)

    def _find(self, key: Any, build: Callable[[], Any]) -> Any:
        found = self._kept.get(key)
        if found is None:
            found = build()
            if not can_return(key):
                return found
        keep(self._kept, key, found, KEPT)
        return found
