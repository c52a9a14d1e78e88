"""The message that `sparse_gp` and `WhitenReparam` send to handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpyro
from numpyro.primitives import apply_stack

from numpyro_ensemble._compat import HANDLERS

SUFFIX = "_gp"  # ending of the message's name


def _around() -> list[numpyro.plate]:
    """Return the plates around a call."""
    return [handler for handler in HANDLERS if isinstance(handler, numpyro.plate)]


def plates() -> tuple[int, ...]:
    """Return the batch shape that the plates around a call give to a sample site."""
    sizes = {plate.dim: plate.subsample_size for plate in _around()}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


def is_subsampled() -> bool:
    """Return whether the innermost plate around a call is subsampled."""
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
    """Send a message about a process without a sample site to the surrounding handlers.

    If `whitened`, the process is sampled through a whitened site, and `at` are its inputs. If not,
    the values of the process are those at inducing points.

    A handler with functions for the process sets the message's "value" to the functions at the
    inputs `at`, and sets "answered". Without such a handler, `draw` draws the value at the
    process's own inputs.
    """
    message = {
        "type": "gp",
        "name": f"{name}{SUFFIX}",  # a trace needs unique names; scopes add a prefix
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
