"""Ensembles as pure functions, in Python loops like those that users write."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.infer.util import log_density
from zoo import CASES, X, Y, ridge

from numpyro_ensemble import (
    EnsembleMAP,
    EnsembleState,
    ensemble_init,
    ensemble_loss,
    ensemble_predict,
    ensemble_step,
    log_joint,
)

ADAM = optax.adam(0.1)


def close(loose=1e-4):
    return {"rtol": 1e-9} if jax.config.jax_enable_x64 else {"rtol": loose, "atol": 1e-6}


def joint(params, x, y):
    """Return the log likelihood and the log prior of ridge regression, written by hand."""
    log_likelihood = -0.5 * jnp.square((y - x @ params["w"]) / 0.5).sum()
    return log_likelihood, -0.5 * jnp.square(params["w"] / 2.0).sum()


def solution(prior_weight=1.0):
    penalty = prior_weight * 0.5**2 / 2.0**2
    return np.linalg.solve(X.T @ X + penalty * np.eye(2), X.T @ Y)


def init_w(key):
    return {"w": jax.random.normal(key, (2,))}


def loop(step, state, num_steps, *batch):
    """Run a loop and return its last state and its losses, (E, num_steps)."""
    losses = []
    for _ in range(num_steps):
        state, loss = step(state, *batch)
        losses.append(loss)
    return state, np.stack(losses, axis=1)


def start(init_fn=init_w, optimizer=ADAM, *, ensemble_size=3, seed=0):
    return ensemble_init(init_fn, optimizer, ensemble_size=ensemble_size, seed=seed)


def stepper(log_joint=joint, optimizer=ADAM, **weights):
    return jax.jit(partial(ensemble_step, log_joint=log_joint, optimizer=optimizer, **weights))


adam_step = stepper()
SGD = optax.sgd(0.035)  # the curvatures of the ridge regression are about 8 and 47


def member(tree, index):
    """Take one member out of a stacked tree of arrays, as an ensemble of one."""
    return jax.tree.map(lambda leaf: leaf[index : index + 1], tree)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(assert_array_equal, ours, theirs)


# Closed forms -----------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(("prior_weight", "wrong"), [(1.0, 0.0), (0, 1.0), (7.0, 1.0)])
def test_ridge_regression_is_the_solved_system(prior_weight, wrong):
    step = stepper(optimizer=SGD, prior_weight=prior_weight)
    state, losses = loop(step, start(optimizer=SGD), 100, X, Y)
    atol = 1e-10 if jax.config.jax_enable_x64 else 1e-5
    for fitted in state.params["w"]:
        assert_allclose(fitted, solution(prior_weight), atol=atol)
        assert np.abs(fitted - solution(wrong)).max() > 100 * atol
    log_likelihood, log_prior = joint({"w": solution(prior_weight)}, X, Y)
    assert_allclose(losses[:, -1], -(log_likelihood + prior_weight * log_prior), rtol=1e-5)
    assert np.ptp(losses[:, 0]) > 0.1  # members start at different values


@pytest.mark.parametrize("through", ["log_joint", "log_density"])
def test_a_numpyro_model_is_a_log_joint(through):
    if through == "log_joint":
        step = stepper(log_joint(ridge), SGD)
    else:  # a log density that is not split counts as likelihood
        whole = lambda params, x, y: (log_density(ridge, (x, y), {}, params)[0], jnp.nan)  # noqa: E731
        step = stepper(whole, SGD, prior_weight=0)
    state, losses = loop(step, start(optimizer=SGD), 100, X, Y)
    assert_allclose(state.params["w"], np.stack([solution()] * 3), atol=1e-10)
    assert_allclose(losses[:, -1], -log_density(ridge, (X, Y), {}, {"w": solution()})[0])
    assert np.abs(solution() - solution(0.0)).max() > 1e-3


def test_a_model_with_a_constrained_latent():
    """The mode of the scale of a centred normal is the root mean square of its data."""

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    split = log_joint(model)

    def on_the_real_line(params, y):
        return split({"scale": jnp.exp(params)}, y)

    step = stepper(on_the_real_line, prior_weight=0)
    state, _ = loop(step, start(jax.random.normal), 1000, Y)
    assert_allclose(jnp.exp(state.params), np.sqrt(np.mean(Y**2)), atol=1e-6)


@pytest.mark.long
def test_line_searches_work():
    lbfgs = optax.lbfgs(memory_size=2)
    state, losses = loop(stepper(optimizer=lbfgs), start(optimizer=lbfgs), 12, X, Y)
    assert_allclose(state.params["w"], np.stack([solution()] * 3), atol=1e-8)
    _, by_adam = loop(adam_step, start(), 12, X, Y)
    assert (losses[:, -1] < by_adam[:, -1] - 1e-3).all()


# Members ----------------------------------------------------------------------------------------


@pytest.mark.core
def test_it_agrees_with_the_engine(key):
    state, losses = loop(adam_step, start(seed=key), 20, X, Y)
    runner = EnsembleMAP.from_log_joint(joint, init_w, ADAM, ensemble_size=3)
    result = runner.run(key, 20, X, Y, progress_bar=False)
    assert_allclose(losses, result.losses, **close())
    assert_allclose(state.params["w"], result.params["w"], **close())
    assert np.abs(state.params["w"][0] - state.params["w"][1]).max() > 0.1


def clipped_adamw():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup_steps=5, decay_steps=60)
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=1e-3))


@pytest.mark.core
def test_a_chain_of_transformations_is_each_members_own(key):
    optimizer, keys = clipped_adamw(), jax.random.split(key, 3)
    step = stepper(optimizer=optimizer)
    together, losses = loop(step, start(optimizer=optimizer, seed=keys), 30, X, Y)
    for e in range(3):
        single = start(optimizer=optimizer, ensemble_size=1, seed=keys[e : e + 1])
        alone, its_losses = loop(step, single, 30, X, Y)
        assert_allclose(losses[e : e + 1], its_losses, **close())
        assert_allclose(together.params["w"][e : e + 1], alone.params["w"], **close(1e-3))

    @jax.jit
    def naive(params, opt_state):
        """Clip the norm over all members together."""
        grads = jax.vmap(jax.grad(ensemble_loss(joint)), (0, None, None))(params, X, Y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = start(optimizer=optimizer, seed=keys).params
    opt_state = optimizer.init(params)
    for _ in range(30):
        params, opt_state = naive(params, opt_state)
    assert np.abs(params["w"] - together.params["w"]).max() > 1e-3


def test_early_stopping_in_a_python_loop():
    optimizer = clipped_adamw()
    step, state = stepper(optimizer=optimizer), start(optimizer=optimizer)
    best, waited, steps = jnp.inf, 0, 0
    while waited < 5 and steps < 200:
        state, losses = step(state, X, Y)
        better = losses.mean() < best - 1e-4
        best, waited = (losses.mean(), 0) if better else (best, waited + 1)
        steps += 1
    assert 20 < steps < 150
    assert_allclose(state.params["w"], np.stack([solution()] * 3), atol=0.02)
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert counts and all((leaf == steps).all() and leaf.shape == (3,) for leaf in counts)


@pytest.mark.core
@pytest.mark.parametrize("optimizer", [ADAM, clipped_adamw()], ids=["adam", "chain"])
def test_a_nan_in_one_member_leaves_the_others_alone(optimizer):
    step = adam_step if optimizer is ADAM else stepper(optimizer=optimizer)
    good = start(optimizer=optimizer)
    ill = EnsembleState({"w": good.params["w"].at[1, 0].set(jnp.nan)}, good.opt_state)
    good, losses = loop(step, good, 10, X, Y)
    ill, ill_losses = loop(step, ill, 10, X, Y)
    assert np.isnan(ill_losses[1]).all() and np.isnan(ill.params["w"][1]).any()
    for e in (0, 2):
        assert_same(member(ill, e), member(good, e))
        assert_array_equal(ill_losses[e], losses[e])


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.core
def test_batches_are_unbiased():
    """Over an epoch of ragged batches, the size-weighted mean gradient is the full gradient."""
    w = {"w": jnp.array([0.3, -0.7])}
    full = jax.grad(ensemble_loss(joint))(w, X, Y)["w"]
    batches = [slice(0, 3), slice(3, 6), slice(6, 8)]
    sizes = np.array([3, 3, 2])

    def mean(weights, scales):
        slopes = [
            jax.grad(ensemble_loss(joint, scale=scale))(w, X[rows], Y[rows])["w"]
            for rows, scale in zip(batches, scales, strict=True)
        ]
        return np.average(slopes, axis=0, weights=weights)

    assert_allclose(mean(sizes, 8 / sizes), full, **close())
    for wrong in (mean(np.ones(3), 8 / sizes), mean(sizes, np.ones(3))):
        assert np.abs(wrong - full).max() > 0.1


@pytest.mark.core
@pytest.mark.leaks
def test_a_step_takes_the_weights_of_the_loss():
    sgd = optax.sgd(1.0)
    before = start(optimizer=sgd)
    step = partial(ensemble_step, log_joint=joint, optimizer=sgd)
    after, losses = jax.jit(step)(before, X, Y, prior_weight=3.0, scale=2.0)
    for e in range(3):
        log_likelihood, log_prior = joint({"w": before.params["w"][e]}, X, Y)
        assert_allclose(losses[e], -(2.0 * log_likelihood + 3.0 * log_prior), **close())
    w = np.asarray(before.params["w"])
    downhill = 2.0 * (Y - w @ X.T) @ X / 0.25 - 3.0 * w / 4.0
    assert_allclose(after.params["w"] - before.params["w"], downhill, **close())


@pytest.mark.core
@pytest.mark.leaks
def test_a_python_zero_drops_the_prior_exactly():
    def broken(w, y):
        return -jnp.square(y - w), jnp.log(-jnp.square(w))

    loss = ensemble_loss(broken, prior_weight=0)
    assert jax.value_and_grad(loss)(1.0, 3.0) == (4.0, -4.0)
    traced = jax.jit(lambda v: ensemble_loss(broken, prior_weight=v)(1.0, 3.0))
    assert np.isnan(traced(0.0))  # a traced weight only multiplies
    slope = jax.grad(lambda v: ensemble_loss(joint, prior_weight=v)({"w": jnp.ones(2)}, X, Y))(1.0)
    assert_allclose(slope, 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", ["prior_weight", "scale"])
def test_weights_are_checked(name):
    with pytest.raises(ValueError, match=f"^{name} takes a finite weight of at least 0, got -1"):
        ensemble_loss(joint, **{name: -1})
    with pytest.raises(ValueError, match=f"^{name} takes a finite weight"):
        ensemble_step(start(), X, Y, log_joint=joint, optimizer=ADAM, **{name: np.nan})
    with pytest.raises(TypeError, match=f"^{name} takes one number"):
        ensemble_loss(joint, **{name: np.ones(3)})


# Modules ----------------------------------------------------------------------------------------


class Net(eqx.Module):
    """A network whose leaves are arrays of several kinds, functions, numbers and strings."""

    mlp: eqx.nn.MLP
    act: Callable
    order: jax.Array
    table: np.ndarray
    repeats: int
    rate: float
    name: str

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, "scalar", 3, 1, activation=jax.nn.tanh, key=key)
        self.act = jax.nn.softplus
        self.order = jnp.array([1, 0])
        self.table = np.array([True, False])
        self.repeats, self.rate, self.name = 2, 0.5, "net"

    def __call__(self, x):
        assert self.name == "net"
        for _ in range(self.repeats):  # a tracer would raise
            x = self.rate * x[self.order]
        return self.act(self.mlp(x))


def net_joint(net, x, y):
    weights = jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))
    prior = -0.5 * sum(jnp.square(w).sum() for w in weights)
    return -0.5 * jnp.square(y - jax.vmap(net)(x)).sum(), prior


@pytest.mark.long
@pytest.mark.leaks
def test_an_equinox_module_is_a_member():
    momentum = optax.sgd(0.05, momentum=0.9)
    state, step = start(Net, momentum), stepper(net_joint, momentum)
    one_step = partial(ensemble_step, log_joint=net_joint, optimizer=momentum)
    plain, plain_losses = loop(one_step, state, 2, X, Y)
    jitted, losses = loop(step, state, 6, X, Y)
    assert_allclose(losses[:, :2], plain_losses, rtol=1e-5)
    assert step._cache_size() == 1
    assert (losses[:, -1] < losses[:, 0]).all()
    for net in (state.params, plain.params, jitted.params):
        assert net.act is jax.nn.softplus and net.mlp.activation is state.params.mlp.activation
        assert (net.repeats, net.rate, net.name) == (2, 0.5, "net")
        assert (net.order.shape, net.table.shape, net.table.dtype) == ((2,), (2,), bool)
        assert net.mlp.layers[0].weight.shape == (3, 3, 2)
    weights = np.asarray(state.params.mlp.layers[0].weight)
    assert np.abs(weights[0] - weights[1]).max() > 0.1
    moments = jitted.opt_state[0].trace
    assert {leaf.shape[0] for leaf in jax.tree.leaves(moments)} == {3}
    assert moments.order is moments.table is moments.act is moments.name is None

    @jax.jit
    def predict(state):
        arrays, shared = eqx.partition(state.params, eqx.is_inexact_array)
        second = eqx.combine(jax.tree.map(lambda leaf: leaf[1], arrays), shared)
        predicted = ensemble_predict(state.params, lambda net, x: jax.vmap(net)(x), X)
        return predicted, jax.vmap(second)(X)

    predicted, alone = predict(jitted)
    assert predicted.shape == (3, 8)
    assert_allclose(predicted[1], alone, **close())


class NNXNet(nnx.Module):
    """A network with parameters, a static function and width, and a stream of random numbers."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(2, 3, rngs=rngs, param_dtype=jnp.result_type(float))
        self.outer = nnx.Linear(3, 1, rngs=rngs, param_dtype=jnp.result_type(float))
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.act, self.width = nnx.tanh, 3

    def __call__(self, x):
        assert self.width == 3
        return self.outer(self.dropout(self.act(self.inner(x))))[..., 0]


def nnx_joint(net, x, y):
    prior = -0.5 * sum(jnp.square(w).sum() for w in jax.tree.leaves(nnx.state(net, nnx.Param)))
    return -0.5 * jnp.square(y - net(x)).sum(), prior


def make_nnx(key):
    return NNXNet(nnx.Rngs(key))


def test_an_nnx_module_is_a_member(key):
    keys, step = jax.random.split(key, 3), stepper(nnx_joint)
    state = start(make_nnx, seed=keys)
    assert isinstance(state.params, NNXNet)
    assert state.params.inner.kernel.shape == (3, 2, 3)
    assert state.params.dropout.rngs.count.shape == ()
    trained, losses = loop(step, state, 6, X, Y)
    assert step._cache_size() == 1
    assert (losses[:, -1] < losses[:, 0]).all()
    alone, its_losses = loop(step, start(make_nnx, ensemble_size=1, seed=keys[1:2]), 6, X, Y)
    assert_allclose(losses[1:2], its_losses, **close())
    kernel = trained.params.inner.kernel[...]
    assert_allclose(kernel[1], alone.params.inner.kernel[0], **close())
    assert np.abs(kernel[1] - kernel[0]).max() > 0.1
    predicted = ensemble_predict(trained.params, lambda net, x: net(x), X)
    by_hand = jnp.tanh(X @ kernel[1] + trained.params.inner.bias[1][None])
    by_hand = by_hand @ trained.params.outer.kernel[1] + trained.params.outer.bias[1][None]
    assert_allclose(predicted[1], by_hand[:, 0], **close())


# Starts -----------------------------------------------------------------------------------------


@pytest.mark.core
def test_seeds_of_every_kind_agree():
    def starting(seed):
        return start(optimizer=SGD, seed=seed).params["w"]

    raw = jax.random.PRNGKey(5)
    expected = jax.vmap(init_w)(jax.random.split(raw, 3))["w"]
    typed = jax.random.key(5)
    for seed in (5, np.int32(5), typed, jax.random.split(typed, 3), raw, jax.random.split(raw, 3)):
        assert_array_equal(starting(seed), expected)
    assert np.abs(starting(6) - expected).min() > 0
    assert len(np.unique(expected)) == 6
    one = start(seed=jax.random.split(raw, 3)[1:2], ensemble_size=1)
    assert_array_equal(one.params["w"], expected[1:2])


def test_an_optimiser_state_is_each_members_own():
    state = start()
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.opt_state)} == {3}
    assert state.opt_state[0].count.shape == (3,)
    assert state.opt_state[0].mu["w"].shape == (3, 2)


@pytest.mark.parametrize(
    ("size", "seed", "error", "message"),
    [
        (0, 0, ValueError, "^ensemble_size must be at least 1, got 0"),
        (2.0, 0, TypeError, "^ensemble_size takes an integer, got 2.0"),
        (True, 0, TypeError, "^ensemble_size takes an integer, got True"),
        (3, jax.random.split(jax.random.key(0), 2), ValueError, "^seed takes one key or .*=3 keys"),
        (3, jax.random.split(jax.random.PRNGKey(0), 4), ValueError, "^seed takes one key"),
        (3, 1.5, ValueError, "^seed takes one key .* type float"),
        (3, None, TypeError, "^ensemble_init takes rng_key, or its other name seed; got"),
    ],
)
def test_sizes_and_seeds_are_checked(size, seed, error, message):
    with pytest.raises(error, match=message):
        start(ensemble_size=size, seed=seed)


def test_a_step_compiles_once(compile_count):
    state, step = start(), stepper()
    state, _ = step(state, X, Y)
    with compile_count() as count:
        for shift in range(3):
            state, _ = step(state, X + shift, Y)
    assert count.count == 0, count.names


# Predictions ------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.leaks
def test_predictions_are_stacked():
    w = jnp.arange(6.0).reshape(3, 2)

    def predict(params, x, shift):
        mean = x @ params["w"] * params["factor"] + shift
        return {"mean": mean, "total": mean.sum()}

    params = {"w": w, "factor": 2, "name": "linear"}
    predicted = ensemble_predict(params, predict, X, 1.0)
    expected = 2.0 * np.asarray(w) @ X.T + 1.0
    assert_allclose(predicted["mean"], expected, **close())
    assert_allclose(predicted["total"], expected.sum(1), **close())
    again = jax.jit(lambda w: ensemble_predict({**params, "w": w}, predict, X, 1.0))(w)
    assert_allclose(again["mean"], expected, **close())
    slope = jax.grad(lambda w: ensemble_predict(w, lambda w, x: (x @ w).sum(), X).sum())(w)
    assert_allclose(slope, np.stack([X.sum(0)] * 3), **close())


# The state --------------------------------------------------------------------------------------


def in_python(x):
    return x


@pytest.mark.core
@pytest.mark.leaks
def test_a_state_passes_through_transformations():
    state = start(lambda key: {**init_w(key), "act": in_python, "size": 3, "order": jnp.arange(2)})
    inside = jax.jit(lambda s: s)(state)
    assert inside.params["act"] is in_python
    assert type(inside.params["size"]) is int
    assert inside.params["order"].shape == (2,)
    assert_array_equal(inside.params["w"], state.params["w"])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    assert isinstance(doubled, EnsembleState)
    assert_array_equal(doubled.params["w"], 2.0 * state.params["w"])
    assert doubled.params["size"] == 3
    made = jax.jit(lambda seed: start(seed=jax.random.key(seed)))(0)
    assert_array_equal(made.params["w"], start().params["w"])
    lengths = jax.vmap(lambda s: jnp.square(s.params["w"]).sum())(made)
    assert_allclose(lengths, np.square(made.params["w"]).sum(1), rtol=1e-6)


def test_loops_of_jax_take_a_state():
    step = partial(ensemble_step, log_joint=joint, optimizer=ADAM)

    @jax.jit
    def scanned(state, x, y):
        return jax.lax.scan(lambda s, _: step(s, x, y), state, length=5)

    ours, losses = scanned(start(), X, Y)
    theirs, expected = loop(adam_step, start(), 5, X, Y)
    assert_allclose(losses.T, expected, **close())
    assert_allclose(ours.params["w"], theirs.params["w"], **close())


def test_a_state_is_copied_and_pickled_and_stays_as_it_is():
    state = start(lambda key: {**init_w(key), "act": in_python, "size": 3, "name": "net"})
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other is not state
        assert_same(other, state)
        assert other.params["act"] is in_python
        assert (other.params["size"], other.params["name"]) == (3, "net")
    before = jax.tree.map(np.array, (start().params, start().opt_state))
    held = start()
    adam_step(held, X, Y)
    assert_same(jax.tree.map(np.asarray, (held.params, held.opt_state)), before)
    with pytest.raises(AttributeError):
        held.params = {}
    with pytest.raises(ValueError, match="rank should be at least 1"):
        jax.vmap(lambda s: s.params["w"])(start(lambda key: {**init_w(key), "n": jnp.array(3)}))


def test_other_shared_leaves_are_another_structure():
    def structure(**shared):
        return jax.tree.structure(EnsembleState({"w": np.ones((3, 2)), **shared}, ()))

    assert structure(size=3) == structure(size=3)
    assert structure(size=3) != structure(size=4)
    assert structure(act=jnp.tanh) != structure(act=jnp.exp)
    assert structure(n=np.array(3)) == structure(n=np.array(4))  # arrays are leaves, not structure


def test_a_case_of_the_zoo_trains_through_its_log_joint():
    """Members of a model of several latents are dicts of their values."""
    case = CASES["decentred"]
    split = log_joint(case.model)

    def init(key):
        shapes = {"mu": (), "tau": (), "a_decentered": (3,), "b_base": (3,)}
        keys = dict(zip(shapes, jax.random.split(key, 4), strict=True))
        return {name: jax.random.normal(keys[name], shapes[name]) for name in shapes}

    def on_the_real_line(params, group, y):
        return split({**params, "tau": jnp.exp(params["tau"])}, group, y=y)

    group = np.asarray(case.args[0])
    step = jax.jit(
        lambda state, y: ensemble_step(state, group, y, log_joint=on_the_real_line, optimizer=ADAM)
    )
    state, losses = loop(step, start(init), 150, case.kwargs["y"])
    assert (losses[:, -1] < losses[:, 0] - 1.0).all()
    assert {name: leaf.shape for name, leaf in state.params.items()} == {
        "mu": (3,), "tau": (3,), "a_decentered": (3, 3), "b_base": (3, 3),
    }  # fmt: skip
