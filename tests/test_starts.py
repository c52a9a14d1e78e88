"""Starts of chains, checks of starts, and nested R-hat."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsembleVI
from numpyro_ensemble.mcmc import MEADS, rhat_nested, starts
from numpyro_ensemble.mcmc.searches import initial
from numpyro_ensemble.mcmc.target import Target

X = np.random.default_rng(0).normal(size=(40, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.2 * np.random.default_rng(1).normal(size=40)


def model(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.deterministic("first", w[0])
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, s), obs=y)


def run(kernel, init_params=None, chains=64, warmup=60, draws=40, **options):
    options = {"num_warmup": warmup, "num_samples": draws, "num_chains": chains} | options
    mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **options)
    mcmc.run(jax.random.key(0), X, Y, init_params=init_params)
    return mcmc


def distances(z):
    """Return how far starts are from the posterior, in its standard deviations."""
    mean = np.linalg.lstsq(X, Y)[0]
    sd = 0.2 * np.sqrt(np.diag(np.linalg.inv(X.T @ X)))
    return (np.asarray(z["w"]) - mean) / sd


def check(z, chains):
    assert z["w"].shape == (chains, 3) and z["s"].shape == (chains,) and set(z) == {"w", "s"}
    assert len(np.unique(z["w"][:, 0])) == chains
    away = distances(z)
    assert (abs(away.mean(axis=0)) < 1.5).all() and (0.3 < away.std(axis=0)).all()
    assert (away.std(axis=0) < 2.0).all()


@pytest.mark.long
@pytest.mark.promotes_ranks  # NumPyro's guides promote
def test_starts_from_ensembles(key):
    optim = numpyro.optim.Adam(0.05)
    fits = EnsembleMAP(model, optim, ensemble_size=3)
    result = fits.run(jax.random.key(0), 400, X, Y, progress_bar=False)
    z = starts.from_ensemble(key, fits, result, X, Y, num_chains=16)
    check(z, 16)
    still = starts.from_ensemble(key, fits, result, X, Y, num_chains=3, jitter=0.0)
    np.testing.assert_allclose(still["w"], result.params["w"], rtol=1e-5)
    np.testing.assert_allclose(np.exp(still["s"]), result.params["s"], rtol=1e-5)
    vi = EnsembleVI(model, AutoNormal(model), optim, Trace_ELBO(), ensemble_size=2)
    result = vi.run(jax.random.key(0), 400, X, Y, progress_bar=False)
    z = starts.from_ensemble(jax.random.key(3), vi, result, X, Y, num_chains=64)
    check(z, 64)
    few = {name: values[:4] for name, values in z.items()}
    for kernel, start in ((MEADS(model), z), (NUTS(model), few)):  # the starts serve both
        mcmc = run(kernel, start, len(start["s"]), warmup=20, draws=10)
        assert abs(distances(mcmc.get_samples())).mean() < 3
    broken = result._replace(params={k: v * jnp.nan for k, v in result.params.items()})
    with pytest.raises(ValueError, match="No member"):
        starts.from_ensemble(key, vi, broken, X, Y)


@pytest.mark.promotes_ranks
def test_what_starts_from_ensembles_refuse(key):
    """NaN starts were returned for data with NaN, and wrong arguments met Python's own errors."""
    fits = EnsembleMAP(model, numpyro.optim.Adam(0.05), ensemble_size=3)
    result = fits.run(jax.random.key(0), 5, X, Y, progress_bar=False)
    with pytest.raises(ValueError, match="near the members is not finite. The data hold NaN: y"):
        starts.from_ensemble(key, fits, result, X, np.where(np.arange(40) == 3, np.nan, Y))
    with pytest.raises(ValueError, match=r"no values of the latent sites \['y'\]: pass the data"):
        starts.from_ensemble(key, fits, result, X)
    with pytest.raises(TypeError, match="runner takes an EnsembleMAP or EnsembleVI, got function"):
        starts.from_ensemble(key, model, result, X, Y)
    with pytest.raises(TypeError, match="result takes what the run of .* got EnsembleMAP"):
        starts.chain_members(fits)
    chosen = starts.from_ensemble(
        key, fits, result, X, Y, num_chains=5, members=np.array([2, 0]), jitter=0.0
    )
    np.testing.assert_allclose(chosen["w"], result.params["w"][np.array([2, 0, 2, 0, 2])])
    np.testing.assert_array_equal(starts.chain_members(result, 3, [2, 0]), [2, 0, 2])
    np.testing.assert_array_equal(starts.chain_members(result, members=[1]), [1])
    for wrong, message in (
        ([3], r"members names \[3\], and the result has members 0 to 2"),
        (np.array([True, False, True]), "takes numbers of members, np.flatnonzero"),
        ([], "takes numbers of members"),
    ):
        with pytest.raises(ValueError, match=message):
            starts.chain_members(result, members=wrong)
    broken = {name: value.at[1].set(jnp.nan) for name, value in result.params.items()}
    with pytest.raises(ValueError, match=r"members names \[1\], which are not finite"):
        starts.chain_members(result._replace(params=broken), members=[0, 1])
    with pytest.raises(TypeError, match="num_chains takes an integer, got an array float64"):
        starts.from_pathfinder(key, model, X, Y)


@pytest.mark.long
def test_the_kernel_finds_its_start(compile_count):
    kernel = MEADS(model)
    keys = jax.random.split(jax.random.key(1), 64)
    check(kernel.init(keys, 80, None, (X, Y)).z, 64)
    prior = initial(Target(model), keys[0], 64, (X, Y), {})
    assert distances(prior).std() > 10  # the spread of starts by "init" alone
    with compile_count() as compilations:
        kernel.init(keys, 80, None, (X + 0.1, Y))  # other data of the same shape
    assert compilations.count == 0, compilations.names
    mcmc = run(kernel, warmup=80, draws=80)
    draws = mcmc.get_samples(group_by_chain=True)
    assert (abs(distances({"w": draws["w"].mean(axis=(0, 1))[None]})) < 0.5).all()
    rhat = max(float(x.max()) for x in az.rhat(az.from_numpyro(mcmc)).data_vars.values())
    assert rhat < 1.1
    nested = rhat_nested(draws, np.arange(64) % 4)
    assert nested["w"].shape == (3,) and nested["s"].shape == ()
    assert max(x.max() for x in jax.tree.leaves(nested)) < 1.1


@pytest.mark.long
def test_pathfinder_finds_the_typical_set():
    check(starts.from_pathfinder(jax.random.key(0), model, 16, X, Y, num_paths=2), 16)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_searches_that_find_nothing_say_so():
    key = jax.random.key(0)
    for search in (starts.from_nuts, starts.from_pathfinder):
        with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
            search(key, model, 8, X, np.nan * Y)

    def jittered(x, y=None, jitter=1e-3):
        model(x, y)

    with pytest.raises(ValueError, match="'jitter' is both an option of from_nuts and a keyword"):
        starts.from_nuts(key, jittered, 8, X, Y, jitter=0.2)
    with pytest.raises(ValueError, match="jitter takes a finite number, 0 or above"):
        starts.from_nuts(key, model, 8, X, Y, jitter=-1.0)


def test_a_start_that_would_freeze_is_reported():
    kernel = MEADS(model, start="init", init_strategy=init_to_sample)
    with pytest.warns(UserWarning, match=r"far from the typical set.*largest eigenvalue.*'nuts'"):
        kernel.init(jax.random.split(jax.random.key(0), 64), 10, None, (X, Y))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:MEADS starts far from the typical set")
def test_few_chains_in_a_fold_are_told_of():
    with pytest.warns(UserWarning, match="from 8 chains in each of 4 folds.*run 64 or more"):
        kernel = MEADS(model, start="init")
        kernel.init(jax.random.split(jax.random.key(0), 32), 10, None, (X, Y))


@pytest.mark.core
def test_nested_rhat():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(12, 10, 2))
    groups = np.arange(12) % 3
    shifted = draws + np.array([0.0, 2.0])[None, None] * groups[:, None, None]
    good, bad = rhat_nested(shifted, groups)
    assert good < 1.1 and bad > 1.5
    # no chain leaves its superchain, and each superchain has mixed within itself: R-hat by the
    # formula, from superchains with means -1 and 1 and variances 1
    exact = np.repeat([-1.0, 1.0], 6)[:, None] + np.tile([-1.0, 1.0], (12, 5))
    within = np.var([-1.0, 1.0] * 5, ddof=1)
    expected = np.sqrt(1 + 2.0 / within)
    assert np.isclose(rhat_nested(exact, np.repeat([0, 1], 6), method="identity"), expected)
    assert np.isfinite(rhat_nested(draws[:, :1], groups, method="identity")).all()
    if hasattr(az, "rhat_nested"):
        for method in ("rank", "identity"):
            theirs = az.rhat_nested(shifted[..., 1], superchain_ids=groups, method=method)
            assert np.isclose(rhat_nested(shifted[..., 1], groups, method=method), theirs)
    for wrong in (np.zeros(12, int), np.arange(12) // 5, np.arange(6) % 2):
        with pytest.raises(ValueError, match="superchains takes|samples takes draws"):
            rhat_nested(draws, wrong)
    with pytest.raises(ValueError, match="method takes"):
        rhat_nested(draws, groups, method="split")
