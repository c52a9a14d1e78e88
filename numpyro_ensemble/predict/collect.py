"""The draws of a fitted ensemble, and the sites of its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.infer import MCMC

from numpyro_ensemble._compat import distribution_mask
from numpyro_ensemble.density import (
    is_improper,
    is_subsampled,
    model_sites,
    named_axes,
    unchecked_trace,
)
from numpyro_ensemble.fit.ensemble import Ensemble
from numpyro_ensemble.fit.state import setup_of
from numpyro_ensemble.handlers import is_factor, unwrapped
from numpyro_ensemble.mapping import check_failed, finite_members, pick
from numpyro_ensemble.predict.chains import chains_of, checked_members, settings_of
from numpyro_ensemble.results import EnsembleResult, PathfinderResult, check_gathered
from numpyro_ensemble.vi import EnsembleVI

_VI_DRAWS = 100


class Draws(NamedTuple):
    """Draws of all members, or of those that have not failed."""

    model: Callable
    samples: dict[str, Any]  # (E, S, ...)
    params: dict[str, Any]  # (E, ...)
    shape: tuple[int, int]
    stats: dict[str, Any]
    members: np.ndarray  # the members' own numbers
    finite: np.ndarray
    ensemble_size: int  # failed members included
    losses: Any = None
    seconds: float | None = None
    attrs: Mapping[str, Any] = MappingProxyType({})
    origins: np.ndarray | None = None  # the member that each chain started at

    def without_failed(self) -> Draws:
        """Return the draws of the finite members."""
        places = np.flatnonzero(self.finite)
        names = ("samples", "params", "stats", "members", "losses", "finite", "origins")
        taken = pick({name: getattr(self, name) for name in names}, places)
        return self._replace(**taken, shape=(places.size, self.shape[1]))


def collect(
    inference: Any,
    result: Any,
    rng_key: jax.Array,
    num_samples: int | None,
    args: tuple,
    kwargs: dict,
    on_failed: str,
    members: ArrayLike | None = None,
) -> Draws:
    """Return the draws of a fit, or the samples that were given for a model."""
    if members is not None and isinstance(result, EnsembleResult | PathfinderResult):
        raise ValueError(
            "members= names the member that each chain started at, and the draws of this result "
            "are the members' own: leave members out."
        )
    if isinstance(result, PathfinderResult):
        draws = _of_paths(inference, result, num_samples, rng_key)
    elif isinstance(result, MCMC):
        samples, stats = chains_of(result)
        draws = _given(inference, samples, num_samples)
        draws = draws._replace(stats=stats, attrs=settings_of(result))
    elif not isinstance(inference, Ensemble):
        draws = _given(inference, result, num_samples)
    elif not isinstance(result, EnsembleResult):
        raise TypeError(f"result takes what run returned, got {type(result).__name__}.")
    else:
        if getattr(inference, "raw", False):
            raise TypeError(
                "to_arviz takes fits of NumPyro models, and this is one of a raw density."
            )
        check_gathered(result)
        _check_fit(inference, result, args, kwargs)
        if isinstance(inference, EnsembleVI):
            draws = _of_guides(inference, result, rng_key, num_samples or _VI_DRAWS, args, kwargs)
        else:
            draws = _of_points(inference, result, num_samples or 1, args, kwargs)
    if members is not None:
        draws = draws._replace(origins=checked_members(members, draws.shape[0]))
    check_failed(draws.finite, on_failed)
    return draws if draws.finite.all() else draws.without_failed()


def _check_fit(runner: Ensemble, result: EnsembleResult, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError if the arguments lack data that the fit had, as far as is known."""
    setup = setup_of(result.state)
    if setup is None or setup.template is None:
        return
    own = setup.template.member_ranks
    if own:
        raise ValueError(
            f"each member was fitted to its own data, member_args={list(own)}: make ArviZ data of "
            f"one member at a time, by to_arviz(runner.model, ...) with its draws and its data."
        )
    now = model_sites(runner.model, args, kwargs)
    lost = [
        name
        for name, site in setup.template.sites.items()
        if site.kind == "observed" and name in now and now[name].kind != "observed"
    ]
    if lost:
        raise ValueError(
            f"the sites {lost} were observed in the fit and are not with these arguments: pass "
            f"the data as well."
        )


def _given(inference: Any, result: Any, num_samples: int | None) -> Draws:
    """Return the user's samples of a model."""
    model = getattr(inference, "model", inference)
    if not callable(model):
        raise TypeError(f"inference takes a runner or a model, got {inference!r}.")
    if not isinstance(result, Mapping):
        raise TypeError(f"result takes samples by site name, got {type(result).__name__}.")
    shapes = {name: np.shape(value)[:2] for name, value in result.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"samples must have the same leading axes (E, S); got {shapes}.")
    shape = next(iter(shapes.values()))
    if num_samples not in (None, shape[1]):
        raise ValueError(
            f"num_samples={num_samples}, and samples lead with {shape}: leave num_samples out."
        )
    samples = {name: jnp.asarray(value) for name, value in result.items()}
    finite = finite_members(samples, shape[0])
    return Draws(model, samples, {}, shape, {}, np.arange(shape[0]), finite, shape[0])


def _of_paths(
    inference: Any, result: PathfinderResult, num_samples: int | None, key: jax.Array
) -> Draws:
    """Return Pathfinder's samples as one chain, chosen by their weights if these differ."""
    log_weights = np.asarray(result.log_weights)
    chosen: Any = np.arange(len(log_weights))
    if np.ptp(log_weights) > 0:
        chosen = jax.random.choice(key, len(chosen), chosen.shape, p=jnp.exp(result.log_weights))
    samples = {name: jnp.asarray(value)[chosen][None] for name, value in result.samples.items()}
    draws = _given(inference, samples, num_samples)
    attrs = {"pareto_k": float(result.pareto_k), "elbo": np.asarray(result.elbo)}
    weights = log_weights[np.asarray(chosen)][None]
    return draws._replace(stats={"log_weight": weights}, attrs=attrs)


def _of_guides(
    runner: EnsembleVI, result: EnsembleResult, key: jax.Array, number: int, args: Any, kwargs: Any
) -> Draws:
    """Draw from the members' guides."""
    samples, densities = runner.draws(key, result, number, args, kwargs, with_density=True)
    own = {name: leaf for name, leaf in result.params.items() if name not in samples}
    return _of_fit(runner, result, samples, own, number, densities)


def _of_points(
    runner: Ensemble, result: EnsembleResult, number: int, args: tuple, kwargs: dict
) -> Draws:
    """Repeat the members' estimates."""
    sites = unchecked_trace(runner.model, args, kwargs)
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
    """Return the draws of a fit, with its parameters, losses and attributes."""
    params = {**own, **(result.state.mutable_state or {})}
    size, losses = runner.ensemble_size, np.asarray(result.losses)
    attrs = {"runner": type(runner).__name__, "num_steps": losses.shape[-1]}
    if isinstance(runner, EnsembleVI):
        attrs |= {"guide": _name(runner.guide), "loss": _name(runner.loss)}
    return Draws(
        runner.model, samples, params, (size, number), stats, np.arange(size),
        np.asarray(result.finite), size, losses, result.seconds, attrs,
    )  # fmt: skip


def _name(what: Any) -> str:
    return getattr(what, "__name__", type(what).__name__)


class Sites(NamedTuple):
    """The sites of a model, from a trace with its data."""

    latent: dict[str, Any]
    discrete: list[str]  # discrete latents without draws
    deterministic: list[str]
    observed: dict[str, Any]  # the data by name, NaN where it is masked
    factors: list[str]
    improper: list[str]
    dims: dict[str, list[str]]
    names: set[str]
    subsampled: dict[str, Any]  # the rows that this trace has drawn, by plate
    shapes: dict[str, tuple[int, ...]]  # of sample and deterministic sites

    @classmethod
    def of(cls, model: Callable, args: tuple, kwargs: dict, drawn: Collection[str]) -> Sites:
        """Trace the model once, at an initialisation."""
        trace = unchecked_trace(model, args, kwargs)
        sites = cls({}, [], [], {}, [], [], {}, set(trace), {}, {})
        for name, site in trace.items():
            if is_subsampled(site):
                sites.subsampled[name] = site["value"]
            if site["type"] not in ("sample", "deterministic"):
                continue
            sites.shapes[name] = np.shape(site["value"])
            names = named_axes(site)
            if names is not None:
                sites.dims[name] = names
            if site["type"] == "deterministic":
                sites.deterministic.append(name)
            elif is_factor(site):
                sites.factors.append(name)
            elif site["is_observed"]:
                sites.observed[name] = _seen(site)
            elif site["fn"].is_discrete and (
                name not in drawn or site["infer"].get("enumerate") == "parallel"
            ):
                sites.discrete.append(name)
            else:
                sites.latent[name] = site["value"]
                if is_improper(site):
                    sites.improper.append(name)
        return sites


def _seen(site: dict[str, Any]) -> np.ndarray:
    """Return the data of a site, NaN where a mask leaves it out."""
    value, process = np.asarray(site["value"]), unwrapped(site["fn"])
    seen = getattr(process, "observed", None)
    if seen is not None:  # a process masks single values of its event
        value = np.where(np.broadcast_to(np.asarray(seen), value.shape), value, np.nan)
    mask = mask_of(site["fn"])
    if mask is True or np.all(mask):
        return value
    batch = value.shape[: value.ndim - site["fn"].event_dim]
    mask = np.broadcast_to(np.asarray(mask), batch)
    mask = mask.reshape(*batch, *[1] * (value.ndim - len(batch)))
    return np.where(mask, value, np.nan)


def mask_of(fn: Any) -> Any:
    """Return the mask of a distribution's batch, True if nothing is masked."""
    mask: Any = True
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            mask = jnp.logical_and(mask, distribution_mask(fn))
        fn = fn.base_dist
    return mask


def check_sites(draws: Draws, sites: Sites) -> None:
    """Raise a ValueError if samples do not fit the model."""
    unknown = sorted(draws.samples.keys() - sites.names)
    missing = sorted(sites.latent.keys() - draws.samples.keys())
    if unknown or missing:
        raise ValueError(
            f"the samples are of another model: they lack the sites {missing}, and have {unknown}, "
            f"which this model lacks."
        )
    for name, value in sites.latent.items():
        given = draws.samples[name]
        if given.shape[2:] != np.shape(value):
            raise ValueError(
                f"samples of {name!r} have shape {given.shape[2:]}, and with these arguments the "
                f"model's site has {np.shape(value)}: pass the arguments of the fit. If the model "
                f"subsamples a plate, pass a model without subsampling instead of the runner."
            )
