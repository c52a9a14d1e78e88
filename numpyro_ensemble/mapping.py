"""Functions mapped over draws and members in bounded memory, and members that failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.results import name_members
from numpyro_ensemble.sharding import Placement

_LEVEL = "xla_backend_optimization_level"
ROOM = 1 << 28  # bytes that the draws of one batch may take


def peak_bytes(fn: Callable, *args: Any) -> int:
    """Return how many bytes are alive at once, at most, in one call of a function.

    Operations count one after the other, as traced; a compiler that fuses them needs less.
    """
    return _peak(jax.make_jaxpr(fn)(*args).jaxpr)


def _peak(jaxpr: Any) -> int:
    last: dict[Any, int] = {}  # the last operation that needs each value
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((var, i) for var in eqn.invars if not hasattr(var, "val"))
    last.update((var, len(jaxpr.eqns)) for var in jaxpr.outvars if not hasattr(var, "val"))
    alive = most = 0
    made: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        inside = map(_peak, jaxprs_in_params(eqn.params))
        made.update((var, _size(var.aval)) for var in eqn.outvars if var in last)
        alive += sum(made[var] for var in eqn.outvars if var in made)
        most = max(most, alive + max(inside, default=0))
        for var in {var for var in eqn.invars if not hasattr(var, "val") and last[var] == i}:
            alive -= made.pop(var, 0)
    return most


def _size(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return 0
    return int(np.prod(aval.shape)) * dtype.itemsize


def batch_for(total: int, size: int, room: int = ROOM) -> int:
    """Return how many draws of `size` bytes to compute at once, preferably a divisor of `total`."""
    most = min(total, max(1, room // max(size, 1)))
    least = -(-total // most)
    for number in range(least, min(2 * least, total) + 1):
        if total % number == 0:
            return total // number
    return most


def map_draws(
    fn: Callable,
    draws: Any,
    batch_size: int | None = None,
    placement: Placement | None = None,
    room: int = ROOM,
) -> Any:
    """Map a function over draws in one program, `batch_size` at once, or as many as memory holds.

    On a mesh each device computes that many at once.
    """
    total = jax.tree.leaves(draws)[0].shape[0]
    if batch_size is None:
        batch_size = batch_for(total, peak_bytes(fn, pick(draws, 0)), room)

    def every(draws: Any) -> Any:
        if batch_size == 1:
            return jax.lax.map(fn, draws)
        if batch_size >= len(jax.tree.leaves(draws)[0]):
            return jax.vmap(fn)(draws)
        return jax.lax.map(fn, draws, batch_size=batch_size)

    if placement is None or placement.mesh is None:
        return every(draws)
    values = placement.padded(placement.spread(every, (0,)), (0,), total)(draws)
    return placement.settle(values, total)


def map_member_draws(fn: Callable, keys: jax.Array, placement: Placement | None = None) -> Any:
    """Map `fn((key, member, draw))` over keys `(E, S)`, and give the values these leading axes."""
    size, number = keys.shape[:2]
    member, draw = np.divmod(np.arange(size * number), number)
    inputs = keys.reshape(size * number, *keys.shape[2:]), member, draw
    flat = map_draws(fn, inputs, placement=placement)
    return jax.tree.map(lambda x: x.reshape(size, number, *x.shape[1:]), flat)


def platform_of(*trees: Any) -> str:
    """Return where arrays are, or where new ones are made if that is not known."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            return next(iter(leaf.devices())).platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", str(device))


def compiler_options(level: int) -> dict[str, str] | None:
    """Return options of `jax.jit` for a program that runs so seldom that compilation counts.

    They are for CPUs, where the user has not set the level.

    Args:
        level: of optimisation, 3 being the compiler's own: 0 compiles fastest, and code may be
            five times slower; 2 takes half the time of 3 for whole fits, which run as fast.
    """
    if platform_of() != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", ""):
        return None
    return {_LEVEL: str(level)}


def pick(tree: Any, *index: Any) -> Any:
    """Take one entry along the leading axes of all arrays."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def check_mixture(weights: Any, number: int, parts: str) -> Any:
    """Return the weights of a mixture's parts, which need not add up to 1.

    Raises:
        ValueError: if there is not one for each part, or one is negative, or they add up to 0.
    """
    values = weights if has_tracers(weights) else np.asarray(weights, float)
    if values.shape != (number,):
        raise ValueError(
            f"weights takes one number for each of {number} {parts}, got shape {values.shape}."
        )
    if has_tracers(weights):
        return values
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"weights takes finite numbers that are not negative, got {values}.")
    if not values.sum() > 0:
        raise ValueError("weights add up to 0.")
    return values


def finite_members(trees: Any, ensemble_size: int) -> np.ndarray:
    """Return which members `(E,)` hold nothing but finite numbers; shared leaves do not count."""
    finite = np.ones(ensemble_size, bool)
    for leaf in jax.tree.leaves(trees):
        if is_inexact(leaf) and np.shape(leaf)[:1] == (ensemble_size,):
            finite &= np.isfinite(np.asarray(leaf)).reshape(ensemble_size, -1).all(axis=1)
    return finite


def check_failed(finite: np.ndarray, on_failed: str) -> None:
    """Warn of members that are not finite, or raise a ValueError.

    Raises:
        ValueError: if `on_failed` says so, or no member is left.
    """
    if finite.all():
        return
    message = f"{(~finite).sum()} of {finite.size} members are not finite: {name_members(~finite)}."
    if on_failed == "raise":
        raise ValueError(f'{message} Leave them out yourself, or pass on_failed="warn".')
    if not finite.any():
        raise ValueError(f"{message} No member is left.")
    warn(f"{message} They are left out.")
