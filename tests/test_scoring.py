"""Scores against closed forms, scipy and ArviZ."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import scoringrules
from numpy.testing import assert_allclose
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, scoring, to_arviz
from numpyro_ensemble.predict.assembly import makes_inference_data

MANY = 4000
MU, SD = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 2.0])
SEEN = np.array([0.3, 1.4, -6.0])
# the quantiles of each normal, which have no sampling noise
DRAWS = scipy.stats.norm.ppf((np.arange(MANY)[:, None] + 0.5) / MANY) * SD + MU


def gaussian_crps(y, mu, sd):
    """Return the closed form of Gneiting and Raftery (2007), equation 21."""
    z = (y - mu) / sd
    pdf, cdf = scipy.stats.norm.pdf(z), scipy.stats.norm.cdf(z)
    return sd * (z * (2 * cdf - 1) + 2 * pdf - 1 / np.sqrt(np.pi))


@pytest.mark.promotes_ranks
def test_crps_of_a_gaussian():
    exact = gaussian_crps(SEEN, MU, SD)
    ours = scoring.crps(DRAWS, SEEN, pointwise=True)
    assert_allclose(ours, exact, rtol=2e-3)
    assert_allclose(scoring.crps(DRAWS, SEEN), exact.mean(), rtol=2e-3)
    assert np.abs(np.abs(SEEN - MU) - exact).min() > 0.02  # the mean's absolute error differs
    slope = jax.grad(lambda m: scoring.crps(jnp.asarray(DRAWS) + m, SEEN))(0.0)
    step = (scoring.crps(DRAWS + 1e-3, SEEN) - scoring.crps(DRAWS - 1e-3, SEEN)) / 2e-3
    assert_allclose(slope, step, rtol=1e-2)


@pytest.mark.promotes_ranks
def test_energy_score_of_vectors(key):
    draws = np.asarray(jax.random.normal(key, (60, 3)))
    first = np.linalg.norm(draws - SEEN, axis=1).mean()
    second = np.linalg.norm(draws[:, None] - draws[None], axis=2).mean()
    assert_allclose(scoring.energy_score(draws, SEEN), first - 0.5 * second, rtol=1e-5)
    assert_allclose(
        scoring.energy_score(draws, SEEN),
        scoringrules.es_ensemble(SEEN, draws, m_axis=0, v_axis=1), rtol=1e-5,
    )  # fmt: skip
    slope = jax.grad(lambda m: scoring.energy_score(jnp.asarray(draws) * m, SEEN))(1.0)
    step = [scoring.energy_score(draws * m, SEEN) for m in (1.001, 0.999)]
    assert_allclose(slope, (step[0] - step[1]) / 2e-3, rtol=1e-2)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("score", ["rmse", "crps", "energy_score", "coverage", "pit"])
def test_a_weight_is_a_repeated_draw(score, key):
    draws = np.asarray(jax.random.normal(key, (40, 3)))
    times = np.arange(40) % 3
    function = getattr(scoring, score)
    weighted = function(draws, SEEN, weights=times)
    repeated = np.repeat(draws, times, axis=0)
    assert_allclose(weighted, function(repeated, SEEN, weights=np.ones(len(repeated))), rtol=1e-5)
    if score not in ("coverage", "pit"):
        assert abs(weighted - function(draws, SEEN)).max() > 1e-4


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_what_is_missing_is_left_out_or_refused(key):
    draws = DRAWS.copy()
    draws[7] = np.nan
    for function in (scoring.crps, scoring.coverage, scoring.pit, scoring.rmse):
        with pytest.warns(UserWarning, match="1 of 4000 draws are not finite and are left out"):
            assert_allclose(function(draws, SEEN), function(np.delete(DRAWS, 7, axis=0), SEEN))
    with pytest.raises(ValueError, match="none of the 2 draws is finite"):
        scoring.coverage(np.full((2, 3), np.nan), SEEN)
    with pytest.raises(ValueError, match=r"y has NaN at \[1\]"):
        scoring.crps(DRAWS, np.array([0.0, np.nan, 1.0]))

    def model(y, seen):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(y)), numpyro.handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    samples = {"mu": 0.3 * jax.random.normal(key, (2, 30))}
    y, seen = np.array([1.0, 2.0, 0.0, -999.0]), np.array([True, True, False, False])
    masked = to_arviz(model, samples, y, seen)
    short = to_arviz(model, samples, y[:2], seen[:2], posterior_predictive=False)
    assert np.isnan(masked["observed_data"]["y"].values[2:]).all()
    assert_allclose(scoring.nll(masked), scoring.nll(short), rtol=1e-6)
    assert scoring.rmse(masked) < 3.0
    assert scoring.summary({"fit": masked}).loc["fit", "NLL"] == pytest.approx(scoring.nll(short))


@pytest.mark.promotes_ranks
def test_nll_of_a_mixture(key):
    terms = scipy.stats.norm.logpdf(SEEN, MU + np.arange(4)[:, None], SD)
    exact = -np.log(np.exp(terms).mean(0))
    assert_allclose(scoring.nll(terms, pointwise=True), exact, rtol=1e-6)
    assert np.abs(exact - -terms.mean(0)).min() > 0.1  # the mean of the log scores differs
    weights = np.array([1.0, 0.0, 3.0, 0.0])
    wanted = -np.log((weights[:, None] * np.exp(terms)).sum(0) / 4.0).mean()
    assert_allclose(scoring.nll(terms, weights=weights), wanted, rtol=1e-6)
    terms[1] = -np.inf
    assert np.isfinite(jax.grad(lambda w: scoring.nll(jnp.asarray(terms[:1]) * w))(1.0))
    assert np.isfinite(scoring.nll(terms, weights=weights))


def test_intervals_are_scipys_quantiles():
    low, high = scoring.interval(DRAWS, (0.5, 0.95))
    for i, level in enumerate((0.5, 0.95)):
        expected = scipy.stats.norm.interval(level, MU, SD)
        assert_allclose((low[i], high[i]), expected, atol=5e-3 * SD.max())
    widths = scoring.interval_width(DRAWS, (0.95,))
    assert_allclose(widths, 2 * 1.959964 * SD.mean(), rtol=5e-3)
    even = np.full(MANY, 2.0)
    weighted = scoring.interval(DRAWS, (0.5, 0.95), weights=even)
    assert_allclose(weighted, (low, high), atol=5e-3 * SD.max())
    half = np.where(np.arange(MANY) < MANY // 2, 1.0, 0.0)
    assert_allclose(
        scoring.interval(DRAWS, (0.9,), weights=half)[1, 0], MU - 0.0627 * SD, atol=0.02
    )


def test_coverage_calibration_and_pit(key):
    y = np.asarray(jax.random.normal(key, (5000,)))
    draws = scipy.stats.norm.ppf((np.arange(400)[:, None] + 0.5) / 400) * np.ones(5000)
    levels, shares = scoring.calibration_curve(draws, y, num_levels=9)
    error = 4 * np.sqrt(0.25 / 5000)
    assert_allclose(shares, levels, atol=error)
    narrow = scoring.coverage(draws / 2, y, (0.5, 0.95))
    assert (np.array([0.5, 0.95]) - narrow > 2 * error).all()  # half the spread is noticed
    values = scoring.pit(draws, y)
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(scoring.pit(draws / 2, y), "uniform").pvalue < 1e-6
    assert_allclose(scoring.pit(np.array([[0.0], [1.0]]), np.array([1.0])), 0.75)


def test_rmse_and_the_variance_decomposition(key):
    assert_allclose(scoring.rmse(DRAWS, SEEN), np.sqrt(((MU - SEEN) ** 2).mean()), rtol=1e-5)
    means = np.asarray(jax.random.normal(key, (5, 7, 3)))
    parts = scoring.variance_decomposition(means, 0.25)
    assert_allclose(parts["total"], means.reshape(35, 3).var(axis=0) + 0.25, rtol=1e-5)
    assert_allclose(parts["between"], means.mean(1).var(0), rtol=1e-5)
    assert_allclose(sum(parts[k] for k in ("aleatoric", "between", "within")), parts["total"])
    with pytest.raises(ValueError, match=r"means takes \(E, S, ...\)"):
        scoring.variance_decomposition(np.ones(3))


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


DATA = np.array([0.5, 1.5, 1.0, 0.2, 1.9])
POSTERIOR = (DATA.sum() / 6, 6**-0.5)


@pytest.fixture(scope="module")
def fits():
    """Return fits of which one member is the posterior, one is too narrow, and one is off."""
    runner = EnsembleVI(
        conjugate, AutoNormal(conjugate), numpyro.optim.SGD(1e-12), Trace_ELBO(), ensemble_size=3
    )
    mean, spread = POSTERIOR
    starts = {
        "mu_auto_loc": np.array([mean, mean, mean + 2.0]),
        "mu_auto_scale": np.array([spread, spread / 4, spread]),
    }
    key = jax.random.key(1)
    result = runner.run(key, 2, DATA, init_params=starts, progress_bar=False)
    return runner, result, to_arviz(runner, result, DATA, rng_key=key, num_samples=500)


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_scores_read_arviz_data(fits):
    data = fits[2]
    draws = data["posterior_predictive"]["y"].values.reshape(1500, 5)
    terms = data["log_likelihood"]["y"].values.reshape(1500, 5)
    assert_allclose(scoring.crps(data), scoring.crps(draws, DATA))
    assert_allclose(scoring.nll(data), scoring.nll(terms))
    assert_allclose(scoring.coverage(data), scoring.coverage(draws, DATA))
    table = scoring.summary({"all": data, "draws": draws}, DATA, truth=np.ones(5))
    assert isinstance(table, pd.DataFrame)
    assert list(table.index) == ["all", "draws"]
    assert {"RMSE truth", "RMSE", "NLL", "CRPS", "coverage 0.95", "width 0.95"} == set(table)
    assert_allclose(table.loc["all", "CRPS"], table.loc["draws", "CRPS"])


def test_khat_tells_good_members_from_bad(fits):
    members, mixture = scoring.khat(fits[2])
    assert members[0] < 0.5  # the posterior itself: its ratios are constant up to rounding
    assert members[1] > 0.7 and members[2] > 0.5
    assert mixture < 0.5  # a mixture with the posterior in it: the ratio is at most 3


def two_modes():
    parts = dist.Normal(jnp.array([-10.0, 10.0]), 1.0)
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.full(2, 0.5)), parts))


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "guide",
    [
        AutoNormal,
        pytest.param(AutoMultivariateNormal, marks=pytest.mark.long),
        pytest.param(AutoIAFNormal, marks=pytest.mark.long),
    ],
)
def test_members_in_one_mode_do_not_count_twice(guide, key):
    runner = EnsembleVI(
        two_modes, guide(two_modes), numpyro.optim.SGD(1e-12), Trace_ELBO(), ensemble_size=4
    )
    if guide is AutoIAFNormal:  # NumPyro's flow needs more than one dimension
        with pytest.raises(ValueError, match="latent dim = 1"):
            runner.run(key, 1, progress_bar=False)
        return
    loc, spread = np.array([-10.0, -10.0, -10.0, 10.0]), np.full(4, 1.05)
    starts = {"z_auto_loc": loc, "z_auto_scale": spread}
    if guide is AutoMultivariateNormal:
        starts = {"auto_loc": loc[:, None], "auto_scale_tril": spread[:, None, None]}
    result = runner.run(key, 1, init_params=starts, progress_bar=False)
    data = to_arviz(runner, result, num_samples=500)
    assert scoring.khat(data).mixture < 0.5
    drawn = scoring.importance_resample(key, data)["z"]
    assert abs((drawn < 0).mean() - 0.5) < 0.05
    assert (data["posterior"]["z"].values < 0).mean() == 0.75  # the share among pooled draws


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_density_that_other_members_cannot_tell(key):
    def guide(y):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key))
        noise = numpyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        numpyro.sample("mu", dist.Delta(loc + noise))

    runner = EnsembleVI(conjugate, guide, numpyro.optim.SGD(1e-12), Trace_ELBO(), ensemble_size=2)
    result = runner.run(key, 1, DATA, progress_bar=False)
    data = to_arviz(runner, result, DATA, num_samples=50)
    assert np.isnan(scoring.khat(data).mixture)
    with pytest.raises(ValueError, match="has no density for another member's draws"):
        scoring.importance_resample(key, data)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_psis_is_arvizs_own(key):
    ratios = np.asarray(jax.random.t(key, 3.0, (2, 400)))
    smoothed, shape = scoring.psis(ratios)
    assert_allclose(np.exp(smoothed).sum(-1), 1.0, rtol=1e-6)
    assert shape.shape == (2,)
    terms = -ratios.T[None]  # LOO's ratios are the negative log likelihoods
    groups = {"posterior": {"a": np.zeros((1, 400))}, "log_likelihood": {"y": terms}}
    data = az.from_dict(**groups) if makes_inference_data() else az.from_dict(groups)
    loo = az.loo(data, pointwise=True, reff=1.0)
    assert_allclose(np.ravel(loo.pareto_k), shape, rtol=1e-6)
    pointwise = scipy.special.logsumexp(smoothed + terms[0].T, axis=1)
    assert_allclose(pointwise, np.ravel(loo.loo_i if makes_inference_data() else loo.elpd_i))
    with pytest.raises(ValueError, match="PSIS needs 25 draws at least.*num_samples=100"):
        scoring.psis(np.zeros(3))


def test_ratios_that_are_all_the_same_are_trusted():
    noise = np.random.default_rng(0).normal(size=400)
    # equal but for single-precision rounding
    rounded = np.asarray(300.0 + 1e-5 * noise, np.float32)
    rows = np.stack([np.zeros(400), rounded, 1e-16 * noise, noise])
    log_weights, shapes = scoring.psis(rows)
    assert_allclose(np.exp(log_weights[:3]), 1 / 400, rtol=1e-3)
    assert (shapes < 0.5).all() and np.isfinite(shapes).all()
    alone = scoring.psis(noise)
    assert_allclose(log_weights[3], alone[0])
    assert shapes[3] == alone[1] != 0.0
    heavy = np.where(np.arange(400) == 7, 50.0, 0.0)  # one draw has all of the weight
    assert not scoring.psis(heavy)[1] <= 0.7


@pytest.mark.long
def test_resampling_goes_to_the_posterior(key):
    runner = EnsembleVI(
        conjugate, AutoNormal(conjugate), numpyro.optim.SGD(1e-12), Trace_ELBO(), ensemble_size=2
    )
    mean, spread = POSTERIOR
    starts = {
        "mu_auto_loc": mean + np.array([-0.2, 0.2]),
        "mu_auto_scale": np.full(2, 1.5 * spread),
    }
    result = runner.run(key, 1, DATA, init_params=starts, progress_bar=False)
    data = to_arviz(runner, result, DATA, num_samples=4000)
    raw = data["posterior"]["mu"].values
    drawn = scoring.importance_resample(key, data)["mu"]
    assert drawn.shape == (8000,)
    assert_allclose(drawn.mean(), mean, atol=4 * spread / np.sqrt(4000))
    assert_allclose(drawn.std(), spread, rtol=0.05)
    assert abs(raw.std() / spread - 1) > 0.3  # the draws before resampling


def elpd(data):
    loo = az.loo(data)
    return loo.elpd_loo if makes_inference_data() else loo.elpd


@pytest.mark.promotes_ranks
@pytest.mark.filterwarnings("ignore")  # ArviZ warns where LOO is unreliable
def test_weights_are_those_of_loo_and_go_on_to_scores(fits, key):
    samples = {"mu": np.array([[1.5], [0.9], [1.1]]) + 0.3 * jax.random.normal(key, (3, 200))}
    data, *single = (
        to_arviz(conjugate, {"mu": values}, DATA, posterior_predictive=False)
        for values in (samples["mu"], *samples["mu"][:, None])
    )
    scores = np.array([elpd(part) for part in single])
    exact = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    weights = scoring.member_weights(data, "pseudo-bma")
    assert_allclose(weights, exact, rtol=1e-3)
    assert np.ptp(weights) > 0.01  # the weights are not even
    stacked = scoring.member_weights(data, "stacking")
    terms = data["log_likelihood"]["y"].values
    assert stacked.argmax() in scores.argsort()[1:]
    assert_allclose(
        scoring.nll(data, weights=weights),
        scoring.nll(terms.reshape(600, 5), weights=np.repeat(weights, 200)), rtol=1e-6,
    )  # fmt: skip


@pytest.mark.long
def test_weights_of_members_that_failed_are_zero(key):
    runner = EnsembleMAP(conjugate, numpyro.optim.Adam(0.1), ensemble_size=3)
    starts = {"mu": np.array([0.0, np.nan, 1.0])}
    with pytest.warns(UserWarning, match="not finite: 1"):
        result = runner.run(key, 3, DATA, init_params=starts, progress_bar=False)
    with pytest.warns(UserWarning, match="left out"):
        data = to_arviz(runner, result, DATA, num_samples=20)
    weights = scoring.member_weights(data, "elbo")
    assert weights.shape == (3,) and weights[1] == 0
    assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    with pytest.warns(UserWarning, match="left out"):
        predictive = EnsemblePredictive(conjugate, result, weights=weights, return_sites=["mu"])
    assert predictive(key, DATA)["mu"].shape == (2,)
    assert np.isfinite(scoring.crps(data, weights=weights))


@pytest.mark.filterwarnings("ignore")  # ArviZ warns where LOO is unreliable
@pytest.mark.parametrize("method", ["stacking", "pseudo-bma", "elbo", "uniform"])
def test_weights_of_members(fits, method):
    weights = scoring.member_weights(fits[2], method)
    assert weights.shape == (3,)
    assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    if method == "uniform":
        assert_allclose(weights, 1 / 3)
    else:
        assert weights[2] < 0.2  # the member that is off


def test_bad_input(fits, key):
    data = fits[2]
    with pytest.raises(ValueError, match=r"draws have shape \(4000, 3\) and y \(2,\)"):
        scoring.crps(DRAWS, SEEN[:2])
    with pytest.raises(ValueError, match="y is missing"):
        scoring.crps(DRAWS)
    with pytest.raises(ValueError, match="weights takes one number for each of 4000 draws"):
        scoring.crps(DRAWS, SEEN, weights=np.ones(3))
    with pytest.raises(ValueError, match="weights add up to 0"):
        scoring.rmse(DRAWS, SEEN, weights=np.zeros(MANY))
    for wrong, message in (
        (DRAWS[:0], r"draws takes shape \(S, N\)"),
        (data["posterior"], "draws takes|no group"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            scoring.crps(wrong, SEEN)
    with pytest.raises(TypeError, match=r"unknown options \['wieghts'\]"):
        scoring.crps(DRAWS, SEEN, wieghts=1)
    with pytest.raises(ValueError, match=r"var_name takes one of \['y'\], got 'typo'"):
        scoring.crps(data, var_name="typo")
    with pytest.raises(TypeError, match="predictions takes a dict by row name"):
        scoring.summary(DRAWS, SEEN)
    with pytest.raises(ValueError, match=r"log_likelihood names \['b'\]; the rows are \['a'\]"):
        scoring.summary({"a": DRAWS}, SEEN, log_likelihood={"b": DRAWS})
    with pytest.raises(ValueError, match="and there are 3 observations"):
        scoring.summary({"a": DRAWS}, SEEN, log_likelihood={"a": DRAWS[:, :2]})
    with pytest.raises(ValueError, match="levels takes probabilities"):
        scoring.coverage(DRAWS, SEEN, (95,))
    with pytest.raises(ValueError, match="method takes .*'waic'"):
        scoring.member_weights(data, "waic")
    runner = EnsembleMAP(conjugate, numpyro.optim.Adam(0.1), ensemble_size=4)
    with pytest.warns(UserWarning, match="4 members of 1 draws each are too few for az.loo"):
        mapped = to_arviz(runner, runner.run(key, 3, DATA, progress_bar=False), DATA)
    with pytest.raises(ValueError, match="LOO needs 25 draws at least, got 1. .*num_samples=100"):
        scoring.member_weights(mapped)
    with pytest.raises(ValueError, match="the draws of each member are all the same"):
        scoring.member_weights(
            to_arviz(runner, runner.run(key, 3, DATA, progress_bar=False), DATA, num_samples=30)
        )
    with pytest.raises(ValueError, match="no log_q: importance weights need data"):
        scoring.khat(mapped)
