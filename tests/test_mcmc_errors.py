"""Errors of the many-chain kernels, and failures that they recover from."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.mcmc import ghmc
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES
from numpyro_ensemble.mcmc.ghmc import ghmc_step

KERNELS = [MEADS, ChEES, MAMS, MCLMC]
FEW = [pytest.param(k, marks=[pytest.mark.long] * (k in (MEADS, MAMS))) for k in KERNELS]
CHAINS = 64


def model(y=0.5):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)


def run(kernel, warmup=10, init_params=None, data=(), **options):
    options = {"chain_method": "vectorized", "progress_bar": False, "num_chains": CHAINS} | options
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=10, **options)
    mcmc.run(jax.random.key(0), *data, init_params=init_params)
    return mcmc


def start(num_chains=CHAINS):
    return {"mu": jax.random.normal(jax.random.key(1), (num_chains, 2))}


@pytest.mark.parametrize("kernel", KERNELS)
def test_chains_that_cannot_be_adapted_together(kernel):
    write = rf'MCMC\({kernel.__name__}\(model\), num_chains=64, chain_method="vectorized"'
    for options in ({"num_chains": 1}, {"chain_method": "sequential"}, {"chain_method": jax.vmap}):
        with pytest.raises(ValueError, match=write):
            run(kernel(model), **options)
    few = "16 chains or more" if kernel is MEADS else "4 chains or more"
    for num_chains in (2, 8)[: 1 + (kernel is MEADS)]:
        with pytest.raises(ValueError, match=few if num_chains != 2 else "chains"):
            run(kernel(model), num_chains=num_chains)


def test_folds():
    with pytest.raises(ValueError, match="num_chains=18 is not a multiple of num_folds=4. Run 20"):
        run(MEADS(model), num_chains=18)
    with pytest.raises(ValueError, match="leaves 2 chains in each of num_folds=32"):
        run(MEADS(model, num_folds=32))


@pytest.mark.filterwarnings("ignore:Out-of-support")
@pytest.mark.parametrize("kernel", FEW)
def test_models_that_cannot_be_sampled(kernel):
    def discrete():
        z = numpyro.sample("z", dist.Poisson(0.5))
        numpyro.sample("mu", dist.Normal(z, 1.0))

    def delta():
        numpyro.sample("mu", dist.Normal(numpyro.sample("m", dist.Delta(1.0)), 1.0))

    def subsampled():
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 6, subsample_size=2):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=jnp.zeros(2))

    with pytest.raises(ValueError, match="plate 'rows' takes 2 of its 6 rows at random"):
        run(kernel(subsampled))
    with pytest.raises(ValueError, match="'z' is discrete .*Sum it out"):
        run(kernel(discrete))
    with pytest.raises(ValueError, match="'m' is a Delta.*numpyro.deterministic"):
        run(kernel(delta))
    with pytest.raises(ValueError, match="no latent site"):
        run(kernel(lambda: numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.5)))
    with pytest.raises(RuntimeError, match="Cannot find valid initial.*The data hold NaN: y"):
        run(kernel(model, start="init"), data=(jnp.nan,))

    def positive(y):
        numpyro.sample("y", dist.Gamma(numpyro.sample("rate", dist.LogNormal()), 1.0), obs=y)

    with pytest.raises(RuntimeError, match="Cannot find valid initial.*outside of their distrib"):
        run(kernel(positive, start="init"), data=(-1.0,))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_warm_up(kernel, key, compile_count):
    calls = []

    def counted(y=0.5):
        calls.append(y)
        model(y)

    message = "num_warmup=0 leaves .*mcmc.post_warmup_state"
    for init_params in (None, start()):
        with pytest.raises(ValueError, match=message):
            run(kernel(counted), 0, init_params)
    keys = jax.random.split(key, CHAINS)
    with compile_count() as count, pytest.raises(ValueError, match=message):
        kernel(counted).init(keys, 0)
    assert not calls
    assert count.count == 0, count.names


@pytest.mark.long
def test_an_adapted_state_needs_no_warm_up(key):
    kernel = ChEES(model)
    before = run(kernel, 10, start())
    after = MCMC(
        kernel, num_warmup=0, num_samples=10, num_chains=CHAINS, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    after.post_warmup_state = before.last_state
    after.run(key)
    step_sizes = [mcmc.last_state.adapt_state.step_size for mcmc in (before, after)]
    np.testing.assert_array_equal(*step_sizes)
    assert after.get_samples()["mu"].shape == (10 * CHAINS, 2)


@pytest.mark.long
@pytest.mark.parametrize("kernel", FEW)
def test_starts_that_cannot_be_used(kernel):
    with pytest.raises(
        ValueError, match="64 of 64 chains start .*not finite.*data hold NaN: y.*masked: Leave init"
    ):
        run(kernel(model), init_params=start(), data=(jnp.nan,))
    bad = start()["mu"].at[jnp.array([3, 7]), 0].set(jnp.nan)
    with pytest.raises(ValueError, match="2 of 64 chains start .*not finite: 3, 7. Leave"):
        run(kernel(model), init_params={"mu": bad})
    alike = start()["mu"].at[:, 1].set(0.1)  # their mean differs from 0.1 by rounding
    with pytest.raises(ValueError, match="same value of 'mu'.*must be spread. Leave init_params"):
        run(kernel(model), init_params={"mu": alike})
    with pytest.raises(ValueError, match=r"'mu'\] takes .* shape \(64, 2\), .*got \(64,\)"):
        run(kernel(model), init_params={"mu": start()["mu"][:, 0]})
    with pytest.raises(ValueError, match="64 of 64 .*Give other init_params: finite"):
        run(kernel(potential_fn=lambda z: 0.5 * (z**2).sum()), init_params=jnp.nan * bad)
    with pytest.raises(ValueError, match=r"latent sites, \['mu'\]; got \['nu'\]"):
        run(kernel(model), init_params={"nu": bad})
    with pytest.raises(ValueError, match="potential_fn needs to be told"):
        run(kernel(potential_fn=lambda z: 0.5 * (z**2).sum()))


def test_states_of_another_kernel_or_model(key):
    """A state of another model was taken, and its sites were left out of the draws."""

    def other(y=0.5):
        numpyro.sample("tau", dist.LogNormal())

    def wider(y=0.5):
        numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    state = run(ChEES(model, start="init"), 10, start()).last_state
    for kernel, message in (
        (MAMS(model), "the state is of another kernel: it has ChEESAdaptation, and MAMS needs"),
        (
            ChEES(other),
            r"of another model: .* \{'mu': \(2,\)\}, and this model has \{'tau': \(\)\}",
        ),
        (ChEES(wider), r"of another model: .* \{'mu': \(2,\)\}, and .* \{'mu': \(3,\)\}"),
    ):
        mcmc = MCMC(
            kernel, num_warmup=0, num_samples=5, num_chains=CHAINS, chain_method="vectorized",
            progress_bar=False,
        )  # fmt: skip
        mcmc.post_warmup_state = state
        with pytest.raises(ValueError, match=message):
            mcmc.run(key)


def test_starts_of_another_precision(key):
    """Starts that were saved in float32 are cast; without a cast a loop's types disagree."""
    single = jax.tree.map(lambda x: x.astype(jnp.float32), start(16))
    mcmc = run(ChEES(model), 5, single, num_chains=16)
    assert mcmc.last_state.z["mu"].dtype == jnp.float64


def test_chains_alone():
    few = start(1)
    with pytest.raises(ValueError, match="adapt='each'.*was given one chain.*two chains or more"):
        run(MCLMC(model, adapt="each"), 50, few, num_chains=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_options(kernel):
    for wrong in ({}, {"model": model, "potential_fn": model}):
        with pytest.raises(ValueError, match="one of model and potential_fn"):
            kernel(**wrong)
    with pytest.raises(TypeError, match="model takes a function"):
        kernel(3)
    with pytest.raises(ValueError, match=r"start takes one of \['init', 'microcanonical', 'nuts',"):
        kernel(model, start="prior")
    with pytest.raises(TypeError, match="init_strategy"):
        kernel(model, init_strategy=0.0)
    with pytest.raises(TypeError, match="num_folds takes an integer"):
        MEADS(model, num_folds=2.0)
    with pytest.raises(ValueError, match="steps_per_draw must be at least 1"):
        MEADS(model, steps_per_draw=0)
    for name in ("step_size_multiplier", "damping_slowdown"):
        with pytest.raises(ValueError, match=f"{name} takes a finite number above 0"):
            MEADS(model, **{name: 0.0})
    names = "'auto', 'dense', 'low_rank', 'diagonal', or a number of directions"
    for wrong in ("full", 0, True, 2.0, None):
        with pytest.raises(ValueError, match=f"metric takes one of {names}.*got {wrong!r}"):
            kernel(model, metric=wrong)
    for name in ("step_size", "learning_rate"):
        with pytest.raises(ValueError, match=f"{name} takes a finite number above 0"):
            ChEES(model, **{name: -1.0})
    with pytest.raises(ValueError, match="target_accept_prob lies between 0 and 1"):
        ChEES(model, target_accept_prob=1.0)


def cliff(z):
    """A Gaussian potential that is NaN beyond 1.5."""
    return jnp.where(z[0] > 1.5, jnp.nan, 0.5 * (z**2).sum())


@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_that_falls_off_comes_back(kernel):
    z = jax.random.normal(jax.random.key(2), (CHAINS, 2)).clip(max=1.4)
    options = {
        MEADS: {"step_size_multiplier": 1.0},
        MCLMC: {"desired_energy_var": 0.1, "steps_per_draw": 1},
    }.get(kernel, {"target_accept_prob": 0.5})
    mcmc = MCMC(
        kernel(potential_fn=cliff, **options),
        num_warmup=50,
        num_samples=300,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), init_params=z)
    draws = mcmc.get_samples(group_by_chain=True)
    diverging = mcmc.get_extra_fields(group_by_chain=True)["diverging"]
    assert jnp.isfinite(draws).all() and (draws[..., 0] <= 1.5).all()
    assert (diverging.sum(axis=1) > 0).mean() > 0.5
    assert (mcmc.last_state.num_divergences >= diverging.sum(axis=1)).all()
    moved = (jnp.diff(draws[:, -50:], axis=1) != 0).any(axis=(1, 2))
    assert moved.all()  # also long after a chain's first divergence


def bent(z):
    """A potential with NaN gradient and finite value beyond 1.5."""
    return 0.5 * (z**2).sum() + jnp.where(z[0] < 1.5, jnp.sqrt(1.5 - z[0]), 0.0)


@pytest.mark.core
@pytest.mark.parametrize("potential", [cliff, bent])
def test_a_step_off_the_edge(key, potential):
    def density(z):
        return -potential(z)

    z = jnp.array([[1.4, 0.0]])
    chains = jax.vmap(lambda z, k: ghmc.init(z, density, k))(z, key[None])
    chains = chains._replace(momentum=jnp.array([[9.0, 0.0]]))
    given = (jnp.full(1, 0.2), jnp.ones((1, 2)), jnp.full(1, 1e-6), jnp.full(1, 0.005))
    step = jax.jit(ghmc_step, static_argnums=2)
    ours, outcome = step(key[None], chains, density, *given)
    assert outcome.num_divergences == 1
    np.testing.assert_array_equal(ours.position, z)
    np.testing.assert_array_equal(ours.logdensity_grad, chains.logdensity_grad)
    np.testing.assert_allclose(ours.slice, (chains.slice + 1.005) % 2 - 1, rtol=1e-5)
    assert ours.momentum[0, 0] < -8  # its momentum is reversed
    again, outcome = step(jax.random.split(key, 1), ours, density, *given)
    assert again.position[0, 0] < 1.4 and outcome.num_divergences == 0
