"""EnsemblePredictive against NumPyro's Predictive, member by member."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from numpyro.infer.svi import SVIState
from numpyro.primitives import mutable as numpyro_mutable
from zoo import CASES, X, Y, chosen, map_on_ridge, ridge, vi_on_ridge

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleResult, EnsembleVI
from numpyro_ensemble.mapping import map_draws, peak_bytes

ADAM = numpyro.optim.Adam(0.05)


def fit(runner, key, *args, num_steps=3):
    return runner.run(key, num_steps, *args, progress_bar=False)


def line(x, y=None):
    """A model with a parameter of its own, a latent, and a deterministic site."""
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    mean = numpyro.deterministic("mean", slope * x + w)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(mean, 0.1), obs=y)


INPUT = np.linspace(-1.0, 1.0, 8)
DRAWS = {"w": jnp.array([1.0, -1.0, 0.5])}
SLOPES = {"slope": jnp.array([0.1, 0.2, 0.3])}


@pytest.mark.core
def test_it_is_numpyros_predictive_for_every_member(key):
    ours = EnsemblePredictive(line, DRAWS, params={"slope": jnp.full(3, 0.4)})(key, INPUT)
    theirs = Predictive(line, DRAWS, params={"slope": jnp.asarray(0.4)})(key, INPUT)
    assert ours.keys() == theirs.keys() == {"mean", "y"}
    for name, value in theirs.items():
        assert_allclose(ours[name], value, rtol=1e-6)
    deep = {"w": jnp.arange(6.0).reshape(3, 2)}
    ours = EnsemblePredictive(line, deep, params={"slope": jnp.full(3, 0.4)}, batch_ndims=2)
    theirs = Predictive(line, deep, params={"slope": jnp.asarray(0.4)}, batch_ndims=2)
    assert_allclose(ours(key, INPUT)["y"], theirs(key, INPUT)["y"], rtol=1e-6)
    assert ours(key, INPUT)["y"].shape == (3, 2, 8)


def test_every_member_has_its_own_parameters(key):
    ours = EnsemblePredictive(line, DRAWS, params=SLOPES)(key, INPUT)
    expected = SLOPES["slope"][:, None] * INPUT[None] + DRAWS["w"][:, None]
    assert_allclose(ours["mean"], expected, rtol=1e-6)
    # NumPyro substitutes the whole stack into the model
    with pytest.raises((TypeError, ValueError), match="roadcast|incompatible"):
        Predictive(line, DRAWS, params=SLOPES, batch_ndims=1)(key, INPUT)


@pytest.mark.core
def test_the_result_of_a_map_fit_predicts(key):
    result = fit(EnsembleMAP(line, ADAM, ensemble_size=3), key, INPUT, Y)
    predictive = EnsemblePredictive(line, result, num_samples=4, group_by_member=True)
    grouped = predictive(key, INPUT)
    assert {name: value.shape for name, value in grouped.items()} == {
        "mean": (3, 4, 8), "y": (3, 4, 8),
    }  # fmt: skip
    expected = result.params["slope"][:, None] * INPUT[None] + result.params["w"][:, None]
    assert_allclose(grouped["mean"], np.repeat(expected[:, None], 4, axis=1), rtol=1e-5)
    assert np.abs(grouped["y"][:, 0] - grouped["y"][:, 1]).min() > 0
    flat = EnsemblePredictive(line, result, num_samples=4)(key, INPUT)
    assert_array_equal(flat["y"], grouped["y"].reshape(12, 8))
    only = EnsemblePredictive(line, result, return_sites=["mean"])(key, INPUT)
    assert {name: value.shape for name, value in only.items()} == {"mean": (3, 8)}


MODULES = ["flax_net", "nnx_net", "eqx_net", "batch_norm", "random_nnx_net"]


@pytest.mark.long
@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", chosen(MODULES, {"nnx_net"}))
def test_modules_and_mutable_state_are_per_member(name, key):
    case = CASES[name]
    runner = EnsembleMAP(case.model, ADAM, ensemble_size=2)
    starts = None
    if name in ("nnx_net", "eqx_net"):  # these modules come with weights
        with pytest.warns(UserWarning, match="start at the same values"):
            form = runner.get_params(runner.init(key, *case.args))
        starts = jax.tree.map(lambda a: jnp.stack([a[0], a[0] + 1.0]), form)
    result = runner.run(key, 2, *case.args, init_params=starts, progress_bar=False)
    model = handlers.uncondition(case.model)
    draws = EnsemblePredictive(model, result, num_samples=2)(key, *case.args)["y"]
    keys = jax.random.split(key, 4)
    for i in range(4):
        single = result.member(i // 2)
        known = {k: v for k, v in single.params.items() if hasattr(v, "shape")}
        state = {**single.params, **(single.state.mutable_state or {})}
        alone = Predictive(model, known, params=state, batch_ndims=0)(keys[i], *case.args)["y"]
        assert_allclose(draws[i], alone, rtol=1e-6)


def test_state_that_is_not_real_is_per_member_too(key):
    def model(y=None):
        count = numpyro_mutable("count", {"n": jnp.zeros((), int)})
        count["n"] = count["n"] + 1
        numpyro.sample("y", dist.Normal(count["n"], 1e-6), obs=y)

    counts = {"count": {"n": jnp.array([2, 7])}}
    state = SVIState((jnp.zeros(2, int), {}), counts, jax.random.split(key, 2))
    result = EnsembleResult({}, state, jnp.zeros((2, 1)))
    drawn = EnsemblePredictive(model, result, num_samples=1)(key)["y"]
    assert_allclose(drawn, [3.0, 8.0], atol=1e-4)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "guide", [AutoNormal, pytest.param(AutoLaplaceApproximation, marks=pytest.mark.long)]
)
def test_a_guide_draws_with_each_members_parameters(guide, key):
    runner = vi_on_ridge()
    if guide is not AutoNormal:
        runner = EnsembleVI(ridge, guide(ridge), ADAM, Trace_ELBO(), ensemble_size=2)
    guide, result = runner.guide, fit(runner, key, X, Y)
    predictive = EnsemblePredictive(
        ridge, result, guide=guide, num_samples=400, return_sites=["w", "y"], group_by_member=True
    )
    draws = predictive(key, X, None)
    assert draws["y"].shape == (2, 400, 8)
    for e in range(2):
        params = result.member(e).params
        alone = guide.sample_posterior(key, params, X, Y, sample_shape=(4000,))["w"]
        error = alone.std(0) * np.sqrt(1 / 400)
        assert_allclose(draws["w"][e].mean(0), alone.mean(0), atol=5 * error.max())
        assert_allclose(draws["w"][e].std(0), alone.std(0), rtol=0.2)
    given = EnsemblePredictive(ridge, guide=guide, params=result.params, num_samples=400)
    assert given(key, X, None)["y"].shape == (800, 8)


def test_prior_predictions(key):
    draws = EnsemblePredictive(ridge, num_samples=2000)(key, X, None)
    assert draws["w"].shape == (2000, 2)
    assert_allclose(draws["w"].std(0), 2.0, rtol=0.1)
    ours = EnsemblePredictive(line, params=SLOPES, num_samples=5, group_by_member=True)(key, INPUT)
    assert ours["y"].shape == (3, 5, 8)
    theirs = Predictive(ridge, num_samples=3)(key, X, None)
    assert_allclose(EnsemblePredictive(ridge, num_samples=3)(key, X, None)["y"], theirs["y"])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_batches_change_nothing(batch_size, key):
    options = {"params": SLOPES, "num_samples": 4}
    whole = EnsemblePredictive(line, DRAWS, **options, parallel=True)(key, INPUT)
    parts = EnsemblePredictive(line, DRAWS, **options, batch_size=batch_size)(key, INPUT)
    one = EnsemblePredictive(line, DRAWS, **options, parallel=False)(key, INPUT)
    for name, value in whole.items():
        assert_allclose(parts[name], value, rtol=1e-6)
        assert_allclose(one[name], value, rtol=1e-6)


def test_weights_resample_the_members(key):
    samples = {"w": jnp.array([[0.0, 0.1], [10.0, 10.1], [20.0, 20.1]])}
    weights = np.array([0.1, 0.0, 0.3])
    options = {"batch_ndims": 2, "return_sites": ["w"]}
    drawn = EnsemblePredictive(ridge_free, samples, weights=weights, **options)(key)["w"]
    assert drawn.shape == (6,)
    members = np.asarray(drawn) // 10
    # a draw from each stratum of 1 / 6
    assert (members == 0).sum() in (1, 2) and (members == 2).sum() in (4, 5)
    even = EnsemblePredictive(ridge_free, samples, weights=np.ones(3), **options)(key)["w"]
    assert_array_equal(np.sort(even), np.sort(samples["w"].ravel()))  # each draw is used once
    with jax.enable_x64(False):  # single precision rounds a draw of a million to the next member
        two = {"w": jnp.array([0.0, 1.0])}
        many = EnsemblePredictive(ridge_free, two, num_samples=500_000, weights=[1.0, 0.0])
        # with this key the last place is at 0.99 of its stratum
        assert np.max(many.places(jax.random.key(79)).member) == 0
    result = fit(vi_on_ridge(), key, X, Y)
    one = EnsemblePredictive(
        ridge,
        result,
        guide=vi_on_ridge().guide,
        num_samples=200,
        weights=[0.0, 1.0],
        return_sites=["w"],
    )(key, X, None)["w"]
    assert len(np.unique(one[:, 0])) == 400  # every draw is new
    assert_allclose(one.mean(0), result.params["w_auto_loc"][1], atol=0.05)


def ridge_free():
    numpyro.sample("w", dist.Normal(0.0, 1.0))


@pytest.mark.promotes_ranks
def test_discrete_sites_are_inferred(key):
    def model(y):
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(jnp.where(z == 1, 2.0, -2.0), 0.1), obs=y)

    y = np.array([2.0, -2.0, 2.0])
    predictive = EnsemblePredictive(model, num_samples=3, infer_discrete=True)
    assert_array_equal(predictive(key, y)["z"], np.tile([1, 0, 1], (3, 1)))


def test_deterministic_sites_are_computed_anew_or_not(key):
    given = {**DRAWS, "mean": jnp.full((3, 8), 7.0)}
    anew = EnsemblePredictive(line, given, params=SLOPES)(key, INPUT)
    held = EnsemblePredictive(line, given, params=SLOPES, condition_deterministic=True)(key, INPUT)
    assert np.abs(anew["mean"] - 7.0).min() > 1.0
    assert_array_equal(held["mean"], given["mean"])


def test_equal_arguments_compile_nothing(key, compile_count):
    predictive = EnsemblePredictive(line, DRAWS, params=SLOPES)
    first = predictive(key, INPUT)
    jax.random.key(1)
    with compile_count() as count:
        predictive(jax.random.key(1), INPUT.copy())
    assert count.count == 0, count.names
    jitted = jax.jit(lambda k, x: predictive(k, x))(key, INPUT)
    assert_allclose(jitted["y"], first["y"], rtol=1e-6)


def test_draws_are_made_as_many_at_once_as_there_is_room(key):
    weights = jnp.ones((1, 512))

    def one(w):
        hidden = jnp.tanh(jnp.ones((2000, 1)) @ (w * weights))
        return (hidden @ weights.T)[:, 0]

    alive = peak_bytes(one, 1.0)
    assert 2000 * 512 * 8 <= alive <= 4 * 2000 * 512 * 8
    draws = jnp.ones(300)
    for fn, fits in ((lambda d: map_draws(one, d), True), (jax.vmap(one), False)):
        memory = jax.jit(fn).lower(draws).compile().memory_analysis().temp_size_in_bytes
        assert (memory < 2**29) == fits
    assert "scan" in str(jax.make_jaxpr(lambda d: map_draws(one, d, 10))(draws))


def test_one_member_alone(key):
    ours = EnsemblePredictive(line, {"w": 0.5}, params={"slope": 0.4}, batch_ndims=0)(key, INPUT)
    theirs = Predictive(line, {"w": jnp.array(0.5)}, params={"slope": 0.4}, batch_ndims=0)
    assert_allclose(ours["y"], theirs(key, INPUT)["y"], rtol=1e-6)


def test_sites_that_were_not_fitted_are_named(key):
    def more(x, y=None):
        numpyro.sample("b", dist.Normal(100.0, 1.0))
        line(x, y)

    result = fit(EnsembleMAP(line, ADAM, ensemble_size=2), key, INPUT, Y)
    with pytest.warns(UserWarning, match=r"\['b'\] were no sites of the fitted model"):
        EnsemblePredictive(more, result)(key, INPUT)


def test_misspelt_samples_are_named(key):
    """As in NumPyro, the site would be drawn from its prior without a word."""

    def model():
        numpyro.sample("x_4", dist.Normal(numpyro.sample("weight", dist.Normal(0, 1)), 1))
        numpyro.sample("theta_new", dist.Normal(0, 1))

    with pytest.warns(UserWarning, match="the samples have 'wegiht', which is .* lack 'weight'"):
        EnsemblePredictive(model, {"wegiht": jnp.ones(3)})(key)
    others = {"weight": jnp.ones(3), "x_0": jnp.ones(3), "theta": jnp.ones(3)}
    EnsemblePredictive(model, others)(key)


def test_failed_members_are_left_out(key):
    broken = {"w": jnp.array([1.0, jnp.nan, 0.5])}
    with pytest.warns(UserWarning, match="1 of 3 members are not finite: 1. They are left out"):
        predictive = EnsemblePredictive(line, broken, params=SLOPES, weights=[0.0, 0.5, 1.0])
    drawn = predictive(key, INPUT)["mean"]
    assert_allclose(drawn, np.tile(SLOPES["slope"][2] * INPUT + 0.5, (2, 1)), rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 3 members are not finite: 1. Leave them out"):
        EnsemblePredictive(line, broken, params=SLOPES, on_failed="raise")
    with pytest.raises(ValueError, match="3 of 3 members are not finite.*No member is left"):
        EnsemblePredictive(line, {"w": jnp.full(3, jnp.nan)}, params=SLOPES)


def test_observed_arguments_are_noticed(key):
    predictive = EnsemblePredictive(line, DRAWS, params=SLOPES)
    with pytest.warns(UserWarning, match=r"\['y'\] are observed in this call.*y=None"):
        draws = predictive(key, INPUT, Y)
    assert_array_equal(draws["y"], np.tile(Y, (3, 1)))
    EnsemblePredictive(line, DRAWS, params=SLOPES, return_sites=["mean"])(key, INPUT, Y)


def stacked(**leaves):
    return EnsembleResult(leaves, None, jnp.zeros((3, 1)))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "posterior_samples takes a dict.*got int"),
        ((), {}, ValueError, "num_samples is needed"),
        (({"a": np.ones(3), "b": np.ones(2)},), {}, ValueError, "must have the same leading axes"),
        ((DRAWS,), {"params": {"slope": np.ones(2)}}, ValueError, "have 3 members, and params"),
        ((DRAWS,), {"weights": [1.0, -1.0, 1.0]}, ValueError, "weights takes finite numbers"),
        ((DRAWS,), {"weights": [1.0, 1.0]}, ValueError, "one number for each of 3 members"),
        ((DRAWS,), {"weights": np.zeros(3)}, ValueError, "weights add up to 0"),
        (
            (DRAWS,), {"weights": np.ones(3), "group_by_member": True}, ValueError,
            "leave out weights or group_by_member",
        ),
        ((DRAWS,), {"batch_size": 2, "parallel": True}, ValueError, "either batch_size or"),
        ((DRAWS,), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ((DRAWS,), {"guide": ridge}, ValueError, "either posterior_samples or a guide"),
        ((DRAWS,), {"batch_ndims": 3}, ValueError, "batch_ndims takes 0, 1 or 2"),
        ((DRAWS,), {"batch_ndims": 2}, ValueError, "leading axes, of members and draws"),
        ((DRAWS,), {"return_sites": "y"}, TypeError, "return_sites takes a collection"),
        ((DRAWS,), {"on_failed": "ignore"}, ValueError, 'on_failed takes "warn" or "raise"'),
        ((), {"num_samples": 3, "group_by_member": True}, ValueError, "group_by_member needs"),
        (
            ({"w": np.ones((3, 2))},), {"batch_ndims": 2, "num_samples": 4}, ValueError,
            "num_samples=4, and posterior_samples lead with",
        ),
    ],
)  # fmt: skip
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        EnsemblePredictive(line, *args, **options)


def test_a_result_of_another_model_is_refused(key):
    result = fit(vi_on_ridge(), key, X, Y)
    with pytest.raises(ValueError, match="'w_auto_loc'.*pass guide=runner.guide"):
        EnsemblePredictive(ridge, result)(key, X, None)
    with pytest.raises(ValueError, match="the EnsembleResult has the params"):
        EnsemblePredictive(ridge, result, params={})


def test_samples_with_an_axis_too_many_are_refused(key):
    with pytest.raises(ValueError, match=r"'w' has shape \(7,\).*batch_ndims=1"):
        EnsemblePredictive(line, {"w": np.zeros((3, 7))}, params=SLOPES)(key, INPUT)


def test_a_guide_must_be_that_of_the_fit(key):
    result = fit(map_on_ridge(), key, X, Y)
    guide = AutoNormal(ridge)
    options = {"guide": guide, "num_samples": 2}
    with pytest.raises(ValueError, match="the guide was never called: take the one.*runner.guide"):
        EnsemblePredictive(ridge, result, **options)(key, X, None)
    handlers.seed(guide, key)(X, Y)
    with pytest.raises(ValueError, match=r"\['w_auto_loc', 'w_auto_scale'\], which are not among"):
        EnsemblePredictive(ridge, result, **options)(key, X, None)


def test_a_member_that_ended_badly_is_left_out(key):
    def model(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        numpyro.factor("wall", jnp.where(mu > 50.0, jnp.nan, 0.0))
        numpyro.sample("y", dist.Normal(mu, 0.1), obs=y)

    starts = {"mu": jnp.array([0.0, 100.0])}
    with pytest.warns(UserWarning, match="not finite: 1"):
        result = EnsembleMAP(model, ADAM, ensemble_size=2).run(
            key, 3, 2.0, init_params=starts, stable_update=True, progress_bar=False
        )
    assert np.isfinite(result.params["mu"]).all()  # the failed member keeps its start
    with pytest.raises(ValueError, match="1 of 2 members are not finite: 1"):
        EnsemblePredictive(model, result, on_failed="raise")
    with pytest.raises(ValueError, match="rng_key takes one key"):
        EnsemblePredictive(model, DRAWS)(0.0)
