"""Sampling from every member of an ensemble: each chain stays in its member's mode."""

import warnings

import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.module import random_eqx_module, random_nnx_module
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy.stats import norm
from zarr.storage import MemoryStore

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, scoring, to_arviz
from numpyro_ensemble.mcmc import MCLMC, member_starts, rhat_nested, starts
from numpyro_ensemble.mcmc.mixing import Advice, check_mixing
from numpyro_ensemble.predict.assembly import makes_inference_data

X = np.linspace(-0.4, 0.4, 12)
SLOPES = {1: np.ones(12), -1: -1.0 - X}  # of the data's means in the level, by the level's sign
Y = np.where(np.arange(12) < 7, 5.2, 5.0 * (1.0 + X)) + np.tile([-0.3, 0.1, 0.2, 0.0], 3)


def model(x, y=None):
    """A level with two modes, in each of which the posterior is normal, beside a matrix."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    kinds = dist.Categorical(jnp.array([0.5, 0.5]))
    prior = dist.MixtureSameFamily(kinds, dist.Normal(jnp.array([-5.0, 5.0]), 0.5))
    level = numpyro.sample("level", prior)
    numpyro.deterministic("corner", w[0, 1])
    with numpyro.plate("row", len(x)):
        mean = jnp.where(level > 0, level, -level * (1.0 + x))
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def conditional(sign, rows):
    """Return mean and variance of the level in one mode, given some rows of the data."""
    slopes = SLOPES[sign][rows]
    variance = 1.0 / (1.0 / 0.5**2 + (slopes**2).sum() / 0.5**2)
    return variance * (sign * 5.0 / 0.5**2 + (slopes * Y[rows]).sum() / 0.5**2), variance


def left_out(sign):
    """Return the log density of each observation given all others, in one mode."""
    terms = []
    for i, slope in enumerate(SLOPES[sign]):
        mean, variance = conditional(sign, np.arange(12) != i)
        terms.append(norm.logpdf(Y[i], slope * mean, np.sqrt(0.5**2 + slope**2 * variance)))
    return np.array(terms)


@pytest.fixture(scope="module")
def fit():
    """Five members of two modes, of which member 2 has failed."""
    runner = EnsembleMAP(model, ensemble_size=5)
    begin = {"level": jnp.array([4.0, -4.0, 3.0, -3.0, 6.0]), "w": jnp.ones((5, 2, 2))}
    result = runner.run(jax.random.key(0), 100, X, Y, init_params=begin, progress_bar=False)
    level = result.params["level"].at[2].set(jnp.nan)
    return runner, result._replace(params={**result.params, "level": level})


SIGNS = np.array([1, -1, -1, 1])  # of members 0, 1, 3, 4


@pytest.fixture(scope="module")
def run(fit):
    """Two chains of each member that has not failed."""
    runner, result = fit
    members = starts.chain_members(result, 8)
    with pytest.warns(UserWarning, match="1 of 5 members are not finite: 2. They are left out"):
        init_params = starts.from_ensemble(jax.random.key(1), runner, result, X, Y, num_chains=8)
    mcmc = MCMC(
        MCLMC(model, adapt="each"), num_warmup=400, num_samples=300, num_chains=8,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings():  # these chains are not meant to agree
        warnings.simplefilter("error")
        mcmc.run(jax.random.key(2), X, Y, init_params=init_params)
    return members, mcmc


def test_the_members_of_chains(fit):
    _, result = fit
    assert_array_equal(starts.chain_members(result), [0, 1, 3, 4])
    assert_array_equal(starts.chain_members(result, 6), [0, 1, 3, 4, 0, 1])
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        starts.chain_members(result, 0)
    nothing = result._replace(params={k: v * jnp.nan for k, v in result.params.items()})
    with pytest.raises(ValueError, match="No member of the result is finite"):
        starts.chain_members(nothing)


def test_each_chain_samples_the_mode_of_its_member(run):
    members, mcmc = run
    draws = mcmc.get_samples(group_by_chain=True)
    signs = np.tile(SIGNS, 2)
    assert (np.sign(draws["level"]) == signs[:, None]).all()
    for sign in (1, -1):
        mean, variance = conditional(sign, np.arange(12))
        level = np.asarray(draws["level"])[signs == sign]
        assert abs(level.mean() - mean) < 0.2 * variance**0.5
        # the prior's variance is 13 times as large
        assert abs(level.var() / variance - 1.04) < 0.25
    assert abs(draws["w"].var() - 1.04) < 0.2
    # other kernels are meant to mix, and would warn that these draws have not mixed
    with pytest.warns(UserWarning, match="chains of MEADS have not mixed: .*'level'"):
        check_mixing(draws, Advice("MEADS", ("level", "w"), "", ""))
    nested = rhat_nested(draws, members)
    assert nested["level"] > 1.5 and nested["w"].max() < 1.3
    same = signs == 1  # members 0 and 4 have found one mode
    assert rhat_nested(draws["level"][same], members[same]) < 1.2


@pytest.fixture(scope="module")
def data(run):
    members, mcmc = run
    return to_arviz(model, mcmc, X, Y, members=members)


@pytest.mark.long
@pytest.mark.promotes_ranks  # ArviZ's adapter promotes
def test_arviz_data_tells_the_member_of_each_chain(run, data):
    members, mcmc = run
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        assert data[group].coords["member"].dims == ("chain",)
        assert_array_equal(data[group].coords["member"], np.tile([0, 1, 3, 4], 2))
        assert_array_equal(data[group].coords["chain"], np.arange(8))
    assert "member" not in data["observed_data"].coords
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert_allclose(data["sample_stats"]["energy_var"], fields["energy_var"])
    assert {"lp", "diverging"} <= set(data["sample_stats"].data_vars)
    draws = mcmc.get_samples(group_by_chain=True)
    assert_allclose(data["posterior"]["level"], draws["level"])
    assert_allclose(data["posterior"]["corner"], draws["w"][..., 0, 1])
    theirs = az.from_numpyro(mcmc)["posterior"]
    for name, value in theirs.data_vars.items():
        assert_allclose(data["posterior"][name], value)
    if not makes_inference_data():
        # numbers without gaps
        numbers = np.unique(data["posterior"]["member"], return_inverse=True)[1]
        nested = az.rhat_nested(data, superchain_ids=numbers)
        assert_allclose(nested["level"], rhat_nested(draws, members)["level"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # ArviZ warns where LOO is unreliable
def test_a_failed_chain_takes_its_member_along(run):
    members, mcmc = run
    draws = dict(mcmc.get_samples(group_by_chain=True))
    few = {name: value[:, :30] for name, value in draws.items()}
    few["level"] = few["level"].at[1, 3].set(jnp.nan)
    store = MemoryStore()
    options = {"members": members, "rng_key": jax.random.key(0)}
    with pytest.warns(UserWarning, match="1 of 8 members are not finite: 1"):
        left = to_arviz(model, few, X, Y, **options)
    with pytest.warns(UserWarning, match="1 of 8 members are not finite: 1"):
        stored = to_arviz(model, few, X, Y, store=store, progress_bar=False, **options)
    for found in (left, stored):
        for group in ("posterior", "posterior_predictive", "log_likelihood"):
            assert_array_equal(found[group].coords["chain"], [0, 2, 3, 4, 5, 6, 7])
            assert_array_equal(found[group].coords["member"], [0, 3, 4, 0, 1, 3, 4])
            assert "member" not in found[group].data_vars
    weights = scoring.member_weights(left)
    assert weights.shape == (8,) and weights[1] == 0.0


def test_what_members_may_not_be(fit, run):
    runner, result = fit
    _, mcmc = run
    for members in ([0, 1], np.zeros(8), np.zeros((8, 1), int)):
        with pytest.raises(ValueError, match="members takes one integer for each of 8 chain"):
            to_arviz(model, mcmc, X, Y, members=members)
    with pytest.raises(ValueError, match="draws of this result are the members' own"):
        to_arviz(runner, result, X, Y, members=[0, 1, 2, 3, 4])
    idle = MCMC(NUTS(model), num_warmup=10, num_samples=10)
    with pytest.raises(ValueError, match="MCMC without draws: call its run first"):
        to_arviz(model, idle, X, Y)


@pytest.mark.filterwarnings("ignore")  # ArviZ warns where LOO is unreliable
def test_stacking_weighs_chains(run, data):
    """Weights of the two modes are those by closed-form predictive densities."""
    _, mcmc = run
    densities = np.exp([left_out(1), left_out(-1)])
    grid = np.linspace(0.0, 1.0, 2001)
    scores = np.log(grid[:, None] * densities[0] + (1.0 - grid[:, None]) * densities[1]).sum(axis=1)
    expected = grid[scores.argmax()]
    assert 0.2 < expected < 0.8 and abs(expected - 0.5) > 0.05
    weights = scoring.member_weights(data)
    signs = np.tile(SIGNS, 2)
    assert weights.shape == (8,) and abs(weights.sum() - 1.0) < 1e-6
    assert abs(weights[signs == 1].sum() - expected) < 0.04
    mixture = EnsemblePredictive(
        model, mcmc.get_samples(group_by_chain=True), weights=weights, batch_ndims=2
    )
    y = mixture(jax.random.key(0), X)["y"]
    assert y.shape == (8 * 300, 12)
    means = {sign: conditional(sign, np.arange(12))[0] * SLOPES[sign] for sign in (1, -1)}
    mixed = expected * means[1] + (1.0 - expected) * means[-1]
    assert abs(y.mean(axis=0) - mixed).max() < 0.12 < abs(means[1] - mixed).max()


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_chains_start_at_draws_of_guides():
    vi = EnsembleVI(
        model, AutoNormal(model), numpyro.optim.Adam(0.05), Trace_ELBO(), ensemble_size=4
    )
    result = vi.run(jax.random.key(0), 400, X, Y, progress_bar=False)
    members = starts.chain_members(result, 8)
    z = starts.from_ensemble(jax.random.key(1), vi, result, X, Y, num_chains=8)
    centres = np.asarray(result.params["level_auto_loc"])[members]
    assert (np.sign(z["level"]) == np.sign(centres)).all() and len(np.unique(z["level"])) == 8


# Networks -----------------------------------------------------------------------------------------

INPUTS = np.linspace(-1.5, 1.5, 24)[:, None]
WAVE = np.sin(2.0 * INPUTS[:, 0]) + 0.1 * np.tile([1.0, -1.0, 0.5, -0.5], 6)
PRIOR = dist.Normal(0.0, 1.0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.wide, self.out = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.wide(x)))[:, 0]


NNX = Net(nnx.Rngs(0))
EQX = eqx.nn.MLP(1, "scalar", 4, 1, activation=jnp.tanh, key=jax.random.PRNGKey(0))


def nnx_net(x):
    return random_nnx_module("net", NNX, PRIOR)(x)


def eqx_net(x):
    return jax.vmap(random_eqx_module("net", EQX, PRIOR))(x)


def plain_net(x):
    weight = numpyro.sample("weight", PRIOR.expand([1, 4]).to_event(2))
    shift = numpyro.sample("shift", PRIOR.expand([4]).to_event(1))
    out = numpyro.sample("out", PRIOR.expand([4]).to_event(1))
    return jnp.tanh(x @ weight + shift) @ out


@pytest.mark.long
@pytest.mark.promotes_ranks  # Flax and Equinox promote
@pytest.mark.parametrize("net", [nnx_net, eqx_net, plain_net])
def test_networks_are_sampled_from_every_member(net):
    def regression(x, y=None):
        mean = net(x)
        noise = numpyro.sample("noise", dist.HalfNormal(0.5))
        with numpyro.plate("row", len(x)):
            numpyro.sample("y", dist.Normal(mean, noise), obs=y)

    runner = EnsembleMAP(regression, numpyro.optim.Adam(0.03), ensemble_size=3)
    result = runner.run(jax.random.key(0), 600, INPUTS, WAVE, progress_bar=False)
    members = starts.chain_members(result)
    init_params = starts.from_ensemble(
        jax.random.key(1), runner, result, INPUTS, WAVE, num_chains=len(members)
    )
    mcmc = MCMC(
        MCLMC(regression, adapt="each"), num_warmup=300, num_samples=100, num_chains=len(members),
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have not settled.*R-hat of predictions")
        warnings.filterwarnings("ignore", "The energy error of MCLMC")  # a short warm-up
        mcmc.run(jax.random.key(2), INPUTS, WAVE, init_params=init_params)
    draws = mcmc.get_samples(group_by_chain=True)
    y = EnsemblePredictive(regression, draws, batch_ndims=2)(jax.random.key(3), INPUTS)["y"]
    assert y.shape == (3, 100, 24)
    error = np.sqrt(((y.mean(axis=1) - WAVE) ** 2).mean(axis=1))
    line = np.polyval(np.polyfit(INPUTS[:, 0], WAVE, 1), INPUTS[:, 0])
    assert (error < 0.2).all() and np.sqrt(((line - WAVE) ** 2).mean()) > 0.4
    assert abs(np.sqrt((draws["noise"] ** 2).mean()) - 0.1) < 0.06


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_parameters_that_members_have_fitted_are_told_of():
    def partly(x, y):
        net = random_nnx_module("net", NNX, {"out.kernel": PRIOR, "out.bias": PRIOR})
        numpyro.sample("y", dist.Normal(net(x), 0.1).to_event(1), obs=y)

    runner = EnsembleMAP(partly, numpyro.optim.Adam(0.05), ensemble_size=2)
    result = runner.run(jax.random.key(0), 3, INPUTS, WAVE, progress_bar=False)
    with pytest.warns(
        UserWarning, match=r"parameters \['net\$params'\], and chains keep .*initial"
    ):
        starts.from_ensemble(jax.random.key(1), runner, result, INPUTS, WAVE, num_chains=2)


def test_starts_without_noise_need_no_curvature(monkeypatch):
    """The curvature of a network takes longer to compile than its sampling."""

    def once(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("row", 2):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    monkeypatch.setattr(member_starts, "_widths", None)
    fits = EnsembleMAP(once, numpyro.optim.Adam(0.1), ensemble_size=3)
    result = fits.run(jax.random.key(0), 20, jnp.ones(2), progress_bar=False)
    call = jax.random.key(1), fits, result, jnp.ones(2)
    z = starts.from_ensemble(*call, num_chains=4, jitter=0.0)
    assert_array_equal(z["x"], result.params["x"][np.array([0, 1, 2, 0])])
    with pytest.raises(TypeError):
        starts.from_ensemble(*call, num_chains=4)
