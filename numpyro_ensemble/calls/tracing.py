"""Tracing models: one thread at a time, and the errors of models that look at values.

NumPyro keeps its handlers in one list that all threads share.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax

TRACING = threading.RLock()


def tracing_alone(fn: Callable) -> Callable:
    """Make a function that runs NumPyro code wait until no other thread traces.

    A function given to `jax.jit` runs only when it is traced, so compiled programs never wait.
    """

    @functools.wraps(fn)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with TRACING:
            return fn(*args, **kwargs)

    return alone


VALUES_WANTED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
# errors of a model that was written for NumPy arrays and gets traced ones
NUMPY_WANTED = (*VALUES_WANTED, TypeError, AttributeError)


class LooksAtValuesError(ValueError):
    """A model looks at the values of an argument that is traced."""


def looking(fn: Callable) -> Callable:
    """Make a traced function raise a `LooksAtValuesError` where it needs concrete values."""

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except VALUES_WANTED as error:
            raise LooksAtValuesError(str(error).partition("\n")[0]) from error

    return traced
