"""Latent processes under several methods of inference, against the posterior in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from gp_truth import inputs, within
from numpy.testing import assert_allclose
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, autoguide
from zoo import chosen

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    ExpectedLikelihood,
    GaussianProcess,
    Pathwise,
    Periodic,
    WhitenReparam,
    choose_inducing,
    sparse_gp,
)
from numpyro_ensemble.mcmc import MEADS

X, X_NEW = inputs(8, 1, width=5.0), np.linspace(0.5, 5.5, 5)[:, None]
KERNEL, SD = RBF(1.0, 0.8), 0.4
Y = np.sin(X[:, 0]) + SD * np.random.default_rng(0).normal(size=8)


def model(X, y=None):
    f = numpyro.sample("f", GaussianProcess(KERNEL, X))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(f, SD), obs=y)


WHITE = reparam(model, config={"f": WhitenReparam()})
EXACT = GaussianProcess(KERNEL, X, SD**2)
FACTOR = np.asarray(GaussianProcess(KERNEL, X).scale_tril())


def base_posterior():
    """Return mean and precision of the whitened values given the data."""
    precision = np.eye(8) + FACTOR.T @ FACTOR / SD**2
    return np.linalg.solve(precision, FACTOR.T @ Y / SD**2), precision


def sampled(kernel, **options):
    mcmc = MCMC(kernel, progress_bar=False, chain_method="vectorized", **options)
    mcmc.run(jax.random.key(0), X, Y)
    return mcmc.get_samples()


@pytest.mark.long
@pytest.mark.promotes_ranks  # NumPyro's guides do
def test_functions_from_ensembles_of_variational_fits(key):
    """The mean is a parameter of each member; the guide can represent the posterior given it."""

    def shifted(X, y=None):
        shift = numpyro.param("shift", 0.5)
        f = numpyro.sample("f", GaussianProcess(KERNEL, X))
        numpyro.sample("y", dist.Normal(f + shift, SD).to_event(1), obs=y)

    white = reparam(shifted, config={"f": WhitenReparam()})
    guide = autoguide.AutoMultivariateNormal(white)
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    runner = EnsembleVI(white, guide, optim, Trace_ELBO(8), ensemble_size=2)
    result = runner.run(key, 1500, X, Y, progress_bar=False)
    draws = runner.sample_posterior(key, result, X, Y, num_samples=200)
    options = {"params": result.params, "num_features": 256, "batch_size": 200}
    values = np.asarray(Pathwise(white, draws, X, Y, **options)(key, X_NEW)["f"])
    for shift, own in zip(
        np.asarray(result.params["shift"]), values.reshape(2, 200, -1), strict=True
    ):
        mean, variance = EXACT.predict(Y - shift, X_NEW)
        assert (abs(own.mean(axis=0) - mean) < 6 * np.sqrt(variance / 200)).all()
        assert_allclose(own.var(axis=0) / variance, 1.0, atol=0.4)
        assert abs(EXACT.predict(Y - shift - 1.0, X_NEW)[0] - mean).max() > 0.5  # another mean


SAMPLERS = {
    "NUTS": lambda: sampled(NUTS(WHITE), num_warmup=200, num_samples=500, num_chains=2),
    "MEADS": lambda: sampled(MEADS(WHITE), num_warmup=100, num_samples=60, num_chains=64),
}


@pytest.mark.parametrize("name", chosen(SAMPLERS, set()))
def test_functions_from_samplers_have_the_exact_moments(name, key):
    samples = SAMPLERS[name]()
    pathwise = Pathwise(WHITE, samples, X, Y, num_features=256, batch_size=200)
    mean, variance = EXACT.predict(Y, X_NEW)
    values = np.asarray(pathwise(key, X_NEW)["f"])
    number = len(values) / 4  # draws are not independent
    assert (abs(values.mean(axis=0) - mean) < 5 * np.sqrt(variance / number)).all()
    assert_allclose(values.var(axis=0) / variance, 1.0, atol=0.2)
    moments = pathwise.moments(X_NEW)["f"]
    assert_allclose(moments.mean, mean, atol=0.08)
    assert_allclose(moments.variance, variance, rtol=0.12)
    # plain Predictive draws the process again: this wrong answer is rejected
    wrong = Predictive(WHITE, {"f_base": samples["f_base"][:, :5]})(key, X_NEW)["f"]
    assert not np.allclose(wrong.var(axis=0) / variance, 1.0, atol=0.2)


GUIDES = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormal": autoguide.AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": lambda m: autoguide.AutoLowRankMultivariateNormal(m, rank=8),
}


@pytest.mark.long
@pytest.mark.promotes_ranks  # NumPyro's guides do
@pytest.mark.parametrize("name", chosen(GUIDES, {"AutoNormal"}))
def test_guides_find_what_their_family_can_hold(name, key):
    guide = GUIDES[name](WHITE)
    delta = name == "AutoDelta"
    loss = Trace_ELBO(num_particles=1 if delta else 16)
    svi = SVI(WHITE, guide, optax.adam(optax.cosine_decay_schedule(0.03, 1500)), loss)
    result = svi.run(key, 1500, X, Y, progress_bar=False)
    samples = guide.sample_posterior(jax.random.key(1), result.params, X, Y, sample_shape=(2000,))
    base = np.asarray(samples["f_base"])
    mean, precision = base_posterior()
    assert_allclose(base.mean(axis=0), mean, atol=0.005 if delta else 0.12)
    covariance = np.linalg.inv(precision)
    if name == "AutoNormal":  # the closest independent normals
        covariance = np.diag(1 / np.diag(precision))
    if not delta:
        assert_allclose(np.cov(base.T), covariance, atol=0.12)
    some = {name: value[:400] for name, value in samples.items()}
    if delta:
        some = {"f_base": base[:1]}
    moments = Pathwise(WHITE, some, X, Y, num_features=64).moments(X_NEW)["f"]
    exact_mean, exact_variance = EXACT.predict(Y, X_NEW)
    assert_allclose(moments.mean, exact_mean, atol=0.01 if delta else 0.15)
    if delta:  # the variance is that given the values at X
        left = GaussianProcess(KERNEL, X).predict(FACTOR @ base[0], X_NEW)[1]
        assert_allclose(moments.variance, left, rtol=1e-5, atol=within(1e-7, 1e-4))
        assert (moments.variance < 0.9 * exact_variance).any()
    elif name != "AutoNormal":
        assert_allclose(moments.variance, exact_variance, atol=0.1)


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_minibatches_reach_titsias_bound(key):
    """NumPyro's SVI reaches the bound of a sparse process, with batches and without."""
    number, noise = 300, 0.1
    points = inputs(number, 1, width=8.0)
    y = np.sin(points[:, 0]) + noise**0.5 * np.random.default_rng(1).normal(size=number)
    Z = np.asarray(choose_inducing(None, points, 12, kernel=KERNEL))
    bound = CollapsedSparseGP(KERNEL, points, Z, noise).log_prob(y)

    def sparse(X, y, size, likelihood=ExpectedLikelihood):
        with numpyro.plate("data", number, subsample_size=size):
            batch, y_batch = numpyro.subsample(X, event_dim=1), numpyro.subsample(y, event_dim=0)
        m, v = sparse_gp("f", KERNEL, batch, Z)
        with numpyro.plate("rows", number, subsample_size=size):
            numpyro.sample("y", likelihood(lambda f: dist.Normal(f, noise**0.5), m, v), obs=y_batch)

    def elbo(size, *options):
        guide = autoguide.AutoMultivariateNormal(sparse)
        optim = optax.adam(optax.cosine_decay_schedule(0.05, 2000))
        svi = SVI(sparse, guide, optim, Trace_ELBO(num_particles=4))
        data = (jnp.asarray(points), jnp.asarray(y))
        result = svi.run(key, 2000, *data, size, *options, progress_bar=False)
        whole = Trace_ELBO(num_particles=2000).loss
        return -whole(key, result.params, sparse, guide, *data, number, *options)

    assert -0.3 < elbo(number) - bound < 0.1, bound
    assert -0.6 < elbo(50) - bound < 0.1, bound
    # wrong: the likelihood at the mean, as if inducing values determined the process everywhere
    assert elbo(number, lambda likelihood, m, v: likelihood(m)) > bound + 0.5


def mauna_loa(t, y=None):
    """A trend, and a yearly cycle that may change its shape."""
    trend = numpyro.sample("trend", dist.LogNormal(3.0, 0.5))
    season = numpyro.sample("season", dist.LogNormal(-2.0, 0.5))
    shape = numpyro.sample("shape", dist.LogNormal(0.0, 0.3))
    noise = numpyro.sample("noise", dist.LogNormal(-6.0, 1.0))
    kernel = RBF(4.0, trend) + season * RBF(1.0, 30.0) * Periodic(1.0, shape, 1.0)
    numpyro.sample("y", GaussianProcess(kernel, t, noise), obs=y)


@pytest.mark.long
def test_mauna_loa(key):
    """Ten years of carbon dioxide under NUTS; two more years are predicted."""
    from statsmodels.datasets import co2

    monthly = co2.load_pandas().data["co2"].resample("MS").mean().dropna()[-144:]
    t = np.asarray(monthly.index.year + (monthly.index.month - 0.5) / 12, float) - 1990.0
    y = monthly.to_numpy()
    y = (y - y[:120].mean()) / y[:120].std()
    mcmc = MCMC(NUTS(mauna_loa), num_warmup=150, num_samples=60, progress_bar=False)
    mcmc.run(key, t[:120], y[:120])
    samples = mcmc.get_samples()
    pathwise = Pathwise(mauna_loa, samples, t[:120], y[:120], num_paths=4, num_features=256)
    out = {name: np.asarray(value) for name, value in pathwise(key, t[120:]).items()}
    error = out["y"].mean(axis=0) - y[120:]
    line = np.polyval(np.polyfit(t[:120], y[:120], 1), t[120:]) - y[120:]
    assert np.sqrt((error**2).mean()) < 0.6 * np.sqrt((line**2).mean())
    inside = abs(error) < 2.5 * out["y"].std(axis=0)
    assert inside.mean() > 0.8
    parts = pathwise.draw(key)["y"].components()
    cycle = np.asarray(parts[1](t[108:120])).mean(axis=0)  # highest in May, lowest in autumn
    months = np.round((t[108:120] % 1) * 12 + 0.5).astype(int)
    assert months[cycle.argmax()] in (4, 5, 6) and months[cycle.argmin()] in (9, 10)
