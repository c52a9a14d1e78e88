"""Chains with a far lower log density than the others do not influence the adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.adaptation.meads_adaptation import maximum_eigenvalue
from blackjax.mcmc import dynamic_hmc

from numpyro_ensemble.mcmc.checks import survey
from numpyro_ensemble.mcmc.chees_scheme import Scheme as ChEESScheme
from numpyro_ensemble.mcmc.chees_scheme import chees_start, chees_step, first_metric
from numpyro_ensemble.mcmc.counted import counted, largest_eigenvalue, with_stand_ins
from numpyro_ensemble.mcmc.meads_scheme import Scheme, meads_start
from numpyro_ensemble.mcmc.progress import Progress

CHAINS = 64
BAD = np.array([3, 10, 40])
GOOD = np.setdiff1d(np.arange(CHAINS), BAD)


def exploding(row):
    """A normal with widths 1 and 3; beyond 8 its density drops as in an unstable recursion."""
    inside = -0.5 * (row**2 / jnp.array([1.0, 9.0])).sum()
    return inside - jnp.where(jnp.abs(row[0]) > 8.0, jnp.abs(row[0]) ** 20, 0.0)


@pytest.fixture
def rows():
    """Return positions in the typical set, and three positions where the density drops."""
    draws = np.random.default_rng(0).normal(size=(CHAINS, 2)) * np.array([1.0, 3.0])
    draws[BAD] = [[15.0, 0.0], [-20.0, 1.0], [12.0, 2.0]]
    return jnp.asarray(draws)


@pytest.mark.core
def test_chains_count_unless_they_are_hopelessly_behind(rows):
    values = jax.vmap(exploding)(rows)
    np.testing.assert_array_equal(np.flatnonzero(~counted(values, 2)), BAD)
    some = values.at[7].set(jnp.nan)
    np.testing.assert_array_equal(np.flatnonzero(~counted(some, 2)), [3, 7, 10, 40])
    assert counted(jnp.array([0.0, -49.0, -51.0, 9.0, 0.0]), 2).tolist() == [1, 1, 0, 1, 1]
    assert counted(jnp.array([0.0, -1e9, -1e9, 1.0]), 2).all()  # too few chains would be left


def test_statistics_are_those_of_the_chains_that_count(rows):
    counts = jnp.ones(CHAINS, bool).at[BAD].set(False)
    expected = maximum_eigenvalue(rows[GOOD])
    far = rows.at[BAD].multiply(10.0)
    np.testing.assert_allclose(largest_eigenvalue(far, counts), expected, rtol=1e-5)
    assert largest_eigenvalue(far, counts | True) > 2.0 * expected
    pool = with_stand_ins(rows, counts.at[0].set(False))
    assert set(map(float, pool[:, 0])) == set(map(float, rows[GOOD[1:], 0]))


@pytest.mark.long
def test_meads_takes_nothing_from_chains_that_explode(rows):
    scheme, progress = Scheme(4), Progress.start(100, CHAINS)
    values, slopes = jax.vmap(jax.value_and_grad(exploding))(rows)
    begin = jax.jit(meads_start, static_argnums=4)
    found = begin(rows, values, slopes, progress, scheme)
    first = np.asarray(rows[:16])[GOOD[:14]]  # the second fold uses these
    np.testing.assert_allclose(found.scale[16], first.std(axis=0), rtol=1e-6)
    largest = maximum_eigenvalue(slopes[GOOD[:14]] * first.std(axis=0)[None])
    np.testing.assert_allclose(found.step_size[16], 0.5 / largest**0.5, rtol=1e-6)
    assert 0.3 < found.step_size.min()
    owned = begin(rows, jnp.zeros(CHAINS), slopes, progress, scheme)  # all chains count
    assert owned.step_size.min() < 1e-10
    *_, known = survey(exploding, rows, 4)
    assert known.eigenvalue.max() < 3.0


def test_chees_takes_nothing_from_chains_that_explode(rows, key):
    progress, first = Progress.start(100, CHAINS), jnp.asarray(0.5)
    keys = jax.random.split(key, CHAINS)

    def after(rows, scheme):
        chains = jax.vmap(lambda row: dynamic_hmc.init(row, exploding, 0))(rows)
        chains = chains._replace(random_generator_arg=jnp.ones((), int))
        counts = counted(chains.logdensity, 2)
        metric = first_metric(rows, counts, scheme)
        start = chees_start(metric, first, 2 * first, progress, scheme)
        return start, *chees_step(keys, chains, start, exploding, scheme)[:2]

    run = jax.jit(after, static_argnums=1)
    start, chains, found = run(rows, ChEESScheme())
    counting = with_stand_ins(rows, counted(jax.vmap(exploding)(rows), 2))
    np.testing.assert_allclose(start.metric.sigma[0], counting.std(axis=0), rtol=1e-6)
    spread = np.std(chains.position[GOOD], axis=0)
    np.testing.assert_allclose(found.metric.sigma[0], spread, rtol=0.15)
    usual = run(rows.at[BAD].set(0.5), ChEESScheme())[2]
    for name in ("step_size", "trajectory_length"):
        np.testing.assert_allclose(getattr(found, name), getattr(usual, name), rtol=0.1)
    np.testing.assert_allclose(found.metric.sigma, usual.metric.sigma, rtol=0.1)
    assert np.std(rows[:, 0]) > 2.0 * found.metric.sigma[0, 0]  # the width if all chains counted
