"""Adjusted microcanonical trajectories: BlackJAX's step, closed forms, and adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.mcmc import adjusted_mclmc_dynamic
from blackjax.mcmc.integrators import isokinetic_velocity_verlet
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MAMS
from numpyro_ensemble.mcmc.counted import counted
from numpyro_ensemble.mcmc.mams_scheme import Scheme, mams_start, mams_step, time_unit, widths_of
from numpyro_ensemble.mcmc.metric import SharedMetric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.trajectories import leapfrogs

CHAINS = 64
SCALES = jnp.array([0.3, 2.0, 1.0])


def log_density(row):
    """A Gaussian whose first coordinate follows the second."""
    b = row[1:] / SCALES[1:]
    return -0.5 * ((row[0] - b[0]) / SCALES[0]) ** 2 - 0.5 * (b**2).sum()


def started(density, rows, step_size, num_warmup, scheme=None):
    """Return chains at their starts, and the start of their adaptation."""
    init = adjusted_mclmc_dynamic.init
    chains = jax.vmap(lambda row: init(row, density, 0))(rows)
    chains = chains._replace(random_generator_arg=jnp.zeros((), int))
    counts = counted(chains.logdensity, rows.shape[1])
    metric = SharedMetric.among(rows, counts, "auto")
    first = jnp.asarray(step_size, rows.dtype), Progress.start(num_warmup, len(rows))
    return chains, mams_start(rows, counts, metric, *first, scheme or Scheme())


@pytest.mark.core
def test_the_step_is_blackjax(key):
    rows = jax.random.normal(key, (CHAINS, 3)) * SCALES[None]
    chains, adaptation = started(log_density, rows, 0.8, 10)
    theirs = adjusted_mclmc_dynamic.build_kernel(
        integration_steps_fn=leapfrogs,
        integrator=isokinetic_velocity_verlet,
        next_random_arg_fn=lambda index: index + 1,
    )

    def expected(keys, chains):
        step_size, length = (x[0] for x in adaptation[:2])
        metric = adaptation.metric.inverse_mass
        alike = chains._replace(random_generator_arg=jnp.full(CHAINS, 4))
        move = jax.vmap(
            lambda key, chain: theirs(
                key, chain, log_density, step_size, jnp.inf, metric, (length / step_size,)
            )
        )
        return move(keys, alike)

    def ours(keys, chains):
        return mams_step(
            keys,
            chains._replace(random_generator_arg=jnp.asarray(4)),
            adaptation,
            log_density,
            Scheme(),
        )

    keys = jax.random.split(key, CHAINS)
    (state, info), (new, _, known) = jax.jit(lambda *x: (expected(*x), ours(*x)))(keys, chains)
    assert known.num_integration_steps[0] > 2 and 0.05 < (~known.is_accepted).mean() < 0.95
    for a, b in ((new[:3], state[:3]), (known.acceptance_rate, info.acceptance_rate)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)
    assert new.random_generator_arg == state.random_generator_arg[0] == 5


@pytest.mark.long
@pytest.mark.core
def test_steps_that_are_too_long_leave_no_bias(key):
    """Accepted ends of trajectories follow the density; proposed ends do not."""
    size, scheme = 10, Scheme()
    widths = jnp.geomspace(0.3, 3.0, size)

    def density(row):
        return -0.5 * ((row / widths) ** 2).sum()

    rows = widths[None] * jax.random.normal(key, (CHAINS, size))
    chains, adaptation = started(density, rows, 3.6, 1)
    adaptation = adaptation._replace(
        progress=Progress(adaptation.progress.iteration + 1, adaptation.progress.remaining - 1),
        metric=SharedMetric.identity(CHAINS, size, 0, rows.dtype)._replace(
            sigma=jnp.broadcast_to(widths[None], rows.shape)
        ),
    )

    def step(chains, key):
        keys = jax.random.split(key, CHAINS)
        new, _, info = mams_step(keys, chains, adaptation, density, scheme)
        return new, (new.position, info.proposal.position, info.acceptance_rate)

    run = jax.jit(lambda chains, key: jax.lax.scan(step, chains, jax.random.split(key, 400))[1])
    accepted, proposed, rate = run(chains, key)
    assert 0.3 < rate.mean() < 0.9
    energies = [((x / widths[None, None]) ** 2).sum(axis=-1).T for x in (accepted, proposed)]
    errors = [z_scores(energy, size) for energy in energies]
    assert errors[0] < 4 and errors[1] > 8, errors  # the second: every end is accepted


def z_scores(draws, mean):
    """Return how many standard errors the means of draws `(C, N, ...)` are away from the truth."""
    draws = np.asarray(draws)
    error = draws.std(axis=(0, 1)) / np.sqrt(effective_sample_size(draws))
    return abs(draws.mean(axis=(0, 1)) - mean) / error


@pytest.mark.core
def test_the_length_follows_correlations(key):
    """Widths of directions are estimated without the excess that a small number of chains adds."""
    size, rho = 40, 0.8
    rows = jax.random.normal(key, (200, CHAINS, size))
    paired = rows.at[..., 1].set(rho * rows[..., 0] + (1 - rho**2) ** 0.5 * rows[..., 1])
    paired = jnp.arange(1.0, size + 1)[None, None] * paired + 7.0
    counts = jnp.arange(CHAINS) < CHAINS - 3
    paired = paired.at[:, -3:].set(1e3)  # these chains do not count
    sigma = jnp.broadcast_to(jnp.arange(1.0, size + 1)[None], (CHAINS, size))
    metric = SharedMetric.identity(CHAINS, size, 0, rows.dtype)._replace(sigma=sigma)
    sums = jax.jit(jax.vmap(lambda rows: widths_of(rows, counts, metric)))(paired)
    expected = np.ones(size) + rho**2 * (np.arange(size) < 2)
    error = np.asarray(sums.std(axis=0)) / np.sqrt(200)
    scores = abs(np.asarray(sums.mean(axis=0)) - expected) / error
    assert scores.max() < 4.5
    assert scores.max() < (size / CHAINS / error).min()  # the excess from few chains
    chains, adaptation = started(lambda row: -0.5 * (row**2).sum(), rows[0], 0.5, 10)
    half_turn = np.pi * time_unit(size)
    assert half_turn <= adaptation.trajectory_length[0] < 1.6 * half_turn


def exploding(row):
    """A normal with widths 1 and 3; beyond 8 its density drops as in an unstable recursion."""
    inside = -0.5 * (row**2 / jnp.array([1.0, 9.0])).sum()
    return inside - jnp.where(jnp.abs(row[0]) > 8.0, jnp.abs(row[0]) ** 20, 0.0)


def metric_of(adaptation):
    """Return the covariance that a metric represents."""
    sigma, directions, eigenvalues = map(np.asarray, adaptation.metric.inverse_mass)
    inner = np.eye(len(sigma)) + directions @ np.diag(eigenvalues - 1.0) @ directions.T
    return sigma[:, None] * inner * sigma


@pytest.mark.long
def test_mams_takes_nothing_from_chains_that_explode(key):
    rows = jax.random.normal(key, (CHAINS, 2)) * jnp.array([[1.0, 3.0]])
    bad = jnp.array([3, 10, 40])
    far = rows.at[bad].set(jnp.array([[15.0, 0.0], [-20.0, 1.0], [12.0, 2.0]]))
    keys = jax.random.split(key, CHAINS)

    def after(rows):
        chains, start = started(exploding, rows, 0.7, 100)
        return start, mams_step(keys, chains, start, exploding, Scheme())[1]

    (start, found), (_, usual) = map(jax.jit(after), (far, rows.at[bad].set(0.5)))
    good = np.setdiff1d(np.arange(CHAINS), bad)
    spread = np.cov(far[good].T)
    ours = metric_of(start)
    np.testing.assert_allclose(np.diag(ours), np.diag(spread), rtol=0.2)
    for name in ("step_size", "trajectory_length"):
        np.testing.assert_allclose(getattr(found, name), getattr(usual, name), rtol=0.15)
    np.testing.assert_allclose(np.diag(metric_of(found)), np.diag(metric_of(usual)), rtol=0.2)
    assert np.var(far[:, 0]) > 5.0 * metric_of(found)[0, 0]  # the variance if all chains counted


@pytest.mark.long
def test_one_latent_alone():
    def model():
        numpyro.sample("rate", dist.Gamma(3.0, 2.0))

    mcmc = MCMC(
        MAMS(model),
        num_warmup=150,
        num_samples=150,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    first = {"rate": 0.5 * jax.random.normal(jax.random.key(1), (CHAINS,))}
    mcmc.run(jax.random.key(0), init_params=first)
    draws = mcmc.get_samples(group_by_chain=True)["rate"]
    assert z_scores(draws, 1.5) < 4 and z_scores((draws - 1.5) ** 2, 0.75) < 4
    assert z_scores(draws, 1.0) > 8  # 1.0 is the mode


def test_options():
    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]))

    for name in ("step_size", "length_factor"):
        with pytest.raises(ValueError, match=f"{name} takes a finite number above 0"):
            MAMS(model, **{name: -1.0})
    with pytest.raises(ValueError, match="metric takes one of 'auto', 'dense'"):
        MAMS(model, metric="full")
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        MAMS(model, max_steps=0)
    with pytest.raises(ValueError, match="target_accept_prob lies between 0 and 1"):
        MAMS(model, target_accept_prob=1.0)
