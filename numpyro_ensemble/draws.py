"""Draws from members: from their guides, and through one program that bounds its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from numpyro.infer.util import compute_log_probs

from numpyro_ensemble.arguments import has_tracers
from numpyro_ensemble.density import filled_trace
from numpyro_ensemble.guides import is_set_up
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.results import name_members

_ROOM = 1 << 28  # bytes that the draws of one batch may take, by the model's sites
_HIDDEN = 4  # bytes of a draw's intermediate values, for each byte of its sites


def draw_latents(
    guide: Callable, key: jax.Array, params: dict, args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Draw once from one member's guide: all its sites but the observed ones, plates included."""
    if isinstance(guide, AutoGuide):
        return guide.sample_posterior(key, params, *args, **kwargs)
    filled = handlers.substitute(handlers.seed(guide, key), data=params)
    return _latents(handlers.trace(filled).get_trace(*args, **kwargs))


def draw_with_density(
    guide: Callable, key: jax.Array, params: dict, args: tuple, kwargs: dict
) -> tuple[dict[str, Any], jax.Array | None]:
    """Draw once from one member's guide, with the log density of the draw where it is known."""
    if isinstance(guide, AutoLaplaceApproximation):  # called, it gives the mode
        return draw_latents(guide, key, params, args, kwargs), None
    seeded = handlers.seed(guide, key)
    log_probs, trace = compute_log_probs(seeded, args, kwargs, params)
    return _latents(trace), sum(log_probs.values(), jnp.zeros(()))


def _latents(trace: dict) -> dict[str, Any]:
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate" or (site["type"] == "sample" and not site["is_observed"])
    }


def check_guide(guide: Callable, params: dict, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError where a guide was not set up, or its parameters are not those given."""
    if not is_set_up(guide):
        raise ValueError(
            "the guide was never called: take the one that was fitted, runner.guide, or call it "
            "once with the arguments of the fit, handlers.seed(guide, rng_key)(*args)."
        )
    needed: set[str] = set()

    def look() -> None:
        seeded = handlers.seed(guide, jax.random.key(0))
        for name, site in handlers.trace(seeded).get_trace(*args, **kwargs).items():
            if site["type"] == "param":
                needed.add(name)

    jax.eval_shape(look)
    missing = sorted(needed - params.keys())
    if missing:
        raise ValueError(
            f"the guide has parameters {missing}, which are not among those given, "
            f"{sorted(params)}: these are of another guide, or of a fit without one."
        )


def fill_model(
    model: Callable, key: jax.Array, known: dict[str, Any], args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Trace a model on known values; its deterministic sites are computed anew from these."""

    def value(site: dict[str, Any]) -> Any:
        return None if site["type"] == "deterministic" else known.get(site["name"])

    filled = handlers.substitute(handlers.seed(model, key), substitute_fn=value)
    return handlers.trace(filled).get_trace(*args, **kwargs)


def bytes_per_draw(model: Callable, args: tuple, kwargs: dict) -> int:
    """Return the size of all values of a model's sites, traced abstractly."""
    found: list[int] = []

    def look() -> None:
        for site in filled_trace(model, args, kwargs).values():
            for leaf in jax.tree.leaves(site["value"]):
                if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                    found.append(int(np.prod(leaf.shape)) * leaf.dtype.itemsize)

    jax.eval_shape(look)
    return sum(found)


def batch_for(total: int, size: int) -> int:
    """Return how many draws of `size` bytes go at once; a divisor of their number is preferred."""
    most = min(total, max(1, _ROOM // (_HIDDEN * max(size, 1))))
    least = -(-total // most)
    for number in range(least, min(2 * least, total) + 1):
        if total % number == 0:
            return total // number
    return most


def map_draws(fn: Callable, draws: Any, batch_size: int) -> Any:
    """Map a function over draws, so many at once, inside one program."""
    total = jax.tree.leaves(draws)[0].shape[0]
    if batch_size >= total:
        return jax.vmap(fn)(draws)
    return jax.lax.map(fn, draws, batch_size=batch_size)


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
    """Say which members `(E,)` hold nothing but finite numbers; shared leaves do not count."""
    finite = np.ones(ensemble_size, bool)
    for leaf in jax.tree.leaves(trees):
        if is_inexact(leaf) and np.shape(leaf)[:1] == (ensemble_size,):
            finite &= np.isfinite(np.asarray(leaf)).reshape(ensemble_size, -1).all(axis=1)
    return finite


def check_failed(finite: np.ndarray, on_failed: str, stacklevel: int = 4) -> None:
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
    warnings.warn(f"{message} They are left out.", stacklevel=stacklevel)
