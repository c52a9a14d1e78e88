"""Log densities, log likelihoods and deterministic sites of each draw, in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer import util

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.handlers import unwrapped
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mapping import map_member_draws, pick
from numpyro_ensemble.predict.collect import Draws, Sites, mask_of
from numpyro_ensemble.sharding import Placement


class Computed(NamedTuple):
    """What the model says of each draw; every array leads with `(E, S)`."""

    deterministic: dict[str, Any]
    density: Any
    pointwise: dict[str, Any]


def compute(
    draws: Draws,
    sites: Sites,
    rng_key: jax.Array,
    pointwise: bool,
    args: tuple,
    kwargs: dict,
    placement: Placement | None = None,
) -> Computed:
    """Compute deterministic sites, log densities and pointwise log likelihoods in one program.

    What depends on discrete sites that were summed out is left out.
    """
    if sites.discrete:
        return Computed({}, None, {})
    given = {name: draws.samples[name] for name in sites.deterministic if name in draws.samples}

    def one(where: tuple) -> Computed:
        key, e, s = where
        known = {**pick(draws.params, e), **pick(draws.samples, e, s)}
        trace = fill_model(draws.model, key, known, args, kwargs)
        names = [name for name in sites.deterministic if name not in given]
        deterministic = {name: trace[name]["value"] for name in names}
        model = handlers.seed(draws.model, key)
        known = {name: value for name, value in known.items() if name not in sites.deterministic}
        density, _ = util.log_density(model, args, kwargs, known)
        if not pointwise:
            return Computed(deterministic, density, {})
        filled = handlers.substitute(model, data=known)
        terms = util.log_likelihood(filled, {}, *args, batch_ndims=0, **kwargs)
        terms = {n: each_value(trace[n], terms[n]) for n in sites.observed}
        return Computed(deterministic, density, terms)

    keys = jax.random.split(rng_key, draws.shape)
    mapped = jax.jit(tracing_alone(lambda keys: map_member_draws(one, keys, placement)))
    values = home(mapped(keys))
    return values._replace(deterministic=given | values.deterministic)


def each_value(site: dict[str, Any], joint: Any) -> Any:
    """Return the log densities of a site's values, each given all others where they depend.

    A Gaussian process is one event, whose log density tells nothing of its single values.
    """
    process: Any = unwrapped(site["fn"])
    if not hasattr(process, "pointwise_log_prob"):
        return joint
    value = jnp.asarray(site["value"])
    rows = value.reshape(-1, value.shape[-1])
    terms = jax.vmap(process.pointwise_log_prob)(rows).reshape(value.shape)
    mask = mask_of(site["fn"])
    if mask is True:
        return terms
    return jnp.where(jnp.broadcast_to(mask, value.shape[:-1])[..., None], terms, 0.0)
