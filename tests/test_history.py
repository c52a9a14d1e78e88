"""Results do not depend on calls made before, elsewhere or at the same time."""

import copy
import threading
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from zoo import jit_once

from numpyro_ensemble import (
    EarlyStopping,
    EnsembleMAP,
    EnsemblePredictive,
    EnsembleVI,
    to_arviz,
)

ADAM = numpyro.optim.Adam(0.05)
ONES = np.ones(3)


def bounded(y, top):
    """The sites are in no alphabetical order, and a support depends on an argument."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    below = numpyro.sample("below", dist.Uniform(0.0, top))
    numpyro.sample("y", dist.Normal(below + slope.sum(), 1.0).expand([3]).to_event(1), obs=y)


def follows_data(y):
    """The model computes a support from its data."""
    u = numpyro.sample("u", dist.Uniform(0.0, y.max()))
    c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(u + c, 1.0).expand([3]).to_event(1), obs=y)


def follows_latent(y):
    """A support depends on another latent, and so on the start of a fit."""
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    high = numpyro.sample("high", dist.Uniform(low, low + y.max()))
    numpyro.sample("y", dist.Normal(high, 1.0).expand([3]).to_event(1), obs=y)


def with_bound(y):
    """The constraint of a parameter depends on the data."""
    rate = numpyro.param("rate", 0.5, constraint=dist.constraints.interval(0.0, jnp.max(y) + 1.0))
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(rate * alpha, 1.0).expand([3]).to_event(1), obs=y)


def required(y, shift):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    a = numpyro.sample("a", dist.Normal(shift, 1.0))
    numpyro.sample("y", dist.Normal(z + a, 1.0).expand([3]).to_event(1), obs=y)


def vi(model, guide=AutoNormal, loss=None, **options):
    options = {"ensemble_size": 2, **options}
    return EnsembleVI(model, guide(model), ADAM, loss or Trace_ELBO(), **options)


def map_fit(model, **options):
    return EnsembleMAP(model, ADAM, **{"ensemble_size": 2, **options})


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


@cache
def plain(make, model):
    """Return a runner that only `quiet` calls, as the reference of many tests."""
    return make(model)


def same(ours, theirs):
    """Compare the arrays of two trees bit for bit."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_array_equal(a, b)


def cases(quick, *rest):
    """Parametrise by the quick cases, and leave the rest to `make long`."""
    return [*quick, *(pytest.param(*case, marks=pytest.mark.long) for case in rest)]


# Earlier results are unchanged ------------------------------------------------------------------

TRACED = {
    "concrete": ({"jit_model_args": False}, lambda top: top),
    "inputs": ({}, jnp.asarray),
    "member_args": ({"member_args": ["top"]}, lambda top: np.full(2, top)),
}


@pytest.mark.parametrize("how", cases(["inputs"], ["concrete"], ["member_args"]))
def test_a_later_run_changes_no_earlier_result(how, key):
    options, argument = TRACED[how]
    runner = vi(bounded)
    first = quiet(runner, key, 3, ONES, argument(1.0), **options)
    before = runner.sample_posterior(key, first, ONES, 1.0, num_samples=20)
    params = runner.get_params(first.state)
    second = quiet(runner, key, 3, ONES, argument(100.0), **options)
    same(runner.sample_posterior(key, first, ONES, 1.0, num_samples=20), before)
    same(runner.get_params(first.state), params)
    assert before["below"].max() < 1.0
    assert runner.sample_posterior(key, second, ONES, 1.0, num_samples=20)["below"].max() > 2.0


@pytest.mark.long
@pytest.mark.parametrize("jit_model_args", cases([None], [False]))
def test_a_laplace_approximation_keeps_the_curvature_of_its_data(jit_model_args, key):
    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(loc, scale).expand([3]).to_event(1), obs=y)

    def spread(result):
        draws = runner.sample_posterior(key, result, np.arange(3.0), num_samples=200)
        return draws["scale"].std()

    runner = vi(model, AutoLaplaceApproximation)
    options = {"jit_model_args": jit_model_args}
    first = quiet(runner, key, 200, np.arange(3.0), **options)
    before = spread(first)
    quiet(runner, key, 200, 10.0 * np.arange(3.0), **options)
    assert_allclose(spread(first), before, rtol=1e-12)
    fresh = vi(model, AutoLaplaceApproximation)
    alone = quiet(fresh, key, 200, np.arange(3.0)).params["auto_loc"]
    assert_allclose(first.params["auto_loc"], alone, rtol=1e-6)


@pytest.mark.long
def test_draws_and_arviz_data_of_an_old_result_use_its_own_support(key):
    runner = vi(follows_data)
    options = {"num_samples": 5, "log_likelihood": False, "posterior_predictive": False}
    first = quiet(runner, key, 3, ONES)
    before = to_arviz(runner, first, ONES, **options)
    quiet(runner, key, 3, 100.0 * ONES)
    after = to_arviz(runner, first, ONES, **options)
    assert_array_equal(after["posterior"]["u"], before["posterior"]["u"])
    assert runner.sample_posterior(key, first, ONES, num_samples=50)["u"].max() < 1.0


@pytest.mark.parametrize(
    ("make", "model"),
    cases([(map_fit, with_bound)], (vi, follows_data), (vi, with_bound), (map_fit, follows_data)),
)
def test_steps_of_two_fits_in_turns_keep_their_own_constraints(make, model, key):
    """`evaluate`, `update` and `get_params` use the constraints of the state's own start."""
    runner, data = make(model), (ONES, 50.0 * ONES)
    states = [runner.init(key, y) for y in data]
    values = [[runner.evaluate(s, y) for y in data] for s in states]
    steps = [[runner.update(s, y)[1] for y in data] for s in states]
    for i, start in enumerate(data):
        alone = make(model)
        state = alone.init(key, start)
        for j, y in enumerate(data):
            assert_allclose(values[i][j], alone.evaluate(state, y), rtol=1e-12)
            assert_allclose(steps[i][j], alone.update(state, y)[1], rtol=1e-12)
        same(runner.get_params(states[i]), alone.get_params(state))


def test_svi_keeps_the_constraints_of_a_states_start_too(key):
    """As in NumPyro's SVI, the constraints of the start are used for other data, too."""
    runner = vi(with_bound, ensemble_size=1)
    state = runner.init(key, ONES)
    svi = SVI(with_bound, AutoNormal(with_bound), ADAM, Trace_ELBO())
    start_and_evaluate = jit_once(lambda key: svi.evaluate(svi.init(key, ONES), 50.0 * ONES))
    single = start_and_evaluate(jax.random.split(key, 1)[0])
    assert_allclose(runner.evaluate(state, 50.0 * ONES)[0], single, rtol=1e-9)


@pytest.mark.parametrize("model", cases([follows_latent], [follows_data]))
def test_a_map_state_knows_its_supports(model, key):
    runner = map_fit(model)
    first = quiet(runner, key, 3, ONES)
    quiet(runner, key, 3, 9.0 * ONES)
    same(runner.get_params(first.state), first.params)
    same(jax.jit(runner.get_params)(first.state), first.params)


def test_a_state_goes_through_transformations(key):
    runner = vi(follows_latent, AutoDelta)
    state = jax.jit(runner.init)(key, ONES)
    start = runner.init(key, ONES)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert_allclose(a, b, rtol=1e-9)
    state, losses = jax.jit(runner.update)(start, ONES)
    assert_allclose(losses, runner.update(start, ONES)[1], rtol=1e-9)
    many = jax.vmap(lambda k: runner.init(k, ONES))(jax.random.split(key, 3))
    params = jax.vmap(runner.get_params)(many)
    assert params["high_auto_loc"].shape == (3, 2)

    def body(_, state):
        return runner.update(state, ONES)[0]

    state = jax.lax.fori_loop(0, 3, body, start)
    whole = quiet(runner, key, 3, ONES)
    got = runner.get_params(state)
    for name, value in whole.params.items():
        assert_allclose(got[name], value, rtol=1e-9)


# Threads and callbacks --------------------------------------------------------------------------


def test_two_threads_share_a_runner(key):
    runner = vi(required)
    data = [(shift + ONES, shift) for shift in (0.0, 7.0)]
    alone = [quiet(plain(vi, required), key, 20, *args).losses for args in data]
    wrong: list = []

    def work(which):
        for i in range(6):
            args = data[(which + i) % 2]
            losses = quiet(runner, key, 20, *args).losses
            if not np.array_equal(losses, alone[(which + i) % 2]):
                wrong.append((which, i))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize("make", cases([map_fit], [vi]))
def test_a_run_inside_a_callback_of_another_changes_nothing(make, key):
    runner = make(required)
    alone = quiet(plain(make, required), key, 6, ONES, 0.0)
    inner = []

    def callback(step, state, losses):
        inner.append(quiet(runner, key, 6, 9.0 * ONES, 9.0).losses)
        runner.evaluate(state, ONES, 0.0)

    outer = quiet(runner, key, 6, ONES, 0.0, callback=callback, chunk_size=2)
    same(outer.params, alone.params)
    same(outer.losses, alone.losses)
    same(runner.get_params(outer.state), alone.params)
    same(inner[-1], quiet(plain(make, required), key, 6, 9.0 * ONES, 9.0).losses)


# First use inside a transformation --------------------------------------------------------------

Y = jnp.asarray(ONES)
USES = {
    "plain": lambda run: run(Y),
    "jit": lambda run: jax.jit(run)(Y),
    "vmap": lambda run: jax.vmap(run)(Y[None])[0],
    "jvp": lambda run: jax.jvp(run, (Y,), (Y,))[0],
    "eval_shape": lambda run: jax.eval_shape(run, Y) and None,
    "debug_nans": lambda run: _within(jax.debug_nans(True), run),
    "disable_jit": lambda run: _within(jax.disable_jit(), run),
}


def _within(context, run):
    with context:
        return run(Y)


@pytest.fixture(scope="module")
def expected():
    """Return the losses of each kind of runner in plain use."""
    key = jax.random.key(0)
    return {m: quiet(plain(m, required), key, 2, Y, 0.5).losses for m in (vi, map_fit)}


QUICK_USES = [(vi, ("jit", "plain"))]


def uses_in_turns(make):
    """Yield, for each use, a sequence that begins and ends with this use, by way of all others."""
    names = list(USES)
    for first in range(len(names)):
        # seven is prime, so each stride visits all seven uses
        stride = 1 + (first + (make is vi)) % (len(names) - 1)
        yield tuple(names[(first + stride * turn) % len(names)] for turn in range(len(names) + 1))


ALL_USES = [(make, uses) for make in (vi, map_fit) for uses in uses_in_turns(make)]


@pytest.mark.parametrize(
    ("make", "uses"),
    cases(QUICK_USES, *ALL_USES),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_the_first_use_of_a_runner_may_be_any(make, expected, uses, key):
    losses, runner = expected[make], make(required)
    for use in uses:
        got = USES[use](lambda y: quiet(runner, key, 2, y, 0.5).losses)
        if got is not None:
            assert_allclose(got, losses, rtol=1e-8, err_msg=use)
    assert not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(vars(runner.guide)))


def test_init_under_jit_leaves_a_runner_as_it_was(key):
    runner = vi(required)
    jax.jit(runner.init)(key, Y, 0.5)
    same(quiet(runner, key, 2, Y, 0.5).losses, quiet(plain(vi, required), key, 2, Y, 0.5).losses)


# Settings ---------------------------------------------------------------------------------------

SETTINGS = {
    "prior_weight": (map_fit, 0.1),
    "jacobian": (map_fit, True),
    "init_loc_fn": (map_fit, numpyro.infer.init_to_median),
    "kl_weight": (vi, 0.1),
    "loss": (vi, TraceMeanField_ELBO()),
    "optim": (vi, numpyro.optim.SGD(0.01)),
    "ensemble_size": (map_fit, 3),
    "model": (map_fit, lambda y: follows_data(2.0 * y)),
}


@cache
def changed_and_restored(make):
    """Return a runner whose settings are changed and set back by one test after another."""
    return make(follows_data)


CHANGES = [(name, copied) for name in SETTINGS for copied in (False, True)]
QUICK_CHANGES = [("prior_weight", True), ("ensemble_size", False)]


@pytest.mark.parametrize(
    ("name", "copied"),
    cases(QUICK_CHANGES, *(change for change in CHANGES if change not in QUICK_CHANGES)),
)
def test_a_setting_that_is_changed_takes_effect(name, copied, key):
    make, value = SETTINGS[name]
    runner = changed_and_restored(make)
    held = getattr(runner, name)
    before = quiet(runner, key, 2, ONES)
    changed = copy.copy(runner) if copied else runner
    try:
        setattr(changed, name, value)
        after = quiet(changed, key, 2, ONES)
    finally:
        setattr(runner, name, held)
    if name in ("optim", "loss"):
        wanted = vi(follows_data)
        wanted = EnsembleVI(
            follows_data, wanted.guide, value if name == "optim" else ADAM,
            value if name == "loss" else Trace_ELBO(), ensemble_size=2,
        )  # fmt: skip
    elif name == "model":
        wanted = map_fit(value)
    else:
        wanted = make(follows_data, **{name: value})
    same(after.losses, quiet(wanted, key, 2, ONES).losses)
    assert after.losses.shape != before.losses.shape or np.abs(after.losses - before.losses).max()
    same(quiet(runner, key, 2, ONES).losses, before.losses)


def test_a_setting_of_the_wrong_kind_is_refused(key):
    runner, guided = map_fit(follows_data), vi(follows_data)
    for owner, name, value, error in (
        (runner, "prior_weight", -1.0, ValueError),
        (runner, "init_loc_fn", 3, TypeError),
        (runner, "ensemble_size", 0, ValueError),
        (guided, "loss", Trace_ELBO, TypeError),
        (guided, "kl_weight", -1.0, ValueError),
        (guided, "optim", 3, TypeError),
        (guided, "guide", 3, TypeError),
    ):
        held = getattr(owner, name)
        with pytest.raises(error, match=f"^{name} "):
            setattr(owner, name, value)
        assert getattr(owner, name) is held


@pytest.mark.parametrize("make", cases([map_fit], [vi]))
def test_a_runner_can_be_deeply_copied(make, key):
    runner = plain(make, required)
    before = quiet(runner, key, 2, ONES, 0.5)
    other = copy.deepcopy(runner)
    same(quiet(other, key, 2, ONES, 0.5).losses, before.losses)
    held = copy.deepcopy(before)
    same(runner.get_params(held.state), before.params)
    assert held.finite.all()


def test_early_stopping_goes_with_debug_nans(key):
    rule = EarlyStopping(patience=1, window=2, min_delta=1e3)
    runner = map_fit(required)
    with jax.debug_nans(True):
        losses = quiet(runner, key, 12, Y, 0.5, early_stopping=rule).losses
    assert_array_equal(np.isfinite(losses).sum(1), [4, 4])
    inside = jax.jit(lambda y: runner.run(key, 12, y, 0.5, early_stopping=rule).losses)(Y)
    assert_allclose(inside, losses, rtol=1e-9)


# Single cases -----------------------------------------------------------------------------------


def test_data_in_double_precision_are_not_narrowed_before_the_model_sees_them(key):
    """Differences of seconds since 1970 are lost in float32; the model takes them in NumPy."""
    seconds = 1.7e9 + 10.0 * np.arange(6.0)
    big = np.array([3_000_000_000, 5_000_000_000])

    def model(t, n, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(slope * (t - t[0]) / 10.0, 1.0).to_event(1), obs=y)
        numpyro.sample("also", dist.Normal(slope * (n / 1e9), 1.0).to_event(1), obs=n / 1e9)

    with jax.enable_x64(False):
        runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
        result = quiet(runner, key, 200, seconds, big, np.arange(6.0, dtype=np.float32))
        assert_allclose(result.params["slope"], 1.0, atol=0.1)


def test_a_start_can_make_a_constraint_traced(key):
    def model(y):
        hi = numpyro.param("hi", 3.0, constraint=dist.constraints.positive)
        mid = numpyro.param("mid", 1.0, constraint=dist.constraints.interval(0.0, hi))
        numpyro.sample("y", dist.Normal(mid, 1.0).expand([3]).to_event(1), obs=y)

    runner = map_fit(model)
    starts = {"hi": jnp.array([10.0, 20.0]), "mid": jnp.array([1.0, 2.0])}
    state = runner.init(key, 8.0 * ONES, init_params=starts)
    params = runner.get_params(state)
    assert_allclose(params["mid"], starts["mid"], rtol=1e-6)
    assert quiet(runner, key, 400, 8.0 * ONES, init_params=starts).params["mid"].max() > 6.0


@pytest.mark.long
def test_a_runner_goes_on_with_its_own_model_and_guide(key):
    def other(y):
        z = numpyro.sample("z", dist.Normal(0.0, 5.0))
        numpyro.sample("y", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=y)

    def positive(y):
        z = numpyro.sample("z", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=y)

    first = quiet(map_fit(positive), key, 3, ONES)
    more = quiet(map_fit(other), key, 600, -5.0 * ONES, init_state=first.state)
    assert more.params["z"].max() < -3.0

    def guide_of(scale):
        def guide(y, shift):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.5), scale))
            numpyro.sample("a", dist.Normal(numpyro.param("at", lambda k: jax.random.normal(k)), 1))

        return guide

    narrow, wide = (
        EnsembleVI(required, guide_of(scale), ADAM, Trace_ELBO(), ensemble_size=2)
        for scale in (0.01, 3.0)
    )
    state = narrow.init(key, ONES, 0.5)
    fresh = wide.init(key, ONES, 0.5)
    assert_allclose(wide.evaluate(state, ONES, 0.5), wide.evaluate(fresh, ONES, 0.5), rtol=1e-9)
    assert np.abs(narrow.evaluate(state, ONES, 0.5) - wide.evaluate(state, ONES, 0.5)).max() > 0.1


def test_dictionaries_reach_the_model_in_their_order(key):
    def model(rows, **more):
        for name, value in {**rows, **more}.items():
            numpyro.sample(name, dist.Normal(value, 1.0))

    rows, more = {"zeta": jnp.array(1.0), "alpha": jnp.array(2.0)}, {"mid": 0.5, "beta": ONES[0]}
    runner = map_fit(model)
    keys = jax.random.split(key, 2)
    ours = runner.get_params(runner.init(keys, rows, **more))
    single = SVI(model, AutoDelta(model, init_loc_fn=numpyro.infer.init_to_uniform), ADAM,
                 Trace_ELBO())  # fmt: skip
    theirs = jit_once(lambda k: single.get_params(single.init(k, rows, **more)))(keys[1])
    for name in ("zeta", "alpha", "mid", "beta"):
        assert_allclose(ours[name][1], theirs[f"{name}_auto_loc"], rtol=1e-9)


def test_predictions_use_the_set_up_of_their_own_fit(key):
    def model(y, s):
        z = numpyro.sample("z", dist.Normal(0.0, 10.0))
        numpyro.sample("y", dist.Normal(z, s).expand([3]).to_event(1), obs=y)

    runner = vi(model, AutoLaplaceApproximation)
    quiet(runner, key, 50, ONES, jnp.array(1.0))
    second = quiet(runner, key, 50, ONES, jnp.array(0.01))
    predictive = EnsemblePredictive(
        model, second, guide=runner.guide, num_samples=100, return_sites=["z"]
    )
    spread = predictive(key, None, 0.01)["z"].reshape(2, 100).std(axis=1)
    assert_allclose(spread, 0.01 / np.sqrt(3.0), rtol=0.3)
    predictive.return_sites = ["y"]
    assert list(predictive(key, None, 0.01)) == ["y"]


def test_what_a_guide_closes_over_is_never_stale_in_draws(key):
    spread = [1.0]

    def guide(y, shift):
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.5), spread[0]))
        numpyro.sample("a", dist.Normal(numpyro.param("at", lambda k: jax.random.normal(k)), 1.0))

    runner = EnsembleVI(required, guide, ADAM, Trace_ELBO(), ensemble_size=2)
    result = quiet(runner, key, 2, ONES, 0.5)
    before = runner.sample_posterior(key, result, ONES, 0.5, num_samples=50)["z"].std()
    spread[0] = 5.0
    after = runner.sample_posterior(key, result, ONES, 0.5, num_samples=50)["z"].std()
    assert after > 3.0 * before


def test_a_model_that_looks_at_a_latent_is_told_so(key):
    def model(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z if z > 0 else 0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"value of a latent.*jnp\.where"):
        quiet(map_fit(model), key, 2, 1.0)
