"""The metric that chains share: against dense linear algebra, and on posteriors that need it."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MEADS, ChEES
from numpyro_ensemble.mcmc.metric import SharedMetric, num_directions, shrunk_eigenvalues
from numpyro_ensemble.mcmc.progress import Progress

CHAINS = 64
# coordinates of unequal widths with correlation -.999, as in a regression on raw heights
WIDTHS = np.array([0.45, 0.007, 0.02])
CORRELATION = np.array([[1.0, -0.999, 0.0], [-0.999, 1.0, 0.0], [0.0, 0.0, 1.0]])
COVARIANCE = CORRELATION * np.outer(WIDTHS, WIDTHS)
MEAN = np.array([5.8, 0.06, -0.1])


def normals(key, shape):
    return np.asarray(jax.random.normal(key, shape))


def rows_of(key, number, covariance=COVARIANCE, mean=MEAN):
    lower = np.linalg.cholesky(covariance)
    return jnp.asarray(mean + normals(key, (number, len(mean))) @ lower.T)


def dense(metric):
    """Return the inverse mass as a matrix."""
    sigma, directions, eigenvalues = (np.asarray(x) for x in metric.inverse_mass)
    stretch = np.eye(len(sigma)) + directions @ np.diag(eigenvalues - 1.0) @ directions.T
    return np.diag(sigma) @ stretch @ np.diag(sigma)


def observed(rows, rank, total=100):
    """Return the metric after iterations with positions `(T, C, d)`."""

    def step(metric, pair):
        iteration, now = pair
        progress = Progress(jnp.full(len(now), iteration), jnp.full(len(now), total) - iteration)
        return metric.observe(now, progress), None

    start = SharedMetric.start(rows[0], rank)
    return jax.jit(lambda x: jax.lax.scan(step, start, (jnp.arange(len(x)), x))[0])(rows)


@pytest.mark.core
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_coordinates_are_those_of_dense_linear_algebra(key, rank):
    keys = jax.random.split(key, 3)
    metric = SharedMetric.start(rows_of(keys[0], 4000), rank)
    inverse_mass = dense(metric)
    expected = COVARIANCE if rank else np.diag(WIDTHS**2)
    tell = np.sqrt(np.outer(WIDTHS, WIDTHS))
    np.testing.assert_allclose(inverse_mass / tell, expected / tell, atol=0.1 * tell.max())
    positions = np.asarray(rows_of(keys[1], 50)) - MEAN
    gradients = normals(keys[2], (50, 3)) / WIDTHS
    places = np.asarray(metric.whiten(jnp.asarray(positions)))
    slopes = np.asarray(metric.whiten_gradients(jnp.asarray(gradients)))
    exact = {"rtol": 1e-6 if jnp.result_type(float) == jnp.float64 else 2e-3}
    solved = np.linalg.solve(inverse_mass, positions.T).T
    np.testing.assert_allclose((places**2).sum(1), (positions * solved).sum(1), **exact)
    np.testing.assert_allclose(
        (slopes**2).sum(1), (gradients @ inverse_mass * gradients).sum(1), **exact
    )
    pairing = (gradients * positions).sum(1)
    np.testing.assert_allclose((slopes * places).sum(1), pairing, atol=1e-2 * abs(pairing).max())


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 3])
def test_what_is_pooled_forgets_the_start(key, rank):
    rows = normals(key, (30, 16, 3)) * WIDTHS * np.linspace(0.5, 1.0, 30)[:, None, None]
    metric = observed(jnp.asarray(rows), rank)
    # the share of earlier iterations that iteration s keeps
    kept = np.array([s / (s + 3.0) for s in range(30)])
    weights = np.array([kept[s + 1 :].prod() for s in range(30)])
    np.testing.assert_allclose(metric.number, 16 * weights.sum(), rtol=1e-6)
    covariance = np.cov(rows.reshape(-1, 3).T, aweights=np.repeat(weights, 16), ddof=0)
    second = np.asarray(metric.pooled).ravel()[3 : 3 + (9 if rank else 3)] / metric.number[0]
    seen = covariance if rank else np.diag(covariance)
    np.testing.assert_allclose(second, seen.ravel(), rtol=0.05, atol=0.02 * second.max())
    even = np.cov(rows.reshape(-1, 3).T, ddof=0)  # without forgetting
    assert abs(even[2, 2] / covariance[2, 2] - 1.0) > 0.1


def test_eigenvalues_are_shrunk(key):
    ratio, true = 0.1, np.array([100.0, 1.5, 0.4, 0.001])
    seen = true + ratio * true / (true - 1.0)  # Donoho, Gavish and Johnstone
    np.testing.assert_allclose(shrunk_eigenvalues(jnp.asarray(seen), ratio), true, rtol=1e-6)
    noise = np.random.default_rng(0).normal(size=(400, 40))
    sampled = np.linalg.eigvalsh(noise.T @ noise / 400)
    assert sampled.max() > 1.5 and sampled.min() < 0.6
    np.testing.assert_allclose(shrunk_eigenvalues(jnp.asarray(sampled), ratio), 1.0, atol=0.4)
    assert np.median(abs(shrunk_eigenvalues(jnp.asarray(sampled), ratio) - 1.0)) == 0.0
    # more dimensions than draws
    few = shrunk_eigenvalues(jnp.array([0.0, 1e-12, 1.0, 5.0, 1000.0]), 2.0)
    assert (few[:4] == 1.0).all() and abs(few[4] - 998.0) < 1.0


@pytest.mark.long
def test_a_low_rank_metric_takes_narrow_and_wide_directions(key):
    size, loading = 20, np.linspace(-1.0, 1.0, 20)
    covariance = 0.1 * np.eye(size) + 0.9 * np.outer(np.ones(size), np.ones(size))
    covariance += 5.0 * np.outer(loading, loading)
    pair = np.eye(size)[0] - np.eye(size)[1]
    covariance -= 0.0499 * np.outer(pair, pair)  # the narrowest direction has variance 0.0002
    keys = jax.random.split(key, 2)
    rows = rows_of(keys[0], 5000, covariance, np.zeros(size))
    condition = {}
    for rank in (3, size):
        whitened = np.cov(SharedMetric.start(rows, rank).whiten(rows).T)
        condition[rank] = np.linalg.cond(whitened)
    scales = np.sqrt(np.diag(covariance))
    alone = np.linalg.cond(covariance / np.outer(scales, scales))
    assert alone > 1e4 and condition[3] < 100.0 and condition[size] < 1.5, (alone, condition)


def test_directions_that_chains_can_learn():
    chosen = [num_directions("auto", 64, size) for size in (1, 2, 64, 65, 512, 513, 4000)]
    assert chosen == [0, 2, 64, 16, 16, 0, 0]
    assert num_directions("auto", 16, 20) == 16 and num_directions("auto", 1024, 1001) == 0
    assert num_directions("auto", 1024, 101) == 16
    named = [num_directions(metric, 64, 200) for metric in ("dense", "low_rank", "diagonal", 5)]
    assert named == [200, 16, 0, 5]
    assert num_directions(5, 64, 3) == 3


@pytest.mark.parametrize(("size", "rank"), [(4000, 0), (500, 16), (100, 100)])
def test_states_lead_with_chains_and_stay_small(size, rank):
    state = jax.eval_shape(
        lambda rows: SharedMetric.start(rows, rank), jax.ShapeDtypeStruct((CHAINS, size), float)
    )
    assert all(x.shape[0] == CHAINS for x in state)
    numbers = sum(x.size for x in state)
    square = size * size if rank else 0
    assert numbers < 1.1 * (CHAINS * size + square + size * rank + CHAINS * rank) + 8 * CHAINS
    assert numbers < 400_000  # a copy of the directions for each chain would be 512,000 or more


def potential(z):
    apart = z - jnp.asarray(MEAN)
    return 0.5 * apart @ jnp.asarray(np.linalg.inv(COVARIANCE)) @ apart


def draws_of(kernel, key):
    mcmc = MCMC(
        kernel,
        num_warmup=200,
        num_samples=300,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, init_params=rows_of(jax.random.fold_in(key, 1), CHAINS))
    return np.asarray(mcmc.get_samples(group_by_chain=True)), mcmc


# longer trajectories of ChEES would make up for a poor metric
FEW_STEPS = {"max_leapfrog_steps": 12}
SAMPLERS = [(MEADS, {}), (ChEES, FEW_STEPS)]


@pytest.mark.long
@pytest.mark.parametrize(("kernel", "options"), SAMPLERS)
@pytest.mark.filterwarnings("ignore:.*have not mixed")  # with a diagonal metric
def test_correlated_normals(key, kernel, options):
    rhats, errors = {}, {}
    for metric in ("auto", "diagonal"):
        draws, mcmc = draws_of(kernel(potential_fn=potential, metric=metric, **options), key)
        rhats[metric] = float(az.rhat(az.convert_to_dataset({"z": draws}))["z"].max())
        if metric == "auto":
            moments = np.stack([draws, (draws - MEAN) ** 2])
            expected = np.stack([MEAN, np.diag(COVARIANCE)])
            sizes = np.array([effective_sample_size(x) for x in moments])
            errors = abs(moments.mean((1, 2)) - expected) * np.sqrt(sizes) / moments.std((1, 2))
            product = (draws[..., 0] - MEAN[0]) * (draws[..., 1] - MEAN[1])
            np.testing.assert_allclose(product.mean(), COVARIANCE[0, 1], rtol=0.1)
            assert dense(mcmc.last_state.adapt_state.metric)[0, 1] < 0.9 * COVARIANCE[0, 1] < 0
    assert rhats["auto"] <= 1.01 < rhats["diagonal"], rhats
    assert (errors < 4.5).all(), errors
