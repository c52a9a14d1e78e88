"""The message that `sparse_gp` and `WhitenReparam` send to handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpyro
from numpyro.primitives import apply_stack

from numpyro_ensemble._compat import HANDLERS

SUFFIX = "_gp"  # of the announcing message's name


def _around() -> list[numpyro.plate]:
    """Return the plates that a call stands in."""
    return [handler for handler in HANDLERS if isinstance(handler, numpyro.plate)]


def plates() -> tuple[int, ...]:
    """Return the batch shape that the plates around a call give to a sample site."""
    sizes = {plate.dim: plate.subsample_size for plate in _around()}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


def is_subsampled() -> bool:
    """Return whether the innermost plate around a call takes some of its rows."""
    last = max(_around(), key=lambda plate: plate.dim)
    return bool(last.size != last.subsample_size)


def announce(
    name: str,
    gp: Any,
    at: jax.Array,
    draw: Callable[[], jax.Array],
    copies: tuple[int, ...] = (),
    whitened: bool = False,
) -> dict[str, Any]:
    """Send a process, which has no sample site of its own, to the handlers around.

    Where it is `whitened`, its own sample site is written in other terms, and `at` are its inputs;
    else its values are those at inducing points.

    A handler that has functions for it sets the message's "value" to theirs at the inputs `at`, and
    "answered"; otherwise the value is drawn, at the process's own inputs.
    """
    message = {
        "type": "gp",
        "name": f"{name}{SUFFIX}",  # a trace takes each name once; scopes put theirs in front
        "gp": gp,
        "at": at,
        "copies": copies,
        "whitened": whitened,
        "fn": draw,
        "args": (),
        "kwargs": {},
        "value": None,
        "answered": False,
        "cond_indep_stack": [],
    }
    return apply_stack(message)
