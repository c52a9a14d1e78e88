"""Other packages that run NumPyro for their users take this package's kernels and fits."""

import driver
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import package_models
import pytest
from cases import Size
from numpy.testing import assert_allclose
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.mcmc import MEADS, ChEES

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.promotes_ranks,
    pytest.mark.filterwarnings("default"),
]
NAMES = tuple(package_models.CASES)
ADAM = numpyro.optim.Adam(0.01)
X = np.linspace(-1.0, 1.0, 20)[:, None]
Y = 0.7 * X[:, 0] + 0.1 * np.cos(9 * X[:, 0])
POSTERIOR = (4 * X[:, 0] @ Y / (1 + 4 * X[:, 0] @ X[:, 0]), (1 + 4 * X[:, 0] @ X[:, 0]) ** -0.5)


def line(X, y=None):
    """A slope with a standard normal prior, and noise 0.5; `POSTERIOR` is the exact posterior."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", X.shape[0]):
        numpyro.sample("y", dist.Normal(slope * X[:, 0], 0.5), obs=y)


@pytest.fixture
def impact_model():
    aimz = pytest.importorskip("aimz", reason="aimz is not installed: pip install aimz")
    return aimz.ImpactModel


@pytest.mark.parametrize("kernel", [ChEES, MEADS])
def test_aimz_samples_with_many_chains(impact_model, kernel, key):
    mcmc = MCMC(
        kernel(line),
        num_warmup=200,
        num_samples=50,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    model = impact_model(line, rng_key=key, inference=mcmc)
    model.fit_on_batch(X, Y, progress=False)
    slope = np.asarray(model.posterior["slope"])
    mean, sd = POSTERIOR
    assert slope.size == 64 * 50
    assert abs(slope.mean() - mean) < 4 * sd / np.sqrt(400)  # a few hundred effective draws
    assert_allclose(slope.std(), sd, rtol=0.15)
    assert model.predict_on_batch(X, return_datatree=False)["y"].shape[-1] == 20


def test_aimz_takes_one_member_of_an_ensemble(impact_model, key):
    guide = AutoNormal(line)
    vi = EnsembleVI(line, guide, ADAM, Trace_ELBO(), ensemble_size=3)
    result = vi.run(key, 1500, X, y=Y, progress_bar=False)
    model = impact_model(line, rng_key=key, inference=SVI(line, guide, ADAM, Trace_ELBO()))
    member = result.member(1)
    model.vi_result = member
    draws = guide.sample_posterior(key, member.params, sample_shape=(500,))
    model.set_posterior_sample(draws)
    mean, sd = POSTERIOR
    assert abs(np.mean(model.posterior["slope"]) - mean) < 0.5 * sd
    assert model.predict_on_batch(X, return_datatree=False)["y"].shape[-1] == 20


def test_aimz_takes_no_ensemble(impact_model, key):
    vi = EnsembleVI(line, AutoNormal(line), ADAM, Trace_ELBO(), ensemble_size=3)
    with pytest.raises(TypeError):
        impact_model(line, rng_key=key, inference=vi)


@pytest.mark.parametrize("name", NAMES)
def test_model(name):
    case = package_models.case(name)
    if isinstance(case, str):
        pytest.skip(case)
    columns = driver.in_turn(NAMES.index(name), case)
    row = driver.run_model(name, case, columns=columns, size=driver.SHORT)
    assert driver.complaints(row, case.refused) == []


@pytest.fixture
def forecast_package():
    reason = "numpyro_forecast is not installed; it needs Python 3.12 or newer"
    return pytest.importorskip("numpyro_forecast", reason=reason)


@pytest.mark.parametrize("build", [AutoNormal, AutoMultivariateNormal])
def test_draws_do_not_depend_on_who_set_the_guide_up(forecast_package, build, key):
    model, args = package_models.case("numpyro_forecast local level")[:2]
    keys, guides = jax.random.split(key, 2), [build(model), build(model)]
    vi = EnsembleVI(model, guides[0], ADAM, Trace_ELBO(), ensemble_size=2)
    ours = vi.run(keys, 20, *args, progress_bar=False).member(0)
    svi = SVI(model, guides[1], ADAM, Trace_ELBO())
    theirs = svi.run(keys[0], 20, *args, progress_bar=False)
    draws = [forecast_package.draw_posterior(key, g, ours.params, num_samples=5) for g in guides]
    assert draws[0].keys() == draws[1].keys()
    for name in draws[0]:
        assert_allclose(draws[0][name], draws[1][name], rtol=1e-8, err_msg=name)
        assert np.ptp(draws[0][name], axis=0).max() > 0
    for name, value in theirs.params.items():
        assert_allclose(ours.params[name], value, rtol=1e-6, err_msg=name)


def test_forecasts_of_a_member_and_of_many_chains(forecast_package, key):
    model, (covariates, data) = package_models.case("numpyro_forecast local level")[:2]
    guide = AutoNormal(model)
    vi = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    known = covariates[:48], data[:48]
    params = vi.run(key, 1500, *known, progress_bar=False).member(0).params
    posterior = forecast_package.draw_posterior(key, guide, params, num_samples=200)
    size = Size()
    mcmc = MCMC(
        ChEES(model),
        num_warmup=size.warmup,
        num_samples=20,
        num_chains=size.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, *known)
    for samples in (posterior, mcmc.get_samples()):
        ahead = forecast_package.forecast(key, model, samples, known[1], covariates)
        assert ahead.shape[1:] == (12, 1)
        low, high = jnp.quantile(ahead, jnp.array([0.01, 0.99]), axis=0)
        inside = (low < data[48:]) & (data[48:] < high)
        assert inside.mean() > 0.7


def test_windows_of_a_backtest_are_members(forecast_package, key):
    """An ensemble with the windows as `member_args` reaches the losses of `backtest_vectorized`."""
    model, (covariates, data) = package_models.case("numpyro_forecast local level")[:2]
    starts, length = (0, 12, 24), 24
    found = forecast_package.evaluate.backtest_vectorized(
        key,
        lambda: model,
        data,
        covariates,
        train_window=length,
        test_window=12,
        stride=12,
        guide=AutoNormal(model),
        optim=ADAM,
        num_steps=4000,
    )
    windows = [jnp.stack([a[s : s + length] for s in starts]) for a in (covariates, data)]
    guide = AutoNormal(model)
    vi = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=3)
    result = vi.run(key, 4000, *windows, member_args=(0, 1), progress_bar=False)
    theirs = np.asarray(found.losses)[:3]
    # the fits have different keys, so that losses agree only to the noise of the bound
    assert_allclose(result.losses[:, -100:].mean(1), theirs[:, -100:].mean(1), rtol=0.1, atol=3.0)
