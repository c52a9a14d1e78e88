"""Modes that members have found, and the mixture of their Laplace approximations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoLaplaceApproximation

from numpyro_ensemble.fit.curvature import Curvature, curvatures, draws_at
from numpyro_ensemble.fit.state import setup_of
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.results import TRUSTED_K, EnsembleResult, name_members
from numpyro_ensemble.scoring import psis
from numpyro_ensemble.vi import EnsembleVI


class Modes(NamedTuple):
    """The modes of a posterior density in unconstrained space, the most probable one first.

    Attributes:
        members: `(E,)`, the mode of each member, -1 for a member that has not reached one.
        counts: `(M,)`, number of members at each mode.
        best: `(M,)`, the member with the highest log density at each mode.
        location: `(M, D)`, the modes in unconstrained space, the latents in the order of the model.
        log_density: `(M,)`, with the Jacobian of the constraints.
        precision: `(M, D, D)`, the negative Hessian.
        positive_definite: `(M,)`, whether the precision is positive definite; if not, the
            point is a saddle or on a ridge.
        log_evidence: `(M,)`, the log of the mass around each mode by Laplace's method, NaN where
            the precision is not positive definite.
        weights: `(M,)`, shares of the evidence, which add up to 1.

    The example of `modes` makes one.
    """

    members: np.ndarray
    counts: np.ndarray
    best: np.ndarray
    location: np.ndarray
    log_density: np.ndarray
    precision: np.ndarray
    positive_definite: np.ndarray
    log_evidence: np.ndarray
    weights: np.ndarray


class LaplaceMixture(NamedTuple):
    """Draws from the mixture of Laplace approximations at all modes, each counted once.

    Attributes:
        samples: constrained draws by site name, `(S, ...)`, with those of deterministic sites.
        modes: the modes and their weights in the mixture.
        part: `(S,)`, the mode that each draw comes from.
        log_ratios: `(S,)`, log density of the posterior less log density of the mixture.
        log_weights: `(S,)`, log weights of the draws: the ratios smoothed by PSIS, adding up to 1.
        pareto_k: below 0.7 the weighted draws are those of the posterior; above, they are not.

    The example of `laplace` makes one.
    """

    samples: dict[str, jax.Array]
    modes: Modes
    part: np.ndarray
    log_ratios: np.ndarray
    log_weights: np.ndarray
    pareto_k: float


def modes(
    runner: EnsembleVI, result: EnsembleResult, *args: Any, tolerance: float = 0.1, **kwargs: Any
) -> Modes:
    """Group the members of a Laplace fit that found the same mode.

    Args:
        runner: an `EnsembleVI` with an `AutoLaplaceApproximation`.
        result: what its `run` returned.
        *args: arguments of the model, those of the run.
        tolerance: the largest distance between a member and its mode, and between two members
            at one mode, in standard deviations of the Laplace approximation.
        **kwargs: keyword arguments of the model.

    Returns:
        A `Modes`. Modes that differ only in the labels of components count as different modes.

    Raises:
        ValueError: if no member has reached a mode, or members were fitted to different densities.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optimistix
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoLaplaceApproximation
        >>> from numpyro_ensemble import EnsembleVI, modes
        >>> def model():
        ...     parts = dist.Normal(jnp.array([-4.0, 4.0]), 1.0)
        ...     numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.8, 0.2])),
        ...                                                parts))
        >>> guide, lbfgs = AutoLaplaceApproximation(model), optimistix.LBFGS(1e-8, 1e-8)
        >>> vi = EnsembleVI(model, guide, lbfgs, Trace_ELBO(), ensemble_size=8)
        >>> found = modes(vi, vi.run(jax.random.key(0), 200, progress_bar=False))
        >>> print(found.counts.sum(), found.weights.round(2))
        8 [0.8 0.2]
    """
    _check_fit(runner, result, tolerance)

    def use(call: Any) -> Curvature:
        return curvatures(call, result.state)

    found = runner.use(use, args, kwargs, state=result.state)
    return group_modes(jax.tree.map(np.asarray, found), tolerance)


def laplace(
    runner: EnsembleVI,
    rng_key: jax.Array,
    result: EnsembleResult,
    *args: Any,
    num_samples: int = 1000,
    tolerance: float = 0.1,
    **kwargs: Any,
) -> LaplaceMixture:
    """Draw from the mixture of Laplace approximations at all modes, and compute Pareto k.

    Modes are weighed by their evidence, so that a mode counts once, however many members have
    found it.

    Args:
        runner: an `EnsembleVI` with an `AutoLaplaceApproximation`.
        rng_key: one key.
        result: what its `run` returned.
        *args: arguments of the model, those of the run.
        num_samples: number of draws S.
        tolerance: see `modes`.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: as `modes` does, and if no mode has a positive definite precision.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optimistix
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoLaplaceApproximation
        >>> from numpyro_ensemble import EnsembleVI, laplace
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(2.0, 1.0))
        >>> guide, lbfgs = AutoLaplaceApproximation(model), optimistix.LBFGS(1e-8, 1e-8)
        >>> vi = EnsembleVI(model, guide, lbfgs, Trace_ELBO(), ensemble_size=4)
        >>> result = vi.run(jax.random.key(0), 200, progress_bar=False)
        >>> mixture = laplace(vi, jax.random.key(1), result)
        >>> mixture.samples["x"].shape
        (1000,)
    """
    rng_key = one_key(rng_key)
    check_count("num_samples", num_samples)
    found = modes(runner, result, *args, tolerance=tolerance, **kwargs)
    if not found.positive_definite.any():
        raise ValueError(
            f"none of the {len(found.counts)} places that members have come to has a positive "
            f"definite precision, so that there is no Laplace approximation: the posterior is flat "
            f"or a saddle there. Take a guide with a scale, AutoNormal say."
        )
    keys = jax.random.split(rng_key, 3)
    part = np.asarray(jax.random.categorical(keys[0], np.log(found.weights), shape=(num_samples,)))
    noise = np.asarray(jax.random.normal(keys[1], (num_samples, found.location.shape[1])))
    points, log_q = _draw(found, part, noise)

    def use(call: Any) -> tuple[dict, Any]:
        return draws_at(call, result.state, jnp.asarray(points), keys[2])

    samples, log_p = runner.use(use, args, kwargs, state=result.state)
    log_ratios = np.asarray(log_p, float) - log_q
    # a draw outside the support has no weight
    log_ratios = np.where(np.isfinite(log_ratios), log_ratios, -np.inf)
    log_weights, k = psis(np.maximum(log_ratios, log_ratios.max() - 700.0))
    if not k <= TRUSTED_K:
        warn(
            f"The Laplace mixture is not the posterior: Pareto k is {float(k):.2f}, above "
            f"{TRUSTED_K}. Its draws and evidence are rough; take MCMC, or a guide that is richer."
        )
    return LaplaceMixture(samples, found, part, log_ratios, log_weights, float(k))


def group_modes(found: Curvature, tolerance: float) -> Modes:
    """Group points by the mode that they are at."""
    values, vectors = _spectra(found.precision)
    size, dims = found.point.shape
    widest = np.abs(values).max(axis=1, keepdims=True)
    floor = dims * np.finfo(found.precision.dtype).eps * np.maximum(widest, np.finfo(float).tiny)
    scales = np.maximum(np.abs(values), floor)  # of a ridge too, along which points are together
    slopes = np.einsum("edk,ed->ek", vectors, found.gradient)
    apart = np.sqrt((slopes**2 / scales).sum(axis=1))  # distance to the mode, by Newton's method
    arrived = np.isfinite(found.log_density) & (apart <= tolerance)
    if not arrived.any():
        best = np.nanmin(apart) if np.isfinite(apart).any() else np.nan
        raise ValueError(
            f"none of {size} members has come to a mode: the nearest one is {best:.3g} standard "
            f"deviations away, and tolerance={tolerance}. Pass the data of the fit, if these are "
            f"others or hold NaN. Else take more steps, or a minimiser "
            f"(optimistix.LBFGS(rtol=1e-8, atol=1e-8))."
        )
    members, best = np.full(size, -1), []
    for e in np.argsort(-np.where(arrived, found.log_density, -np.inf), kind="stable"):
        if not arrived[e] or members[e] >= 0:
            continue
        steps = (found.point - found.point[e]) @ vectors[e]
        near = np.sqrt((steps**2 * scales[e]).sum(axis=1)) <= tolerance
        near[e] = True
        members[near & arrived & (members < 0)] = len(best)
        best.append(e)
    chosen = np.array(best)
    definite = (values[chosen] > floor[chosen]).all(axis=1)
    log_det = np.log(np.where(definite[:, None], values[chosen], 1.0)).sum(axis=1)
    evidence = found.log_density[chosen] + 0.5 * (dims * np.log(2 * np.pi) - log_det)
    evidence = np.where(definite, evidence, np.nan)
    weights = np.where(definite, np.exp(evidence - np.logaddexp.reduce(evidence[definite])), 0.0)
    order = np.argsort(-weights, kind="stable")
    place = np.append(np.argsort(order), -1)  # the last for members without a mode
    counts = np.bincount(members[members >= 0], minlength=len(best))
    lone = members < 0
    if lone.any():
        warn(
            f"{lone.sum()} of {size} members have not come to a mode: {name_members(lone)}. They "
            f"are left out."
        )
    chosen = chosen[order]
    return Modes(
        place[members],
        counts[order],
        chosen,
        found.point[chosen],
        found.log_density[chosen],
        found.precision[chosen],
        definite[order],
        evidence[order],
        weights[order],
    )


def _spectra(precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues and eigenvectors, NaN of matrices that are not finite."""
    finite = np.isfinite(precision).all(axis=(1, 2))
    values, vectors = np.linalg.eigh(np.where(finite[:, None, None], precision, 0.0))
    return np.where(finite[:, None], values, np.nan), vectors


def _draw(found: Modes, part: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return draws of the mixture, and their log densities under all of it."""
    parts = np.flatnonzero(found.positive_definite)
    points, terms = np.empty_like(noise), []
    factors = {m: np.linalg.cholesky(found.precision[m]) for m in parts}
    for m in parts:
        mine = part == m
        points[mine] = found.location[m] + np.linalg.solve(factors[m].T, noise[mine].T).T
    for m in parts:
        scaled = (points - found.location[m]) @ factors[m]
        log_det = np.log(np.diag(factors[m])).sum()
        normal = log_det - 0.5 * (scaled**2).sum(axis=1) - 0.5 * noise.shape[1] * np.log(2 * np.pi)
        terms.append(np.log(found.weights[m]) + normal)
    return points, np.logaddexp.reduce(terms, axis=0)


def _check_fit(runner: EnsembleVI, result: EnsembleResult, tolerance: float) -> None:
    if not isinstance(runner, EnsembleVI) or not isinstance(runner.guide, AutoLaplaceApproximation):
        raise TypeError(
            f"runner takes an EnsembleVI with an AutoLaplaceApproximation, whose density is that "
            f"of the unconstrained latents; got {type(runner).__name__} with "
            f"{type(getattr(runner, 'guide', None)).__name__}."
        )
    if not isinstance(result, EnsembleResult):
        raise TypeError(f"result takes what run returned, got {type(result).__name__}.")
    if not (isinstance(tolerance, int | float) and tolerance > 0):
        raise ValueError(f"tolerance takes a positive number, got {tolerance!r}.")
    others = sorted(result.params.keys() - {f"{runner.guide.prefix}_loc"})
    if others:
        raise ValueError(
            f"the model has parameters {others}, of which each member has its own values, so that "
            f"members fit different densities. Give these parameters priors, by numpyro.sample."
        )
    setup = setup_of(result.state)
    template = None if setup is None else setup.template
    if template is not None and template.member_ranks:
        raise ValueError(
            f"members were fitted to data of their own ({list(template.member_ranks)}, by "
            f"member_args), so that each has a density of its own, and modes of its own."
        )
    if template is not None and template.guide_forms.supports:
        raise ValueError(
            "the support of a latent depends on another latent, and with it what a point in "
            "unconstrained space means: write it with a fixed support, by "
            "numpyro.infer.reparam.TransformReparam say."
        )
