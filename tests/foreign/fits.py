"""Fits of a foreign model, of which member 0 must agree with a single NumPyro fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from numpyro import handlers
from numpyro.contrib.funsor import config_enumerate, enum, log_density
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide, init_to_uniform
from numpyro.optim import Adam

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, to_arviz

STEPS = 10
RATE = 1e-3  # larger steps of an untrained network amplify rounding
MEMBERS = 2


class UpstreamError(RuntimeError):
    """NumPyro's own SVI fails on the model as well."""


class UnequalError(AssertionError):
    """A member differs from the single fit with its key."""


def loss_of(case):
    return TraceEnum_ELBO() if case.enumerated else Trace_ELBO()


def optimiser(case):
    return case.optim or Adam(RATE)


def is_discrete(site):
    return site["type"] == "sample" and not site["is_observed"] and site["fn"].is_discrete


def guided(case: Case):
    """Return the model to make an autoguide for: without the latents that are summed out."""
    return handlers.block(case.model, hide_fn=is_discrete) if case.enumerated else case.model


def difference(ours, theirs):
    """Return the largest difference of two trees, in units of 1 + |theirs|."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        raise UnequalError(f"{jax.tree.structure(ours)} beside {jax.tree.structure(theirs)}")
    largest = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            raise UnequalError("shapes differ, or which numbers are finite")
        gap = np.abs(a - b)[np.isfinite(a)] / (1 + np.abs(b[np.isfinite(b)]))
        largest = max(largest, float(gap.max(initial=0.0)))
    return largest


def require_equal(ours, theirs):
    single_precision = any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(theirs))
    tolerance = 2e-3 if single_precision else 1e-6  # networks keep single precision
    gap = difference(ours, theirs)
    if not gap <= tolerance:
        raise UnequalError(f"member 0 is {gap:.1e} away from a single fit")


class Single(NamedTuple):
    params: dict[str, Any]
    losses: jax.Array


def single_fit(case, guide, keys, steps=STEPS):
    """Run NumPyro's SVI with member 0's key; the start of `SVI.run` is not compiled."""
    svi = SVI(case.model, guide, optimiser(case), loss_of(case))
    result = svi.run(keys[0], steps, *case.args, progress_bar=False, **case.kwargs)
    return Single(result.params, result.losses)


def compiled_single_fit(case, guide, keys, steps=STEPS):
    """Start NumPyro's SVI with member 0's key and update it, in one program.

    The program compiles in half the time of `SVI.run`. Under `jit`, NumPyro orders latents
    alphabetically, so guides of the whole vector differ from those of `SVI.run`. The guide cannot
    be used afterwards, because it holds tracers.
    """
    svi = SVI(case.model, guide, optimiser(case), loss_of(case))

    @jax.jit
    def program(key):
        state, losses = jax.lax.scan(
            lambda state, _: svi.update(state, *case.args, **case.kwargs),
            svi.init(key, *case.args, **case.kwargs),
            length=steps,
        )
        return Single(svi.get_params(state), losses)

    return program(keys[0])


def fit(case, guide, keys, steps=STEPS):
    vi = EnsembleVI(case.model, guide, optimiser(case), loss_of(case), ensemble_size=len(keys))
    return vi, vi.run(keys, steps, *case.args, progress_bar=False, **case.kwargs)


def variational(case: Case, build, key, steps=STEPS):
    """Fit an ensemble and one SVI with member 0's key; both must agree."""
    keys = jax.random.split(key, MEMBERS)
    try:
        vi, result = fit(case, build(guided(case)), keys, steps)
    except Exception:
        require_single_fit(compiled_single_fit, case, build(guided(case)), keys)
        raise
    ours = {"params": result.member(0).params, "losses": result.losses[0]}
    single = require_single_fit(compiled_single_fit, case, build(guided(case)), keys, steps)
    try:
        require_equal(ours, single._asdict())
    except UnequalError:  # perhaps the order of latents differs
        single = require_single_fit(single_fit, case, build(guided(case)), keys, steps)
        require_equal(ours, single._asdict())
    return vi, result


def require_single_fit(run, case, guide, keys, steps=STEPS):
    """Run NumPyro's SVI, and raise `UpstreamError` if it fails."""
    try:
        return run(case, guide, keys, steps)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UpstreamError(f"NumPyro's own SVI fails: {type(error).__name__}: {text}") from error


def point(case: Case, key, steps=STEPS):
    """Fit modes, and compare member 0 with `AutoDelta` of a single SVI.

    `AutoDelta` takes no discrete latents: with these, the loss is compared with NumPyro's density.
    """
    keys = jax.random.split(key, MEMBERS)
    runner = EnsembleMAP(case.model, optimiser(case), ensemble_size=MEMBERS)
    result = runner.run(keys, steps, *case.args, progress_bar=False, **case.kwargs)
    if case.enumerated:
        losses = runner.evaluate(result.state, *case.args, **case.kwargs)
        require_equal({"loss": losses[0]}, {"loss": -summed_density(case, result.member(0).params)})
        return result
    guide = autoguide.AutoDelta(case.model, init_loc_fn=init_to_uniform)
    single = compiled_single_fit(case, guide, keys, steps)  # the order of latents has no effect
    suffix = "_auto_loc"
    values = {k.removesuffix(suffix): v for k, v in single.params.items() if k.endswith(suffix)}
    require_equal({k: result.member(0).params[k] for k in values}, values)
    return result


def summed_density(case: Case, params):
    """Return NumPyro's log density at constrained values, with discrete latents summed out."""
    seeded = handlers.seed(case.model, 0)
    trace = handlers.trace(seeded).get_trace(*case.args, **case.kwargs)
    frames = [f for site in trace.values() for f in site.get("cond_indep_stack", ())]
    summed = enum(config_enumerate(seeded), min((f.dim for f in frames), default=0) - 1)
    return jax.jit(lambda p: log_density(summed, case.args, case.kwargs, p)[0])(params)


def predict(case: Case, vi, result, key, draws=3):
    """Predict from all members; check that samples are the leading axis and are finite."""
    predictive = EnsemblePredictive(case.model, result, guide=vi.guide, num_samples=draws)
    sites = predictive(key, *case.args, **case.kwargs)
    for name, values in sites.items():
        if len(values) != MEMBERS * draws:
            raise AssertionError(f"{name} leads with {len(values)} samples")
        if not jnp.isfinite(values).all():
            raise AssertionError(f"{name} is not finite")
    return sites


def arviz(case: Case, vi, result):
    """Make ArviZ data with a chain for each member."""
    data = to_arviz(vi, result, *case.args, num_samples=5, **case.kwargs)
    sizes = data["posterior"].sizes
    if (sizes["chain"], sizes["draw"]) != (MEMBERS, 5):
        raise AssertionError(f"posterior of sizes {dict(sizes)}")
    return data
