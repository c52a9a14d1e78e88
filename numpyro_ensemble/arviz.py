"""From a fitted ensemble to ArviZ data: members are chains, draws within a member are draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
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
from numpyro_ensemble.predictive import EnsemblePredictive
from numpyro_ensemble.primitives import check_count, combine, partition
from numpyro_ensemble.results import EnsembleResult
from numpyro_ensemble.vi import EnsembleVI

_VI_DRAWS = 100
_PRIOR_DRAWS = 500


def to_arviz(
    inference: Any,
    result: Any,
    *args: Any,
    rng_key: jax.Array | None = None,
    num_samples: int | None = None,
    prior: bool | int = False,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    predictions: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    on_failed: str = "warn",
    **kwargs: Any,
) -> Any:
    """Turn a fitted ensemble into ArviZ data.

    A member becomes a chain, and a draw within a member a draw. `az.loo` needs some draws: give
    `num_samples` where a MAP ensemble has few members.

    Args:
        inference: an `EnsembleMAP`, an `EnsembleVI`, or a model.
        result: what `run` returned; for a model, samples by site that lead with `(E, S)`.
        *args: arguments of the model, the observed ones too.
        rng_key: for draws and predictions (default: key 0).
        num_samples: draws per member (default: 1 for MAP, 100 for variational fits).
        prior: add prior and prior predictive draws, 500 or as many as said.
        posterior_predictive: add predictions of the observed sites.
        log_likelihood: add the log likelihood of each observation.
        predictions: predictions for other data, leading with `(E, S)` or `(E * S,)`.
        constant_data: the group of that name.
        coords: coordinates by dimension.
        dims: dimensions by site; those of plates and `infer={"event_dims": ...}` are known.
        on_failed: "warn" leaves members that are not finite out with a warning, "raise" raises.
        **kwargs: keyword arguments of the model.

    Returns:
        `arviz.InferenceData` below ArviZ 1.0, from then on an `xarray.DataTree`; both have the
        group `training` with the losses besides ArviZ's own.

    Raises:
        TypeError: if `inference` is no runner and no model, or `result` is not of its kind.
        ValueError: for samples with unequal leading axes, or a result of another model.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsembleMAP, to_arviz
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", 3):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=4)
        >>> result = runner.run(jax.random.key(0), 100, jnp.ones(3), progress_bar=False)
        >>> data = to_arviz(runner, result, jnp.ones(3), num_samples=5)
        >>> dict(data.posterior_predictive["y"].sizes)
        {'chain': 4, 'draw': 5, 'rows': 3}
    """
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    if num_samples is not None:
        check_count("num_samples", num_samples)
    keys = jax.random.split(rng_key, 4)
    draws = _draws(inference, result, keys[0], num_samples, args, kwargs, on_failed)
    model = draws.model
    sites = _Sites.of(model, args, kwargs)
    _check_shapes(draws, sites)
    groups: dict[str, dict[str, Any]] = {}
    groups["posterior"] = {
        name: value for name, value in draws.samples.items() if name in sites.latent
    } | _computed(draws, sites, keys[1], args, kwargs)
    with_likelihood = log_likelihood and bool(sites.observed)
    if sites.factors and with_likelihood:
        warnings.warn(
            f"log_likelihood leaves out the factors {sorted(sites.factors)}: they belong to no "
            f"observation. Their terms are part of lp.",
            stacklevel=2,
        )
    density, pointwise = _densities(draws, sites, with_likelihood, args, kwargs)
    groups["sample_stats"] = {"lp": density, **draws.stats}
    if "log_q" in draws.stats:
        groups["sample_stats"]["log_p"] = density
    if with_likelihood:
        groups["log_likelihood"] = pointwise
    free = handlers.uncondition(model)
    if posterior_predictive and sites.observed:
        predictive = EnsemblePredictive(
            free, draws.samples, params=draws.params, batch_ndims=2, return_sites=sites.observed
        )
        groups["posterior_predictive"] = predictive(keys[2], *args, **kwargs)
    if prior:
        groups |= _prior(free, draws, sites, int(prior), keys[3], args, kwargs)
    if sites.observed:
        groups["observed_data"] = sites.observed
    if constant_data is not None:
        groups["constant_data"] = dict(constant_data)
    if predictions is not None:
        groups["predictions"] = _group(predictions, draws.shape)
    dims = {**sites.dims, **(dims or {})}
    return _assemble(groups, draws, dims, dict(coords or {}))


class _Draws(NamedTuple):
    """Draws of all members that have not failed."""

    model: Callable
    samples: dict[str, Any]  # (E, S, ...)
    params: dict[str, Any]  # (E, ...)
    shape: tuple[int, int]
    stats: dict[str, Any]
    members: np.ndarray  # the members' own numbers
    losses: Any = None
    seconds: float | None = None


def _draws(
    inference: Any,
    result: Any,
    rng_key: jax.Array,
    num_samples: int | None,
    args: tuple,
    kwargs: dict,
    on_failed: str,
) -> _Draws:
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
    return _Draws(model, samples, {}, (members.size, number), {}, members)


def _fitted(
    runner: Ensemble,
    result: EnsembleResult,
    rng_key: jax.Array,
    num_samples: int | None,
    args: tuple,
    kwargs: dict,
    on_failed: str,
) -> _Draws:
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
    return _Draws(
        runner.model,
        pick(samples, members),
        combine(pick(arrays, members), shared),
        (members.size, number),
        stats,
        members,
        np.asarray(result.losses)[members],
        result.seconds,
    )


class _Sites(NamedTuple):
    """What a trace of the model with its data tells."""

    latent: dict[str, Any]
    deterministic: list[str]
    observed: dict[str, Any]  # the data by name
    factors: list[str]
    improper: list[str]
    dims: dict[str, list[str]]

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict) -> _Sites:
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


def _check_shapes(draws: _Draws, sites: _Sites) -> None:
    for name, value in sites.latent.items():
        given = draws.samples.get(name)
        if given is not None and given.shape[2:] != np.shape(value):
            raise ValueError(
                f"samples of {name!r} have shape {given.shape[2:]}, and the model, called with "
                f"these arguments, {np.shape(value)}: pass the arguments of the fit; or, where the "
                f"model subsamples a plate, a model without subsampling in the runner's place."
            )


def _computed(
    draws: _Draws, sites: _Sites, rng_key: jax.Array, args: tuple, kwargs: dict
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


def _densities(
    draws: _Draws, sites: _Sites, pointwise: bool, args: tuple, kwargs: dict
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


def _over(draws: _Draws, rng_key: jax.Array, fn: Callable) -> Any:
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


def _prior(
    free: Callable,
    draws: _Draws,
    sites: _Sites,
    number: int,
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict,
) -> dict[str, dict[str, Any]]:
    """Draw from the prior, where it can be drawn from."""
    if sites.improper:
        warnings.warn(
            f"prior draws are left out: the prior of {sites.improper} is improper.", stacklevel=3
        )
        return {}
    size, number = draws.shape[0], _PRIOR_DRAWS if number == 1 else number
    names = [*sites.latent, *sites.deterministic, *sites.observed]
    grouped: dict[str, Any] = {}
    if draws.params:
        grouped = {"params": draws.params, "group_by_member": True}
    predictive = EnsemblePredictive(
        free, num_samples=number if grouped else size * number, return_sites=names, **grouped
    )
    values = predictive(rng_key, *args, **kwargs)
    if not grouped:
        values = {name: v.reshape(size, number, *v.shape[1:]) for name, v in values.items()}
    seen = {name: values.pop(name) for name in sites.observed}
    return {"prior": values, "prior_predictive": seen} if seen else {"prior": values}


def _group(values: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Give predictions their two leading axes."""
    grouped = {}
    for name, value in values.items():
        value = np.asarray(value)
        if value.shape[:2] != shape and value.shape[:1] == (shape[0] * shape[1],):
            value = value.reshape(*shape, *value.shape[1:])
        if value.shape[:2] != shape:
            raise ValueError(
                f"predictions[{name!r}] has shape {value.shape}; it must lead with {shape}, or "
                f"with {shape[0] * shape[1]}."
            )
        grouped[name] = value
    return grouped


def _assemble(groups: dict[str, dict[str, Any]], draws: _Draws, dims: dict, coords: dict) -> Any:
    """Make ArviZ data of the groups, of whichever kind the installed ArviZ has."""
    import arviz as az  # NumPyro has been imported by now: the other order breaks ArviZ's adapter

    attrs = {
        "inference_library": "numpyro_ensemble",
        "inference_library_version": _version(),
        "numpyro_version": numpyro.__version__,
    }
    if draws.seconds is not None:
        attrs["sampling_time"] = draws.seconds
    groups = {
        name: {site: np.asarray(value) for site, value in group.items()}
        for name, group in groups.items()
        if group
    }
    coords = {"chain": draws.members, **coords}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "More chains")  # there are many members on purpose
        if hasattr(az, "InferenceData"):  # below 1.0
            data = az.from_dict(**groups, coords=coords, dims=dims)  # type: ignore[arg-type]
        else:
            data = az.from_dict(groups, coords=coords, dims=dims)
    for name in groups:
        data[name].attrs.update(attrs)
    if draws.losses is not None:
        _add_training(data, draws, attrs)
    return data


def _add_training(data: Any, draws: _Draws, attrs: dict) -> None:
    """Add the losses of each member at each step."""
    import xarray as xr

    losses = xr.Dataset(
        {"loss": (("chain", "step"), draws.losses)}, coords={"chain": draws.members}, attrs=attrs
    )
    if hasattr(data, "add_groups"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The group training is not defined")
            data.add_groups({"training": losses})
    else:
        data["training"] = xr.DataTree(losses)


def _version() -> str:
    from numpyro_ensemble import __version__

    return __version__
