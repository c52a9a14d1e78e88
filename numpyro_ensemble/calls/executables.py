"""Compiled programs of functions that depend on values that cannot be compared."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from numpyro_ensemble.calls.arguments import traces
from numpyro_ensemble.calls.identity import fingerprint
from numpyro_ensemble.calls.tracing import TRACING

_KEPT = 32  # compiled programs


class Executables:
    """Compiled programs, found by the code that a function lowers to."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def wrap(self, program: Any, statics: int = 0) -> Callable:
        """Return a function that traces a jitted one in every call, and compiles new code only.

        Args:
            program: what `jax.jit` returned.
            statics: how many of its first arguments are static.
        """

        def call(*args: Any) -> Any:
            inputs = args[statics:]
            if traces(inputs):
                return program(*args)
            traced = program.trace(*args)
            lowered = traced.lower()
            key = self._key(traced, lowered, inputs)
            compiled = self._kept.get(key)
            if compiled is None:
                compiled = lowered.compile()
            if key is not None:
                keep(self._kept, key, compiled, _KEPT)
            # what is static in the outcome is this call's
            return jax.tree.unflatten(
                jax.tree.structure(traced.out_info), jax.tree.leaves(compiled(*inputs))
            )

        call.trace = program.trace  # type: ignore[attr-defined]
        return call

    def _key(self, traced: Any, lowered: Any, inputs: tuple) -> Any:
        text = lowered.as_text()
        if "callback" in text:  # it would call the functions of this call again: it is not kept
            return None
        leaves, treedef = jax.tree.flatten(inputs)
        placed = tuple(x.sharding if isinstance(x, jax.Array) else None for x in leaves)
        consts = traced.jaxpr.consts  # JAX has arrays of its own among them
        constants = tuple(
            fingerprint(c if isinstance(c, jax.Array) else np.asarray(c)) for c in consts
        )
        digest = hashlib.blake2b(text.encode()).hexdigest()
        return (digest, treedef, tuple(traced.jaxpr.in_avals), placed, constants)


def keep(store: OrderedDict, key: Any, value: Any, most: int) -> None:
    """Put a value into a store of limited size; the values not used for longest are dropped."""
    if key in store and next(reversed(store)) is key:
        return
    with TRACING:
        store[key] = value
        store.move_to_end(key)
        while len(store) > most:
            store.popitem(last=False)
