"""The draws of a fitted ensemble, and what the model says of each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import util

from numpyro_ensemble.density import filled_trace
from numpyro_ensemble.draws import (
    batch_for,
    check_failed,
    fill_model,
    finite_members,
    map_draws,
    pick,
)
from numpyro_ensemble.engine import Ensemble
from numpyro_ensemble.handlers import is_factor, unwrapped
from numpyro_ensemble.map import EnsembleMAP
from numpyro_ensemble.primitives import combine, partition
from numpyro_ensemble.results import EnsembleResult
from numpyro_ensemble.vi import EnsembleVI

_VI_DRAWS = 100


class Draws(NamedTuple):
    """Draws of all members that have not failed."""

    model: Callable
    samples: dict[str, Any]  # (E, S, ...)
    params: dict[str, Any]  # (E, ...)
    shape: tuple[int, int]
    stats: dict[str, Any]
    members: np.ndarray  # the members' own numbers
    losses: Any = None
    seconds: float | None = None


def collect(
    inference: Any,
    result: Any,
    rng_key: jax.Array,
    num_samples: int | None,
    args: tuple,
    kwargs: dict,
    on_failed: str,
) -> Draws:
    """Return the draws of what was fitted, a runner's or those given for a model."""
    if isinstance(inference, Ensemble):
        if not isinstance(result, EnsembleResult):
            raise TypeError(f"result takes what run returned, got {type(result).__name__}.")
        return _fitted(inference, result, rng_key, num_samples, args, kwargs, on_failed)
    model = getattr(inference, "model", inference)
    if not callable(model):
        raise TypeError(f"inference takes a runner or a model, got {inference!r}.")
    if not isinstance(result, Mapping):
        raise TypeError(f"result takes samples by site name, got {type(result).__name__}.")
    shapes = {name: np.shape(value)[:2] for name, value in result.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"samples must lead with the same (E, S); got {shapes}.")
    size, number = next(iter(shapes.values()))
    if num_samples not in (None, number):
        raise ValueError(f"num_samples={num_samples}, and the samples lead with {size, number}.")
    finite = finite_members(dict(result), size)
    check_failed(finite, on_failed, stacklevel=5)
    members = np.flatnonzero(finite)
    samples = {name: jnp.asarray(value)[members] for name, value in result.items()}
    return Draws(model, samples, {}, (members.size, number), {}, members)


def _fitted(
    runner: Ensemble,
    result: EnsembleResult,
    rng_key: jax.Array,
    num_samples: int | None,
    args: tuple,
    kwargs: dict,
    on_failed: str,
) -> Draws:
    finite = np.asarray(result.finite)
    check_failed(finite, on_failed, stacklevel=5)
    members = np.flatnonzero(finite)
    stats: dict[str, Any] = {}
    if isinstance(runner, EnsembleVI):
        number = num_samples or _VI_DRAWS
        samples, log_q = runner.draws_with_density(rng_key, result, number, args, kwargs)
        if log_q is not None:
            stats["log_q"] = log_q[members]
        own = {name: leaf for name, leaf in result.params.items() if name not in samples}
    elif isinstance(runner, EnsembleMAP) and isinstance(result.params, dict):
        number = num_samples or 1
        sites = filled_trace(runner.model, args, kwargs)
        latent = {name for name, site in sites.items() if site["type"] == "sample"}
        unknown = sorted(result.params.keys() - sites.keys())
        if unknown:
            raise ValueError(f"the result is of another model: this one has no {unknown}.")
        samples = {
            name: jnp.broadcast_to(leaf[:, None], (len(leaf), number, *leaf.shape[1:]))
            for name, leaf in result.params.items()
            if name in latent
        }
        own = {name: leaf for name, leaf in result.params.items() if name not in latent}
    else:
        raise TypeError("to_arviz takes fits of NumPyro models, not of raw densities.")
    params = {**own, **(result.state.mutable_state or {})}
    arrays, shared = partition(params)
    return Draws(
        runner.model,
        pick(samples, members),
        combine(pick(arrays, members), shared),
        (members.size, number),
        stats,
        members,
        np.asarray(result.losses)[members],
        result.seconds,
    )


class Sites(NamedTuple):
    """What a trace of the model with its data tells."""

    latent: dict[str, Any]
    deterministic: list[str]
    observed: dict[str, Any]  # the data by name
    factors: list[str]
    improper: list[str]
    dims: dict[str, list[str]]

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict) -> Sites:
        """Trace the model once, at an initialisation."""
        sites = cls({}, [], {}, [], [], {})
        for name, site in filled_trace(model, args, kwargs).items():
            if site["type"] not in ("sample", "deterministic"):
                continue
            frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
            event = site.get("infer") or {}
            names = [frame.name for frame in frames] + list(event.get("event_dims", []))
            if names:
                sites.dims[name] = names
            if site["type"] == "deterministic":
                sites.deterministic.append(name)
            elif is_factor(site):
                sites.factors.append(name)
            elif site["is_observed"]:
                sites.observed[name] = np.asarray(site["value"])
            else:
                sites.latent[name] = site["value"]
                if type(unwrapped(site["fn"])).__name__ == "ImproperUniform":
                    sites.improper.append(name)
        return sites


def check_shapes(draws: Draws, sites: Sites) -> None:
    """Raise a ValueError where samples do not have the shape that the model's site has."""
    for name, value in sites.latent.items():
        given = draws.samples.get(name)
        if given is not None and given.shape[2:] != np.shape(value):
            raise ValueError(
                f"samples of {name!r} have shape {given.shape[2:]}, and the model, called with "
                f"these arguments, {np.shape(value)}: pass the arguments of the fit; or, where the "
                f"model subsamples a plate, a model without subsampling in the runner's place."
            )


def computed(
    draws: Draws, sites: Sites, rng_key: jax.Array, args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Return the deterministic sites at each draw."""
    names = [name for name in sites.deterministic if name not in draws.samples]
    given = {name: draws.samples[name] for name in sites.deterministic if name in draws.samples}
    if not names:
        return given

    def one(key: jax.Array, known: dict) -> dict[str, Any]:
        trace = fill_model(draws.model, key, known, args, kwargs)
        return {name: trace[name]["value"] for name in names}

    return given | _over(draws, rng_key, one)


def densities(
    draws: Draws, sites: Sites, pointwise: bool, args: tuple, kwargs: dict
) -> tuple[Any, dict[str, Any]]:
    """Return the log density of each draw, and the log likelihood of each observation."""

    def one(key: jax.Array, known: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = handlers.seed(draws.model, key)
        known = {name: value for name, value in known.items() if name not in sites.deterministic}
        density, _ = util.log_density(model, args, kwargs, known)
        if not pointwise:
            return density, {}
        filled = handlers.substitute(model, data=known)
        terms = util.log_likelihood(filled, {}, *args, batch_ndims=0, **kwargs)
        return density, {name: terms[name] for name in sites.observed}

    return _over(draws, jax.random.key(0), one)


def _over(draws: Draws, rng_key: jax.Array, fn: Callable) -> Any:
    """Map a function of a key and the known values over all draws, in one bounded program."""
    size, number = draws.shape
    arrays, shared = partition(draws.params)
    member, draw = np.divmod(np.arange(size * number), number)

    def one(where: tuple) -> Any:
        key, e, s = where
        return fn(key, {**combine(pick(arrays, e), shared), **pick(draws.samples, e, s)})

    keys = jax.random.split(rng_key, size * number)
    forms = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (keys, member, draw)))
    bytes_each = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(forms))
    at_once = batch_for(size * number, bytes_each)
    values = jax.jit(lambda where: map_draws(one, where, at_once))((keys, member, draw))
    return jax.tree.map(lambda x: x.reshape(size, number, *x.shape[1:]), values)
