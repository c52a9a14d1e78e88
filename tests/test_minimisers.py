"""Quasi-Newton fits, line searches and whole searches against SciPy, optimistix, optax and SVI."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from scipy.optimize import minimize
from zoo import CASES, Case, X, Y, jit_once, ridge

from numpyro_ensemble import EnsembleMAP, EnsembleVI, ensemble_map

RNG = np.random.default_rng(3)
W = RNG.normal(size=(40, 3)).round(2)
Z = (RNG.random(40) < 1 / (1 + np.exp(-W @ [1.0, -1.0, 0.5]))).astype(float)
LBFGS = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
SOLVERS = {
    "lbfgs": LBFGS,
    "lbfgs_direct": optimistix.LBFGS(rtol=1e-8, atol=1e-8, use_inverse=False, history_length=4),
    "bfgs": optimistix.BFGS(rtol=1e-8, atol=1e-8),
    "dfp": optimistix.DFP(rtol=1e-8, atol=1e-8),
    "cg": optimistix.NonlinearCG(rtol=1e-9, atol=1e-9),
    "best": optimistix.BestSoFarMinimiser(optimistix.BFGS(rtol=1e-8, atol=1e-8)),
}


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def zoned(w, z):
    """A logistic regression with sites in no alphabetical order, and scalars beside vectors."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    base = numpyro.sample("base", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(z)):
        numpyro.sample("z", dist.Bernoulli(logits=base + tau * (w @ slopes)), obs=z)


def objective(runner, *args):
    """Return the loss and its gradient at one member's unconstrained parameters, by name."""
    guide = AutoDelta(runner.model)
    svi = SVI(runner.model, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    svi.init(jax.random.key(0), *args)

    def loss(params):
        every = svi.constrain_fn(params)
        return svi.loss.loss(jax.random.key(0), every, svi.model, guide, *args)

    return loss


def scipys(loss, start):
    """Return SciPy's minimum of a loss over a dictionary."""
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    both = jit_once(jax.value_and_grad(lambda x: loss(unravel(x))))
    options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9, "maxls": 50}
    run = minimize(
        lambda x: tuple(map(np.asarray, both(x))),
        flat,
        jac=True,
        method="L-BFGS-B",
        options=options,
    )
    return unravel(run.x), run.fun


@pytest.mark.parametrize(
    "name", ["lbfgs", *(pytest.param(n, marks=pytest.mark.long) for n in SOLVERS if n != "lbfgs")]
)
def test_every_solver_finds_scipys_optimum(name, key):
    runner = EnsembleMAP(zoned, SOLVERS[name], ensemble_size=3)
    start = runner.init(key, W, Z)
    result = quiet(runner, key, 1000, W, Z)
    assert result.converged.all()
    assert (result.gradient_norm < 1e-5).all()
    loss = objective(runner, W, Z)
    ours = runner.evaluate(result.state, W, Z)
    for e in range(3):
        begin = jax.tree.map(lambda x, e=e: x[e], start.optim_state[1].params)
        _, best = scipys(loss, begin)
        assert_allclose(ours[e], best, rtol=1e-8)
    assert_allclose(result.losses[:, 0], runner.evaluate(start, W, Z), rtol=1e-12)
    assert (result.losses[:, 0] > ours + 0.1).all()


@pytest.mark.long
def test_single_precision_is_named_as_a_reason(key):
    with jax.enable_x64(False), pytest.warns(UserWarning, match="float32 may be too coarse for it"):
        result = quiet(EnsembleMAP(zoned, LBFGS, ensemble_size=3), key, 2, W, Z)
    assert result.losses.dtype == "float32"


@pytest.mark.long
def test_members_that_stopped_on_a_slope_are_named(key):
    coarse = optimistix.BFGS(rtol=1e3, atol=1e3)
    with pytest.warns(UserWarning, match="3 of 3 members .* where the gradient is up to .* long"):
        result = quiet(EnsembleMAP(zoned, coarse, ensemble_size=3), key, 100, W, Z)
    assert result.converged.all()
    assert (result.gradient_norm > 1.0).all()


def test_a_member_is_optimistixs_own_run(key):
    runner = EnsembleMAP(zoned, LBFGS, ensemble_size=3)
    start = runner.init(key, W, Z)
    with pytest.warns(UserWarning, match="3 of 3 members have not met the criterion"):
        result = quiet(runner, key, 12, W, Z)
    loss = objective(runner, W, Z)
    for e in (0, 2):
        begin, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda x, e=e: x[e], start.optim_state[1].params)
        )

        def flat(x, _, unravel=unravel):
            return loss(unravel(x))

        alone = optimistix.minimise(flat, LBFGS, begin, max_steps=12, throw=False)
        assert_allclose(result.state.optim_state[1].point[e], alone.value, rtol=1e-8)


@pytest.mark.core
def test_members_stop_alone_and_stay(key):
    runner = EnsembleMAP(zoned, ensemble_size=4)
    assert "LBFGS" in repr(runner.optim)
    result = quiet(runner, key, 300, W, Z)
    assert result.converged.all() and result.stopped.all() and result.finite.all()
    taken = np.isfinite(result.losses).sum(axis=1)
    assert len(set(taken)) > 1
    assert_array_equal(taken, result.state.optim_state[0])
    for e, number in enumerate(taken):
        assert np.isnan(result.losses[e, number:]).all()
    more = quiet(runner, key, 5, W, Z, init_state=result.state)
    assert np.isnan(more.losses).all() and more.finite.all() and more.converged.all()
    jax.tree.map(assert_array_equal, more.params, result.params)
    assert sorted(more.ranking()) == [0, 1, 2, 3]
    assert_array_equal(more.ranking(), result.ranking())
    close = {"rtol": 1e-7} if jax.config.jax_enable_x64 else {"rtol": 2e-3}
    assert_allclose(result.params["slopes"], result.params["slopes"][np.zeros(4, int)], **close)


@pytest.mark.core
def test_a_loop_of_update_equals_run_equals_halves_and_chunks(key):
    runner = EnsembleMAP(zoned, LBFGS, ensemble_size=3)
    whole = quiet(runner, key, 300, W, Z)
    assert whole.converged.all()
    with pytest.warns(UserWarning, match="have not met the criterion of LBFGS.*in 9 steps"):
        first = quiet(runner, key, 9, W, Z)
    assert not first.converged.any()
    second = quiet(runner, key, 291, W, Z, init_state=first.state, chunk_size=7)
    state = runner.init(key, W, Z)
    for _ in range(int(whole.state.optim_state[0].max()) + 3):
        state, _ = runner.update(state, W, Z)
    assert_array_equal(state.optim_state[0], whole.state.optim_state[0])
    joined = np.concatenate([first.losses, second.losses], axis=1)
    assert_allclose(joined, whole.losses, rtol=1e-5)
    for other in (second.params, runner.get_params(state)):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), other, whole.params)
    assert_array_equal(jax.random.key_data(state.rng_key), jax.random.key_data(whole.state.rng_key))


@pytest.mark.long
def test_a_second_run_compiles_nothing(key, compile_count):
    runner = EnsembleMAP(zoned, LBFGS, ensemble_size=3)
    quiet(runner, key, 100, W, Z)
    with compile_count() as second:
        result = quiet(runner, jax.random.key(1), 150, W[::-1].copy(), Z[::-1].copy())
        runner.run(key, 100, W, Z)
    assert second.count == 0, second.names
    assert result.converged.all()


BAD = {
    "nan_data": lambda: {"member_args": ["z"], "z": np.stack([Z, Z * np.nan, Z])},
    "nan_start": lambda: {"z": Z, "init_params": {"base": np.array([0.0, np.nan, 1.0])}},
    "far_start": lambda: {"z": Z, "init_params": {"base": np.array([0.0, 1e200, 1.0])}},
}


@pytest.mark.parametrize(
    "name",
    ["nan_data", *(pytest.param(n, marks=pytest.mark.long) for n in ("nan_start", "far_start"))],
)
def test_one_bad_member_never_touches_another(name, key):
    runner = EnsembleMAP(zoned, LBFGS, ensemble_size=3)
    given = BAD[name]()
    good = {"member_args": given.get("member_args"), "z": given["z"]}
    if name == "nan_data":
        good["z"] = np.stack([Z, Z, Z])
    else:
        good["init_params"] = {"base": np.array([0.0, 0.0, 1.0])}
    clean = quiet(runner, key, 60, W, **good)
    with pytest.warns(UserWarning, match="members .*: 1"):
        ill = quiet(runner, key, 60, W, **given)
    assert list(clean.converged) == [True] * 3 and list(ill.converged) == [True, False, True]
    for e in (0, 2):
        assert_array_equal(ill.losses[e], clean.losses[e])
        for site, value in ill.params.items():
            assert_array_equal(value[e], clean.params[site][e])


@pytest.mark.long
def test_a_flat_direction_stops_and_moves_nobody(key):
    def flat(y):
        idle = numpyro.sample("idle", dist.ImproperUniform(dist.constraints.real, (), ()))
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(loc + 0.0 * idle, 1.0), obs=y)

    result = quiet(EnsembleMAP(flat, LBFGS, ensemble_size=2), key, 100, Y)
    assert result.converged.all()
    assert_allclose(result.params["loc"], [Y.sum() / (1 + len(Y))] * 2, rtol=1e-8)


def state_space(y):
    drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))

    def move(x, now):
        x = numpyro.sample("x", dist.Normal(x + drift, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=now)
        return x, None

    scan(move, 0.0, jnp.asarray(y))


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["state_space", *(pytest.param(n, marks=pytest.mark.long) for n in ("with_param", "interval"))],
)
def test_parameters_train(name, key):
    model, args, kwargs = CASES.get(name, Case(state_space, (Y,)))
    runner = EnsembleMAP(model, LBFGS, ensemble_size=2)
    start = runner.init(key, *args, **kwargs)
    result = quiet(runner, key, 600, *args, **kwargs)
    assert result.converged.all() and result.finite.all()
    assert (result.gradient_norm < 1e-5).all()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), runner.get_params(start), result.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.long
def test_mutable_state_trains(key):
    model, args, _ = CASES["batch_norm"]
    runner = EnsembleMAP(model, LBFGS, ensemble_size=2)
    state = runner.init(key, *args)
    with pytest.warns(UserWarning, match="have not met the criterion"):
        result = quiet(runner, key, 12, *args)
    before, after = state.mutable_state, result.state.mutable_state
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert (result.losses[:, -1] < result.losses[:, 0] - 1.0).all() and result.finite.all()


@pytest.mark.core
def test_float32_meets_the_criterion_that_it_can(key):
    x, z = jnp.asarray(W, jnp.float32), jnp.asarray(Z, jnp.float32)
    runner = EnsembleMAP(zoned, optimistix.LBFGS(rtol=1e-14, atol=1e-14), ensemble_size=3)
    result = quiet(runner, key, 300, x, z)
    assert result.converged.all()
    tight = 1e-6 if jax.config.jax_enable_x64 else 1e-2
    assert (result.gradient_norm < tight).all()


@pytest.mark.long
def test_a_step_to_an_infinite_density_is_rejected(key):
    """The first step leads to a place whose log density overflows; the search rejects it."""

    def log_joint(params):
        x = params["x"]
        return jnp.where(jnp.abs(x) > 20.0, jnp.inf, -0.5 * x**2 - 0.25 * x**4), 0.0

    def init_fn(key):
        return {"x": jax.random.uniform(key, minval=9.0, maxval=11.0)}

    runner = EnsembleMAP.from_log_joint(log_joint, init_fn, LBFGS, ensemble_size=2)
    result = quiet(runner, key, 200)
    assert np.isfinite(result.losses[:, 0]).all() and result.finite.all() and result.converged.all()
    assert_allclose(result.params["x"], 0.0, atol=1e-4)


@pytest.mark.long
def test_a_density_of_ones_own(key):
    def log_joint(params, y):
        return -((y - params["b"]) ** 2).sum(), -((params["b"] - params["a"]) ** 2) - params[
            "a"
        ] ** 2

    def init_fn(key):
        return {"b": jax.random.normal(key), "a": jnp.ones(())}

    params, losses = ensemble_map(
        log_joint, init_fn, ensemble_size=2, num_steps=60, data=Y, rng_key=key, optimizer=LBFGS
    )
    b = Y.sum() / (len(Y) + 0.5)
    assert_allclose(params["b"], [b, b], rtol=1e-6)
    assert np.isnan(losses[:, -1]).all()
    runner = EnsembleMAP.from_log_joint(log_joint, init_fn, ensemble_size=2)
    result = quiet(runner, key, 60, Y)
    assert result.converged.all() and (result.gradient_norm < 1e-6).all()


# Searches of others -----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("guided", ["map", "laplace"])
def test_minimize_equals_svis_update(guided, key):
    optim = numpyro.optim.Minimize(tol=1e-6)
    if guided == "map":
        runner, guide = EnsembleMAP(zoned, optim, ensemble_size=2), AutoDelta(zoned)
    else:
        guide = AutoLaplaceApproximation(zoned)
        runner = EnsembleVI(zoned, guide, optim, Trace_ELBO(), ensemble_size=2)
        guide = AutoLaplaceApproximation(zoned)
    result = quiet(runner, key, 1, W, Z)
    assert result.converged is None
    if guided == "map":
        guide = AutoDelta(zoned, init_loc_fn=numpyro.infer.init_to_uniform)
    svi = SVI(zoned, guide, optim, Trace_ELBO())
    state = svi.init(jax.random.split(key)[1], W, Z)
    state, loss = jax.jit(lambda: svi.update(state, W, Z))()
    theirs = svi.get_params(state)
    assert_allclose(result.losses[1], [loss], rtol=1e-9)
    if guided == "map":
        assert_allclose(result.params["slopes"][1], theirs["slopes_auto_loc"], rtol=1e-6)
    else:
        assert_allclose(result.params["auto_loc"][1], theirs["auto_loc"], rtol=1e-6)
    again = quiet(runner, key, 1, W, Z, init_state=result.state, stable_update=True)
    assert (again.losses <= result.losses * (1 + 1e-9)).all()


BACKTRACKING = optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(15))


@pytest.mark.long
@pytest.mark.parametrize(
    ("optim", "stable"),
    [
        pytest.param(optax.lbfgs(memory_size=3), False, marks=pytest.mark.long),
        pytest.param(optax.lbfgs(memory_size=3), True, marks=pytest.mark.long),
        (BACKTRACKING, True),
    ],
)
def test_an_optax_line_search_equals_a_single_run(optim, stable, key):
    runner = EnsembleMAP(zoned, optim, ensemble_size=2)
    params = jax.tree.map(lambda x: x[1], runner.init(key, W, Z).optim_state[1][0])
    result = quiet(runner, key, 5, W, Z, stable_update=stable)
    loss = objective(runner, W, Z)

    @jit_once
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        known = {"value": value, "grad": gradient, "value_fn": loss}
        updates, state = optim.update(gradient, state, params, **known)
        return optax.apply_updates(params, updates), state, value

    state, losses = optim.init(params), []
    for _ in range(5):
        params, state, value = step(params, state)
        losses.append(value)
    assert_allclose(result.losses[1], losses, rtol=1e-7)
    assert losses[-1] < losses[0] - 1.0


def test_polyaks_step_takes_the_loss(key):
    def lowest(y):
        numpyro.factor("loss", -((numpyro.param("a", lambda k: jax.random.normal(k)) - y) ** 2))

    runner = EnsembleMAP(lowest, optax.polyak_sgd(max_learning_rate=1.0), ensemble_size=2)
    result = quiet(runner, key, 40, 0.3)
    assert_allclose(result.params["a"], [0.3, 0.3], rtol=1e-6)


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size",
    [pytest.param(None, marks=pytest.mark.long), 16, pytest.param(20, marks=pytest.mark.long)],
)
def test_the_gradient_is_that_of_all_the_data(batch_size, key):
    runner = EnsembleMAP(zoned, numpyro.optim.Adam(0.01), ensemble_size=2)
    result = quiet(runner, key, 7, W, Z, batch_size=batch_size)
    loss = objective(runner, W, Z)
    for e in range(2):
        params = runner.optim.get_params(
            jax.tree.map(lambda x, e=e: x[e], result.state.optim_state)
        )
        assert_allclose(result.gradient_norm[e], optax.tree.norm(jax.grad(loss)(params)), rtol=1e-8)


@pytest.mark.long
def test_where_it_is_not_known(key):
    forward = EnsembleMAP(zoned, LBFGS, ensemble_size=2)
    result = quiet(forward, key, 100, W, Z, forward_mode_differentiation=True)
    assert result.converged.all() and (result.gradient_norm < 1e-5).all()
    vi = EnsembleVI(
        ridge, AutoNormal(ridge), numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2
    )
    other = quiet(vi, key, 2, X, Y)
    assert other.gradient_norm is None and other.converged is None


# Bad calls --------------------------------------------------------------------------------------


def vi(guide, optim=LBFGS, **options):
    return EnsembleVI(zoned, guide(zoned), optim, Trace_ELBO(), ensemble_size=2, **options)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: EnsembleMAP(zoned),
            {"batch_size": 5},
            "batch_size=5 does not go with LBFGS.*Adam",
        ),
        (lambda: EnsembleMAP(zoned, optax.lbfgs()), {"batch_size": 5}, "batch_size=5.*line search"),
        (lambda: vi(AutoNormal), {}, "LBFGS.*noisy.*AutoDelta"),
        (lambda: vi(AutoNormal, numpyro.optim.Minimize()), {}, "Minimize compares.*noisy"),
        (lambda: vi(AutoNormal, optax.lbfgs()), {}, "line search.*noisy"),
        (lambda: vi(AutoDelta, kl_weight=lambda step: 1.0 / (1 + step)), {}, "schedule.*number"),
    ],
)
def test_a_loss_that_cannot_be_compared_is_refused(build, options, message, key):
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            quiet(build(), key, 3, W, Z, **options)


def test_a_subsampled_plate_is_noise(key):
    case = CASES["subsampled"]
    runner = EnsembleMAP(case.model, LBFGS, ensemble_size=2)
    with pytest.raises(ValueError, match="noisy.*subsampled plate"):
        runner.init(key, *case.args)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (optimistix.Newton(1e-6, 1e-6), "Newton solves another kind of problem"),
        (optimistix.LevenbergMarquardt(1e-6, 1e-6), "optimistix.LBFGS.*say"),
        (optimistix.LBFGS, "optim takes an optimiser"),
        (minimize, "optim takes an optimiser"),
    ],
)
def test_other_solvers_are_refused(optim, message):
    with pytest.raises(TypeError, match=message):
        EnsembleMAP(zoned, optim)


def test_bad_numbers(key):
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        quiet(EnsembleMAP(zoned), key, 0, W, Z)
