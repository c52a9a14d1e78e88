"""One lock around tracing: NumPyro keeps its handlers in one list that all threads share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

TRACING = threading.RLock()


def tracing_alone(fn: Callable) -> Callable:
    """Make a function that runs NumPyro code wait until no other thread traces.

    A function given to `jax.jit` runs when it is traced, so that compiled programs never wait.
    """

    @functools.wraps(fn)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with TRACING:
            return fn(*args, **kwargs)

    return alone
