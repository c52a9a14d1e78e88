"""Cross-validation: fits of all folds at once agree with separate fits and closed forms."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy import stats
from scipy.special import logsumexp

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.scoring import cross_validate

KEY = jax.random.key(3)
RNG = np.random.default_rng(2)
N, NOISE = 12, 0.6
X = RNG.normal(size=(N, 2))
Y = X @ np.array([1.0, -0.5]) + NOISE * RNG.normal(size=N)
GROUP = np.array([3, 3, 0, 0, 0, 7, 7, 7, 7, 3, 0, 7])


def regression(x, y, noise=NOISE):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def posterior(x, y, noise=NOISE):
    covariance = np.linalg.inv(np.eye(2) + x.T @ x / noise**2)
    return covariance @ x.T @ y / noise**2, covariance


def exact(labels, noise=NOISE):
    """Return the log predictive density of each row, given the rows of the other folds."""
    terms = np.empty(N)
    for label in np.unique(labels):
        out = labels == label
        mean, covariance = posterior(X[~out], Y[~out], noise)
        sd = np.sqrt(noise**2 + np.einsum("ni,ij,nj->n", X[out], covariance, X[out]))
        terms[out] = stats.norm(X[out] @ mean, sd).logpdf(Y[out])
    return terms


def nuts(model=regression):
    return MCMC(
        NUTS(model), num_warmup=200, num_samples=500, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip


def vi(model=regression):
    optim = numpyro.optim.Adam(0.05)
    return EnsembleVI(model, AutoNormal(model), optim, Trace_ELBO(), ensemble_size=2)


@pytest.mark.long
def test_groups_are_what_the_closed_form_says():
    found = cross_validate(regression, nuts(), X, Y, rng_key=KEY, folds=GROUP, num_draws=1000)
    expected = exact(GROUP)
    assert_allclose(found.elpd_i, expected, rtol=0.06, atol=0.06)
    assert abs(expected - exact(np.arange(N))).max() > 0.1  # single rows differ
    assert_allclose(found.elpd, found.elpd_i.sum())
    assert_allclose(found.se, np.sqrt(N) * found.elpd_i.std(), rtol=0.05)  # over N or N - 1


def test_each_fold_is_a_fit_of_its_own():
    """Scores of a fold equal those of a model masked by hand and fitted with the fold's key."""
    runner, labels = vi(), np.arange(N) % 3
    found = cross_validate(
        regression, runner, X, Y, rng_key=KEY, folds=labels, num_steps=40, num_draws=20,
        batch_size=2,
    )  # fmt: skip
    keys = jax.random.split(jax.random.split(KEY)[1], 3)
    for k, key in enumerate(keys):
        keep = labels != k

        def masked(x, y, keep=keep):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with numpyro.plate("row", N), handlers.mask(mask=jnp.asarray(keep)):
                numpyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

        fit_key, draw_key = jax.random.split(jax.random.split(key)[0])
        one = EnsembleVI(
            masked, AutoNormal(masked), numpyro.optim.Adam(0.05), Trace_ELBO(), ensemble_size=1
        )
        result = one.run(fit_key, 40, X, Y, progress_bar=False)
        w = np.asarray(one.sample_posterior(draw_key, result, X, Y, num_samples=20)["w"])
        terms = stats.norm(X @ w.T, NOISE).logpdf(Y[:, None])
        expected = logsumexp(terms, axis=1) - np.log(20)
        assert_allclose(found.elpd_i[~keep], expected[~keep], rtol=1e-5)
    runner.run(KEY, 3, X, Y, progress_bar=False)


def test_the_future_is_left_out():
    time = np.arange(N)
    fitted = time[None] < np.array([6, 8, 10])[:, None]
    scored = ~fitted & (time[None] < np.array([8, 10, 12])[:, None])

    def fit(key, x, y):
        seen.append(1)
        return {"w": jnp.zeros((200, 2))}

    seen = []
    found = cross_validate(regression, fit, X, Y, rng_key=KEY, folds=(fitted, scored))
    assert np.isnan(found.elpd_i[:6]).all() and len(seen) == 1
    assert_allclose(found.elpd_i[6:], stats.norm(0.0, NOISE).logpdf(Y[6:]), rtol=1e-5)
    assert found.data.n_data_points == 6


@pytest.mark.promotes_ranks
def test_a_table_of_rows_and_a_second_site():
    """Each row has counts of two kinds and a latent; a second site is observed too."""

    def kinds(y, other):
        rate = numpyro.sample("b_rate", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("row", N, dim=-2):
            own = numpyro.sample("a", dist.Normal(0.0, 0.1))
            with numpyro.plate("kind", 2):
                numpyro.sample("z", dist.Poisson(rate * jnp.exp(own)), obs=y)
        numpyro.sample("other", dist.Normal(rate.sum(), 1.0), obs=other)

    counts = RNG.poisson(2.0, size=(N, 2))

    def fit(key, y, other):
        return {"b_rate": jnp.full((200, 2), 1.5), "a": jnp.zeros((200, N, 1))}

    found = cross_validate(
        kinds, fit, counts, 0.3, rng_key=KEY, folds=4, var_name="z", num_draws=200
    )
    assert_allclose(found.elpd_i, stats.poisson(1.5).logpmf(counts), rtol=1e-5)
    with pytest.raises(ValueError, match=r"observes \['z', 'other'\]: name one by var_name"):
        cross_validate(kinds, fit, counts, 0.3, rng_key=KEY)


@pytest.mark.filterwarnings("ignore")
def test_arviz_compares_them():
    labels = np.arange(N) % 4

    def of(noise):
        mean, covariance = posterior(X, Y, noise)

        def fit(key, x, y, noise):
            return {"w": jax.random.multivariate_normal(key, mean, covariance, (200,))}

        return cross_validate(regression, fit, X, Y, noise, rng_key=KEY, folds=labels)

    good, bad = of(NOISE), of(4.0)
    table = az.compare({"wide": bad.data, "right": good.data})
    assert list(table.index) == ["right", "wide"]
    column = "elpd" if "elpd" in table else "elpd_loo"
    assert_allclose(table[column].astype(float), [good.elpd, bad.elpd], atol=0.3)  # ArviZ rounds


def test_rows_are_dealt_by_the_key():
    def fit(key, x, y):
        return {"w": jnp.zeros((200, 2))}

    found = [cross_validate(regression, fit, X, Y, rng_key=KEY, folds=5) for _ in range(2)]
    assert_array_equal(found[0].elpd_i, found[1].elpd_i)
    assert np.isfinite(found[0].elpd_i).all()


def joint(y):
    numpyro.sample("y", dist.Normal(jnp.zeros(N), 1.0).to_event(1), obs=y)


def some_rows(y):
    with numpyro.plate("row", N, subsample_size=4):
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=numpyro.subsample(y, event_dim=0))


EMPTY = np.zeros((2, N), bool)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (regression, {"folds": 1}, "folds takes 2 to 12 for 12 rows, got 1"),
        (regression, {"folds": np.zeros(N, int)}, "only one fold"),
        (regression, {"folds": np.arange(5)}, r"a number for each of 12 rows, got shape \(5,\)"),
        (regression, {"folds": (EMPTY, ~EMPTY)}, "scores a row twice"),
        (regression, {"folds": (EMPTY, EMPTY)}, r"folds \[0, 1\] leave no row to fit"),
        (regression, {"folds": (EMPTY[:, :4], EMPTY)}, r"two masks \(K, 12\)"),
        (regression, {"var_name": "z"}, "none of the observed sites"),
        (joint, {}, "'y' is one event"),
        (some_rows, {}, r"draws some rows of the plates \['row'\]"),
    ],
)
def test_bad_input(model, options, said):
    args = (X, Y) if model is regression else (Y,)
    with pytest.raises(ValueError, match=said):
        cross_validate(model, lambda *_: {}, *args, rng_key=KEY, **options)
