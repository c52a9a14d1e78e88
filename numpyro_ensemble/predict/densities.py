"""Log densities, log likelihoods and deterministic sites of each draw, in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import compute_log_probs

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.handlers import unwrapped
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mapping import map_member_draws, pick
from numpyro_ensemble.predict.collect import Draws, Sites, mask_of
from numpyro_ensemble.sharding import Placement


class Computed(NamedTuple):
    """Values and log densities of each draw; every array has leading axes `(E, S)`."""

    deterministic: dict[str, Any]
    density: Any
    log_likelihood: dict[str, Any]
    log_prior: dict[str, Any]
    unconstrained: dict[str, Any]


class Wanted(NamedTuple):
    """Names of the sites whose values or log densities are computed."""

    deterministic: tuple[str, ...]
    log_likelihood: tuple[str, ...]
    log_prior: tuple[str, ...]
    unconstrained: tuple[str, ...]

    @classmethod
    def of(
        cls,
        draws: Draws,
        sites: Sites,
        log_likelihood: bool,
        log_prior: bool,
        unconstrained: bool,
    ) -> Wanted:
        """Return the names for a call; deterministic sites among the draws are not computed."""
        latent = tuple(sites.latent)
        return cls(
            tuple(name for name in sites.deterministic if name not in draws.samples),
            tuple(sites.observed) if log_likelihood else (),
            latent if log_prior else (),
            latent if unconstrained else (),
        )


class OfDraw(NamedTuple):
    """Values and log densities of one draw.

    Attributes:
        posterior: deterministic sites.
        log_likelihood: terms of each observation.
        log_prior: terms of each latent value.
        unconstrained: latents in unconstrained space.
        terms: all terms of the log density, by site, or their sum.
    """

    posterior: dict[str, Any]
    log_likelihood: dict[str, Any]
    log_prior: dict[str, Any]
    unconstrained: dict[str, Any]
    terms: Any


def of_draw(
    model: Callable, key: jax.Array, known: dict, wanted: Wanted, args: tuple, kwargs: dict
) -> OfDraw:
    """Run the model once with the values of a draw."""
    terms, trace = compute_log_probs(
        handlers.seed(model, key), args, kwargs, known, sum_log_prob=False
    )
    return OfDraw(
        {name: trace[name]["value"] for name in wanted.deterministic},
        {name: each_value(trace[name]) for name in wanted.log_likelihood},
        {name: each_value(trace[name]) for name in wanted.log_prior},
        {name: _unconstrained(trace[name]) for name in wanted.unconstrained},
        terms,
    )


def _unconstrained(site: dict[str, Any]) -> Any:
    """Return a latent in unconstrained space; a discrete one is as it is."""
    if site["fn"].is_discrete:
        return site["value"]
    return biject_to(site["fn"].support).inv(site["value"])


def compute(
    draws: Draws,
    sites: Sites,
    wanted: Wanted,
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict,
    placement: Placement | None = None,
) -> Computed:
    """Compute deterministic sites, log densities and their terms in one program.

    If discrete sites were summed out, nothing is computed, since all of it may depend on them.
    """
    if sites.discrete:
        return Computed({}, None, {}, {}, {})
    given = {name: draws.samples[name] for name in sites.deterministic if name in draws.samples}
    hidden = frozenset(sites.deterministic)

    samples = {name: value for name, value in draws.samples.items() if name not in hidden}
    params = {name: value for name, value in draws.params.items() if name not in hidden}

    # draws are inputs: if they were constants, XLA would compute the densities while it compiles
    def every(keys: jax.Array, samples: dict[str, Any], params: dict[str, Any]) -> Computed:
        def one(where: tuple) -> Computed:
            key, e, s = where
            known = {**pick(params, e), **pick(samples, e, s)}
            found = of_draw(draws.model, key, known, wanted, args, kwargs)
            density = sum((term.sum() for term in found.terms.values()), jnp.zeros(()))
            terms = found.log_likelihood, found.log_prior
            return Computed(found.posterior, density, *terms, found.unconstrained)

        return map_member_draws(one, keys, placement)

    keys = jax.random.split(rng_key, draws.shape)
    values = home(jax.jit(tracing_alone(every))(keys, samples, params))
    return values._replace(deterministic=given | values.deterministic)


def each_value(site: dict[str, Any]) -> Any:
    """Return the log density of each value of a site.

    A Gaussian process is one event with one log density, so its values have the log density given
    all other values. Weights of a scale, or of plates that draw some of their rows, are left out,
    as in NumPyro's `log_likelihood`.
    """
    process: Any = unwrapped(site["fn"])
    if not site["is_observed"] or not hasattr(process, "pointwise_log_prob"):
        return site["fn"].log_prob(site["value"])
    value = jnp.asarray(site["value"])
    rows = value.reshape(-1, value.shape[-1])
    terms = jax.vmap(process.pointwise_log_prob)(rows).reshape(value.shape)
    mask = mask_of(site["fn"])
    if mask is True:
        return terms
    return jnp.where(jnp.broadcast_to(mask, value.shape[:-1])[..., None], terms, 0.0)
