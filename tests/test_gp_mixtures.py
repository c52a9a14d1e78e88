"""Exact moments, quantiles and leave-one-out terms of processes over posterior draws."""

import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import inputs, within
from numpy.testing import assert_allclose
from numpyro import handlers
from scipy.optimize import brentq
from scipy.stats import norm

from numpyro_ensemble import to_arviz
from numpyro_ensemble.gp import RBF, CollapsedSparseGP, GaussianProcess, Matern32, Pathwise

X, X_NEW = inputs(9, 2, width=3.0), inputs(5, 2, width=4.0)
Y = np.sin(X[:, 0]) - X[:, 1]
DRAWS = {"width": np.array([0.7, 1.0, 1.6]), "amount": np.array([0.02, 0.1, 0.3])}


def model(X, level, y=None):
    """A process whose noise has two sizes, at alternate inputs."""
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    amount = numpyro.sample("amount", dist.HalfNormal(0.3))
    noise = amount * (1.0 + jnp.arange(len(X)) % 2)
    numpyro.sample("y", GaussianProcess(RBF(1.0, width), X, noise, level), obs=y)


def truth():
    """Return mean, covariance and noise of each draw, by dense algebra."""
    parts = []
    for width, amount in zip(DRAWS["width"], DRAWS["amount"], strict=True):
        kernel, noise = RBF(1.0, width), amount * (1.0 + np.arange(9) % 2)
        K = np.asarray(kernel.matrix(jnp.asarray(X), jnp.asarray(X))) + np.diag(noise)
        cross = np.asarray(kernel.matrix(jnp.asarray(X), jnp.asarray(X_NEW)))
        own = np.asarray(kernel.matrix(jnp.asarray(X_NEW), jnp.asarray(X_NEW)))
        mean = 0.5 + cross.T @ np.linalg.solve(K, Y - 0.5)
        added = amount * (1.0 + np.arange(5) % 2)
        parts.append((mean, own - cross.T @ np.linalg.solve(K, cross), added))
    return [np.stack(part) for part in zip(*parts, strict=True)]


NEAR = within({"rtol": 1e-6, "atol": 1e-8}, {"rtol": 2e-3, "atol": 2e-4})


@pytest.fixture(scope="module")
def pathwise():
    return Pathwise(model, DRAWS, X, 0.5, Y)


@pytest.mark.core
def test_moments_with_noise_and_covariances(pathwise):
    mean, covariance, noise = truth()
    joint = pathwise.moments(X_NEW, 0.5, covariance=True)
    assert joint.keys() == {"y", "y_f"}
    between = np.cov(mean.T, bias=True)
    for name, added in {"y_f": 0.0 * noise, "y": noise}.items():
        expected = covariance.mean(0) + np.diag(added.mean(0)) + between
        assert_allclose(joint[name].mean, mean.mean(0), **NEAR)
        assert_allclose(joint[name].covariance, expected, **NEAR)
        assert_allclose(joint[name].variance, np.diag(expected), **NEAR)
        plain = pathwise.moments(X_NEW, 0.5)[name]
        assert_allclose(plain, (joint[name].mean, joint[name].variance), **NEAR)
        # a wrong answer, without the variance between draws, would be seen
        assert abs(np.diag(between)).max() > 1e-3


@pytest.mark.long
def test_quantiles_are_those_of_the_mixture(pathwise):
    mean, covariance, noise = truth()
    variances = np.diagonal(covariance, axis1=1, axis2=2)
    found = pathwise.quantiles([[0.05, 0.5], [0.8, 0.975]], X_NEW, 0.5)
    for name, variance in {"y_f": variances, "y": variances + noise}.items():
        assert found[name].shape == (2, 2, 5)
        sd = np.sqrt(variance)

        def above(x, n, p, sd=sd):
            return norm.cdf(x, mean[:, n], sd[:, n]).mean() - p

        for (i, j), p in np.ndenumerate([[0.05, 0.5], [0.8, 0.975]]):
            exact = [brentq(above, -20.0, 20.0, args=(n, p), xtol=1e-12) for n in range(5)]
            assert_allclose(found[name][i, j], exact, **NEAR)
        moments = pathwise.moments(X_NEW, 0.5)[name]
        normal = norm.ppf(0.975, moments.mean, np.sqrt(moments.variance))
        assert abs(found[name][1, 1] - normal).max() > 0.01  # one normal would be seen
    assert pathwise.quantiles(0.5, X_NEW, 0.5)["y"].shape == (5,)
    for wrong in (0.0, [0.5, 1.2], "median"):
        with pytest.raises(ValueError, match=r"probabilities|could not convert"):
            pathwise.quantiles(wrong, X_NEW, 0.5)


@pytest.mark.long
def test_copies_have_moments_of_their_own():
    def plates(X, y=None):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("copy", 2):
            numpyro.sample("f", GaussianProcess(RBF(1.0, width), X, 0.05), obs=y)

    ys = np.stack([Y, 2 * Y])
    both = Pathwise(plates, {"width": np.array([0.8, 1.2])}, X, ys)
    joint = both.moments(X_NEW, covariance=True)
    assert joint["f"].covariance.shape == (2, 5, 5)
    one = Pathwise(plates, {"width": np.array([0.8, 1.2])}, X, ys[::-1])
    other = one.moments(X_NEW, covariance=True)
    assert_allclose(joint["f"].covariance[0], other["f"].covariance[1], rtol=1e-9)
    assert_allclose(both.quantiles(0.3, X_NEW)["f"][1], one.quantiles(0.3, X_NEW)["f"][0])


# Leave-one-out ------------------------------------------------------------------------------------


def refitted(make, left_out):
    """Return mean and variance at one input, given the values at all others."""
    rest = np.arange(len(X)) != left_out
    mean, variance = make(X[rest], rest).predict(Y[rest], X[left_out : left_out + 1])
    return mean[0], variance[0]


NOISE = 0.05 * (1.0 + np.arange(9) % 3)
PROCESSES = {
    "dense": lambda X, rest: GaussianProcess(Matern32(1.3, 0.9), X, NOISE[rest], 0.3, jitter=0.0),
    "collapsed": lambda X_, rest: CollapsedSparseGP(
        Matern32(1.3, 0.9), X_, X[:4], NOISE[rest], 0.3
    ),
}


@pytest.mark.parametrize("name", ["dense", pytest.param("collapsed", marks=pytest.mark.long)])
def test_leaving_one_out_is_fitting_without_it(name):
    make = PROCESSES[name]
    process = make(X, np.ones(9, bool))
    mean, variance = process.leave_one_out(Y)
    exact = [refitted(make, i) for i in range(9)]
    assert_allclose(mean, [m for m, _ in exact], rtol=1e-6, atol=1e-8)
    assert_allclose(variance, [v + e for (_, v), e in zip(exact, NOISE, strict=True)], rtol=1e-6)
    terms = process.pointwise_log_prob(Y)
    assert_allclose(terms, norm.logpdf(Y, mean, np.sqrt(variance)), rtol=1e-9)
    inside, spread = process.predict(Y, X)  # wrong: given the value itself too
    assert (norm.logpdf(Y, inside, np.sqrt(spread + NOISE)) - terms).max() > 0.1


def test_what_is_not_observed_is_no_term_and_tells_nothing():
    seen = np.arange(9) != 4
    process = GaussianProcess(RBF(), X, NOISE, observed=seen)
    mean, variance = process.leave_one_out(np.where(seen, Y, np.nan))
    alone = GaussianProcess(RBF(), X[seen], NOISE[seen])
    assert_allclose(mean[seen], jax.jit(alone.leave_one_out)(Y[seen])[0], rtol=1e-6)
    expected = jax.jit(alone.predict)(Y[seen], X[4:5])
    assert_allclose((mean[4], variance[4] - NOISE[4]), np.ravel(expected), rtol=1e-6)
    terms = process.pointwise_log_prob(np.where(seen, Y, np.nan))
    assert terms[4] == 0 and np.isfinite(terms).all()


def test_arviz_compares_processes_by_leaving_one_out():
    """The log likelihood that `az.loo` reads has a term for each value, not one for the site."""

    def wrong(X, level, y=None):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        numpyro.sample("amount", dist.HalfNormal(0.3))
        numpyro.sample("y", GaussianProcess(RBF(0.1, width), X, 2.0, level), obs=y)

    rng = np.random.default_rng(0)
    samples = {
        "width": np.exp(0.1 * rng.normal(size=(4, 25))),
        "amount": 0.05 + 0.05 * rng.random((4, 25)),
    }
    right = to_arviz(model, samples, X, 0.5, Y, posterior_predictive=False)
    terms = np.asarray(right.log_likelihood["y"])
    assert terms.shape == (4, 25, 9)
    noise = samples["amount"][1, 3] * (1.0 + np.arange(9) % 2)
    process = GaussianProcess(RBF(1.0, samples["width"][1, 3]), X, noise, 0.5)
    assert_allclose(terms[1, 3], process.pointwise_log_prob(Y), rtol=1e-6)
    other = to_arviz(wrong, samples, X, 0.5, Y, posterior_predictive=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of pandas about ArviZ
        table = az.compare({"right": right, "wrong": other})
    assert table.index[0] == "right"


def test_masks_of_copies_and_of_values_leave_terms_out():
    def plates(X, y, seen, mask):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        with handlers.mask(mask=mask), numpyro.plate("copy", 2):
            numpyro.sample("f", GaussianProcess(RBF(1.0, width), X, 0.05, observed=seen), obs=y)

    ys, seen = np.stack([Y, 2 * Y]), np.arange(9) != 4
    samples = {"width": np.full((1, 4), 0.9)}
    mask = np.array([True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ warns of four draws
        data = to_arviz(plates, samples, X, ys, seen, mask, posterior_predictive=False)
    terms, values = np.asarray(data.log_likelihood["f"]), np.asarray(data.observed_data["f"])
    assert terms.shape == (1, 4, 2, 9)
    left_out = (terms[0, 0] == 0.0, np.isnan(values))
    for found in left_out:
        assert (found == np.stack([~seen, np.ones(9, bool)])).all()


def test_quantiles_too_near_an_end_for_the_precision_are_refused(pathwise):
    with pytest.raises(ValueError, match="probabilities lie between 0 and 1"):
        pathwise.quantiles(1 - 1e-17, X_NEW, 0.5)
