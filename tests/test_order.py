"""Latents keep the order of the model, whether the package or an SVI has set up the guide.

NumPyro's joint guides concatenate their latents in that order. A dictionary that passes through a
transformation comes back with sorted keys. `SVI` runs eagerly here, because under `jit` it sorts
the latents too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, autoguide
from numpyro.infer.reparam import NeuTraReparam
from numpyro.infer.svi import SVIState
from numpyro.infer.util import initialize_model
from zoo import jit_once

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, to_arviz
from numpyro_ensemble.mcmc import starts

ADAM = numpyro.optim.Adam(0.05)
STEPS = 3


def unsorted(y):
    w = numpyro.sample("w", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("units", 2):
        a = numpyro.sample("a", dist.Gamma(3.0, 1.0))
    numpyro.sample("y", dist.Normal(w + b.sum() + a.sum(), 1.0), obs=y)


def contrast(y=None):
    z = numpyro.sample("z", dist.Normal(100.0, 1.0))
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z - a, 0.1), obs=y)


GUIDES = {
    "Normal": autoguide.AutoNormal,
    "Delta": autoguide.AutoDelta,
    "DiagonalNormal": autoguide.AutoDiagonalNormal,
    "MultivariateNormal": autoguide.AutoMultivariateNormal,
    "LowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "LaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "IAFNormal": lambda m: autoguide.AutoIAFNormal(m, num_flows=1, hidden_dims=[5]),
    "BNAFNormal": lambda m: autoguide.AutoBNAFNormal(m, num_flows=1, hidden_factors=[2]),
    "DAIS": lambda m: autoguide.AutoDAIS(m, K=2),
    "list": lambda m: _in_a_list(m),
}


def _in_a_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoMultivariateNormal(handlers.block(model, hide=["b"])))
    guide.append(autoguide.AutoDelta(handlers.block(model, expose=["b"])))
    return guide


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def vi(model, guide, optim=ADAM, size=2):
    return EnsembleVI(model, guide, optim, Trace_ELBO(), ensemble_size=size)


def svi(model, guide, optim=ADAM):
    return SVI(model, guide, optim, Trace_ELBO())


def close(ours, theirs):
    for name, value in theirs.items():  # values of flows are trees
        for mine, leaf in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(value), strict=True):
            assert_allclose(mine, leaf, err_msg=name, rtol=1e-7, atol=1e-12)


QUICK = {"MultivariateNormal"}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in GUIDES]
)
def test_a_member_is_an_eager_svi_in_order_and_numbers(name, key):
    build, keys = GUIDES[name], jax.random.split(key, 2)
    theirs = build(unsorted)
    single = svi(unsorted, theirs).run(keys[1], STEPS, 2.0, progress_bar=False)
    ours = build(unsorted)
    for guide in (ours, theirs):  # a guide that was never called, and one that SVI has set up
        result = quiet(vi(unsorted, guide), keys, STEPS, 2.0)
        assert_allclose(result.losses[1], single.losses, rtol=1e-8)
        close(result.member(1).params, single.params)
    assert list(ours._init_locs) == list(theirs._init_locs) == ["w", "b", "a"]
    draws = [g.sample_posterior(key, single.params, 2.0) for g in (ours, theirs)]
    close(draws[0], draws[1])


@pytest.mark.long
def test_a_guide_that_a_jitted_svi_has_set_up_is_followed_in_its_order(key):
    guide, keys = autoguide.AutoMultivariateNormal(unsorted), jax.random.split(key, 2)
    single = svi(unsorted, guide)
    alone = jit_once(lambda k: single.run(k, STEPS, 2.0, progress_bar=False))(keys[1])
    assert list(guide._init_locs) == ["a", "b", "w"]  # a transformation sorts the keys
    result = quiet(vi(unsorted, guide), keys, STEPS, 2.0)
    assert_allclose(result.losses[1], alone.losses, rtol=1e-8)
    close(result.member(1).params, alone.params)


@pytest.mark.long
def test_guides_set_up_by_seed_and_by_an_ensemble_have_the_models_order(key):
    seeded = autoguide.AutoDiagonalNormal(unsorted)
    handlers.seed(seeded, key)(2.0)
    shared = autoguide.AutoDiagonalNormal(unsorted)
    wanted = vi(unsorted, shared).init(key, 2.0)
    assert list(seeded._init_locs) == list(shared._init_locs) == ["w", "b", "a"]
    for guide in (seeded, shared):
        state = vi(unsorted, guide).init(key, 2.0)
        params = (ADAM.get_params(s.optim_state)["auto_loc"] for s in (state, wanted))
        assert_allclose(next(params), next(params), rtol=1e-8)


@pytest.mark.long
def test_an_svi_whose_first_start_failed_is_followed(key):
    """After a failed start NumPyro sorts the latents, also without jit."""

    def model(y):
        w = numpyro.sample("w", dist.Normal(0, 1))
        a = numpyro.sample("a", dist.Normal(3, 1))
        numpyro.factor("half", jnp.where(w * a > 0, 0.0, -jnp.inf))
        numpyro.sample("y", dist.Normal(w + 2 * a, 1.0), obs=y)

    orders = {}
    for seed in range(6):
        guide = autoguide.AutoDiagonalNormal(model)
        keys = jax.random.split(jax.random.key(seed), 1)
        single = svi(model, guide).init(keys[0], 2.0)
        order = "".join(guide._init_locs)
        if order in orders:
            continue
        orders[order] = seed
        member = vi(model, guide, size=1).init(keys, 2.0)
        ours = vi(model, guide, size=1).get_params(member)["auto_loc"][0]
        assert_allclose(ours, svi_params(model, guide, single)["auto_loc"], rtol=1e-8)
    assert set(orders) == {"wa", "aw"}


def svi_params(model, guide, state):
    return ADAM.get_params(state.optim_state)


# Draws and predictions of a fit ---------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    """Fit the contrast of two latents, with a guide that an SVI has set up."""
    key = jax.random.key(0)
    guide = autoguide.AutoMultivariateNormal(contrast)
    optim = numpyro.optim.Adam(0.3)
    single = svi(contrast, guide, optim).run(key, 400, 100.0, progress_bar=False)
    runner = vi(contrast, guide, optim)
    result = quiet(
        runner, key, 400, 100.0, init_params={"auto_loc": jnp.array([[99.0, 0.5], [98.0, -0.5]])}
    )
    return guide, single, runner, result


def is_right(samples):
    """Check that z is about 99.5 to 100 and a is about 0, not the other way round."""
    assert np.abs(np.mean(samples["z"]) - 100.0) < 3.0
    assert np.abs(np.mean(samples["a"])) < 3.0


@pytest.mark.long
@pytest.mark.promotes_ranks  # NumPyro's quantiles promote
def test_draws_and_predictions_have_the_latents_in_their_places(fitted, key):
    guide, _, runner, result = fitted
    member = result.member(1).params
    is_right(guide.median(member))
    is_right(guide.sample_posterior(key, member))
    is_right({k: v[1] for k, v in guide.quantiles(member, [0.1, 0.5, 0.9]).items()})
    is_right(dict(zip("za", guide.get_posterior(member).mean, strict=True)))
    is_right(runner.sample_posterior(key, result, num_samples=20))
    mine = EnsemblePredictive(contrast, result, guide=guide, num_samples=20)(key)
    theirs = Predictive(contrast, guide=guide, params=member, num_samples=20)(key)
    for predictions in (mine, theirs):
        assert np.abs(predictions["y"].mean() - 100.0) < 1.0
    data = to_arviz(runner, result, 100.0, num_samples=30)
    is_right({name: np.asarray(data["posterior"][name]) for name in "za"})
    assert np.abs(np.asarray(data["posterior_predictive"]["y"]).mean() - 100.0) < 1.0


@pytest.mark.long
def test_fits_of_svi_go_on_in_an_ensemble(fitted, key):
    _, single, runner, _ = fitted
    last = np.asarray(single.losses[-50:]).mean()
    locs = np.asarray(single.params["auto_loc"]) + np.array([[0.0], [0.1]])
    begun = runner.init(key, 100.0, init_params={**single.params, "auto_loc": locs})
    assert np.asarray(runner.evaluate(begun, 100.0)).max() < last + 20.0
    state = SVIState(*jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), single.state))
    assert np.asarray(runner.evaluate(state, 100.0)).max() < last + 20.0
    more = quiet(runner, key, 2, 100.0, init_state=state)
    assert np.asarray(more.losses).max() < last + 20.0
    back = SVI(contrast, runner.guide, runner.optim, Trace_ELBO())
    back.init(key, 100.0)
    assert back.evaluate(more.member(0).state, 100.0) < last + 20.0


def test_samplers_start_from_members_and_transport_maps(fitted, key):
    guide, _, runner, result = fitted
    start = starts.from_ensemble(key, runner, result, num_chains=4)
    assert np.abs(start["z"] - 100.0).max() < 5.0
    assert np.abs(start["a"]).max() < 5.0
    neutra = NeuTraReparam(guide, result.member(0).params)
    model = neutra.reparam(contrast)
    info = initialize_model(key, model, model_args=(100.0,))
    shared = {"auto_shared_latent": jnp.zeros(2)}
    is_right(neutra.transform_sample(shared["auto_shared_latent"]))
    assert info.potential_fn(shared) < 20.0


@pytest.mark.long
def test_a_map_fit_and_a_raw_density_name_their_latents(key):
    runner = EnsembleMAP(contrast, numpyro.optim.Adam(0.5), ensemble_size=2)
    near = {"z": jnp.array([95.0, 90.0])}
    is_right(quiet(runner, key, 300, 100.0, init_params=near).params)

    def log_joint(params, y):
        return -((params["z"] - params["a"] - y) ** 2), -((params["z"] - 100.0) ** 2)

    raw = EnsembleMAP.from_log_joint(
        log_joint, lambda k: {"z": jax.random.normal(k), "a": jnp.zeros(())},
        numpyro.optim.Adam(1.0), ensemble_size=2,
    )  # fmt: skip
    params = quiet(raw, key, 600, 100.0).params
    is_right(params)
    assert list(raw.get_params(quiet(raw, key, 1, 100.0).state)) == list(params)
