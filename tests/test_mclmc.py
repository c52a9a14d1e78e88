"""Microcanonical Langevin dynamics: BlackJAX's step, its bias and its bound, chains alone."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.mcmc import mclmc
from blackjax.mcmc.integrators import isokinetic_velocity_verlet
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MCLMC
from numpyro_ensemble.mcmc.mclmc_scheme import Scheme, mclmc_start, move
from numpyro_ensemble.mcmc.progress import Progress

CHAINS = 64
Y = np.array([1.2, 0.4, 0.8, 1.1])


def model(y=None):
    """A matrix above a scale, with names in no order, and a mean with a known posterior."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    s = numpyro.sample("s", dist.Gamma(5.0, 2.0))
    numpyro.deterministic("twice", 2 * s)
    with numpyro.plate("row", 4):
        numpyro.sample("y", dist.Normal(w[0, 1], 1.0), obs=y)


def sampler(kernel, draws=60, warmup=150, **options):
    options = {"chain_method": "vectorized", "progress_bar": False, "num_chains": CHAINS} | options
    return MCMC(kernel, num_warmup=warmup, num_samples=draws, **options)


@pytest.mark.core
def test_the_step_is_blackjax(key):
    widths = jnp.array([0.3, 2.0, 1.0])

    def density(row):
        return -0.5 * ((row / widths) ** 2).sum()

    rows = jax.random.normal(key, (CHAINS, 3)) * widths[None]
    keys = jax.random.split(key, CHAINS)
    chains = jax.vmap(lambda row, key: mclmc.init(row, density, key))(rows, keys)
    known = rows, chains.logdensity, chains.logdensity_grad
    adaptation = mclmc_start(*known, Progress.start(9, CHAINS), Scheme())
    kernel = mclmc.build_kernel(integrator=isokinetic_velocity_verlet)
    metric, length = adaptation.metric.inverse_mass, adaptation.decoherence_length[0]

    def expected(key, chain):
        return kernel(key, chain, density, metric, length, adaptation.step_size[0])

    (state, info), (new, outcome) = jax.jit(
        lambda keys, chains: (
            jax.vmap(expected)(keys, chains),
            move(keys, chains, adaptation, density),
        )
    )(keys, chains)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), new, state)
    np.testing.assert_allclose(outcome.error, info.energy_change**2, rtol=1e-4, atol=1e-7)
    assert outcome.error.mean() > 1e-4 and not outcome.num_divergences.any()


@pytest.fixture(scope="module")
def fitted():
    mcmc = sampler(MCLMC(model, start="microcanonical"))
    with jax.numpy_rank_promotion("raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc.run(jax.random.key(1), Y, extra_fields=("adapt_state.step_size", "num_steps"))
    return mcmc


@pytest.mark.core
def test_draws_are_near_the_posterior(fitted):
    """The bias is bounded; means within a hundredth of a standard deviation are not guaranteed."""
    draws = fitted.get_samples(group_by_chain=True)
    assert draws["w"].shape == (CHAINS, 60, 2, 2) and draws["twice"].shape == (CHAINS, 60)
    seen = draws["w"][..., 0, 1]
    # Y.mean(): by the likelihood alone
    assert abs(seen.mean() - Y.sum() / 5) < 0.05 < Y.mean() - Y.sum() / 5
    assert abs(seen.var() * 5 - 1.0) < 0.2 and abs(draws["w"][..., 1, 0].var() - 1.0) < 0.2
    assert abs(draws["s"].mean() - 2.5) < 0.12  # its mode is 2
    fields = fitted.get_extra_fields(group_by_chain=True)
    assert fields["energy_var"].shape == (CHAINS, 60)
    assert 2e-4 < fields["energy_var"].mean() < 7.5e-4
    assert (fields["num_steps"] == 8).all() and not fields["diverging"].any()
    assert (fields["adapt_state.step_size"] == fields["adapt_state.step_size"][0, 0]).all()
    line = fitted.sampler.get_diagnostics_str(fitted.last_state)
    assert line.startswith("8 steps of size") and "energy var=" in line


@pytest.mark.core
def test_a_state_goes_on(fitted):
    last = fitted.post_warmup_state = fitted.last_state
    fitted.run(last.rng_key, Y)
    assert (fitted.last_state.i == last.i + 60).all()
    norms = jnp.linalg.norm(
        jnp.concatenate([x.reshape(CHAINS, -1) for x in fitted.last_state.r.values()], 1), axis=1
    )
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)  # the speed stays 1


@pytest.mark.long
def test_steps_that_are_too_long_are_reported(fitted):
    last = fitted.last_state
    longer = last.adapt_state._replace(step_size=2.0 * last.adapt_state.step_size)
    fitted.post_warmup_state = last._replace(adapt_state=longer)
    said = "energy error of MCLMC is larger .*desired_energy_var=0.0005 .*chains: 0, 1, .*MAMS"
    with pytest.warns(UserWarning, match=said):
        fitted.run(last.rng_key, Y)
    fields = fitted.get_extra_fields()
    assert fields["energy_var"].shape == (60 * CHAINS,) and fields["energy_var"].mean() > 2e-3


def variances(condition, size=8, draws=150, warmup=300, factor=1.0, **options):
    """Return the ratios of variances to the true ones, and their largest standard error."""
    widths = jnp.geomspace(1.0, condition**0.5, size)
    kernel = MCLMC(potential_fn=lambda z: 0.5 * ((z / widths) ** 2).sum(), **options)
    mcmc = sampler(kernel, draws, warmup)
    start = widths[None] * jax.random.normal(jax.random.key(1), (CHAINS, size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mcmc.warmup(jax.random.key(0), init_params=start)
        state = mcmc.post_warmup_state
        adapted = state.adapt_state._replace(step_size=factor * state.adapt_state.step_size)
        mcmc.post_warmup_state = state._replace(adapt_state=adapted)
        mcmc.run(jax.random.key(2))
    squares = (np.asarray(mcmc.get_samples(group_by_chain=True)) / np.asarray(widths)) ** 2
    error = squares.std(axis=(0, 1)) / np.sqrt(effective_sample_size(squares))
    return squares.mean(axis=(0, 1)), error.max()


@pytest.mark.long
@pytest.mark.parametrize("adapt", ["all", "each"])
@pytest.mark.parametrize("condition", [1.0, 100.0, 10_000.0])
def test_the_bias_is_bounded(condition, adapt):
    """Variances are too large by a twentieth: b^2 of the squares is 0.001, a tenth of 0.01."""
    options = {"warmup": 300} if adapt == "all" else {"warmup": 1200, "draws": 300}
    found, error = variances(condition, adapt=adapt, **options)
    assert error < 0.05
    assert abs(found.mean() - 1.04) < 0.08 and abs(found - 1.04).max() < 0.3


@pytest.mark.long
def test_the_bias_follows_what_is_asked_for():
    exact, _ = variances(100.0, desired_energy_var=5e-6, draws=300)
    coarse, _ = variances(100.0, desired_energy_var=5e-2)
    wrong, _ = variances(100.0, factor=10.0)
    assert abs(exact.mean() - 1.0) < 0.03 < 0.12 < coarse.mean() - 1.0
    assert not abs(wrong.mean() - 1.04) < 0.08  # the bound of the test above


def test_the_energy_variance_goes_from_one_value_to_another():
    scheme = Scheme(0.01, first_energy_var=1.0)
    progress = Progress.start(10, CHAINS)
    halfway = Progress(progress.iteration + 4, progress.remaining - 4)
    last = Progress(progress.iteration + 9, progress.remaining - 9)
    np.testing.assert_allclose(scheme.wanted(halfway), 0.1, rtol=1e-5)
    np.testing.assert_allclose(scheme.wanted(last), 0.01, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("adapt", ["all", "each"])
def test_draws_are_made_with_the_last_energy_variance(adapt):

    def potential(z):
        return 0.5 * (z**2).sum()

    kernel = MCLMC(potential_fn=potential, adapt=adapt, desired_energy_var=(0.25, 5e-4))
    mcmc = sampler(kernel, 40, 400)
    start = jax.random.normal(jax.random.key(1), (CHAINS, 20))
    mcmc.warmup(jax.random.key(0), init_params=start, collect_warmup=True)
    found = mcmc.get_extra_fields(group_by_chain=True)["energy_var"].mean(axis=0)
    mcmc.run(jax.random.key(2))
    drawn = mcmc.get_extra_fields(group_by_chain=True)["energy_var"].mean()
    assert 2.5e-4 < drawn < 1e-3
    assert 4e-3 < np.median(found[180:220]) < 4e-2  # 0.011 is expected in the middle


@pytest.mark.long
def test_chains_alone_count_their_large_errors():
    """Energy errors in a funnel have heavy tails: trusted ones alone give 1.8 times the target."""

    def potential(z):
        return z[0] ** 2 / 4.5 + 0.5 * (z[1:] ** 2).sum() * jnp.exp(-z[0]) + 5.5 * z[0]

    mcmc = sampler(MCLMC(potential_fn=potential, adapt="each", desired_energy_var=0.05), 150, 800)
    found = []
    for seed in range(3):
        start = jax.random.normal(jax.random.key(10 + seed), (CHAINS, 12))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mcmc.run(jax.random.key(seed), init_params=start)
        found.append(mcmc.get_extra_fields()["energy_var"].mean() / 0.05)
    assert 0.7 < np.mean(found) < 1.65


@pytest.mark.long
def test_chains_alone_stay_in_modes_of_their_own():
    """Two wells whose widths differ a hundredfold: each chain adapts to the scale of its well."""
    widths = jnp.array([1.0, 0.01])

    def potential(z):
        wells = [0.5 * ((z - c) / w) ** 2 for c, w in zip((-30.0, 30.0), widths, strict=True)]
        heights = jnp.log(widths) * len(z)
        both = jnp.stack([well.sum() for well in wells]) + heights
        return -jax.nn.logsumexp(-both)

    which = jnp.arange(CHAINS) % 2
    start = jnp.where(which == 0, -30.0, 30.0)[:, None] + 0.01 * jax.random.normal(
        jax.random.key(1), (CHAINS, 3)
    )
    mcmc = sampler(MCLMC(potential_fn=potential, adapt="each"), 200, 600)
    with warnings.catch_warnings():  # each chain is judged in its own width
        warnings.simplefilter("error")
        mcmc.run(jax.random.key(0), init_params=start)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    centred = draws - np.where(which == 0, -30.0, 30.0)[:, None, None]
    for i, width in enumerate(widths):
        assert abs(centred[i::2].std() / width - 1.0) < 0.15
    scale = jnp.sqrt(mcmc.last_state.adapt_state.alone.variance).mean(axis=1)
    assert (abs(jnp.log(scale / widths[which])) < 0.7).all()  # one scale for all chains would be 30


def test_the_first_step_does_not_lead_out_of_a_narrow_mode():
    """The step is a quarter of the root of 60 dimensions: 190 widths of the narrow mode."""

    def potential(z):
        narrow = 0.5 * ((z / 0.01) ** 2).sum() + len(z) * jnp.log(0.01)
        wide = 0.5 * ((z - 3.0) ** 2).sum()
        return -jax.nn.logsumexp(jnp.stack([-narrow, -wide]))

    mcmc = sampler(MCLMC(potential_fn=potential, adapt="each"), 40, 300, num_chains=4)
    mcmc.run(jax.random.key(0), init_params=jnp.zeros((4, 60)))  # all chains start at the mode
    draws = np.asarray(mcmc.get_samples())
    assert abs(draws.mean(axis=1)).max() < 0.01 and abs(draws.std() / 0.01 - 1.0) < 0.1


def test_what_is_refused():
    for value in (0.0, -1e-3, np.nan):
        with pytest.raises(ValueError, match="desired_energy_var takes a finite number above 0"):
            MCLMC(model, desired_energy_var=value)
        with pytest.raises(ValueError, match="desired_energy_var takes a finite number above 0"):
            MCLMC(model, desired_energy_var=(0.5, value))
    with pytest.raises(ValueError, match="one number, or two: .*begins and ends with"):
        MCLMC(model, desired_energy_var=(0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match="adapt takes 'all' or 'each', got 'both'"):
        MCLMC(model, adapt="both")
    with pytest.raises(ValueError, match="length_factor takes a finite number above 0"):
        MCLMC(model, length_factor=0.0)
    with pytest.raises(ValueError, match="adapt='each' has a diagonal metric alone, got .*'dense'"):
        MCLMC(model, adapt="each", metric="dense")
    with pytest.raises(ValueError, match="metric takes one of 'auto', 'dense'"):
        MCLMC(model, metric=0)
    keys = jax.random.split(jax.random.key(0), 8)
    with pytest.raises(ValueError, match="num_warmup=1 is too short for adapt='each'.*Give 30"):
        MCLMC(model, adapt="each").init(keys, 1, None, (Y,))
    with pytest.raises(ValueError, match="num_chains=2 is too few for MCLMC.*give adapt='each'"):
        MCLMC(model).init(keys[:2], 10, None, (Y,))
    with pytest.raises(ValueError, match="two latent values or more.*Use MAMS"):
        MCLMC(potential_fn=lambda z: (z**2).sum()).init(keys, 10, jnp.arange(8.0)[:, None])
    with pytest.raises(ValueError, match="given one alone"):
        MCLMC(model).init(keys[0], 10, None, (Y,))
