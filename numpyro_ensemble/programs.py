"""Compiled programs, kept for arguments that they can serve again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from numpyro.primitives import _PYRO_STACK

from numpyro_ensemble.arguments import FIXED, arrange, has_tracers
from numpyro_ensemble.fingerprints import captured

_KEPT = 8  # sets of arguments whose programs are kept


class Programs:
    """The programs made for the last few sets of arguments."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._looks = False  # whether the model looks at the values of its arguments

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": OrderedDict(), "_looks": self._looks}

    def get(
        self,
        build: Callable[[], Any],
        model: Callable | None,
        guide: Callable | None,
        args: tuple,
        kwargs: dict,
        *others: Any,
        jit_model_args: bool = False,
    ) -> Any:
        """Return what was built for arguments of equal contents, or build it.

        With `jit_model_args`, arrays of any contents will do: the program takes them as inputs.
        """
        arguments = arrange(model, args, kwargs, jit_model_args=jit_model_args)
        if has_tracers(arguments.select(FIXED)):
            return build()
        around = captured(tuple(_PYRO_STACK))  # handlers that the call stands in
        key = (arguments.key(), captured(model), captured(guide), around, *others)
        if key not in self._kept:
            self._kept[key] = build()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def call(
        self,
        fn: Callable,
        inputs: tuple,
        model: Callable | None,
        args: tuple,
        kwargs: dict,
        *others: Any,
    ) -> Any:
        """Run `fn((args, kwargs), *inputs)` compiled, for arguments of other contents too.

        Arrays among the arguments are inputs of the program. A model that looks at their values has
        them concrete, and its program serves equal ones alone.
        """
        for traced in (False,) if self._looks else (True, False):
            arguments = arrange(model, args, kwargs, jit_model_args=traced)
            form = arguments.without_inputs()

            def program(dynamic: Any, *inputs: Any, form: Any = form) -> Any:
                return fn(form.rebuild(dynamic), *inputs)

            build = lambda program=program: jax.jit(program)  # noqa: E731
            compiled = self.get(build, model, None, args, kwargs, *others, jit_model_args=traced)
            try:
                result = compiled(arguments.dynamic, *inputs)
            except Exception:  # how a model fails that looks at values is its own affair
                if traced:
                    continue
                raise
            self._looks = not traced
            return result
        raise AssertionError("the last attempt returns or raises")
