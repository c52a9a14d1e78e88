"""Chains with an unusable start get one near the other chains' starts."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_ensemble.mcmc import MAMS, MEADS, ChEES, starts
from numpyro_ensemble.mcmc.replacements import _compared

CHAINS = 64
MODES = jnp.array([0.0, -20.0])
POINTS = jnp.linspace(0.0, 1.0, 20)


def cliff(edge=1.0):
    """Two normals; the density is NaN where `a` is beyond the edge."""
    numpyro.sample("b", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.factor("edge", jnp.where(a < edge, 0.0, jnp.nan) * a)


def beyond(number, edge=1.0):
    """Return a start with a given number of chains beyond the edge."""

    def start(key, num_chains, *args):
        a, *b = jax.random.normal(key, (3, num_chains))
        a = jnp.where(jnp.arange(num_chains) < number, edge + 5.0, -jnp.abs(a))
        return {"a": a, "b": 3.0 * jnp.stack(b, axis=1)}

    return start


@pytest.mark.parametrize(
    "kernel", [MEADS, *(pytest.param(kernel, marks=pytest.mark.long) for kernel in (ChEES, MAMS))]
)
def test_chains_that_start_nowhere_start_beside_others(kernel):
    keys = jax.random.split(jax.random.key(0), CHAINS)
    with pytest.warns(UserWarning, match="13 of 64 chains would start where .* not finite") as told:
        state = kernel(cliff, start=beyond(13)).init(keys, 10)
    assert "They start beside the other chains instead." in str(told[0].message)
    assert jnp.isfinite(state.potential_energy).all() and (state.z["a"] < 1.0).all()
    new = np.concatenate([state.z["a"][:13, None], state.z["b"][:13]], axis=1)
    others = np.concatenate([state.z["a"][13:, None], state.z["b"][13:]], axis=1)
    nearest = abs(new[:, None] - others[None]).max(axis=2).min(axis=1)
    assert (nearest > 1e-6).all()  # moved, not copied
    spread = new.std(axis=0) / others.std(axis=0)
    assert ((0.4 < spread) & (spread < 2.0)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untouched = kernel(cliff, start=beyond(0)).init(keys, 10)
    np.testing.assert_array_equal(untouched.z["b"][13:], state.z["b"][13:])
    with pytest.raises(ValueError, match="58 of 64 chains would .* too few are left, of which 8"):
        kernel(cliff, start=beyond(58)).init(keys, 10)
    with pytest.raises(
        ValueError, match="1 of 64 chains start .* not finite: 0. Leave init_params"
    ):
        kernel(cliff).init(keys, 10, beyond(1)(keys[0], CHAINS))  # a user's start is not replaced


def two_wells():
    """A normal, and beside it a well that holds hardly any mass and that no chain leaves."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    well = -1e6 * (x + 1.5) ** 2 - 1e5
    numpyro.factor("well", jnp.where(x < -1.0, well, 0.0))


@pytest.mark.long
def test_searches_that_end_hopelessly_are_dropped():
    match = (
        r"chains would start where the posterior has exp\(-1e\+05\) .* of search \d.*, of 4 from"
    )
    with pytest.warns(UserWarning, match=match):
        z = starts.from_nuts(jax.random.key(0), two_wells, CHAINS, num_warmup=50, num_draws=20)
    assert (z["x"] > -1.0).all()


def far_and_tiny():
    """A normal at -20, and where the searches begin a mode with exp(-20) of the normal's mass."""
    modes = dist.Normal(jnp.array([-20.0, 1.0]), jnp.array([1.0, 0.05]))
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=MODES), modes))
    numpyro.sample("at", dist.Normal(0.0, 1.0))


@pytest.mark.long
def test_a_mode_of_good_density_that_holds_nothing_is_dropped():
    match = (
        r"has exp\(-2\d\.?\d*\) or less of the mass that the best search has found: those of search"
    )
    with pytest.warns(UserWarning, match=match):
        z = starts.from_nuts(jax.random.key(0), far_and_tiny, CHAINS, num_warmup=100, num_draws=50)
    assert (z["z"] < -15.0).all() and z["z"].std() > 0.5


def test_searches_are_compared_by_density_times_volume():
    """The neck of a funnel of 50 widths has a log density higher by 600, but no more mass."""
    log_density = jnp.tile(jnp.array([0.0, 600.0, 590.0]), 4)
    volumes = jnp.array([0.0, -600.0, -700.0])
    dropped, behind, lowest = _compared(log_density, volumes, 50)
    np.testing.assert_array_equal(dropped, np.tile([False, False, True], 4))
    assert lowest == 0.0 and behind[2] == 110.0
    dropped, *_ = _compared(log_density, 0.0 * volumes, 50)  # compared by density alone
    np.testing.assert_array_equal(dropped, np.tile([True, False, False], 4))


@pytest.mark.core
@pytest.mark.single
def test_a_cholesky_in_float32_is_named():
    def process(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
        near = jnp.exp(-((POINTS[:, None] - POINTS[None]) ** 2) / (1e3 * scale))  # singular
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(20), near), obs=y)

    keys = jax.random.split(jax.random.key(0), CHAINS)
    kernel = ChEES(process, start=lambda key, n, y: {"scale": jax.random.normal(key, (n,))})
    with pytest.raises(ValueError, match=r"64 of 64 .*cause is a Cholesky .*enable_x64\(\)"):
        kernel.init(keys, 10, None, (jnp.sin(POINTS),))
