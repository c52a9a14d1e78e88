"""Leave-one-out, comparison and mixtures of three models whose posteriors are known."""

import warnings
from functools import cache
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, scoring, to_arviz
from numpyro_ensemble.calibration import sbc, uniformity
from numpyro_ensemble.predict.assembly import makes_inference_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*too few for az.loo"),
    pytest.mark.filterwarnings("ignore:The inplace keyword"),  # pandas, about ArviZ
    pytest.mark.filterwarnings("ignore:Estimated shape parameter"),  # ArviZ's form of the next
    pytest.mark.filterwarnings("ignore:leave-one-out is not to be trusted"),
    pytest.mark.promotes_ranks,
]
RNG = np.random.default_rng(3)
ROWS = 24
X = RNG.normal(size=(ROWS, 2)) @ np.array([[1.0, 0.7], [0.0, 0.7]])
SHOP = np.arange(ROWS) % 4
NOISE = 0.5


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def hierarchy(x, y=None):
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    with numpyro.plate("shop", 4):
        a = numpyro.sample("a", dist.Normal(level, 1.0))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(a[x], NOISE), obs=y)


def counts(x, y=None):
    with numpyro.plate("kind", 2):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 0.5))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Poisson(rate[x % 2]), obs=y)


class Known(NamedTuple):
    """A model, its data, posterior draws, and each row's distribution given the others."""

    model: object
    x: np.ndarray
    y: np.ndarray
    draw: object  # (rng, x, y, number) -> draws by site
    predicted: object  # (x, y, i, rows) -> scipy's distribution of row i given all but these rows


def normal_case(model, x, y, design, prior, names):
    """A linear model: `y = design @ z + noise`."""

    def posterior(design, y):
        precision = np.linalg.inv(prior) + design.T @ design / NOISE**2
        covariance = np.linalg.inv(precision)
        return covariance @ design.T @ y / NOISE**2, covariance

    def draw(rng, x, y, number):
        return names(rng.multivariate_normal(*posterior(design, y), size=number))

    def predicted(x, y, i, out=None):
        out = i if out is None else out
        mean, covariance = posterior(np.delete(design, out, 0), np.delete(y, out))
        variance = design[i] @ covariance @ design[i] + NOISE**2
        return stats.norm(design[i] @ mean, np.sqrt(variance))

    return Known(model, x, y, draw, predicted)


def count_case(x, y):
    def draw(rng, x, y, number):
        shape = np.array([3.0 + y[x % 2 == k].sum() for k in (0, 1)])
        rate = np.array([0.5 + (x % 2 == k).sum() for k in (0, 1)])
        return {"rate": rng.gamma(shape, 1 / rate, size=(number, 2))}

    def predicted(x, y, i, out=None):
        same = (x % 2 == x[i] % 2) & ~np.isin(np.arange(len(x)), i if out is None else out)
        shape, rate = 3.0 + y[same].sum(), 0.5 + same.sum()
        return stats.nbinom(shape, rate / (rate + 1))

    return Known(counts, x, y, draw, predicted)


def shops(x):
    return np.concatenate([np.zeros((len(x), 1)), np.eye(4)[x]], axis=1)


PRIOR = np.block([[np.full((1, 1), 4.0), np.full((1, 4), 4.0)],
                  [np.full((4, 1), 4.0), np.full((4, 4), 4.0) + np.eye(4)]])  # fmt: skip
CASES = {
    "regression": normal_case(
        regression, X, X @ np.array([0.8, -0.5]) + NOISE * RNG.normal(size=ROWS), X, np.eye(2),
        lambda z: {"w": z},
    ),
    "hierarchy": normal_case(
        hierarchy, SHOP, RNG.normal(size=4)[SHOP] + NOISE * RNG.normal(size=ROWS), shops(SHOP),
        PRIOR, lambda z: {"level": z[:, 0], "a": z[:, 1:]},
    ),
    "counts": count_case(np.arange(ROWS), RNG.poisson(5.0, size=ROWS)),
}  # fmt: skip
QUICK_AND_LONG = [
    pytest.param(name, marks=[pytest.mark.long] * (name != "hierarchy")) for name in CASES
]


@cache
def exact_data(case, seed=0):
    """Return ArviZ data of draws from the posterior, in two chains."""
    known = CASES[case]
    draws = known.draw(np.random.default_rng(seed), known.x, known.y, 8000)
    draws = {name: value.reshape(2, 4000, *value.shape[1:]) for name, value in draws.items()}
    return to_arviz(known.model, draws, known.x, known.y)


def exact_terms(case, labels=None):
    """Return the log predictive density of each row, given the other rows or the other folds."""
    known = CASES[case]
    density = "logpmf" if case == "counts" else "logpdf"
    out = [[i] if labels is None else np.flatnonzero(labels == labels[i]) for i in range(ROWS)]
    law = [known.predicted(known.x, known.y, i, out[i]) for i in range(ROWS)]
    return np.array([getattr(p, density)(y) for p, y in zip(law, known.y, strict=True)])


def loo_of(data):
    found = az.loo(data, pointwise=True)
    return np.asarray(found.loo_i if makes_inference_data() else found.elpd_i)


@pytest.mark.parametrize("case", QUICK_AND_LONG)
def test_scores_are_those_of_arviz_and_of_the_closed_form(case):
    data = exact_data(case)
    found = scoring.compare({"one": data, "other": exact_data(case, 1)})
    table = found.table
    column = "elpd_loo" if makes_inference_data() else "elpd"
    assert_allclose(table.loc["one", column], loo_of(data).sum(), rtol=1e-8)
    assert abs(table.loc["one", column] - exact_terms(case).sum()) < 0.15
    assert_allclose(table.loc["one", "se"], az.loo(data).se, rtol=1e-6)
    assert (table["pareto_k"] < 0.7).all() and not table["corrected"].any()
    assert_allclose(sum(w.sum() for w in found.weights.values()), 1.0)


@pytest.mark.parametrize("case", QUICK_AND_LONG)
def test_probabilities_are_those_of_the_closed_form(case):
    known = CASES[case]
    values = scoring.loo_pit(exact_data(case))
    law = [known.predicted(known.x, known.y, i) for i in range(ROWS)]
    exact = np.array([p.cdf(y) for p, y in zip(law, known.y, strict=True)])
    if case == "counts":
        exact -= 0.5 * np.array([p.pmf(y) for p, y in zip(law, known.y, strict=True)])
    assert_allclose(values, exact, atol=0.04)
    seen_too = scoring.pit(exact_data(case))
    assert np.abs(values - exact).mean() < 0.5 * np.abs(np.asarray(seen_too) - exact).mean()
    if case == "counts":
        values = scoring.loo_pit(exact_data(case), rng_key=jax.random.key(2))
        low = np.array([p.cdf(y - 1) for p, y in zip(law, known.y, strict=True)])
        high = np.array([p.cdf(y) for p, y in zip(law, known.y, strict=True)])
        assert (values > low - 0.04).all() and (values < high + 0.04).all()
    assert uniformity(values[:, None]).min() > 0.001


@pytest.mark.parametrize("case", QUICK_AND_LONG)
def test_calibration_tells_the_posterior_from_a_narrow_one(case):
    """Exact draws pass, and draws with half the spread are rejected, for all three models."""
    known = CASES[case]

    def fit(spread):
        def draw(key, x, y):
            if case == "counts":
                sums = jnp.stack([y[known.x % 2 == k].sum() for k in (0, 1)]) + 3.0
                each = jax.random.gamma(key, sums, (49, 2)) / (0.5 + ROWS / 2)
                return {"rate": each.mean(0) + spread * (each - each.mean(0))}
            design = X if case == "regression" else shops(SHOP)
            prior = np.eye(2) if case == "regression" else PRIOR
            cov = np.linalg.inv(np.linalg.inv(prior) + design.T @ design / NOISE**2)
            mean = cov @ design.T @ y / NOISE**2
            z = jax.random.normal(key, (49, len(cov))) @ np.linalg.cholesky(cov).T
            z = mean + spread * z
            return {"w": z} if case == "regression" else {"level": z[:, 0], "a": z[:, 1:]}

        return draw

    options = {"rng_key": jax.random.key(1), "num_datasets": 400, "num_draws": 49}
    right = sbc(known.model, fit(1.0), known.x, known.y, **options)
    assert not right.miscalibrated
    wrong = sbc(known.model, fit(0.5), known.x, known.y, **options)
    assert set(right.ranks) - {"log_likelihood"} <= set(wrong.miscalibrated)


def mean_field(case, size=3):
    known = CASES[case]
    runner = EnsembleVI(
        known.model, AutoNormal(known.model), numpyro.optim.Adam(0.03), Trace_ELBO(4),
        ensemble_size=size,
    )  # fmt: skip
    result = runner.run(jax.random.key(0), 500, known.x, known.y, progress_bar=False)
    return runner, result


@pytest.mark.parametrize("case", ["regression", pytest.param("hierarchy", marks=pytest.mark.long)])
def test_guides_are_corrected(case):
    """Scores of a mean-field guide are corrected by its density, on both lines of ArviZ."""
    runner, result = mean_field(case)
    known = CASES[case]
    data = to_arviz(runner, result, known.x, known.y, num_samples=1000)
    exact = exact_terms(case)
    column = "elpd_loo" if makes_inference_data() else "elpd"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = scoring.compare({"a": data, "b": data}).table
        right = table.loc["a", column]
        plain = scoring.compare({"a": data, "b": data}, corrected=False).table.loc["a", column]
    assert table["corrected"].all()
    assert abs(right - exact.sum()) < 0.5 * abs(plain - exact.sum()) + 0.02
    if not makes_inference_data():
        stats = data["sample_stats"]
        theirs = az.loo_approximate_posterior(data, stats["log_p"], stats["log_q_mixture"])
        assert_allclose(right, theirs.elpd, rtol=1e-6)
    assert np.isfinite(scoring.loo_pit(data)).all()


@pytest.mark.long
def test_weights_find_the_model_and_the_member_and_go_into_predictions():
    known = CASES["regression"]
    runner, result = mean_field("regression", 2)
    good = to_arviz(runner, result, known.x, known.y, num_samples=200)
    draws = {"w": np.stack([good["posterior"]["w"].values[0], np.full((200, 2), 1.5)])}
    draws["w"][1] += 0.1 * RNG.normal(size=(200, 2))
    other = to_arviz(regression, draws, known.x, known.y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = scoring.compare({"fit": good, "chains": other}, members=True)
    assert found.weights["fit"].shape == (2,) and found.weights["chains"][1] < 0.05
    assert_allclose(found.weights["fit"].sum() + found.weights["chains"].sum(), 1.0)
    weights = {"fit": [0.1, 0.2], "chains": [0.7, 0.0]}
    key = jax.random.key(1)
    predictions = {
        "fit": EnsemblePredictive(
            regression, result, guide=runner.guide, num_samples=500, weights=weights["fit"]
        )(key, X),
        "chains": EnsemblePredictive(regression, draws, batch_ndims=2, weights=weights["chains"])(
            key, X
        ),
    }
    predictions = {name: {"y": value["y"][:400]} for name, value in predictions.items()}
    mixed = scoring.mix(key, predictions, weights, 1000)["y"]
    assert mixed.shape == (1000, ROWS)
    share = np.isin(np.asarray(mixed[:, 0]), np.asarray(predictions["fit"]["y"][:, 0])).mean()
    assert abs(share - 0.3) < 0.06
    first = scoring.mix(key, predictions, {"fit": 1.0, "chains": 0.0}, 400)["y"]
    assert len(np.unique(first[:, 0])) == 400  # each draw is used once


@pytest.mark.long
@pytest.mark.parametrize("case", QUICK_AND_LONG)
def test_folds_are_what_the_closed_form_says(case):
    """Whole shops are held out; their level is then drawn given the other shops."""
    known = CASES[case]
    mcmc = MCMC(
        NUTS(known.model), num_warmup=300, num_samples=2000, num_chains=2,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    found = scoring.cross_validate(
        known.model, mcmc, known.x, known.y, rng_key=jax.random.key(0), folds=SHOP, num_draws=4000
    )
    # the level of a shop that is far from the others is in the tail of the draws
    wide = 3.0 if case == "hierarchy" else 1.0
    assert_allclose(found.elpd_i, exact_terms(case, SHOP), rtol=0.02, atol=0.1 * wide)
    assert abs(found.elpd - exact_terms(case, SHOP).sum()) < 0.3 * wide
    if case == "hierarchy":  # leaving out single rows gives another score
        assert abs(found.elpd - exact_terms(case).sum()) > 3.0


def test_folds_are_compared_too():
    known = CASES["counts"]

    def draw(key, x, y):
        return {"rate": 4.0 + 0.1 * jax.random.normal(key, (50, 2))}

    def far(key, x, y):
        return {"rate": 20.0 + 0.1 * jax.random.normal(key, (50, 2))}

    options = {"rng_key": jax.random.key(0), "folds": 4, "num_draws": 50}
    models = {
        name: scoring.cross_validate(counts, fit, known.x, known.y, **options)
        for name, fit in {"near": draw, "far": far}.items()
    }
    found = scoring.compare(models)
    assert found.table.index[0] == "near" and found.weights["near"] > 0.9
    assert found.weights["near"].shape == () and np.isnan(found.table["pareto_k"]).all()


def test_members_that_failed_and_masked_rows():
    """Weights include members that failed; masked rows have no probability."""
    x = X
    y = np.asarray(CASES["regression"].y)

    def masked(x, y, seen):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("row", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, NOISE).mask(seen), obs=y)

    seen = np.arange(ROWS) != 5
    runner = EnsembleMAP(masked, numpyro.optim.Adam(0.1), ensemble_size=40)
    starts = {"w": RNG.normal(size=(40, 2))}
    starts["w"][7] = np.nan
    with pytest.warns(UserWarning, match="not finite: 7"):
        result = runner.run(
            jax.random.key(0), 3, x, y, seen, init_params=starts, progress_bar=False
        )
    with pytest.warns(UserWarning, match="left out"):
        data = to_arviz(runner, result, x, y, seen)
    values = scoring.loo_pit(data)
    assert np.isnan(values[5]) and np.isfinite(np.delete(values, 5)).all()
    found = scoring.compare({"a": data, "b": data})
    assert found.weights["a"].shape == (40,) and found.weights["a"][7] == 0
    with pytest.raises(
        ValueError, match=r"different numbers of observations, .*: \{'a': 23, 'b': 24\}"
    ):
        scoring.compare({"a": data, "b": few(y)})


def vectors(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def test_rows_that_are_vectors():
    y = RNG.normal(size=(10, 2))
    data = to_arviz(vectors, {"mu": 0.3 * RNG.normal(size=(2, 100, 2))}, y)
    found = scoring.compare({"a": data, "b": data})
    column = "elpd_loo" if makes_inference_data() else "elpd"
    assert_allclose(found.table.loc["a", column], loo_of(data).sum(), rtol=1e-8)
    assert scoring.member_weights(data).shape == (2,)
    with pytest.raises(ValueError, match=r"site 'y' has events of shape \(2,\)"):
        scoring.loo_pit(data)


@pytest.mark.long
def test_a_selected_member_is_corrected_by_its_own_guide():
    runner, result = mean_field("regression")
    known = CASES["regression"]
    data = to_arviz(runner, result, known.x, known.y, num_samples=200)
    column = "elpd_loo" if makes_inference_data() else "elpd"
    every = scoring.compare({"a": data, "b": data}, members=True).table
    one = data.sel(chain=[1])
    alone = scoring.compare({"a": one, "b": one}).table
    assert_allclose(alone.loc["a", column], every.loc["a[1]", column], rtol=1e-6)
    two = data.sel(chain=[0, 1])
    with pytest.warns(UserWarning, match="not corrected for the guide"):
        assert not scoring.compare({"a": two, "b": two}).table["corrected"].any()


def test_draws_that_leave_the_support_and_data_that_differ():
    y = CASES["regression"].y

    data = few(y)
    group = data["log_likelihood"]
    values = group["y"].values.copy()
    values[1, 3, 2] = -np.inf
    group["y"] = group["y"].copy(data=values)
    with pytest.raises(
        ValueError, match=r"wide: .* site 'y' is not finite in 1 of 40 draws, at .* \[2\]"
    ):
        scoring.compare({"wide": data, "b": few(y)})

    def fit(key, x, y):
        return {"w": 0.1 * jax.random.normal(key, (50, 2))}

    options = {"rng_key": jax.random.key(0), "folds": 4, "num_draws": 50}
    models = {
        name: scoring.cross_validate(regression, fit, X, values, **options)
        for name, values in {"a": y, "b": 3.0 * y}.items()
    }
    with pytest.raises(ValueError, match="'a' and 'b' have different observations"):
        scoring.compare(models)


def few(y, **options):
    draws = {"w": np.random.default_rng(0).normal(size=(2, 20, 2))}
    return to_arviz(regression, draws, X, y, **options)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda d: scoring.compare([d, d]), TypeError, "models takes a dict by model name"),
        (lambda d: scoring.compare({"a": d}), ValueError, "two models or more"),
        (lambda d: scoring.compare({"a": d, "b": d}, method="waic"), ValueError, "method takes"),
        (
            lambda d: scoring.compare({"a": d, "b": d}, var_name={"c": "y"}), ValueError,
            r"var_name names \['c'\]",
        ),
        (
            lambda d: scoring.compare({"a": d, "b": few(X[:, 0])}),
            ValueError, "'a' and 'b' have different observations",
        ),
        (lambda d: scoring.compare({"a": 3, "b": d}), TypeError, "draws takes .* ArviZ data"),
        (lambda d: scoring.mix(jax.random.key(0), {}, {"a": 1.0}), ValueError, r"lack .*\['a'\]"),
        (
            lambda d: scoring.mix(
                jax.random.key(0), {"a": np.ones((5, 2)), "b": np.ones((5, 3))}, {"a": 1, "b": 1}
            ),
            ValueError, "different sites or shapes",
        ),
        (
            lambda d: scoring.mix(jax.random.key(0), {"a": np.ones((5, 2))}, {"a": -1.0}),
            ValueError, "not negative",
        ),
        (
            lambda d: scoring.loo_pit(
                to_arviz(regression, {"w": np.zeros((2, 20, 2))}, X, X[:, 0])
            ),
            ValueError, "all the same",
        ),
        (
            lambda d: scoring.loo_pit(few(X[:, 0], posterior_predictive=False)),
            ValueError, "posterior_predictive=True",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, said):
    with pytest.raises(error, match=said):
        call(few(CASES["regression"].y))
