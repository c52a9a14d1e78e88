"""Modes and Laplace mixtures against conjugate models and mixtures with known weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optimistix
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from scipy import stats

from numpyro_ensemble import EnsembleMAP, EnsembleVI, laplace, modes
from numpyro_ensemble.fit.curvature import Curvature
from numpyro_ensemble.laplace_modes import group_modes

LBFGS = optimistix.LBFGS(rtol=1e-10, atol=1e-10)
RNG = np.random.default_rng(1)
X = RNG.normal(size=(30, 3))
Y = X @ [1.0, -2.0, 0.5] + RNG.normal(size=30)


def fit(model, key, *args, size=4, steps=200, guide=AutoLaplaceApproximation, **options):
    vi = EnsembleVI(model, guide(model), LBFGS, Trace_ELBO(), ensemble_size=size)
    return vi, vi.run(key, steps, *args, progress_bar=False, **options)


def conjugate(x, y):
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    base = numpyro.deterministic("base", numpyro.sample("a", dist.Normal(1.0, 1.5)) * 1.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(base + x @ slopes, 1.0), obs=y)


def truth():
    """Return mean and covariance of slopes and base, and the evidence."""
    design = np.column_stack([X, np.ones(30)])
    prior_mean, prior = np.array([0.0, 0.0, 0.0, 1.0]), np.diag([4.0, 4.0, 4.0, 2.25])
    precision = design.T @ design + np.linalg.inv(prior)
    covariance = np.linalg.inv(precision)
    mean = covariance @ (design.T @ Y + np.linalg.inv(prior) @ prior_mean)
    marginal = stats.multivariate_normal(
        design @ prior_mean, np.eye(30) + design @ prior @ design.T
    )
    return mean, covariance, marginal.logpdf(Y)


def test_a_conjugate_model_is_exact(key):
    vi, result = fit(conjugate, key, X, Y)
    found = modes(vi, result, X, Y)
    mean, covariance, evidence = truth()
    assert_array_equal(found.counts, [4])
    assert_array_equal(found.members, [0, 0, 0, 0])
    assert_allclose(found.location[0], mean, atol=1e-8)
    assert_allclose(np.linalg.inv(found.precision[0]), covariance, rtol=1e-8)
    assert_allclose(found.log_evidence, [evidence], rtol=1e-8)
    assert found.positive_definite.all()
    mixture = laplace(vi, jax.random.key(1), result, X, Y, num_samples=400)
    assert_allclose(mixture.log_ratios, evidence, rtol=1e-8)
    assert sorted(mixture.samples) == ["a", "base", "slopes"]
    assert_allclose(mixture.samples["base"], mixture.samples["a"])
    draws = np.column_stack([mixture.samples["slopes"], mixture.samples["a"]])
    scaled = np.linalg.solve(np.linalg.cholesky(covariance), (draws - mean).T)
    assert np.abs(scaled.mean(axis=1)).max() < 4 / np.sqrt(400)
    assert np.abs(scaled.var(axis=1) - 1).max() < 4 * np.sqrt(2 / 400)


PARTS = np.log([0.8, 0.2])


def two_modes():
    """A density of two modes, the smaller of which has the wider basin."""
    shape = numpyro.sample("shape", dist.HalfNormal(1.0))
    parts = dist.Normal(jnp.array([-6.0, 4.0]), jnp.array([0.5, 1.0]))
    place = dist.MixtureSameFamily(dist.Categorical(logits=jnp.asarray(PARTS)), parts)
    numpyro.sample("place", place)
    numpyro.factor("narrow", -0.5 * ((jnp.log(shape) - 0.3) / 0.1) ** 2)


STARTS = {"place": np.array([-5.0, 3.0, 2.0, 5.0, 4.5, 3.5]), "shape": np.full(6, 1.2)}


def share_of_the_first(mixture):
    """Return the weight of the draws below zero, and its standard error."""
    weights = np.exp(mixture.log_weights)
    below = np.asarray(mixture.samples["place"]) < 0
    share = (weights * below).sum()
    return share, np.sqrt((weights**2 * (below - share) ** 2).sum())


@pytest.mark.long
def test_each_mode_counts_once(key):
    vi, result = fit(two_modes, key, size=6, init_params={"auto_loc": starts(key)})
    found = modes(vi, result)
    assert_array_equal(found.counts, [1, 5])
    assert_array_equal(found.members, [0, 1, 1, 1, 1, 1])
    assert_allclose(found.weights, [0.8, 0.2], atol=2e-3)
    mixture = laplace(vi, jax.random.key(3), result, num_samples=2000)
    assert mixture.pareto_k < 0.7
    share, error = share_of_the_first(mixture)
    assert abs(share - 0.8) < 2 * error
    assert_allclose((mixture.part == 0).mean(), 0.8, atol=4 * np.sqrt(0.16 / 2000))
    # a mixture whose weights count members instead of modes gives the first mode a sixth
    assert abs(1 / 6 - 0.8) > 2 * error


def starts(key):
    vi = EnsembleVI(
        two_modes, AutoLaplaceApproximation(two_modes), LBFGS, Trace_ELBO(), ensemble_size=6
    )
    flat = np.asarray(vi.get_params(vi.init(key))["auto_loc"]).copy()
    flat[:, 1] = STARTS["place"]
    flat[:, 0] = np.log(STARTS["shape"])
    return flat


def test_members_that_agree_do_not_count_twice():
    """Weights are those of the evidence for any counts of members; weights by counts are wrong."""
    point = np.array([[-3.0], [2.0], [2.0 + 1e-9], [2.0]])
    found = group_modes(
        Curvature(point, np.array([1.0, 0.0, 0.0, 0.0]), np.zeros((4, 1)), np.ones((4, 1, 1))), 0.1
    )
    assert_array_equal(found.counts, [1, 3])
    right = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    assert_allclose(found.weights, right)
    counted = right * found.counts / (right * found.counts).sum()
    assert np.abs(counted - right).max() > 0.2


def test_a_saddle_is_a_flag_and_a_lost_member_is_named():
    point = np.array([[0.0, 0.0], [5.0, 0.0], [9.0, 9.0], [np.nan, 0.0]])
    precision = np.stack([np.eye(2), np.diag([1.0, -1.0]), np.eye(2), np.eye(2) * np.nan])
    gradient = np.zeros((4, 2))
    gradient[2] = 3.0
    log_density = np.array([0.0, 2.0, 1.0, np.nan])
    with pytest.warns(UserWarning, match="2 of 4 members have not come to a mode: 2, 3"):
        found = group_modes(Curvature(point, log_density, gradient, precision), 0.1)
    assert_array_equal(found.members, [0, 1, -1, -1])
    assert_array_equal(found.positive_definite, [True, False])
    assert_allclose(found.weights, [1.0, 0.0])
    assert np.isnan(found.log_evidence[1])
    assert_allclose(found.log_evidence[0], np.log(2 * np.pi))


@pytest.mark.long
def test_a_flat_direction_is_a_flag(key):
    def flat(y):
        idle = numpyro.sample("idle", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(numpyro.sample("b", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        numpyro.deterministic("twice", 2 * idle)

    vi, result = fit(flat, key, 0.7, size=3)
    found = modes(vi, result, 0.7)
    assert_array_equal(found.positive_definite, [False])
    assert_array_equal(found.counts, [3])
    with pytest.raises(ValueError, match="none of the 1 places.*positive definite.*AutoNormal"):
        laplace(vi, key, result, 0.7)


@pytest.mark.long
def test_tails_that_are_too_heavy_are_said_loudly(key):
    def heavy():
        numpyro.sample("x", dist.StudentT(1.0, 0.0, 1.0).expand([3]).to_event(1))

    vi, result = fit(heavy, key, size=2)
    with pytest.warns(UserWarning, match="not the posterior: Pareto k is .*above 0.7"):
        mixture = laplace(vi, key, result, num_samples=300)
    assert mixture.pareto_k > 0.7


def test_bad_calls(key):
    def free(y):
        numpyro.sample("y", dist.Normal(numpyro.param("shift", 0.0), 1.0), obs=y)
        numpyro.sample("b", dist.Normal(0.0, 1.0))

    vi, result = fit(conjugate, key, X, Y)
    with pytest.raises(TypeError, match="EnsembleVI with an AutoLaplaceApproximation.*EnsembleMAP"):
        modes(EnsembleMAP(conjugate), result, X, Y)
    with pytest.raises(TypeError, match="with AutoDelta"):
        modes(EnsembleVI(conjugate, AutoDelta(conjugate), LBFGS, Trace_ELBO()), result, X, Y)
    with pytest.raises(ValueError, match="tolerance takes a positive number, got 0"):
        modes(vi, result, X, Y, tolerance=0)
    with pytest.raises(ValueError, match="num_samples"):
        laplace(vi, key, result, X, Y, num_samples=0)
    with pytest.warns(UserWarning, match="4 of 4 members have not met the criterion"):
        early = vi.run(key, 1, X, Y, progress_bar=False)
    with pytest.raises(ValueError, match="none of 4 members has come to a mode.*LBFGS"):
        modes(vi, early, X, Y)


@pytest.mark.long
def test_densities_of_their_own_are_refused(key):
    def free(y):
        numpyro.sample("y", dist.Normal(numpyro.param("shift", 0.5), 1.0), obs=y)
        numpyro.sample("b", dist.Normal(0.0, 1.0))

    vi, result = fit(free, key, 0.7, size=2)
    with pytest.raises(ValueError, match="parameters \\['shift'\\].*priors"):
        modes(vi, result, 0.7)
    ys = np.stack([Y, Y + 1])
    vi, result = fit(conjugate, key, X, ys, size=2, member_args=["y"])
    with pytest.raises(ValueError, match="data of their own.*member_args"):
        modes(vi, result, X, Y)
