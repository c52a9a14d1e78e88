"""The log joint density of a model, split into likelihood and prior, and the model's sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import compute_log_probs

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.enumeration import (
    is_discrete_latent,
    is_marked,
    needs_sum,
    split_density,
    why_not_summed,
    with_placeholders,
)
from numpyro_ensemble.handlers import Role, is_factor, site_role, unwrapped


def log_joint(
    model: Callable, *, prior_sites: Collection[str] = ()
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Turn a model into a function of its latents that returns log likelihood and log prior.

    Args:
        model: a NumPyro model. Seed a model with randomness of its own (a subsampled plate) by
            `numpyro.handlers.seed` first, as for `numpyro.infer.util.log_density`.
        prior_sites: names of `numpyro.factor` sites that belong to the prior.

    Returns:
        `f(params, *args, **kwargs) -> (log_likelihood, log_prior)`, two scalars that add up to
        `log_density(model, args, kwargs, params)[0]`. `params` maps latent sites to constrained
        values. Discrete latents that are marked `infer={"enumerate": "parallel"}` and not in
        `params` are summed out: the prior is then that of the other latents, and the likelihood
        that of the data given these. It raises a ValueError if `params` lacks a latent.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import log_joint
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> log_likelihood, log_prior = log_joint(model)({"mu": 0.0}, 1.0)
        >>> print(log_likelihood.round(3), log_prior.round(3))
        -1.419 -0.919
    """

    def split(params: dict, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        try:
            log_probs, trace = compute_log_probs(with_placeholders(model), args, kwargs, params)
        except AssertionError as error:  # NumPyro cannot draw a latent without a key
            sites = model_sites(model, args, kwargs).values()
            drawn = ("latent", "discrete")
            lacking = [s.name for s in sites if s.kind in drawn and s.name not in params]
            if not lacking:
                raise
            raise ValueError(
                f"params has no value for the latent sites {lacking}. Give constrained values of "
                f"all latents, or condition the model on some by numpyro.handlers.condition."
            ) from error
        if any(needs_sum(site) and name not in params for name, site in trace.items()):
            return split_density(model, trace, params, args, kwargs, prior_sites)
        likelihood = prior = jnp.zeros(())
        seen: set[str] = set()
        for name, log_prob in log_probs.items():
            role = site_role(trace[name], seen, prior_sites)
            seen.add(name)
            if role == "likelihood":
                likelihood = likelihood + log_prob
            else:
                prior = prior + log_prob
        return likelihood, prior

    return split


class Site(NamedTuple):
    """A site of a model, as an abstract trace describes it."""

    name: str
    kind: str  # "latent", "discrete", "observed", "factor", "param", "mutable", "plate"
    role: Role | None  # of sample sites
    shape: Any  # a tuple, or a tree of tuples for parameters
    plates: tuple[tuple[str, int], ...]  # (name, size) of the plates around a sample site
    distribution: str
    scale: Any = None  # of a sample site; of an array only the shape is known
    event_dim: int = 0  # trailing axes along which the values of one draw depend on each other
    drawn_from: int | None = None  # of a plate that draws some of its rows: how many there are
    marked: bool = False  # infer={"enumerate": "parallel"}
    not_summed: str = ""  # why a discrete latent cannot be summed out
    density_shape: tuple[int, ...] = ()  # of the log density of a sample site


def is_subsampled(site: dict[str, Any]) -> bool:
    """Return whether a site of a trace is a plate that has drawn some of its rows."""
    return site["type"] == "plate" and len(site["value"]) < site["args"][0]


def observed_sites(trace: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sites of a trace that have data; factors have none."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and site["is_observed"] and not is_factor(site)
    }


def is_improper(site: dict[str, Any]) -> bool:
    """Return whether a sample site cannot be drawn from."""
    return type(unwrapped(site["fn"])).__name__ == "ImproperUniform"


def plate_of(frame: str, plates: Collection[str]) -> str | None:
    """Return the plate that a frame around a site belongs to, None for one that is not among them.

    A scope puts its prefix before the name of a plate that was made outside of it.
    """
    return max((name for name in plates if frame.endswith(name)), key=len, default=None)


def named_axes(site: dict[str, Any]) -> list[str] | None:
    """Name the axes of a site by its plates and event dims; None where there are no names."""
    shape = np.shape(site["value"])
    frames = site["cond_indep_stack"]
    events = list((site.get("infer") or {}).get("event_dims", []))
    if site["type"] == "sample":
        batch = len(shape) - site["fn"].event_dim
    else:  # what follows the plates is of the event
        batch = min(len(shape), max((-frame.dim for frame in frames), default=0))
    names = [f"{site['name']}_dim_{i}" for i in range(len(shape))]
    named = bool(events)
    for frame in frames:
        place = batch + frame.dim
        if 0 <= place < len(shape) and shape[place] == frame.size:
            names[place], named = frame.name, True
    names[len(shape) - len(events) :] = events
    return names if named else None


@tracing_alone
def filled_trace(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Trace a model at an initialisation, since an improper prior cannot be sampled."""
    seeded = handlers.seed(model, jax.random.key(0))
    filled = handlers.substitute(seeded, substitute_fn=init_to_uniform())
    return handlers.trace(filled).get_trace(*args, **kwargs)


def unchecked_trace(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Trace a model at an initialisation, without NumPyro's checks of values.

    NumPyro checks the values of distributions; at an arbitrary point they may be NaN, as those of
    a differential equation that its solver gives up on, although they are not at any draw.
    """
    with numpyro.validation_enabled(False):
        return filled_trace(model, args, kwargs)


def model_sites(
    model: Callable, args: tuple, kwargs: dict, *, prior_sites: Collection[str] = ()
) -> dict[str, Site]:
    """Trace a model abstractly, with nothing computed or compiled, and describe its sites."""
    found: dict[str, Site] = {}

    def look() -> None:
        for name, site in filled_trace(model, args, kwargs).items():
            if site["type"] in ("sample", "param", "mutable", "plate"):
                found[name] = _describe(site, found, prior_sites)

    jax.eval_shape(tracing_alone(look))
    return found


def _describe(site: dict[str, Any], seen: Collection[str], prior_sites: Collection[str]) -> Site:
    kind, distribution = site["type"], ""
    role: Role | None = None
    plates: tuple[tuple[str, int], ...] = ()
    density_shape: tuple[int, ...] = ()
    if kind == "sample":
        role = site_role(site, seen, prior_sites)
        plates = tuple((frame.name, frame.size) for frame in site["cond_indep_stack"])
        distribution = type(unwrapped(site["fn"])).__name__
        density_shape = _density_shape(site)
        if site["is_observed"]:
            kind = "factor" if is_factor(site) else "observed"
        else:
            kind = "discrete" if is_discrete_latent(site) else "latent"
    shape = jax.tree.map(jnp.shape, site["value"])
    scale, event_dim = site.get("scale"), 0
    drawn_from = site["args"][0] if is_subsampled(site) else None
    if kind == "observed":
        event_dim = unwrapped(site["fn"]).event_dim
    if scale is not None and not isinstance(scale, int | float):
        scale = jax.ShapeDtypeStruct(jnp.shape(scale), jnp.result_type(scale))
    return Site(
        site["name"],
        kind,
        role,
        shape,
        plates,
        distribution,
        scale,
        event_dim,
        drawn_from,
        is_marked(site),
        why_not_summed(site) if kind == "discrete" else "",
        density_shape,
    )


def _density_shape(site: dict[str, Any]) -> tuple[int, ...]:
    fn, shape = site["fn"], np.shape(site["value"])
    try:
        return jnp.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim])
    except ValueError:  # of data that do not fit their plate, which other checks report
        return fn.batch_shape


def fill_model(
    model: Callable, key: jax.Array, known: dict[str, Any], args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Trace a model on known values."""
    return handlers.trace(filled(handlers.seed(model, key), known)).get_trace(*args, **kwargs)


def filled(model: Callable, known: Mapping[str, Any]) -> Callable:
    """Give a model known values; its deterministic sites are computed anew from these."""

    def value(site: dict[str, Any]) -> Any:
        return None if site["type"] == "deterministic" else known.get(site["name"])

    return handlers.substitute(model, substitute_fn=value)
