"""Starts of chains at the members of an ensemble."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from numpyro.infer.util import unconstrain_fn

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.density import unchecked_trace
from numpyro_ensemble.handlers import check_count, one_key, shown, warn
from numpyro_ensemble.mapping import check_failed
from numpyro_ensemble.mcmc.checks import check_scale
from numpyro_ensemble.mcmc.target import Target, all_finite
from numpyro_ensemble.results import EnsembleResult

_PROBES = 32  # random directions in which the curvature is measured
_FLATTEST = 1e-4  # smallest curvature that scales the noise


class _Kind(NamedTuple):
    """How a start is made."""

    draws_guide: bool  # from draws of a guide; False: from modes
    exact: bool  # without noise


def chain_members(
    result: Any, num_chains: int | None = None, members: ArrayLike | None = None
) -> np.ndarray:
    """Return the number of the member that each chain of `from_ensemble` starts at.

    Chain c starts at member `c % E` of the E finite members, or of those that `members` names.
    Members keep their numbers.

    Args:
        result: what the `run` of an `EnsembleMAP` or `EnsembleVI` returned.
        num_chains: number of chains C (default: one for each of these members).
        members: numbers of the members to start at, all of them finite (default: the finite ones).

    Returns:
        Numbers `(C,)`, as `to_arviz(model, mcmc, ..., members=)` and `rhat_nested` take them.

    Raises:
        ValueError: if no member is finite, or one of `members` is not.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsembleMAP
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]))
        >>> runner = EnsembleMAP(model, ensemble_size=3)
        >>> result = runner.run(jax.random.key(0), 20, progress_bar=False)
        >>> print(starts.chain_members(result), starts.chain_members(result, 5))
        [0 1 2] [0 1 2 0 1]
    """
    if not isinstance(result, EnsembleResult):
        raise TypeError(
            f"result takes what the run of an EnsembleMAP or EnsembleVI returned, got "
            f"{type(result).__name__}."
        )
    finite = np.asarray(result.finite)
    if not finite.any():
        raise ValueError("No member of the result is finite, so that no chain can start at one.")
    chosen = np.flatnonzero(finite) if members is None else np.asarray(members)
    if members is not None:
        _check_members(chosen, finite)
    if num_chains is None:
        return chosen
    check_count("num_chains", num_chains)
    return chosen[np.arange(num_chains) % chosen.size]


def _check_members(members: np.ndarray, finite: np.ndarray) -> None:
    if members.ndim != 1 or not members.size or not np.issubdtype(members.dtype, np.integer):
        raise ValueError(
            f"members takes numbers of members, np.flatnonzero(...) say; got {shown(members)}."
        )
    out = sorted({int(e) for e in members if not 0 <= e < finite.size})
    if out:
        raise ValueError(f"members names {out}, and the result has members 0 to {finite.size - 1}.")
    failed = sorted({int(e) for e in members if not finite[e]})
    if failed:
        raise ValueError(f"members names {failed}, which are not finite: leave them out.")


@checked_keywords
def from_ensemble(
    rng_key: jax.Array,
    runner: Any,
    result: Any,
    *args: Any,
    num_chains: int = 64,
    members: ArrayLike | None = None,
    jitter: float | None = None,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Start at the members of an ensemble of MAP or variational fits.

    Chain c starts at member `c % E` of the E finite members, or of those that `members` names: at a
    draw of the member's guide, or at its mode. Normal noise is added. It is scaled by the standard
    deviation of the guide or, at a mode, by the width of the density from its curvature.
    `chain_members` returns the member of each chain.

    Args:
        rng_key: one key.
        runner: an `EnsembleMAP` or `EnsembleVI`.
        result: what the runner's `run` returned. Members that are not finite are left out with a
            warning.
        *args: arguments of the model, those of the fit.
        num_chains: number of chains C of the later run.
        members: numbers of the members to start at, all of them finite (default: the finite ones).
        jitter: scale of the noise; None is 0.1 for draws of a guide and 1 for modes.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: if no member is finite, or the density is not finite near the members.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsembleMAP
        >>> from numpyro_ensemble.mcmc import starts
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]))
        >>> runner = EnsembleMAP(model, ensemble_size=4)
        >>> result = runner.run(jax.random.key(0), 100, progress_bar=False)
        >>> starts.from_ensemble(jax.random.key(1), runner, result, num_chains=64)["x"].shape
        (64, 3)
    """
    if not hasattr(runner, "ensemble_size"):
        raise TypeError(
            f"runner takes an EnsembleMAP or EnsembleVI, got {type(runner).__name__}: write "
            f"from_ensemble(rng_key, runner, result, ...)."
        )
    check_count("num_chains", num_chains)
    check_scale("jitter", 0.0 if jitter is None else jitter)
    rng_key = one_key(rng_key)
    draw_key, noise_key = jax.random.split(rng_key)
    taken = chain_members(result, None, members)
    if members is None:
        check_failed(np.asarray(result.finite), "warn")
    turn, place = np.divmod(np.arange(num_chains), taken.size)
    chosen = taken[place]
    _check_parameters(runner.model, result, chosen, args, kwargs)
    draws_guide = hasattr(runner, "sample_posterior")
    if draws_guide:
        number = max(int(turn[-1]) + 1, _PROBES)
        draws = runner.sample_posterior(
            draw_key, result, *args, num_samples=number, group_by_member=True, **kwargs
        )
    else:
        draws = jax.tree.map(lambda x: x[:, None], result.params)
    target = Target(runner.model)
    names = target.latent_names(args, kwargs)
    if missing := sorted(set(names) - draws.keys()):
        raise ValueError(
            f"the result has no values of the latent sites {missing}: pass the data of the fit, "
            f"which observe sites."
        )
    draws = {name: draws[name] for name in names}
    scale = 0.1 if draws_guide else 1.0
    place = turn if draws_guide else np.zeros(num_chains, int)
    jitter = scale if jitter is None else jitter
    exact = not has_tracers(jitter) and float(jitter) == 0.0
    kind = _Kind(draws_guide, exact)
    deal = partial(_around, target=target, kind=kind)
    inputs = noise_key, draws, chosen, place, jnp.asarray(jitter)
    starts = target.run(("ensemble", kind), deal, inputs, args, kwargs)
    if not has_tracers(starts) and not all_finite(starts).all():
        cause = target.with_nan("Pass the data of the fit.", args, kwargs)
        raise ValueError(f"The density near the members is not finite. {cause}")
    return starts


def _check_parameters(
    model: Callable, result: Any, chosen: np.ndarray, args: tuple, kwargs: dict
) -> None:
    """Warn if members have fitted parameters, which chains keep at their initial values."""

    def differs(initial: Any, fitted: Any) -> bool:
        # a weight with a prior has no initial value, and stays where it was in the fit
        own = dict(jax.tree_util.tree_leaves_with_path(fitted))
        pairs = [(x, own.get(path)) for path, x in jax.tree_util.tree_leaves_with_path(initial)]
        return any(y is not None and (y[chosen] != np.asarray(x)[None]).any() for x, y in pairs)

    fitted = [
        name
        for name, site in unchecked_trace(model, args, kwargs).items()
        if site["type"] == "param" and differs(site["value"], result.params.get(name))
    ]
    if fitted:
        warn(
            f"the members have fitted the parameters {fitted}, and chains keep their initial "
            f"values: give them a prior (random_nnx_module or random_eqx_module for those of a "
            f"module), or fix them at the values of one member, "
            f"numpyro.handlers.substitute(model, data=...)."
        )


def _around(
    call: tuple[tuple, dict],
    key: jax.Array,
    draws: Any,
    chosen: jax.Array,
    place: jax.Array,
    jitter: jax.Array,
    *,
    target: Target,
    kind: _Kind,
) -> Any:
    """Unconstrain draws `(E, n, ...)`, and add noise to those at which chains start."""
    model, probe_key, *noise_keys = target.prepared(*call), *jax.random.split(key, 1 + len(draws))

    def free(values: Any) -> Any:
        return unconstrain_fn(model, *call, values)

    z = jax.vmap(jax.vmap(free))(draws)
    if kind.exact:  # without noise no curvature is needed, whose compilation takes longest
        return jax.tree.map(lambda x: x[chosen, place], z)
    if not kind.draws_guide:
        keys = jax.random.split(probe_key, jax.tree.leaves(z)[0].shape[0])
        at_modes = jax.tree.map(lambda x: x[:, 0], z)
        scales = jax.vmap(partial(_widths, target.smooth_density(*call)))(keys, at_modes)
    else:
        scales = jax.tree.map(lambda x: x.std(axis=1), z)
    leaf_keys = iter(noise_keys)

    def deal(x: jax.Array, scale: jax.Array) -> jax.Array:
        taken = x[chosen, place]
        noise = jax.random.normal(next(leaf_keys), taken.shape, taken.dtype)
        return taken + (jitter * scale[chosen] * noise).astype(taken.dtype)

    return jax.tree.map(deal, z, scales)


def _widths(log_density: Callable, key: jax.Array, z: Any) -> Any:
    """Return the width of the density along each coordinate, from its curvature at `z`."""
    row, unravel = ravel_pytree(z)
    gradient = jax.grad(lambda row: log_density(unravel(row)))

    def probe(key: jax.Array) -> jax.Array:
        direction = jax.random.rademacher(key, row.shape, row.dtype)
        return direction * jax.jvp(gradient, (row,), (direction,))[1]

    # Hutchinson's estimate of the diagonal of the Hessian, at least its standard error
    probes = jax.vmap(probe)(jax.random.split(key, _PROBES))
    error = probes.std(axis=0) / _PROBES**0.5
    curvature = jnp.maximum(jnp.abs(probes.mean(axis=0)), error)
    return unravel(1.0 / jnp.sqrt(jnp.maximum(curvature, _FLATTEST)))
