"""Simulation-based calibration: exact posteriors pass, and wrong posteriors are rejected."""

import warnings

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from scipy import stats

from numpyro_ensemble import EnsembleMAP, EnsembleVI, plotting
from numpyro_ensemble.calibration import ecdf_band, sbc, uniformity
from numpyro_ensemble.mcmc import ChEES
from numpyro_ensemble.predict.assembly import makes_inference_data

mpl.use("Agg")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 2))
NOISE = 0.7
COVARIANCE = np.linalg.inv(np.eye(2) + X.T @ X / NOISE**2)
ROOT = np.linalg.cholesky(COVARIANCE)
ADAM = numpyro.optim.Adam(0.05)


def regression(x, z=None):
    """A conjugate model: the second argument is the data, and an axis of w has a name."""
    w = numpyro.sample(
        "w", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"event_dims": ["input"]}
    )
    with numpyro.plate("row", 8):
        numpyro.sample("y", dist.Normal(x @ w, NOISE), obs=z)


def posterior(key, x, z, *, width=1.0, shift=0.0, noise=NOISE, number=99):
    """Draw from the exact posterior, or from one with a wrong width, mean or noise."""
    precision = jnp.eye(2) + x.T @ x / noise**2
    mean = jnp.linalg.solve(precision, x.T @ z / noise**2)
    draws = jax.random.normal(key, (number, 2)) @ ROOT.T
    if noise != NOISE:
        draws = draws @ jnp.linalg.inv(ROOT).T @ jnp.linalg.cholesky(jnp.linalg.inv(precision)).T
    return {"w": mean[None] + shift * jnp.diag(ROOT)[None] + width * draws}


def calibrated(fit=posterior, number=1000, **options):
    return sbc(regression, fit, X, np.zeros(8), rng_key=KEY, num_datasets=number, **options)


def test_uniformity_is_that_of_uniform_values():
    """p-values of uniform values are uniform, and those of other values are small."""
    p = uniformity(RNG.random((100, 400)))
    assert p.shape == (400,)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    u = RNG.random(300)
    for wrong in (u**1.5, 0.15 + 0.7 * u, stats.beta(0.6, 0.6).ppf(u), np.append(u, np.ones(40))):
        assert uniformity(wrong) < 0.01


def test_the_band_holds_the_whole_curve():
    places, lower, upper = ecdf_band(150, level=0.9)
    values = RNG.random((2000, 150))
    curves = (values[:, :, None] <= places).mean(axis=1)
    inside = ((curves >= lower) & (curves <= upper)).all(axis=1).mean()
    assert 0.87 < inside < 0.94
    pointwise = stats.binom.ppf([0.05, 0.95], 150, 0.5) / 150
    middle = np.searchsorted(places, 0.5)
    assert lower[middle] < pointwise[0] and pointwise[1] < upper[middle]  # wider than pointwise


def test_an_exact_posterior_passes():
    found = calibrated(quantities=lambda latents, x, z: {"sum": latents["w"].sum()})
    assert found.miscalibrated == []
    assert set(found.p_values) == {"w", "sum", "log_likelihood"}
    assert found.ranks["w"].shape == (1000, 2) and found.ranks["w"].max() == 99
    group = found.data["prior_sbc"]
    assert group["w"].dims == ("chain", "draw", "input") and group["sum"].shape == (1, 1000)
    assert found.failed.size == 0 and found.truths["w"].shape == (1000, 2)
    assert abs(np.cov(found.truths["w"].T) - np.eye(2)).max() < 0.15


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"width": 0.5**0.5}, {"w", "log_likelihood"}),  # half the variance
        ({"shift": 0.3}, {"w"}),
        pytest.param(  # a likelihood with other noise than the data have
            {"noise": 1.2}, {"w", "log_likelihood"}, marks=pytest.mark.long
        ),
    ],
)
def test_a_wrong_posterior_is_found(wrong, where):
    def fit(key, x, z):
        return posterior(key, x, z, **wrong)

    assert set(calibrated(fit).miscalibrated) >= where


def test_the_log_likelihood_finds_what_the_latents_do_not():
    """Draws from the prior ignore the data, and the ranks of the latents are still uniform."""

    def prior(key, x, z):
        return {"w": jax.random.normal(key, (99, 2))}

    found = calibrated(prior)
    assert "w" not in found.miscalibrated and "log_likelihood" in found.miscalibrated


def test_a_guide_is_fitted_to_each_data_set_as_alone():
    runner = EnsembleVI(regression, AutoNormal(regression), ADAM, Trace_ELBO(), ensemble_size=1)
    seen = []

    def alone(key, x, z):
        first, second = jax.random.split(key)
        result = runner.run(first, 30, x, z, progress_bar=False)
        seen.append(1)
        return runner.sample_posterior(second, result, x, z, num_samples=9)

    options = {"number": 12, "num_draws": 9}
    together = calibrated(runner, num_steps=30, batch_size=5, **options)
    apart = calibrated(alone, **options)
    for name in ("w", "log_likelihood"):
        np.testing.assert_array_equal(together.ranks[name], apart.ranks[name])
    assert len(seen) == 1  # traced once for all data sets
    runner.run(KEY, 5, X, np.ones(8), progress_bar=False)  # the runner still works


@pytest.mark.long
@pytest.mark.parametrize("guide", [AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal])
def test_guides(guide):
    """Guides fit a normal posterior exactly, except a mean-field guide, which is too narrow."""
    x = X @ np.array([[1.0, 0.9], [0.0, 0.3]])
    runner = EnsembleVI(regression, guide(regression), ADAM, Trace_ELBO(4), ensemble_size=3)
    found = sbc(
        regression, runner, x, np.zeros(8), rng_key=KEY, num_datasets=400, num_steps=2000,
        run_options={"stable_update": True},
    )  # fmt: skip
    assert ("w" in found.miscalibrated) == (guide is AutoNormal)
    assert runner.ensemble_size == 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["NUTS", "ChEES"])
def test_chains(name):
    if name == "NUTS":
        mcmc = MCMC(NUTS(regression), num_warmup=100, num_samples=150, progress_bar=False)
    else:
        mcmc = MCMC(
            ChEES(regression), num_warmup=60, num_samples=20, num_chains=16,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
    found = calibrated(mcmc, number=100, num_draws=19)
    assert found.miscalibrated == []
    mcmc.run(KEY, X, np.ones(8))  # the user's MCMC still runs
    assert np.isfinite(mcmc.get_samples()["w"]).all()


SEEN = X @ np.array([1.0, -1.0]) + NOISE * RNG.normal(size=8)


def of_both(key, x, z):
    """Draw from the posterior of both the data seen before and the simulated ones."""
    precision = jnp.eye(2) + 2 * x.T @ x / NOISE**2
    mean = jnp.linalg.solve(precision, x.T @ (z + SEEN) / NOISE**2)
    root = jnp.linalg.cholesky(jnp.linalg.inv(precision))
    return {"w": mean[None] + jax.random.normal(key, (99, 2)) @ root.T}


@pytest.mark.long
def test_calibration_where_the_posterior_is():
    before = posterior(KEY, X, SEEN, number=600)

    def calibrated_there(make, **options):
        return sbc(
            regression, make, X, SEEN, rng_key=KEY, num_datasets=300, posterior_samples=before,
            **options,
        )  # fmt: skip

    found = calibrated_there(lambda model: of_both)
    assert found.miscalibrated == [] and "posterior_sbc" in str(found.data)
    assert plotting.plot_ranks(found).get_legend() is not None
    # draws given only the simulated data, without SEEN, are rejected
    assert "w" in calibrated_there(lambda model: posterior).miscalibrated
    # the function gets a model that is conditioned on both
    runner = calibrated_there(
        lambda model: EnsembleVI(model, AutoMultivariateNormal(model), ADAM, Trace_ELBO(8)),
        num_steps=800,
    )
    assert runner.miscalibrated == []
    with pytest.raises(TypeError, match="fit takes a function that makes the fit"):
        calibrated_there(MCMC(NUTS(regression), num_warmup=1, num_samples=1))
    with pytest.raises(ValueError, match=r"posterior_samples lacks \['w'\]"):
        sbc(regression, posterior, X, SEEN, rng_key=KEY, posterior_samples={"b": np.zeros(9)})


def counts(shop, seen=None, sold=None):
    """Two observed sites, one of integers and one of booleans, and latent integers."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("shop", 3):
        size = numpyro.sample("a_size", dist.Poisson(3.0))
    with numpyro.plate("row", len(shop)):
        numpyro.sample("seen", dist.Bernoulli(0.3), obs=seen)
        numpyro.sample("sold", dist.Poisson(rate * (1.0 + size[shop])), obs=sold)


@pytest.mark.long
def test_two_sites_and_discrete_latents():
    shop, seen, sold = np.arange(9) % 3, np.zeros(9, bool), np.ones(9, int)
    kinds = []

    def prior(key, shop, *, seen, sold):
        kinds.append((seen.dtype, sold.dtype))
        first, second = jax.random.split(key)
        size = jax.random.poisson(first, 3.0, (99, 3))
        return {"rate": jax.random.gamma(second, 2.0, (99,)), "a_size": size}

    found = sbc(
        counts, prior, shop, rng_key=KEY, num_datasets=300, seen=seen, sold=sold,
        data_sites=["sold", "seen"],
    )  # fmt: skip
    assert kinds[0] == (bool, sold.dtype)
    assert {"a_size", "rate"}.isdisjoint(found.miscalibrated)  # ties are broken at random
    assert "log_likelihood" in found.miscalibrated


def test_data_that_are_not_finite_are_named():
    def heavy(y):
        s = numpyro.sample("s", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", 3):
            numpyro.sample("y", dist.Normal(0.0, jnp.where(s > 1.5, jnp.nan, 1.0)), obs=y)

    def fit(key, y):
        return {"s": jnp.minimum(jax.random.normal(key, (99,)), 1.0)}

    with numpyro.validation_enabled(False):
        with pytest.warns(UserWarning, match=r"of 60 data sets have simulated data .*finite: \d"):
            found = sbc(heavy, fit, np.zeros(3), rng_key=KEY, num_datasets=60)
        assert 0 < found.failed.size < 20
        assert len(found.ranks["s"]) == 60 - found.failed.size
        with pytest.raises(RuntimeError, match="data sets have simulated data"):
            sbc(heavy, fit, np.zeros(3), rng_key=KEY, num_datasets=60, on_failed="raise")


@pytest.mark.skipif(makes_inference_data(), reason="ArviZ below 1.0 does not draw such data")
def test_arviz_draws_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plot = az.plot_ecdf_pit(calibrated(number=50).data, var_names=["w"])
    assert plot.viz is not None


def nothing_observed():
    numpyro.sample("w", dist.Normal(0.0, 1.0))


def with_factor(z):
    numpyro.factor("f", -(numpyro.sample("w", dist.Normal(0.0, 1.0)) ** 2))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=z)


def improper(z):
    w = numpyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(w, 1.0), obs=z)


def centred(z):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 3):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=z - z.mean())


Z = np.arange(3.0)
SHOP = np.arange(9) % 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda o: sbc(nothing_observed, posterior, **o), "no observed site"),
        (lambda o: sbc(with_factor, posterior, 1.0, **o), r"factors \['f'\]"),
        (lambda o: sbc(improper, posterior, 1.0, **o), r"prior of \['w'\] is improper"),
        (lambda o: sbc(centred, posterior, Z, **o), "no argument holds the values of site 'y'"),
        (
            lambda o: sbc(counts, posterior, SHOP, SHOP > 1, SHOP, **o),
            r"observes \['seen', 'sold'\]: name them",
        ),
        (
            lambda o: sbc(counts, posterior, SHOP, SHOP > 1, SHOP, data_sites=["sold"], **o),
            r"lacks \['seen'\]",
        ),
        (
            lambda o: sbc(
                counts, posterior, SHOP, SHOP > 1, SHOP, data_sites=["sold", "seen"], **o
            ),
            "2 arguments hold the values of site 'sold'",
        ),
        (
            lambda o: calibrated(posterior, num_steps=5),
            r"\['num_steps'\] are options of variational fits",
        ),
        (
            lambda o: calibrated(posterior, num_draws=500),
            "500 draws of each site are needed at least",
        ),
        (lambda o: calibrated(posterior, number=3), "num_datasets must be at least 10, got 3"),
        (lambda o: calibrated(NUTS(regression)), r"fit takes an MCMC: MCMC\(NUTS\(model\)"),
        (
            lambda o: calibrated(EnsembleMAP(regression, ADAM), num_steps=5),
            "is a point without draws",
        ),
        (
            lambda o: calibrated(
                EnsembleVI(regression, AutoNormal(regression), ADAM, Trace_ELBO())
            ),
            "num_steps is missing",
        ),
        (lambda o: calibrated(quantities=lambda w, *_: {"w": 0.0}), r"\['w'\], which are ranked"),
        (
            lambda o: calibrated(lambda key, x, z: {"weights": posterior(key, x, z)["w"]}),
            r"draws of \['weights'\], and the model's latents are \['w'\]",
        ),
    ],
)
def test_bad_input(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call({"rng_key": KEY, "num_datasets": 10})


def test_the_picture_names_what_is_wrong():
    found = calibrated(lambda key, x, z: posterior(key, x, z, width=0.5), number=200)
    ax = plotting.plot_ranks(found)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "exact" in labels and any(text.startswith("w, p = 0.0") for text in labels)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    outside = [np.abs(line.get_ydata()).max() > band.max() for line in ax.lines[:2]]
    assert all(outside)
