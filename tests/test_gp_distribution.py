"""The process as a distribution, whitened or not, and through inducing points."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import gram, inputs, jitter, posterior, within
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    ExpectedLikelihood,
    GaussianProcess,
    Matern32,
    WhitenReparam,
    sparse_gp,
)

X, X_NEW = inputs(12, 2), inputs(5, 2, seed=1)
Y = np.sin(X.sum(axis=1))
KERNEL = Matern32(1.3, np.array([0.7, 1.5]))
HETERO = np.linspace(0.05, 0.2, 12)
LITTLE = within(1e-9, 1e-6)  # a jitter that is small beside the noise


def mean(X):
    return 0.3 * X[:, 0]


@pytest.mark.core
@pytest.mark.parametrize("noise", [0.1, HETERO], ids=["number", "vector"])
def test_density_and_moments_are_those_of_a_normal(noise):
    gp = GaussianProcess(KERNEL, X, noise, mean)
    covariance = gram(KERNEL, X) + np.diag(np.broadcast_to(noise, 12))
    covariance += jitter(KERNEL, X) * np.eye(12)
    expected = multivariate_normal(0.3 * X[:, 0], covariance)
    exact = within(1e-9, 1e-4)
    assert_allclose(gp.log_prob(Y), expected.logpdf(Y), rtol=exact)
    assert_allclose(gp.log_prob(np.stack([Y, 2 * Y]))[1], expected.logpdf(2 * Y), rtol=exact)
    assert_allclose(gp.covariance_matrix, covariance, rtol=1e-5)
    assert_allclose(gp.variance, np.diag(covariance), rtol=1e-5)
    assert_allclose(gp.mean, 0.3 * X[:, 0], rtol=1e-6)


def test_draws_have_the_covariance():
    gp = GaussianProcess(KERNEL, X, 0.1, 2.0)
    draws = gp.sample(jax.random.key(0), (4000,)) - 2.0
    L = np.linalg.cholesky(gp.covariance_matrix)
    white = np.linalg.solve(L, np.asarray(draws).T)
    error = 1 / np.sqrt(4000)
    second = white @ white.T / 4000
    assert abs(second - np.eye(12)).max() < 5 * error
    wrong = GaussianProcess(Matern32(1.3, 1.1 * KERNEL.lengthscale), X, 0.1)
    white = np.linalg.solve(np.linalg.cholesky(wrong.covariance_matrix), np.asarray(draws).T)
    assert abs(white @ white.T / 4000 - np.eye(12)).max() > 5 * error


def test_jitter_is_part_of_the_model():
    twice = np.concatenate([X, X])
    gp = GaussianProcess(KERNEL, twice)
    values = gp.sample(jax.random.key(0))
    assert np.isfinite(values).all() and np.isfinite(gp.log_prob(values))
    assert_allclose(gp.added, jitter(KERNEL, twice), rtol=within(1e-9, 1e-6))
    added = GaussianProcess(KERNEL, X, 0.1, None, 1e-3).added
    assert_allclose(added, 0.101, rtol=within(1e-9, 1e-6))


def test_copies_and_plates_are_independent():
    gp = GaussianProcess(KERNEL, X, 0.1).expand((3,))
    values = gp.sample(jax.random.key(0))
    assert values.shape == (3, 12)
    single = GaussianProcess(KERNEL, X, 0.1)
    expected = [single.log_prob(v) for v in values]
    assert_allclose(gp.log_prob(values), expected, rtol=within(1e-10))

    def model():
        with numpyro.plate("task", 3):
            numpyro.sample("f", GaussianProcess(KERNEL, X, 0.1))

    site = handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace()["f"]
    assert site["value"].shape == (3, 12)
    assert abs(site["value"][0] - site["value"][1]).max() > 0.1


def test_it_is_a_pytree_under_vmap():
    def density(lengthscale):
        return GaussianProcess(RBF(1.0, lengthscale), X, 0.1)

    many = jax.vmap(density)(jnp.array([0.5, 1.0]))
    densities = jax.vmap(lambda gp: gp.log_prob(Y))(many)
    assert_allclose(densities[1], density(1.0).log_prob(Y), rtol=within(1e-10))


@jax.jit
def evaluate(gp, y):
    """Return the log density and the predictions, by one program instead of a hundred."""
    return gp.log_prob(y), *gp.predict(y, X_NEW)


def test_missing_observations_are_left_out():
    y, seen = Y.copy(), np.arange(12) % 3 > 0
    y[~seen] = np.nan
    kept = GaussianProcess(KERNEL, X[seen], 0.1, mean, LITTLE)
    gp = GaussianProcess(KERNEL, X, 0.1, mean, LITTLE, observed=seen)
    log_prob, *predicted = evaluate(kept, Y[seen])
    assert_allclose(evaluate(gp, y)[0], log_prob, rtol=within(1e-9))
    for ours, theirs in zip(evaluate(gp, y)[1:], predicted, strict=True):
        assert_allclose(ours, theirs, rtol=within(1e-9), atol=within(0.0, 1e-6))
    slope = jax.jit(
        jax.grad(
            lambda s: GaussianProcess(RBF(1.0, s), X, 0.1, observed=seen).log_prob(jnp.asarray(y))
        )
    )(1.0)
    assert np.isfinite(slope)

    def model(y):
        with handlers.mask(mask=seen):
            numpyro.sample("y", GaussianProcess(KERNEL, X, 0.1, mean, LITTLE), obs=y)

    masked = jax.jit(lambda: log_density(model, (y,), {}, {})[0])()
    assert_allclose(masked, log_prob, rtol=within(1e-9))


def test_predictions_are_the_exact_posterior():
    gp = GaussianProcess(KERNEL, X, HETERO, None, LITTLE)
    expected, covariance = posterior(KERNEL, X, Y, X_NEW, HETERO + LITTLE)
    ours, full = gp.predict(Y, X_NEW, full_cov=True)
    assert_allclose(ours, expected, rtol=within(1e-8), atol=within(0.0, 1e-6))
    assert_allclose(full, covariance, atol=within(1e-9))
    assert_allclose(gp.predict(Y, X_NEW)[1], np.diag(covariance), rtol=within(1e-7, 5e-5))


def latent(X, y=None):
    f = numpyro.sample("f", GaussianProcess(KERNEL, X, 0.0, mean))
    numpyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=y)


def test_whitening_is_a_change_of_variables():
    white = handlers.reparam(latent, config={"f": WhitenReparam()})
    z = jax.random.normal(jax.random.key(0), (12,))
    ours, trace = log_density(white, (X, Y), {}, {"f_base": z})
    gp = GaussianProcess(KERNEL, X, 0.0, mean)
    f = np.asarray(trace["f"]["value"])
    expected = gp.mean + gp.scale_tril() @ z
    assert_allclose(f, expected, rtol=within(1e-10), atol=within(0.0))
    theirs = log_density(latent, (X, Y), {}, {"f": f})[0]
    log_det = np.log(np.diag(gp.scale_tril())).sum()
    assert_allclose(ours, theirs + log_det, rtol=within(1e-8, 5e-5))


# Inducing points --------------------------------------------------------------------------------

Z = inputs(6, 2, seed=2)
NOISE = 0.1


def sparse(X, y=None, whiten=True):
    m, v = sparse_gp("f", KERNEL, X, Z, whiten, mean_fn=mean)
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", ExpectedLikelihood(lambda f: dist.Normal(f, NOISE**0.5), m, v), obs=y)


def test_sparse_moments_are_those_given_the_inducing_values():
    u = np.linspace(-1.0, 1.0, 6)
    conditional = GaussianProcess(KERNEL, Z, 0.0, mean).predict(u, X)
    seen = []

    def model():
        seen.append(sparse_gp("f", KERNEL, X, Z, whiten=False, mean_fn=mean))

    handlers.seed(handlers.substitute(model, {"f_u": u}), jax.random.key(0))()
    for ours, theirs in zip(seen[0], conditional, strict=True):
        assert_allclose(ours, theirs, rtol=within(1e-8, 1e-4), atol=within(1e-10))
    names = handlers.trace(handlers.seed(sparse, jax.random.key(0))).get_trace(X)
    assert [n for n, s in names.items() if s["type"] == "sample"] == ["f_u_base", "y"]


@pytest.mark.long
def test_the_best_inducing_values_reach_titsias_bound():
    """At the best q, log p(y, u) - log q(u) is the same for every u, and is the bound."""
    collapsed = CollapsedSparseGP(KERNEL, X, Z, NOISE, mean)
    center, factor = collapsed.optimal(Y)
    q = dist.MultivariateNormal(center, factor @ factor.T)
    for u in (center, center + 0.1 * factor[:, 0], center - factor.sum(axis=1)):
        joint = log_density(sparse, (X, Y, False), {}, {"f_u": u})[0]
        bound = joint - q.log_prob(u)
        assert_allclose(bound, collapsed.log_prob(Y), rtol=within(1e-6, 2e-5))


def test_all_points_inducing_is_the_exact_process():
    exact = GaussianProcess(KERNEL, X, NOISE, mean)
    collapsed = CollapsedSparseGP(KERNEL, X, X, NOISE, mean)
    # the bound also loses jitter over noise; the jitter is 7e-6 in single precision
    assert_allclose(collapsed.log_prob(Y), exact.log_prob(Y), rtol=within(1e-6, 1e-4))
    for ours, theirs in zip(collapsed.predict(Y, X_NEW), exact.predict(Y, X_NEW), strict=True):
        assert_allclose(ours, theirs, rtol=within(1e-6, 1e-4), atol=within(0.0))
    full = collapsed.predict(Y, X_NEW, full_cov=True)[1]
    assert_allclose(full, exact.predict(Y, X_NEW, full_cov=True)[1], atol=within(1e-7, 2e-5))
    fewer = CollapsedSparseGP(KERNEL, X, Z, NOISE, mean)
    assert fewer.log_prob(Y) < exact.log_prob(Y) - 0.1  # a lower bound


@pytest.mark.core
def test_expected_likelihoods_are_means_over_latents():
    m, v = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.5, 1.0, 0.1])
    y = jnp.array([0.0, 1.0, 1.0])
    sd = 0.7
    normal = ExpectedLikelihood(lambda f: dist.Normal(f, sd), m, v)
    expected = -0.5 * (((y - m) ** 2 + v) / sd**2 + np.log(2 * np.pi * sd**2))
    assert_allclose(normal.log_prob(y), expected, rtol=1e-5)
    by_quadrature = ExpectedLikelihood(lambda f: dist.Normal(1.0 * f, sd), m, v)
    assert not by_quadrature._is_normal_around_f()
    assert_allclose(by_quadrature.log_prob(y), expected, rtol=1e-4)
    scaled = ExpectedLikelihood(lambda f: dist.Normal(f, jnp.exp(0.1 * f)), m, v)
    assert not scaled._is_normal_around_f()  # its scale depends on f
    bernoulli = ExpectedLikelihood(lambda f: dist.Bernoulli(logits=f), m, v)
    with jax.numpy_rank_promotion("allow"):
        f = m + jnp.sqrt(v) * jax.random.normal(jax.random.key(0), (200_000, 3))
        draws = dist.Bernoulli(logits=f).log_prob(y)
    error = draws.std(axis=0) / np.sqrt(len(f))
    assert (abs(bernoulli.log_prob(y) - draws.mean(axis=0)) < 4 * error + 1e-5).all()
    assert (abs(dist.Bernoulli(logits=m).log_prob(y) - draws.mean(axis=0)) > 8 * error).any()
    assert bernoulli.sample(jax.random.key(0), (7,)).shape == (7, 3)
    slope = jax.grad(lambda v: ExpectedLikelihood(normal.likelihood, m, v).log_prob(y).sum())
    assert np.isfinite(slope(jnp.zeros(3))).all()
    traced = jax.jit(lambda v: ExpectedLikelihood(normal.likelihood, m, v).log_prob(y))
    assert np.isnan(traced(-v)).all()  # mean and variance in the wrong order


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianProcess(KERNEL, X, np.ones(5)), r"noise takes .* got shape \(5,\)"),
        (lambda: GaussianProcess(KERNEL, X, -0.1), "noise is a variance, finite and not negative"),
        (
            lambda: GaussianProcess(KERNEL, np.where(X > 2.5, np.nan, X)),
            r"X has \d of 24 entries that are not finite, at \(",
        ),
        (lambda: GaussianProcess(KERNEL, X).log_prob(Y[:5]), r"values \(\.\.\., 12\), got \(5,\)"),
        (
            lambda: GaussianProcess(KERNEL, X).log_prob(np.where(Y > 0.5, np.nan, Y)),
            "not finite, at .*observed=~jnp.isnan",
        ),
        (
            lambda: GaussianProcess(KERNEL, X, observed=np.ones(3, bool)),
            r"observed takes shape \(12,\)",
        ),
        (
            lambda: GaussianProcess(KERNEL, X, mean_fn=lambda X: X).mean,
            r"mean_fn must return shape \(12,\)",
        ),
        (lambda: CollapsedSparseGP(KERNEL, X, Z, 0.0), "divides by the noise"),
        (lambda: CollapsedSparseGP(KERNEL, X, Z[:, :1], 0.1), "X has 2 columns, and Z has 1"),
        (
            lambda: ExpectedLikelihood(lambda f: dist.Normal(0.0, 1.0), np.ones(3), np.ones(3)),
            r"must have batch shape \(3,\), one number for each f: its batch shape is \(\)",
        ),
        (
            lambda: ExpectedLikelihood(lambda f: dist.Normal(f, 1.0), np.ones(3), np.ones(4)),
            r"m has shape \(3,\), and v",
        ),
        (
            lambda: ExpectedLikelihood(lambda f: dist.Normal(f, 1.0), np.ones(3), -np.ones(3)),
            "has 3 negative values: write .*mean, variance",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types():
    with pytest.raises(TypeError, match="kernel takes a kernel"):
        GaussianProcess(lambda a, b: a, X)
    with pytest.raises(TypeError, match="mean_fn takes one number or a function"):
        GaussianProcess(KERNEL, X, mean_fn=np.ones(12))
    with pytest.raises(TypeError, match="likelihood takes a function"):
        ExpectedLikelihood(dist.Normal(0.0, 1.0), np.ones(3), np.ones(3))


@pytest.mark.promotes_ranks
def test_sites_that_whitening_cannot_serve(key):
    def observed():
        numpyro.sample("f", GaussianProcess(KERNEL, X), obs=Y)

    def other():
        numpyro.sample("f", dist.Normal(0.0, 1.0))

    for model, message in (
        (observed, "is for latent processes"),
        (other, "'f' has a Normal"),
    ):
        with pytest.raises(ValueError, match=message):
            handlers.seed(handlers.reparam(model, config={"f": WhitenReparam()}), key)()
