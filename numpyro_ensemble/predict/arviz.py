"""From a fitted ensemble to ArviZ data: members are chains, draws within a member are draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.infer import MCMC

from numpyro_ensemble.calls.keywords import check_call
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.predict.assembly import assemble
from numpyro_ensemble.predict.chains import Run
from numpyro_ensemble.predict.collect import Draws, Sites, check_sites
from numpyro_ensemble.predict.densities import Computed, Wanted, compute
from numpyro_ensemble.predict.predictive import EnsemblePredictive
from numpyro_ensemble.predict.streamed import Cut, Streamed
from numpyro_ensemble.results import name_members
from numpyro_ensemble.sharding import Placement, as_mesh
from numpyro_ensemble.streaming.options import StoreOptions, call_digests

_PRIOR_DRAWS = 500


def to_arviz(
    inference: Any,
    result: Any = None,
    *args: Any,
    rng_key: jax.Array | None = None,
    num_samples: int | None = None,
    prior: bool | int = False,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    log_prior: bool = True,
    unconstrained: bool = False,
    predictions: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    on_failed: str = "warn",
    members: ArrayLike | None = None,
    store: Any = None,
    row_args: Iterable[str | int] | None = None,
    row_batch_size: int | None = None,
    progress_bar: bool = True,
    mesh: Mesh | str | None = None,
    **kwargs: Any,
) -> Any:
    """Turn a fitted ensemble into ArviZ data.

    Each member becomes a chain with `num_samples` draws. `az.loo` needs at least 4 draws of each
    member and 25 in all. Draws of a MAP member are all the same.

    Args:
        inference: an `EnsembleMAP`, an `EnsembleVI`, a `Pathfinder`, a model, or a
            `numpyro.infer.MCMC` that has run (without `result`).
        result: what `run` returned. For a model, samples by site with leading axes `(E, S)`, or a
            `numpyro.infer.MCMC` that has run. Its extra fields become sample stats.
        *args: arguments of the model, with the observed data.
        rng_key: for draws and predictions (default: key 0).
        num_samples: draws per member (default: 1 for MAP, 100 for variational fits).
        prior: add prior and prior predictive draws: True for 500, or their number.
        posterior_predictive: add predictions of the observed sites.
        log_likelihood: add the log likelihood of each observation.
        log_prior: add the log prior density of each latent value, as large as the posterior.
        unconstrained: add the latents in unconstrained space, `unconstrained_posterior`.
        predictions: predictions for other data, with leading axes `(E, S)` or `(E * S,)`.
        constant_data: the group of that name.
        coords: coordinates by dimension.
        dims: dimensions by site; those of plates and `infer={"event_dims": ...}` are known.
        on_failed: "warn" leaves out members that are not finite and warns, "raise" raises an error.
        members: the member `(E,)` that each chain of samples or of an `MCMC` started at, from
            `mcmc.starts.chain_members`. It becomes the coordinate `member` of `chain`.
        store: a path, or a store of Zarr's, to write to block by block. The returned data reads
            from the store. If a call was stopped, the same call continues it.
        row_args: names or positions of the arguments with rows along their leading axes, the
            observed ones too: the store is then written in blocks of these rows.
        row_batch_size: rows of a block (default: as many as fit).
        progress_bar: show how many blocks are written.
        mesh: devices that draws are spread over, as in `EnsemblePredictive`.
        **kwargs: keyword arguments of the model.

    Pathfinder's samples are one chain, with `log_weight` among the sample stats, and `pareto_k` and
    `elbo` in the attributes.

    Returns:
        `arviz.InferenceData` below ArviZ 1.0, and an `xarray.DataTree` from 1.0 on, with ArviZ's
        groups and a group `training` with the losses.

    Raises:
        TypeError: if `inference` is no runner and no model, or `result` does not belong to it.
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
        >>> data = to_arviz(runner, result, jnp.ones(3), num_samples=10)
        >>> dict(data.posterior_predictive["y"].sizes)
        {'chain': 4, 'draw': 10, 'rows': 3}
    """
    rng_key = one_key(jax.random.key(0) if rng_key is None else rng_key)
    if prior is not False and prior is not True:
        check_count("prior", prior)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    options = StoreOptions(row_args, row_batch_size, coords or {}, dims or {}, progress_bar)
    _check_store(store, prior, unconstrained, options)
    placement = Placement(mesh=as_mesh(mesh))
    keys = jax.random.split(rng_key, 4)
    if isinstance(inference, MCMC):
        inference, result, args, kwargs = Run.of(inference, result, args, kwargs)
    kwargs = {**kwargs, **getattr(inference, "static_kwargs", {})}
    fitted = getattr(inference, "model", inference)
    check_call(fitted, args, kwargs)
    cut = Cut.of(fitted, args, kwargs, options)
    draws = cut.collect(inference, result, keys[0], num_samples, on_failed, members)
    model = draws.model
    sites = cut.sites(model, draws)
    check_sites(draws, sites)
    _check_dims(dims or {}, sites, {**(predictions or {}), **(constant_data or {})})
    with_likelihood = log_likelihood and bool(sites.observed) and not sites.discrete
    wanted = Wanted.of(draws, sites, with_likelihood, log_prior, unconstrained)
    _warn_of_gaps(draws, sites, with_likelihood)
    if sites.subsampled:
        model = handlers.substitute(model, data=sites.subsampled)
        draws = draws._replace(model=model)
    free = handlers.uncondition(model)
    predictive = None
    if posterior_predictive and sites.observed:
        predictive = EnsemblePredictive(
            free,
            draws.samples,
            params=draws.params,
            num_samples=draws.shape[1],
            batch_ndims=2,
            return_sites=sites.observed,
            mesh=mesh,
        )
    more = {
        "constant_data": dict(constant_data or {}),
        "predictions": _group(predictions or {}, draws.shape),
    }
    named = {**sites.dims, **(dims or {})}

    def assembled(values: Computed, groups: dict[str, dict[str, Any]]) -> Any:
        posterior = {name: draws.samples[name] for name in sites.latent} | values.deterministic
        stats = {"posterior": posterior, "sample_stats": _stats(draws, values)}
        return assemble({**stats, **groups, **more}, draws, named, dict(coords or {}))

    if store is not None:
        placement.check_store()
        streamed = Streamed(cut, draws, sites, predictive, wanted, keys, options, placement)
        return streamed.write(store, assembled)
    drawn = (rng_key, draws.samples, draws.params, draws.model, args, kwargs)
    placement.check_alike(partial(call_digests, *drawn))
    values = compute(draws, sites, wanted, keys[1], args, kwargs, placement)
    groups = {
        "log_likelihood": values.log_likelihood,
        "log_prior": values.log_prior,
        "unconstrained_posterior": values.unconstrained,
        "observed_data": sites.observed,
    }
    if predictive is not None:
        groups["posterior_predictive"] = predictive(keys[2], *args, **kwargs)
    if prior:
        number = _PRIOR_DRAWS if prior is True else prior
        groups |= _prior(free, draws, sites, number, keys[3], args, kwargs)
    return assembled(values, groups)


def _check_store(store: Any, prior: bool | int, unconstrained: bool, options: StoreOptions) -> None:
    """Raise a ValueError for options that need a store, or that do not go with one."""
    if store is None and (options.row_args is not None or options.row_batch_size is not None):
        raise ValueError("row_args and row_batch_size set the blocks of a store: pass store= too.")
    if store is not None and prior:
        raise ValueError(
            "prior= does not go with store=: leave prior out, and write prior draws by "
            "EnsemblePredictive(model, num_samples=500).to_zarr."
        )
    if store is not None and unconstrained:
        raise ValueError("unconstrained=True does not go with store=: leave it out.")


def _check_dims(dims: Mapping[str, list[str]], sites: Sites, more: Mapping[str, Any]) -> None:
    """Raise a ValueError for dimensions of a site that is not there, or has fewer axes."""
    shapes = {name: np.shape(value)[2:] for name, value in more.items()} | sites.shapes
    shapes = {name.replace("/", "."): shape for name, shape in shapes.items()}
    for name, names in dims.items():
        shape = shapes.get(name.replace("/", "."))
        if shape is None:
            raise ValueError(f"dims names {name!r}, which is none of {sorted(shapes)}.")
        if len(names) > len(shape) and name not in more:
            raise ValueError(
                f"dims names {list(names)} for {name!r}, which has shape {shape} in one draw."
            )


def _warn_of_gaps(draws: Draws, sites: Sites, with_likelihood: bool) -> None:
    """Warn of sites that the groups leave out, and of too few draws for LOO."""
    if sites.subsampled:
        warn(
            f"the model subsamples {sorted(sites.subsampled)}: all groups are of one batch of "
            f"rows. For all rows pass a model without subsampling instead of the runner."
        )
    if sites.discrete:
        warn(
            f"the latents {sorted(sites.discrete)} are discrete and were summed out. The data has "
            f"neither these latents nor lp, log_likelihood and deterministic sites. To have the "
            f"others, sum the latents out in the model (MixtureSameFamily)."
        )
    if sites.factors and with_likelihood:
        warn(
            f"log_likelihood leaves out the factors {sorted(sites.factors)}: they belong to no "
            f"observation. Their terms are part of lp."
        )
    if with_likelihood and (draws.shape[1] < 4 or np.prod(draws.shape) < 25):
        warn(
            f"{draws.shape[0]} members of {draws.shape[1]} draws each are too few for az.loo: pass "
            f"num_samples=100 for a variational fit, or log_likelihood=False. Draws of a MAP "
            f"estimate are all the same: LOO of a MAP ensemble needs many members."
        )


def _stats(draws: Draws, values: Computed) -> dict[str, Any]:
    """Return the log densities, and warn of draws without a finite one."""
    if values.density is None:
        return {}
    bad = ~np.isfinite(np.asarray(values.density))
    if bad.any():
        warn(
            f"{bad.sum()} of {bad.size} draws have no finite log density (lp), of members "
            f"{name_members(bad.any(axis=1))}: do not trust scores of these members."
        )
    target = {"log_p": values.density} if "log_q" in draws.stats else {}
    return {"lp": values.density, **target, **draws.stats}


def _prior(
    free: Callable,
    draws: Draws,
    sites: Sites,
    number: int,
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict,
) -> dict[str, dict[str, Any]]:
    """Draw from the prior, unless it is improper."""
    if sites.improper:
        warn(f"prior draws are left out: the prior of {sites.improper} is improper.")
        return {}
    size = draws.shape[0]
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
                f"predictions[{name!r}] has shape {value.shape}: its leading axes must be {shape}, "
                f"or ({shape[0] * shape[1]},)."
            )
        grouped[name] = value
    return grouped
