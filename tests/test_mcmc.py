"""Every many-chain kernel inside NumPyro's `MCMC`: its results and its errors."""

import pickle
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, Predictive, init_to_uniform

from numpyro_ensemble import reweight
from numpyro_ensemble.mcmc import MAMS, MEADS, ChEES
from numpyro_ensemble.mcmc.state import ChainsState

KERNELS = [partial(kernel, start="init") for kernel in (MEADS, ChEES, MAMS)]
NAMES = ["MEADS", "ChEES", "MAMS"]
FIELDS = (
    "potential_energy",
    "accept_prob",
    "diverging",
    "energy",
    "num_steps",
    "adapt_state.step_size",
)
Y = np.array([1.2, 0.4, 0.8, 1.1])
CHAINS, DRAWS = 64, 70  # with 16 chains MEADS may mix ten times worse


def model(y=None):
    """A mean with a known posterior, and a scale that the data do not depend on."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.deterministic("twice", 2 * s)
    with numpyro.plate("row", 4):
        numpyro.sample("y", dist.Normal(mu[0], 1.0), obs=y)


def sampler(kernel, draws=DRAWS, warmup=100, **options):
    options = {"chain_method": "vectorized", "progress_bar": False, "num_chains": CHAINS} | options
    return MCMC(kernel, num_warmup=warmup, num_samples=draws, **options)


def z_scores(draws, mean):
    """Return how many standard errors the means of draws `(C, N)` are away from the truth."""
    error = draws.std() / np.sqrt(effective_sample_size(np.asarray(draws)))
    return abs(draws.mean() - mean) / error


QUICK_IN_MEADS = pytest.mark.parametrize(
    "fitted",
    [KERNELS[0], *(pytest.param(kernel, marks=pytest.mark.long) for kernel in KERNELS[1:])],
    ids=NAMES, indirect=True,
)  # fmt: skip


@pytest.fixture(scope="module", params=KERNELS, ids=NAMES)
def fitted(request):
    mcmc = sampler(request.param(model))
    with jax.numpy_rank_promotion("raise"):
        mcmc.run(jax.random.key(1), Y, extra_fields=FIELDS)
    return mcmc


@pytest.mark.core
def test_draws_agree_with_the_posterior(fitted):
    draws = fitted.get_samples(group_by_chain=True)
    assert draws["mu"].shape == (CHAINS, DRAWS, 2) and draws["twice"].shape == (CHAINS, DRAWS)
    assert fitted.get_samples()["s"].shape == (CHAINS * DRAWS,)
    mean = Y.sum() / 5
    assert z_scores(draws["mu"][..., 0], mean) < 4
    assert z_scores(draws["mu"][..., 0], Y.mean()) > 6  # Y.mean(): by the likelihood alone
    assert z_scores(draws["s"], np.sqrt(2 / np.pi)) < 4
    assert z_scores((draws["mu"][..., 0] - mean) ** 2, 1 / 5) < 4
    assert z_scores((draws["mu"][..., 0] - mean) ** 2, 1.0) > 6  # 1.0: by the prior alone
    np.testing.assert_allclose(draws["twice"], 2 * draws["s"])


@pytest.mark.core
def test_what_mcmc_does_with_draws(fitted, capsys):
    fields = fitted.get_extra_fields(group_by_chain=True)
    assert {name: x.shape for name, x in fields.items()} == dict.fromkeys(FIELDS, (CHAINS, DRAWS))
    kinetic = (fields["energy"] - fields["potential_energy"]).mean()
    if isinstance(fitted.sampler, MAMS):
        assert kinetic == 0.0  # the speed is constant
    else:
        assert abs(kinetic - 1.5) < 0.15  # half a unit for each of three dimensions
    assert ((fields["accept_prob"] >= 0) & (fields["accept_prob"] <= 1)).all()
    steps = fields["num_steps"]
    assert (steps == 8 if isinstance(fitted.sampler, MEADS) else steps >= 1).all()
    assert not fields["diverging"].any()
    step_size = fields["adapt_state.step_size"]
    assert (step_size == step_size[0, 0]).all() and 0 < step_size[0, 0] < 3
    fitted.print_summary()
    printed = capsys.readouterr().out
    assert "mu[0]" in printed and "Number of divergences: 0" in printed and "twice" not in printed
    data = az.from_numpyro(fitted)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["mu"].shape == (CHAINS, DRAWS, 2) and posterior["s"].shape == (CHAINS, DRAWS)
    expected = {"lp", "acceptance_rate", "diverging", "energy", "n_steps", "step_size"}
    assert expected <= set(stats.data_vars)
    assert float(az.rhat(data)["mu"].max()) < 1.1
    predictive = Predictive(model, fitted.get_samples())
    assert predictive(jax.random.key(2))["y"].shape == (CHAINS * DRAWS, 4)


@pytest.mark.core
@QUICK_IN_MEADS
def test_a_state_goes_on(fitted, compile_count):
    last = fitted.post_warmup_state = fitted.last_state
    keys = fitted.post_warmup_state.rng_key  # as in NumPyro's documentation
    with compile_count() as compilations:
        fitted.run(keys, Y)
    assert compilations.count < 12, compilations.names
    assert (fitted.last_state.i == last.i + DRAWS).all()
    assert (fitted.last_state.adapt_state.step_size == last.adapt_state.step_size).all()
    assert jax.tree.structure(fitted.last_state) == jax.tree.structure(last)
    # an adapted state of another MCMC, with another num_warmup
    other = pickle.loads(pickle.dumps(sampler(type(fitted.sampler)(model), warmup=0)))
    other.post_warmup_state = last
    other.run(keys, Y)
    np.testing.assert_array_equal(other.get_samples()["s"], fitted.get_samples()["s"])


@pytest.mark.long
def test_warmup_and_thinning():
    starts = []

    def start(key, num_chains, y):
        starts.append(num_chains)
        mu, s = jax.random.normal(key, (2, num_chains))
        return {"mu": jnp.stack([mu, -mu], axis=1), "s": 0.1 * s}

    mcmc = sampler(ChEES(model, start=start), draws=20, warmup=30, thinning=5)
    key = jax.random.PRNGKey(0)  # arrays of typed keys cannot be collected
    mcmc.warmup(key, Y, collect_warmup=True, extra_fields=ChainsState._fields)
    assert mcmc.get_samples(group_by_chain=True)["s"].shape == (CHAINS, 6)
    states = mcmc.get_extra_fields(group_by_chain=True)
    assert all(x.shape[:2] == (CHAINS, 6) for x in jax.tree.leaves(states))
    state = mcmc.post_warmup_state
    assert (state.adapt_state.progress.remaining == 0).all()
    mcmc.run(jax.random.PRNGKey(1), Y)
    assert mcmc.get_samples(group_by_chain=True)["s"].shape == (CHAINS, 4)
    assert (mcmc.last_state.i == 50).all()
    assert starts == [CHAINS]  # called in warm-up, not in run


def test_the_density_is_that_of_the_arguments(compile_count):
    near = init_to_uniform(radius=1.0)
    mcmc = sampler(ChEES(model, start="init", init_strategy=near), jit_model_args=True)
    others = []
    for shift in (0.0, 5.0):
        with compile_count() as compilations:
            mcmc.run(jax.random.key(0), Y + shift)
        others.append([name for name in compilations.names if "_fori_collect_loop" not in name])
        draws = mcmc.get_samples(group_by_chain=True)["mu"][..., 0]
        assert z_scores(draws, (Y + shift).sum() / 5) < 4
        if shift:
            assert z_scores(draws, Y.sum() / 5) > 6  # the mean for the first data set
    assert others[1:] == [[]], others  # MCMC compiles its loop at every run


SHIFT = 0.0


def of_surroundings():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=jnp.full(2, SHIFT))


@pytest.mark.long
def test_the_first_density_is_that_of_the_surroundings(monkeypatch):
    kernel = ChEES(of_surroundings, start="init")
    keys = jax.random.split(jax.random.key(0), 8)
    for shift in (0.0, 3.0):
        monkeypatch.setitem(globals(), "SHIFT", shift)
        state = kernel.init(keys, 10, None)
        mu = state.z["mu"]
        expected = 0.5 * (mu**2 + (mu - shift) ** 2).sum(axis=1) + 2 * np.log(2 * np.pi)
        np.testing.assert_allclose(state.potential_energy, expected, rtol=1e-5)


@pytest.mark.long
def test_a_state_goes_on_with_other_data():
    mcmc = sampler(ChEES(model, start="init"), draws=100, num_chains=16)
    mcmc.warmup(jax.random.key(0), Y)
    mcmc.run(jax.random.key(1), Y - 20.0)  # the old density is far above that of any proposal
    draws = mcmc.get_samples(group_by_chain=True)["mu"][:, 50:, 0]
    assert z_scores(draws, (Y - 20.0).sum() / 5) < 4


@pytest.mark.long
def test_a_state_is_refreshed_for_other_data():
    kernel = ChEES(model, start="init")
    keys = jax.random.split(jax.random.key(0), 8)
    state = kernel.init(keys, 10, None, (Y,))
    other = kernel.refresh(state, (Y + 2.0,), {})
    fresh = kernel.init(keys, 10, state.z, (Y + 2.0,))
    for ours, expected in zip(
        jax.tree.leaves((other.potential_energy, other.energy, other.z_grad)),
        jax.tree.leaves((fresh.potential_energy, fresh.energy, fresh.z_grad)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.long
def test_models_may_look_at_their_data():
    def looks(y):
        groups = sorted(set(np.asarray(y).tolist()))
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([len(groups)]).to_event(1))
        place = np.array([groups.index(value) for value in y])
        numpyro.sample("y", dist.Normal(mu[place], 1.0).to_event(1), obs=jnp.asarray(y))

    mcmc = sampler(ChEES(looks, start="init"), draws=5, warmup=5, num_chains=8)
    mcmc.run(jax.random.key(0), np.array([0.5, 1.5, 0.5]))
    assert mcmc.get_samples()["mu"].shape == (40, 2)


@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_latents_on_a_simplex_and_in_order(kernel):
    counts = np.array([3.0, 1.0, 6.0])

    def model():
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("n", dist.Multinomial(10, p), obs=counts)
        o = numpyro.sample("o", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
        numpyro.factor("density", dist.Normal(0.0, 1.0).log_prob(o).sum())

    mcmc = sampler(kernel(model), draws=150, warmup=150)
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)
    for i, alpha in enumerate(counts + 1.0):
        assert z_scores(draws["p"][..., i], alpha / 13.0) < 4
        assert z_scores(draws["p"][..., i], counts[i] / 10.0) > 4  # the mean without a prior
    # the lower and the upper of two normals
    assert z_scores(draws["o"][..., 1], 1.0 / np.sqrt(np.pi)) < 4
    assert z_scores(draws["o"][..., 0] * draws["o"][..., 1], 0.0) < 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The chains of MEADS have not mixed")  # with a diagonal metric
def test_a_low_rank_metric():
    direction = np.ones(20) / np.sqrt(20)
    covariance = np.eye(20) + 99.0 * np.outer(direction, direction)
    precision = jnp.asarray(np.linalg.inv(covariance))

    def potential(z):
        return 0.5 * z @ precision @ z

    start = 3.0 * jax.random.normal(jax.random.key(1), (CHAINS, 20))
    mixed = []
    for metric in ("diagonal", "low_rank"):
        mcmc = sampler(MEADS(potential_fn=potential, metric=metric), draws=150, warmup=300)
        mcmc.run(jax.random.key(0), init_params=start)
        along = mcmc.get_samples(group_by_chain=True) @ direction
        mixed.append(effective_sample_size(np.asarray(along)))
    assert z_scores(along, 0.0) < 4 and z_scores(along**2, 100.0) < 4
    assert mixed[1] > 3.0 * mixed[0], mixed


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The chains of MEADS have not mixed")  # chains cannot cross
def test_chains_keep_their_identity():
    def potential(z):  # two modes, so far apart that no chain can cross
        return 0.5 * ((jnp.abs(z) - 50.0) ** 2).sum()

    signs = jnp.where(jnp.arange(CHAINS) % 3 == 0, -1.0, 1.0)[:, None]
    start = signs * (50.0 + jax.random.normal(jax.random.key(0), (CHAINS, 2)))
    kernel = MEADS(potential_fn=potential, step_size_multiplier=0.02)
    mcmc = sampler(kernel, draws=40, warmup=40)
    key = jax.random.PRNGKey(1)
    fields = ChainsState._fields
    mcmc.warmup(key, init_params=start, collect_warmup=True, extra_fields=fields)
    states = mcmc.get_extra_fields(group_by_chain=True)
    assert all(x.shape[:2] == (CHAINS, 40) for x in jax.tree.leaves(states))
    for _ in range(2):
        draws = mcmc.get_samples(group_by_chain=True)
        assert (jnp.sign(draws) == signs[:, None]).all()  # BlackJAX reorders chains
        assert (draws[:, -1] != draws[:, 0]).all()
        mcmc.run(jax.random.PRNGKey(2))
    assert mcmc.last_state.adapt_state.slot.tolist() != list(range(CHAINS))


@pytest.mark.long
def test_the_bar_moves(capfd, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # NumPyro shows no bar where one of them is set
        monkeypatch.delenv(name, raising=False)
    mcmc = sampler(MEADS(model, start="init"), draws=5, warmup=5, progress_bar=True)
    mcmc.run(jax.random.key(0), Y)
    shown = capfd.readouterr().err
    assert "10/10" in shown and f"divergences in {CHAINS} chains" in shown


@QUICK_IN_MEADS
def test_progress_speaks_of_all_chains(fitted):
    line = fitted.sampler.get_diagnostics_str(fitted.last_state)
    assert "steps of size" in line and "acc. prob=" in line
    assert line.endswith(f"0 divergences in {CHAINS} chains")
    assert fitted.sampler.is_ensemble_kernel


def positive():
    """A scale with a half-normal prior, and two observations around 0."""
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(0.0, s), obs=np.array([0.4, -0.3]))


@pytest.mark.long
@pytest.mark.parametrize("kernel", [*KERNELS, NUTS], ids=[*NAMES, "NUTS"])
def test_cold_posteriors(kernel):
    cold, warm = 8.0, 2.0
    model = reweight(positive, prior=cold, likelihood=warm)
    mcmc = sampler(kernel(model), draws=200, warmup=150)
    # the same start for every kernel
    start = {"s": 0.5 * jax.random.normal(jax.random.key(1), (CHAINS,))}
    mcmc.run(jax.random.key(0), init_params=start)
    draws = np.log(mcmc.get_samples(group_by_chain=True)["s"])
    s = np.linspace(1e-3, 4, 20_000)
    log_density = -cold * s**2 / 2 - warm * (2 * np.log(s) + 0.25 / (2 * s**2))

    def mean_log(log_density):
        weights = np.exp(log_density - log_density.max())
        return (weights * np.log(s)).sum() / weights.sum()

    assert z_scores(draws, mean_log(log_density)) < 4
    # the mean if NumPyro's factor for the change of variables belonged to the likelihood
    assert z_scores(draws, mean_log(log_density + (warm - 1) * np.log(s))) > 8
