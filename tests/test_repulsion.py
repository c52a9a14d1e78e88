"""Repulsion between members, against NumPyro's SVGD, closed forms and runs of fewer members."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.einstein import SVGD, RBFKernel
from numpyro.infer import init_to_uniform
from scipy.special import digamma
from zoo import jit_once

from numpyro_ensemble import Checkpoint, EnsembleMAP, Repulsion
from numpyro_ensemble.fit.forces import Pull, forces

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3))
Y = X @ np.array([1.0, -1.0, 0.5]) + 0.3 * RNG.normal(size=6)
GRID = RNG.normal(size=(4, 3))
SIZE, STEPS = 4, 6
KEYS = jax.random.split(jax.random.key(3), SIZE)
ADAM = numpyro.optim.Adam(0.05)
BY_PARAMETERS = Repulsion()


def model(x, y=None):
    """A model with a matrix, a positive scalar and a vector in a plate; names are in no order."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3, 1]).to_event(2))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("halves", 2):
        a = numpyro.sample("a", dist.Normal(0, 1))
    f = numpyro.deterministic("f", (x @ w)[:, 0] + a.sum())
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(f, noise), obs=y)


def runner(repulsion=BY_PARAMETERS, optim=ADAM, **options):
    return EnsembleMAP(model, optim, ensemble_size=SIZE, repulsion=repulsion, **options)


def fit(runner, *args, steps=STEPS, key=KEYS, **options):
    return runner.run(key, steps, *(args or (X, Y)), progress_bar=False, **options)


@pytest.fixture(scope="module")
def pushed():
    """A runner and the result of its fit."""
    ensemble = runner()
    return ensemble, fit(ensemble)


def close(result, other, rtol=1e-8):
    for one, two in zip(
        *(jax.tree.leaves((r.params, r.losses)) for r in (result, other)), strict=True
    ):
        assert_allclose(one, two, rtol=rtol)


# One step ----------------------------------------------------------------------------------------


def by_hand(places, gradients, *, mixes, weight=1.0, bandwidth=None):
    """Return the members' forces (E, D), summed pair by pair with JAX's own gradients."""
    if bandwidth is None:
        distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
        bandwidth = np.median(distances) ** 2 / np.log(len(places))

    def kernel(one, other):
        return jnp.exp(-((one - other) ** 2).sum() / bandwidth)

    def pairs(fn):
        return jax.jit(jax.vmap(jax.vmap(fn, (0, None)), (None, 0)))(places, places)

    near, slopes = pairs(kernel), pairs(jax.grad(kernel)).sum(1)
    if mixes:
        return (near @ gradients - weight * slopes) / len(places)
    return gradients - weight * slopes / near.sum(1)[:, None]


pushing = jax.jit(forces, static_argnums=0)


def a_pull(places, gradients, losses):
    def split(rows):
        return {"w": rows[:, 1:].reshape(len(rows), 2, 2), "a": rows[:, 0]}

    return Pull(None, losses, split(gradients), split(places), jnp.zeros(len(losses), int))


def joined(tree):
    return np.concatenate([tree["a"][:, None], tree["w"].reshape(len(tree["a"]), -1)], axis=1)


@pytest.mark.core
@pytest.mark.parametrize("method", ["svgd", "wgd"])
@pytest.mark.parametrize("options", [{}, {"weight": 0.3, "bandwidth": 2.0}])
def test_forces_are_those_of_the_papers(method, options):
    """Members are far from the origin, where differences of squared positions lose all digits."""
    gradients = jnp.asarray(RNG.normal(size=(5, 5)))
    around = jnp.asarray(RNG.normal(size=(5, 5)))
    found, push = pushing(
        Repulsion(method=method, **options), a_pull(around + 1000.0, gradients, jnp.ones(5))
    )
    expected = by_hand(around, gradients, mixes=method == "svgd", **options)
    assert push is None
    assert_allclose(joined(found), expected, atol=3e-3 if around.dtype == jnp.float32 else 1e-9)


@pytest.mark.core
@pytest.mark.parametrize("method", ["svgd", "wgd"])
def test_a_member_that_fails_is_left_out_of_the_forces(method):
    repulsion, rest = Repulsion(method=method), np.array([0, 1, 3, 4])
    places, gradients = jnp.asarray(RNG.normal(size=(2, 5, 5)))
    losses, bad = jnp.ones(5), jnp.where(jnp.arange(5) == 2, jnp.nan, 0.0)
    alone = joined(pushing(repulsion, a_pull(places[rest], gradients[rest], losses[rest]))[0])
    tolerance = 1e-5 if places.dtype == jnp.float32 else 1e-10
    for arrays in (
        (places, gradients, losses + bad),
        (places + bad[:, None], gradients + bad[:, None], losses),
        (places.at[2, 3].set(jnp.inf), gradients, losses),
    ):
        found = joined(pushing(repulsion, a_pull(*arrays))[0])
        assert_allclose(found[rest], alone, rtol=tolerance, atol=tolerance)
        assert_array_equal(found[2], arrays[1][2])
    found = joined(pushing(repulsion, a_pull(places, gradients + bad[:, None], losses))[0])
    assert np.isfinite(found[rest]).all() and np.isnan(found[2]).all()
    if method == "svgd":  # under "wgd" the others do not use its gradient, so it still repels them
        assert_allclose(found[rest], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.core
def test_members_at_one_place_stay_together():
    gradients = jnp.ones((3, 5))
    found, _ = pushing(Repulsion(), a_pull(jnp.ones((3, 5)), gradients, jnp.ones(3)))
    assert_allclose(joined(found), gradients, rtol=1e-6)


# Beside NumPyro's SVGD ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "steps"),
    [(ADAM, STEPS), pytest.param(numpyro.optim.SGD(1e-3), 1, marks=pytest.mark.long)],
)
def test_steps_are_those_of_numpyro(optim, steps):
    """NumPyro repels in unconstrained space, by the density over constrained values."""
    svgd = SVGD(
        model, optim, RBFKernel(), num_stein_particles=SIZE,
        guide_kwargs={"init_loc_fn": init_to_uniform},
    )  # fmt: skip

    @jit_once
    def theirs(key):
        state = svgd.init(key, X, Y)
        last = jax.lax.fori_loop(0, steps, lambda _, state: svgd.update(state, X, Y)[0], state)
        return svgd.get_params(state), svgd.get_params(last)

    first, last = (
        {name.removesuffix("_auto_loc"): value for name, value in params.items()}
        for params in theirs(jax.random.key(1))
    )
    result = fit(runner(optim=optim, jacobian=False), steps=steps, init_params=first)
    for name, value in last.items():
        assert_allclose(result.params[name], value, rtol=1e-8)
        assert np.abs(value - first[name]).max() > 1e-4


# Draws of the posterior --------------------------------------------------------------------------


def rate(y):
    r = numpyro.sample("r", dist.Gamma(1.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Exponential(r), obs=y)


def mean_log(**options):
    ensemble = EnsembleMAP(rate, numpyro.optim.Adam(0.05), ensemble_size=30, **options)
    result = fit(ensemble, np.array([0.5, 1.5]), steps=600, key=jax.random.key(0))
    return np.log(result.params["r"]).mean()


@pytest.mark.parametrize("method", ["svgd", pytest.param("wgd", marks=pytest.mark.long)])
def test_members_are_draws_of_the_posterior(method):
    """The posterior is Gamma(3, 3); without the Jacobian it is Gamma(2, 3), half a unit away."""
    exact, without = (digamma(shape) - np.log(3.0) for shape in (3.0, 2.0))
    assert abs(mean_log(repulsion=Repulsion(method=method)) - exact) < 0.1 < exact - without


@pytest.mark.long
def test_without_the_jacobian_it_is_another_density():
    wrong = mean_log(repulsion=Repulsion(), jacobian=False)
    assert abs(wrong - (digamma(2.0) - np.log(3.0))) < 0.1


# Invariants --------------------------------------------------------------------------------------


@pytest.mark.long
def test_no_weight_is_a_plain_fit():
    ensemble = runner(None)
    plain = fit(ensemble)
    ensemble.repulsion = Repulsion(weight=0)
    none = fit(ensemble)
    for one, two in zip(
        *(jax.tree.leaves((r.params, r.losses)) for r in (plain, none)), strict=True
    ):
        assert_array_equal(one, two)
    assert_array_equal(none.gradient_norm, plain.gradient_norm)


@pytest.mark.long
def test_members_in_another_order_are_the_same(pushed):
    ensemble, result = pushed
    order = np.array([2, 0, 3, 1])
    other = fit(ensemble, key=KEYS[order])
    for name, value in result.params.items():
        assert_allclose(other.params[name], value[order], rtol=1e-8)
    assert result.gradient_norm is None  # a member does not end where its own loss is lowest


@pytest.mark.long  # in groups, members repel by a function below
def test_groups_of_members_are_the_members(pushed):
    ensemble, result = pushed
    close(fit(runner(member_batch_size=3)), result)


def test_halves_are_the_whole_and_compile_nothing(pushed, compile_count):
    ensemble, result = pushed
    with compile_count() as compilations:
        half = fit(ensemble, steps=2)
        whole = fit(ensemble, steps=STEPS - 2, init_state=half.state)
    assert not [name for name in compilations.names if "chunk" in name]
    for name, value in result.params.items():
        assert_array_equal(whole.params[name], value)


@pytest.mark.long
def test_checkpoints_are_of_one_repulsion(tmp_path, pushed):
    ensemble, result = pushed
    kept = Checkpoint(tmp_path / "kept", every=2)
    fit(ensemble, checkpoint=kept, callback=lambda step, *_: step >= 4)
    close(fit(ensemble, checkpoint=kept), result)
    with pytest.raises(ValueError, match="repulsion"):
        fit(runner(Repulsion(weight=2.0)), checkpoint=kept)


@pytest.mark.filterwarnings("ignore:.* of 4 members")
@pytest.mark.parametrize("stable_update", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_member_that_fails_touches_no_other(pushed, stable_update):
    ensemble, _ = pushed
    starts = {"a": jax.random.normal(KEYS[0], (SIZE, 2)), "w": jnp.ones((SIZE, 3, 1))}
    starts["a"] = starts["a"].at[1, 0].set(jnp.nan)
    rest = np.array([0, 2, 3])
    result = fit(ensemble, init_params=starts, stable_update=stable_update)
    others = EnsembleMAP(model, ADAM, ensemble_size=3, repulsion=Repulsion())
    alone = fit(others, key=KEYS[rest], init_params=jax.tree.map(lambda x: x[rest], starts))
    for name, value in alone.params.items():
        assert_allclose(result.params[name][rest], value, rtol=1e-8)
    assert not result.finite[1] and result.finite[rest].all()


def test_a_schedule_must_stay_positive(pushed):
    with pytest.raises(ValueError, match="weight's schedule .* at step 3"):
        fit(runner(Repulsion(weight=lambda step: 2.0 - step)))


# Functions ---------------------------------------------------------------------------------------


def at_grid(params):
    return GRID @ params["w"][:, 0] + params["a"].sum()


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        {"site": "f", "inputs": GRID},
        {"site": "y", "inputs": {"x": GRID}},  # by the mean of y
        {"site": "y", "inputs": (GRID, Y[:4])},
        {"function": at_grid},
    ],
)
def test_values_of_sites_and_functions(options):
    params = {"w": jnp.ones((3, 1)), "noise": jnp.ones(()), "a": jnp.arange(2.0)}
    values = Repulsion(**options).outputs(model, params, {})
    assert_allclose(values, GRID.sum(1) + 1.0, rtol=1e-5)
    assert Repulsion(site="a", inputs=GRID).outputs(model, params, {}) is params["a"]


def test_members_repel_by_values_of_a_site(compile_count):
    by_site = runner(Repulsion(site="f", inputs=GRID))
    result = fit(by_site)
    scheduled = Repulsion(function=at_grid, weight=lambda step: 1.0 + 0.0 * step)
    close(fit(runner(scheduled, member_batch_size=3)), result, rtol=1e-7)
    with compile_count() as compilations:
        fit(by_site, X + 1.0, Y)
    assert not [name for name in compilations.names if "chunk" in name]


@pytest.mark.long
def test_a_push_on_a_function_goes_through_its_slopes():
    """The function of a log joint takes whole members, some of whose leaves are no arrays."""
    matrix = jnp.asarray(GRID)

    def log_joint(params, y):
        return -((params["w"] @ matrix.T - y) ** 2).sum(), -(params["w"] ** 2).sum()

    def start(key):
        return {"w": jax.random.normal(key, (3,)), "name": "linear"}

    def values(params):
        assert params["name"] == "linear"
        return matrix @ params["w"]

    ensemble = EnsembleMAP.from_log_joint(
        log_joint, start, optax.sgd(0.1), ensemble_size=SIZE, repulsion=Repulsion(function=values)
    )
    y = jnp.arange(4.0)
    first = jax.vmap(lambda key: start(key)["w"])(KEYS)
    own = jax.vmap(jax.grad(lambda w: -sum(log_joint({"w": w}, y))))(first)
    pushes = by_hand(first @ matrix.T, jnp.zeros((SIZE, 4)), mixes=False)
    result = fit(ensemble, y, steps=1)
    assert_allclose(result.params["w"], first - 0.1 * (own + pushes @ matrix), rtol=1e-8)
    with pytest.raises(ValueError, match="density has no sites"):
        ensemble.repulsion = Repulsion(site="w", inputs=1.0)
        fit(ensemble, y)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel": "laplace"}, ValueError, "kernel takes 'rbf', got 'laplace'"),
        ({"method": "stein"}, ValueError, "method takes 'svgd' or 'wgd'"),
        ({"weight": -1.0}, ValueError, "weight takes a finite weight of at least 0, got -1.0"),
        ({"weight": np.nan}, ValueError, "weight takes a finite"),
        ({"weight": "strong"}, TypeError, "weight takes one number"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth takes a positive number"),
        ({"site": "f"}, ValueError, "site was given without inputs"),
        ({"inputs": GRID}, ValueError, "inputs was given without site"),
        ({"site": 3, "inputs": GRID}, TypeError, "name of a site"),
        ({"function": GRID}, TypeError, "function takes a callable"),
        ({"function": at_grid, "site": "f", "inputs": GRID}, ValueError, "not both"),
        ({"function": at_grid, "method": "svgd"}, ValueError, "method='svgd' does not go"),
    ],
)
def test_a_repulsion_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        Repulsion(**options)


def discrete(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3, 2]).to_event(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnsembleMAP(model, ADAM, ensemble_size=1, repulsion=Repulsion()), "there is one"),
        (lambda: runner(optim=None), "LBFGS.* numpyro.optim.Adam"),
        (lambda: runner(optim=optax.lbfgs()), "line search"),
        (lambda: runner(optim=optimistix.BFGS(1e-3, 1e-3)), "BFGS"),
        (lambda: runner(Repulsion(site="g", inputs=GRID)), r"'g' is no site .*\['w', 'noise'"),
        (lambda: runner(Repulsion(site="rows", inputs=GRID)), "'rows' is no site"),
        (lambda: runner(Repulsion(site="f", inputs=GRID[:, :2])), r"inputs, of shapes \(4, 2\)"),
        (lambda: runner(Repulsion(site="f", inputs={"z": GRID})), "unexpected keyword"),
        (lambda: runner(Repulsion(function=lambda params: "near")), "arrays of real numbers"),
        (lambda: runner(Repulsion(function=lambda params: params["w"] > 0)), "returns bool"),
        (lambda: runner(Repulsion(function=lambda params: params["w"][:0])), "float.*0"),
    ],
)
def test_calls_that_are_refused(make, message, compile_count):
    with compile_count() as compilations, pytest.raises(ValueError, match=message):
        fit(make(), key=jax.random.key(0))
    assert not [name for name in compilations.names if name in ("start", "chunk")]


def test_what_has_no_mean_is_no_place():
    ensemble = EnsembleMAP(
        discrete, ADAM, ensemble_size=2, repulsion=Repulsion(site="y", inputs=GRID)
    )
    with pytest.raises(ValueError, match=r"'y' \(Categorical\w*\) has no mean"):
        fit(ensemble, X, np.array([0, 1, 1, 0, 1, 0]), key=jax.random.key(0))


def test_members_with_data_of_their_own_are_no_draws_of_one_posterior():
    with pytest.raises(ValueError, match=r"member_args gives each member its own \['y'\]"):
        fit(runner(), X, np.stack([Y] * SIZE), member_args=["y"])


def test_a_setting_takes_a_repulsion(pushed):
    with pytest.raises(TypeError, match="repulsion takes a Repulsion"):
        pushed[0].repulsion = 1.0


@pytest.mark.long
@pytest.mark.parametrize("repulsion", [Repulsion(), Repulsion(method="wgd")])
def test_a_member_far_from_the_others_spoils_no_push(repulsion):
    """The push on the others is exact in single precision, at any place in the array."""
    near = 1e-3 * np.random.default_rng(0).normal(size=(6, 40))
    expected, *found = (
        pushed_beside(np.concatenate(parts), repulsion, dtype)
        for dtype, parts in (
            (np.float64, (near, np.full((1, 40), 10.0))),
            (np.float32, (near, np.full((1, 40), 10.0))),
            (np.float32, (np.full((1, 40), 10.0), near)),
        )
    )
    expected = expected[:6]
    for own, where in zip(found, (slice(0, 6), slice(1, 7)), strict=True):
        assert_allclose(own[where], expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def pushed_beside(places, repulsion, dtype):
    """Return the forces on members whose own gradients are 0."""
    places = jnp.asarray(places, dtype)
    loss = jnp.zeros(len(places), dtype)
    pulls = Pull(None, loss, {"w": 0 * places}, {"w": places}, jnp.zeros(len(places), int))
    return np.asarray(forces(repulsion, pulls)[0]["w"], float)
