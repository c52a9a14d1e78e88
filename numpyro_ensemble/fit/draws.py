"""Draws from one member's guide, and their densities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList, AutoLaplaceApproximation
from numpyro.infer.util import compute_log_probs

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.fit.guides import is_set_up
from numpyro_ensemble.handlers import unwrapped


def draw_latents(
    guide: Callable, key: jax.Array, params: dict, args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Draw once from one member's guide: all its sites but the observed ones, plates included."""
    if isinstance(guide, AutoGuide):
        return guide.sample_posterior(key, params, *args, **kwargs)
    filled = handlers.substitute(handlers.seed(guide, key), data=params)
    return _latents(handlers.trace(filled).get_trace(*args, **kwargs))


class Density(NamedTuple):
    """The log density of a draw under its guide, and what other guides need to compute theirs."""

    log_q: jax.Array
    values: dict[str, Any]


def draw_with_density(
    guide: Callable, key: jax.Array, params: dict, args: tuple, kwargs: dict
) -> tuple[dict[str, Any], Density | None]:
    """Draw once from one member's guide, with the density of the draw where it is known."""
    if not _tells_density(guide):
        return draw_latents(guide, key, params, args, kwargs), None
    log_probs, trace = compute_log_probs(handlers.seed(guide, key), args, kwargs, params)
    values = {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate"
        or (site["type"] == "sample" and not isinstance(unwrapped(site["fn"]), dist.Delta))
    }
    if not any(trace[name]["type"] == "sample" for name in values):
        return _latents(trace), None
    return _latents(trace), Density(_total(log_probs), values)


def density_at(
    guide: Callable, latents: dict, values: dict, params: dict, args: tuple, kwargs: dict
) -> tuple[jax.Array, jax.Array]:
    """Return a guide's log density at another guide's draw, and whether it is of that draw.

    It is not if a guide computes its latents from random values and its own parameters.
    """
    filled = handlers.substitute(handlers.seed(guide, jax.random.key(0)), data=values)
    log_probs, trace = compute_log_probs(filled, args, kwargs, params)
    again = _latents(trace)
    same = [jnp.isclose(again[name], value, rtol=1e-3).all() for name, value in latents.items()]
    return _total(log_probs), jnp.stack(same).all()


def _tells_density(guide: Callable) -> bool:
    """Return whether a call of the guide gives the density of what `draw_latents` draws."""
    if isinstance(guide, AutoGuideList):
        return all(map(_tells_density, guide))
    return not isinstance(guide, AutoLaplaceApproximation | AutoDelta)


def _total(log_probs: dict[str, jax.Array]) -> jax.Array:
    return sum(log_probs.values(), jnp.zeros(()))


def _latents(trace: dict) -> dict[str, Any]:
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate"
        or (
            site["type"] == "sample"
            and not site["is_observed"]
            and not site["infer"].get("is_auxiliary")
        )
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

    jax.eval_shape(tracing_alone(look))
    missing = sorted(needed - params.keys())
    if missing:
        raise ValueError(
            f"the guide has parameters {missing}, which are not among those given, "
            f"{sorted(params)}: these are of another guide, or of a fit without one."
        )
