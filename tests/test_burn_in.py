"""Starts from chains that move to the typical set together, and each kernel from such starts."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES, starts
from numpyro_ensemble.mcmc.burn_in import burn_in

CHAINS = 64
SCALES = np.array([[3.0, 0.5], [1.0, 0.2]])


def model(shift):
    """A matrix far from 0, whose entries have different widths, and a positive latent."""
    w = numpyro.sample("w", dist.Normal(0.0, 50.0).expand([2, 2]).to_event(2))
    a = numpyro.sample("a", dist.Gamma(30.0, 3.0))
    numpyro.sample("y", dist.Normal(w, SCALES).to_event(2), obs=shift + jnp.zeros((2, 2)))
    numpyro.factor("b", -0.5 * a)


def away(z, shift=20.0):
    """Return the starts' differences from the posterior mean, in standard deviations."""
    variance = 1.0 / (1.0 / SCALES**2 + 1.0 / 2500.0)
    return (np.asarray(z["w"]) - shift * variance / SCALES**2) / np.sqrt(variance)


@pytest.mark.long
@pytest.mark.core
@pytest.mark.filterwarnings("ignore:.*chains would start where")  # the run of five steps warns
def test_starts_are_in_the_typical_set(key):
    z = starts.from_microcanonical(key, model, CHAINS, 20.0)
    assert z["w"].shape == (CHAINS, 2, 2) and z["a"].shape == (CHAINS,)
    found = away(z)
    assert len(np.unique(found[:, 0, 0])) == CHAINS
    # five standard errors of the mean and of the standard deviation of 64 draws
    assert abs(found.mean(axis=0)).max() < 0.65 and abs(found.std(axis=0) - 1.0).max() < 0.45
    rate = np.exp(np.asarray(z["a"]))  # Gamma(30, 3.5)
    assert abs(rate.mean() - 30 / 3.5) < 5 * np.sqrt(30) / 3.5 / 8
    few = starts.from_microcanonical(key, model, CHAINS, 20.0, max_steps=5)
    assert abs(away(few).mean(axis=0)).max() > 2.0  # five steps are too few


def test_the_walk_ends_by_itself(key):
    """Chains that begin in the typical set stop soon; distant chains stop when they reach it."""
    size = 20

    def density(row):
        return -0.5 * (row**2).sum()

    walk = jax.jit(lambda rows: burn_in(density, key, rows, 500))
    near = jax.random.normal(key, (CHAINS, size))
    rows, soon = walk(near)
    assert soon < 90 and 0.9 < rows.var() < 1.35  # long steps widen the spread
    rows, later = walk(100.0 + near)
    assert soon < later < 500
    assert abs(rows.mean()) < 0.15 and 0.9 < rows.var() < 1.35


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*chains would start where")
def test_hard_places(key):
    """A density that is NaN where half of the chains begin, and one that is NaN everywhere."""

    def edge():
        x = numpyro.sample("x", dist.Normal(0.5, 1.0).expand([3]))
        numpyro.factor("edge", jnp.where(x[0] < 0.0, jnp.nan, 0.0))

    z = np.asarray(starts.from_microcanonical(key, edge, CHAINS)["x"])
    assert np.isfinite(z).all() and (z[:, 0] >= 0.0).all()
    assert abs(z[:, 1].mean() - 0.5) < 0.65

    def nowhere():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]))
        numpyro.factor("none", jnp.nan * x.sum())

    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        starts.from_microcanonical(key, nowhere, CHAINS)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*chains would start where")
def test_one_latent_alone(key):
    def alone():
        numpyro.sample("rate", dist.Gamma(300.0, 30.0))

    z = starts.from_microcanonical(key, alone, CHAINS)["rate"]
    assert z.shape == (CHAINS,) and abs(np.exp(np.asarray(z)).mean() - 10.0) < 0.4


def test_what_is_refused(key):
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        starts.from_microcanonical(key, model, CHAINS, 20.0, max_steps=0)
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        starts.from_microcanonical(key, model, 0, 20.0)

    def discrete():
        numpyro.sample("x", dist.Normal(numpyro.sample("k", dist.Poisson(3.0)), 1.0))

    with pytest.raises(ValueError, match="'k' is discrete"):
        starts.from_microcanonical(key, discrete, CHAINS)


@pytest.mark.long
@pytest.mark.parametrize("kernel", [MEADS, ChEES, MAMS, MCLMC])
def test_kernels_start_there(kernel):
    mcmc = MCMC(
        kernel(model, start="microcanonical"),
        num_warmup=150,
        num_samples=60,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), 20.0)
    found = away(mcmc.get_samples())
    assert abs(found.mean(axis=0)).max() < 0.15 and abs(found.std(axis=0) - 1.0).max() < 0.15
