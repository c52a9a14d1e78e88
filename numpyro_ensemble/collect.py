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
from numpyro_ensemble.results import EnsembleResult
from numpyro_ensemble.vi import EnsembleVI

_VI_DRAWS = 100


class Draws(NamedTuple):
    """Draws of members, all of them or those that have not failed."""

    model: Callable
    samples: dict[str, Any]  # (E, S, ...)
    params: dict[str, Any]  # (E, ...)
    shape: tuple[int, int]
    stats: dict[str, Any]
    members: np.ndarray  # the members' own numbers
    finite: np.ndarray
    losses: Any = None
    seconds: float | None = None

    def without_failed(self) -> Draws:
        """Return the draws of the finite members."""
        places = np.flatnonzero(self.finite)
        number = self.shape[1]
        samples, params, stats = (pick(x, places) for x in (self.samples, self.params, self.stats))
        losses = None if self.losses is None else self.losses[places]
        return Draws(
            self.model, samples, params, (places.size, number), stats, self.members[places],
            self.finite[places], losses, self.seconds,
        )  # fmt: skip


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
    if not isinstance(inference, Ensemble):
        draws = _given(inference, result, num_samples)
    elif not isinstance(result, EnsembleResult):
        raise TypeError(f"result takes what run returned, got {type(result).__name__}.")
    elif isinstance(inference, EnsembleVI):
        draws = _of_guides(inference, result, rng_key, num_samples or _VI_DRAWS, args, kwargs)
    elif isinstance(inference, EnsembleMAP) and isinstance(result.params, dict):
        draws = _of_points(inference, result, num_samples or 1, args, kwargs)
    else:
        raise TypeError("to_arviz takes fits of NumPyro models, not of raw densities.")
    check_failed(draws.finite, on_failed)
    return draws if draws.finite.all() else draws.without_failed()


def _given(inference: Any, result: Any, num_samples: int | None) -> Draws:
    """Return samples that the user has, of a model or of what has one."""
    model = getattr(inference, "model", inference)
    if not callable(model):
        raise TypeError(f"inference takes a runner or a model, got {inference!r}.")
    if not isinstance(result, Mapping):
        raise TypeError(f"result takes samples by site name, got {type(result).__name__}.")
    shapes = {name: np.shape(value)[:2] for name, value in result.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"samples must lead with the same (E, S); got {shapes}.")
    shape = next(iter(shapes.values()))
    if num_samples not in (None, shape[1]):
        raise ValueError(f"num_samples={num_samples}, and the samples lead with {shape}.")
    samples = {name: jnp.asarray(value) for name, value in result.items()}
    finite = finite_members(samples, shape[0])
    return Draws(model, samples, {}, shape, {}, np.arange(shape[0]), finite)


def _of_guides(
    runner: EnsembleVI, result: EnsembleResult, key: jax.Array, number: int, args: Any, kwargs: Any
) -> Draws:
    """Draw from the members' guides."""
    samples, log_q = runner.draws(key, result, number, args, kwargs, with_density=True)
    own = {name: leaf for name, leaf in result.params.items() if name not in samples}
    stats = {} if log_q is None else {"log_q": log_q}
    return _of_fit(runner, result, samples, own, number, stats)


def _of_points(
    runner: EnsembleMAP, result: EnsembleResult, number: int, args: tuple, kwargs: dict
) -> Draws:
    """Repeat the members' estimates."""
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
    return _of_fit(runner, result, samples, own, number, {})


def _of_fit(
    runner: Ensemble,
    result: EnsembleResult,
    samples: dict[str, Any],
    own: dict[str, Any],
    number: int,
    stats: dict[str, Any],
) -> Draws:
    """Put together what a fit tells besides its draws."""
    params = {**own, **(result.state.mutable_state or {})}
    size, losses = runner.ensemble_size, np.asarray(result.losses)
    return Draws(
        runner.model, samples, params, (size, number), stats, np.arange(size),
        np.asarray(result.finite), losses, result.seconds,
    )  # fmt: skip


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
    member, draw = np.divmod(np.arange(size * number), number)

    def one(where: tuple) -> Any:
        key, e, s = where
        return fn(key, {**pick(draws.params, e), **pick(draws.samples, e, s)})

    keys = jax.random.split(rng_key, size * number)
    forms = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (keys, member, draw)))
    bytes_each = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(forms))
    at_once = batch_for(size * number, bytes_each)
    values = jax.jit(lambda where: map_draws(one, where, at_once))((keys, member, draw))
    return jax.tree.map(lambda x: x.reshape(size, number, *x.shape[1:]), values)
