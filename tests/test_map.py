"""EnsembleMAP against closed forms and against NumPyro's own SVI with AutoDelta."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from numpyro.contrib.module import random_nnx_module
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_uniform, init_to_value
from numpyro.infer.autoguide import AutoDelta
from zoo import CASES, NNX, X, Y, chosen, jit_once, map_on_ridge, ridge

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, ensemble_map, log_joint

STEPS = 12


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def leaves_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: assert_allclose(a, b, **tolerance), ours, theirs)


QUICK = {
    "hierarchy", "with_param",
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(sorted(set(CASES) - {"dependent_support"}), QUICK))
def test_a_member_is_a_single_run(name, key):
    case = CASES[name]
    runner = EnsembleMAP(case.model, numpyro.optim.Adam(0.05), ensemble_size=3)
    given = name in ("nnx_net", "eqx_net")  # their modules come with start values of their own
    with pytest.warns(UserWarning, match="start at the same values") if given else nullcontext():
        result = quiet(runner, key, STEPS, *case.args, **case.kwargs)

    guide = AutoDelta(case.model, init_loc_fn=init_to_uniform)
    svi = SVI(case.model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())

    @jax.jit
    def single(member_key):
        return svi.run(member_key, STEPS, *case.args, progress_bar=False, **case.kwargs)

    alone = single(jax.random.split(key, 3)[1])
    assert_allclose(result.losses[1], alone.losses, rtol=1e-7)
    ours = result.member(1)
    latents = [name for name in ours.params if f"{name}_auto_loc" in alone.params]
    assert latents
    filled = {name for name, value in alone.params.items() if jax.tree.leaves(value)}
    assert len(ours.params) == len(filled)  # a random module has empty entries for its latents
    for name, value in ours.params.items():
        theirs = alone.params[f"{name}_auto_loc" if name in latents else name]
        leaves_close(value, theirs, rtol=1e-6, atol=1e-9)
    leaves_close(ours.state.mutable_state, alone.state.mutable_state, rtol=1e-6)
    assert result.finite.all()
    one_leaf = np.asarray(result.params[latents[0]])
    assert np.abs(one_leaf[0] - one_leaf[1]).max() > 1e-3  # members differ


def ridge_solution(prior_weight=1.0, noise=0.5, prior_scale=2.0):
    penalty = prior_weight * noise**2 / prior_scale**2
    return np.linalg.solve(X.T @ X + penalty * np.eye(2), X.T @ Y)


@pytest.mark.core
@pytest.mark.parametrize("prior_weight", [1.0, 0, 7.0])
def test_ridge_regression_is_the_solved_system(prior_weight, key):
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=2, prior_weight=prior_weight)
    result = quiet(runner, key, 1500, X, Y)
    tolerance = 1e-6 if jax.config.jax_enable_x64 else 1e-3
    for fitted in result.params["w"]:
        assert_allclose(fitted, ridge_solution(prior_weight), atol=tolerance)
    wrong = ridge_solution({1.0: 0.0, 0: 1.0, 7.0: 1.0}[prior_weight])
    assert np.abs(fitted - wrong).max() > 10 * tolerance


def test_map_is_the_mode_over_constrained_space_unless_the_jacobian_is_wanted(key):
    def model():
        numpyro.sample("s", dist.Gamma(3.0, 2.0))

    for jacobian, mode in ((False, (3.0 - 1.0) / 2.0), (True, 3.0 / 2.0)):
        runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2, jacobian=jacobian)
        result = quiet(runner, key, 800)
        assert_allclose(result.params["s"], mode, atol=1e-6)


@pytest.mark.promotes_ranks
def test_jacobian_of_a_vector_transform_counts_once(key):
    def model():
        with numpyro.plate("rows", 2):
            numpyro.sample("p", dist.Dirichlet(jnp.array([2.0, 3.0, 4.0])))

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.05), ensemble_size=2, jacobian=True)
    p = quiet(runner, key, 800).params["p"]
    assert p.shape == (2, 2, 3)
    # stick breaking: u_k = logit of Beta(a_k, rest) shifted; its mode is a_k / (a_k + rest)
    sticks = np.array([2 / 9, 3 / 7])
    mode = np.array([sticks[0], (1 - sticks[0]) * sticks[1], (1 - sticks[0]) * (1 - sticks[1])])
    assert_allclose(p, np.broadcast_to(mode, (2, 2, 3)), atol=1e-5)
    simplex_mode = np.array([1.0, 2.0, 3.0]) / 6
    assert np.abs(mode - simplex_mode).max() > 0.03


def test_a_support_that_depends_on_other_latents_follows_them(key):
    model, y = CASES["dependent_support"].model, Y - Y.mean() + 1.0
    runner = EnsembleMAP(model, numpyro.optim.Adam(0.05), ensemble_size=2)
    starts = {"low": np.array([2.0, -1.0]), "high": np.array([3.0, 0.5])}
    params = quiet(runner, key, 1500, y, init_params=starts).params
    assert_allclose(params["low"], 0.0, atol=1e-5)
    assert_allclose(params["high"], 1.0, atol=1e-5)
    # SVI freezes the interval (2, 5) that belongs to the first value of low
    guide = AutoDelta(model, init_loc_fn=init_to_value(values={"low": 2.0, "high": 3.0}))
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    alone = jit_once(lambda k: svi.run(k, 1500, y, progress_bar=False).params)(key)
    assert alone["high_auto_loc"] > 2.0


def test_result_params_feed_predictive(key):
    result = quiet(map_on_ridge(), key, 20, X, Y)
    drawn = Predictive(ridge, result.params, batch_ndims=1)(key, X, None)["y"]
    assert drawn.shape == (2, 8)


def test_best_ranks_finite_members_by_their_last_losses(key):
    def model():
        numpyro.sample(
            "x",
            dist.MixtureSameFamily(
                dist.Categorical(jnp.array([0.2, 0.8])), dist.Normal(jnp.array([-3.0, 3.0]), 0.5)
            ),
        )

    starts = {"x": np.array([-2.5, 2.0, np.nan, -3.5])}
    runner = EnsembleMAP(model, numpyro.optim.Adam(0.05), ensemble_size=4)
    with pytest.warns(UserWarning, match="1 of 4 members .*: 2"):
        result = quiet(runner, key, 300, init_params=starts)
    assert list(result.finite) == [True, True, False, True]
    assert result.ranking()[0] == 1
    assert set(result.ranking()) == {0, 1, 3}
    best = result.best()
    assert_allclose(best.params["x"], 3.0, atol=1e-3)
    assert best.losses.shape == (300,)
    assert_allclose(result.member(-1).params["x"], -3.0, atol=1e-3)
    with pytest.raises(IndexError, match="takes -4 to 3, got 4"):
        result.member(4)
    with pytest.raises(ValueError, match="3 of 4 members are finite"):
        result.best(rank=3)


def test_starts_may_be_given(key):
    runner = EnsembleMAP(CASES["positive"].model, numpyro.optim.SGD(1e-12), ensemble_size=3)
    shared = {"scale": 0.7}
    each = {"scale": np.array([0.7, 0.8, 0.9])}

    def made(member_key):
        return {"scale": jax.random.uniform(member_key, minval=1.0, maxval=2.0)}

    state = runner.init(key, X, Y, init_params=shared)
    assert_allclose(runner.get_params(state)["scale"], 0.7, rtol=1e-6)
    result = quiet(runner, key, 2, X, Y, init_params=each)
    assert_allclose(result.params["scale"], each["scale"], rtol=1e-6)
    assert np.ptp(result.params["loc"]) > 0.1
    result = quiet(runner, key, 2, X, Y, init_params=made)
    expected = jax.vmap(made)(jax.random.split(key, 3))["scale"]
    assert_allclose(result.params["scale"], expected, rtol=1e-6)


@pytest.mark.long
def test_where_a_fit_ended_another_may_start(key):
    runner = EnsembleMAP(CASES["positive"].model, numpyro.optim.SGD(1e-12), ensemble_size=3)
    result = quiet(runner, key, 2, X, Y)
    again = quiet(runner, key, 2, X, Y, init_params=result.params)
    assert_allclose(again.params["loc"], result.params["loc"], rtol=1e-6)


@pytest.mark.long
def test_starts_of_parameters_and_of_modules_may_be_given(key):
    case = CASES["eqx_net"]
    runner = EnsembleMAP(case.model, numpyro.optim.SGD(1e-12), ensemble_size=2)
    params = quiet(
        EnsembleMAP(CASES["flax_net"].model, numpyro.optim.Adam(0.1), ensemble_size=2),
        key, 2, *case.args,
    ).params  # fmt: skip
    again = quiet(
        EnsembleMAP(CASES["flax_net"].model, numpyro.optim.SGD(1e-12), ensemble_size=2),
        key, 1, *case.args, init_params=params,
    ).params  # fmt: skip
    leaves_close(again, params, rtol=1e-6)
    with pytest.warns(UserWarning, match="start at the same values"):
        state = runner.init(key, *case.args)
    net = runner.get_params(state)["net$params"]
    moved = jax.tree.map(lambda leaf: leaf.at[1].add(1.0), net)
    leaves_close(
        runner.get_params(runner.init(key, *case.args, init_params={"net$params": moved}))[
            "net$params"
        ],
        moved,
        rtol=1e-6,
    )


def test_alike_starts_are_reported(key):
    strategy = init_to_value(values={"w": np.ones(2)})
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), init_loc_fn=strategy, ensemble_size=2)
    with pytest.warns(UserWarning, match="start at the same values.*init_params"):
        quiet(runner, key, 2, X, Y)


def gaussian_joint(params, x, y):
    mean = x @ params["w"]
    return dist.Normal(mean, 0.5).log_prob(y).sum(), dist.Normal(0, 2).log_prob(params["w"]).sum()


def init_w(key):
    return {"w": jax.random.normal(key, (2,))}


def test_ensemble_map_equals_the_solved_system(key):
    params, losses = ensemble_map(
        gaussian_joint, init_w, ensemble_size=2, num_steps=1500, data=(X, Y), rng_key=key,
        learning_rate=0.1,
    )  # fmt: skip
    assert losses.shape == (2, 1500)
    assert_allclose(params["w"], np.stack([ridge_solution()] * 2), atol=1e-6)


def test_from_log_joint_agrees_with_the_model(key):
    starts = jax.vmap(init_w)(jax.random.split(key, 2))
    raw = EnsembleMAP.from_log_joint(
        gaussian_joint, init_w, numpyro.optim.Adam(0.1), ensemble_size=2
    )
    ours = quiet(raw, key, 30, X, Y)
    theirs = quiet(map_on_ridge(), key, 30, X, Y, init_params=starts)
    assert_allclose(ours.params["w"], theirs.params["w"], rtol=1e-7)
    assert_allclose(ours.losses, theirs.losses, rtol=1e-7)
    again = quiet(raw, key, 30, X, Y, init_params=starts)
    assert_allclose(again.params["w"], ours.params["w"])


@pytest.mark.long
@pytest.mark.promotes_ranks  # Flax promotes
def test_an_nnx_module_follows_batches(key):
    def make(key):
        return nnx.Linear(2, 1, rngs=nnx.Rngs(key), param_dtype=jnp.result_type(float))

    def arrays(key):
        return nnx.to_pure_dict(nnx.state(make(key)))

    def by_module(net, x, y):
        return -((y - net(x)[:, 0]) ** 2).sum(), -(net.kernel[...] ** 2).sum()

    def by_hand(w, x, y):
        return -((y - (x @ w["kernel"] + w["bias"])[:, 0]) ** 2).sum(), -(w["kernel"] ** 2).sum()

    fits = []
    for joint, start in ((by_module, make), (by_hand, arrays)):
        runner = EnsembleMAP.from_log_joint(joint, start, numpyro.optim.Adam(0.1), ensemble_size=2)
        fits.append(quiet(runner, key, 6, X, Y, batch_size=3))
    assert_allclose(fits[0].losses, fits[1].losses, rtol=1e-7)
    assert_allclose(fits[0].params.kernel[...], fits[1].params["kernel"], rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_density_of_a_model_is_a_raw_density(key, weight):
    """The model's sites are not sites of the fit: none is drawn, reweighted or warned about."""
    options = {"ensemble_size": 2, "prior_weight": weight}
    starts = jax.vmap(init_w)(jax.random.split(key, 2))
    optim = numpyro.optim.Adam(0.1)
    ours = quiet(
        EnsembleMAP.from_log_joint(log_joint(ridge), init_w, optim, **options), key, 30, X, Y
    )
    theirs = quiet(EnsembleMAP(ridge, optim, **options), key, 30, X, Y, init_params=starts)
    assert_allclose(ours.params["w"], theirs.params["w"], rtol=1e-7)


def test_a_raw_density_goes_on_and_compiles_once(key, compile_count):
    runner = EnsembleMAP.from_log_joint(
        gaussian_joint, init_w, numpyro.optim.Adam(0.1), ensemble_size=2
    )
    whole = quiet(runner, key, 6, X, Y)
    first = quiet(runner, key, 4, X, Y)
    with compile_count() as count:
        quiet(runner, key, 4, X, Y)
    assert count.count == 0, count.names
    second = quiet(runner, key, 2, X, Y, init_state=first.state)
    leaves_close(second.params, whole.params, rtol=1e-12)
    leaves_close(runner.get_params(second.state), whole.params, rtol=1e-12)
    with pytest.raises(TypeError, match="from_log_joint takes no prior_sites"):
        EnsembleMAP.from_log_joint(gaussian_joint, init_w, numpyro.optim.Adam(0.1), prior_sites=())
    adam = numpyro.optim.Adam(0.1)
    one_number = EnsembleMAP.from_log_joint(lambda w, *_: w["w"].sum(), init_w, adam)
    with pytest.raises(TypeError, match=r"must return two numbers.*an array of shape \(\)"):
        quiet(one_number, key, 1, X, Y)
    with pytest.raises(TypeError, match=r"one member from a key, got a member \(dict\)"):
        EnsembleMAP.from_log_joint(gaussian_joint, init_w(key), adam)
    with pytest.raises(ValueError, match="init_fn makes nothing that can be trained"):
        ensemble_map(
            gaussian_joint, lambda k: 0.0, ensemble_size=2, num_steps=1, data=(X, Y), rng_key=key
        )


@pytest.mark.long
def test_a_raw_density_must_follow_its_batches(key):
    def forgetful(params, x, y):
        return gaussian_joint(params, X, Y)

    def fit(density, **options):
        return ensemble_map(
            density, init_w, ensemble_size=2, num_steps=2, data=(X, Y), rng_key=key, **options
        )

    assert fit(gaussian_joint, batch_size=4)[1].shape == (2, 2)
    assert fit(forgetful)[1].shape == (2, 2)
    with pytest.raises(ValueError, match="'log_likelihood'.*does not depend on the batched"):
        fit(forgetful, batch_size=4)


def test_learning_rate_and_optimizer_exclude_each_other(key):
    with pytest.raises(ValueError, match="either optimizer or learning_rate"):
        ensemble_map(
            gaussian_joint, init_w, ensemble_size=2, num_steps=1, data=(X, Y), rng_key=key,
            learning_rate=0.1, optimizer=numpyro.optim.Adam(0.1),
        )  # fmt: skip


@pytest.mark.promotes_ranks
def test_parameters_of_a_partly_random_module_are_arrays(key):
    def model(x, y=None):
        net = random_nnx_module("net", NNX, {"kernel": dist.Normal(0.0, 1.0)})
        numpyro.sample("y", dist.Normal(net(x)[:, 0], 1.0).to_event(1), obs=y)

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.05), ensemble_size=2)
    result = quiet(runner, key, 3, X, Y)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result.params))
    assert jax.tree.structure(result.params) == jax.tree.structure(runner.get_params(result.state))
    assert set(result.params) == {"net$params", "net/kernel"}
    again = quiet(runner, key, 1, X, Y, init_params=result.params)
    assert_allclose(again.losses[:, 0], runner.evaluate(result.state, X, Y), rtol=1e-6)
    y = EnsemblePredictive(model, result)(key, X)["y"]
    assert y.shape == (2, len(X))
