"""Errors are raised before anything is compiled, and say the name, the value and the remedy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIState
from zoo import X, Y, map_on_ridge, positive, ridge

from numpyro_ensemble import EnsembleMAP, EnsembleVI

ADAM = numpyro.optim.Adam(0.1)


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def mixture(y):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def unobserved():
    numpyro.sample("mu", dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: EnsembleMAP(ridge, ADAM, ensemble_size=0), ValueError, "ensemble_size must be at"),
        (lambda: EnsembleMAP(ridge, ADAM, ensemble_size=2.5), TypeError, "ensemble_size takes an"),
        (lambda: EnsembleMAP(ridge, ADAM, ensemble_size=True), TypeError, "ensemble_size takes an"),
        (lambda: EnsembleMAP(ridge, ADAM, prior_weight=-1), ValueError, "prior_weight.*got -1"),
        (
            lambda: EnsembleMAP(ridge, ADAM, prior_weight=np.nan),
            ValueError,
            "prior_weight.*got nan",
        ),
        (lambda: EnsembleMAP(ridge, ADAM, prior_weight="x"), TypeError, "prior_weight takes one"),
        (lambda: EnsembleMAP(ridge, "adam"), TypeError, "Got <class 'str'>"),
        (lambda: EnsembleMAP(3, ADAM), TypeError, "model takes a callable.*got 3"),
        (
            lambda: EnsembleMAP(ridge, ADAM, prior_sites="pen"),
            TypeError,
            "prior_sites.*string 'pen'",
        ),
        (
            lambda: EnsembleMAP(ridge, ADAM, prior_sites=["a"], likelihood_sites=["a"]),
            ValueError,
            "prior_sites and likelihood_sites both name",
        ),
    ],
)
def test_constructor(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.0}, TypeError, "num_steps takes an integer, got 2.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size takes an integer"),
        ({"member_args": ["q"]}, ValueError, "member_args names 'q'.*'x', 'y'"),
        ({"init_params": 3}, TypeError, "init_params takes a dict"),
        (
            {"init_params": {"v": 1.0}},
            ValueError,
            r"init_params names \['v'\]; the fit's parameters are \['w'\]",
        ),
        (
            {"init_params": {"w": np.ones(3)}},
            ValueError,
            r"init_params\['w'\] has shape \(3,\); it takes \(2,\) or, per member, \(2, 2\)",
        ),
        ({"init_params": lambda key: {"w": jnp.ones((2, 2))}}, ValueError, r"shape \(2, 2\)"),
        ({"init_params": {"w": {"a": np.ones(2)}}}, ValueError, "has structure"),
        ({"init_state": 3}, TypeError, "init_state takes the state of an earlier run"),
    ],
)
def test_options_of_run(options, error, message, key, compile_count):
    runner = EnsembleMAP(ridge, ADAM, ensemble_size=2)
    jax.random.split(key, 2)  # compiled here, so that it is not counted below
    with compile_count() as count, pytest.raises(error, match=message):
        quiet(runner, key, options.pop("num_steps", 3), X, Y, **options)
    assert count.count == 0, count.names


def test_arrays_of_different_lengths_are_named(key):
    runner = EnsembleMAP(ridge, ADAM, ensemble_size=2)
    with pytest.raises(ValueError, match=r"one leading length, got \{'x': 8, 'y': 7\}.*batch_args"):
        quiet(runner, key, 3, X, Y[:7], batch_size=4)


def test_a_discrete_latent_is_refused(key, compile_count):
    runner = EnsembleMAP(mixture, ADAM, ensemble_size=2)
    jax.random.split(key, 2)
    with compile_count() as count:
        for call in (
            lambda: quiet(runner, key, 3, 1.0),
            lambda: runner.init(key, 1.0),
        ):
            with pytest.raises(ValueError, match=r"'z' is discrete \(Bernoulli.*TraceEnum_ELBO"):
                call()
    assert count.count == 0, count.names


def test_unknown_factors_are_named(key):
    runner = EnsembleMAP(ridge, ADAM, ensemble_size=2, prior_sites=["penalty"])
    with pytest.raises(ValueError, match=r"prior_sites names \['penalty'\]; the model's factors"):
        runner.init(key, X, Y)


def test_without_prior_there_must_be_data(key):
    runner = EnsembleMAP(unobserved, ADAM, ensemble_size=2, prior_weight=0)
    with pytest.raises(ValueError, match="prior_weight=0 leaves nothing to fit"):
        quiet(runner, key, 3)


def test_a_state_of_another_fit_is_refused(key):
    runner = map_on_ridge()
    state = runner.init(key, X, Y)
    for other, message in (
        (EnsembleMAP(ridge, ADAM, ensemble_size=3), r"another ensemble size.*\(2,\).*=3"),
        (
            EnsembleMAP(positive, ADAM, ensemble_size=2),
            r"lacks \['loc_auto_loc', .* and it has \['w_a",
        ),
        (EnsembleMAP(ridge, optax.adam(0.1), ensemble_size=2), "another optimiser: the fields"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(other, key, 3, X, Y, init_state=state)
    with pytest.raises(ValueError, match=r"another model: a leaf has shape \(2, 2\)"):
        quiet(runner, key, 3, np.ones((8, 3)), Y, init_state=state)
    with pytest.raises(ValueError, match="either init_state.*or init_params"):
        quiet(runner, key, 3, X, Y, init_state=state, init_params={"w": np.ones(2)})


@pytest.mark.long
def test_a_keyword_of_the_model_named_like_an_option(key):
    def model(x, y, batch_size=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=batch_size) as rows:
            numpyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])

    x, y = jnp.asarray(X), jnp.asarray(Y)
    runner = EnsembleMAP(model, ADAM, ensemble_size=2)
    for value in (4, None):  # None is the option's default
        with pytest.raises(ValueError, match="'batch_size' is both.*position.*functools.partial"):
            quiet(runner, key, 3, x, y, batch_size=value)
    by_position = quiet(runner, key, 3, x, y, 4)
    bound = quiet(EnsembleMAP(partial(model, batch_size=4), ADAM, ensemble_size=2), key, 3, x, y)
    assert_allclose(by_position.losses, bound.losses)
    both = EnsembleMAP(partial(model, batch_size=None), ADAM, ensemble_size=2)
    assert quiet(both, key, 3, x, y, batch_size=4).finite.all()


def test_a_keyword_of_a_raw_density_named_like_an_option(key):
    def log_joint(w, y, batch_size=1.0):
        return -batch_size * ((y - w) ** 2).sum(), -(w**2)

    runner = EnsembleMAP.from_log_joint(log_joint, jax.random.normal, ADAM, ensemble_size=2)
    with pytest.raises(ValueError, match="'batch_size' is both an option of run and a keyword"):
        quiet(runner, key, 3, Y, batch_size=2)
    with pytest.raises(ValueError, match=r"member_args names 'z'.*\['y'\]"):
        quiet(runner, key, 3, Y, member_args=["z"])


@pytest.mark.parametrize("per_member", [pytest.param(False, marks=pytest.mark.long), True])
def test_starts_outside_the_support(per_member, key):
    def model(y):
        numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, numpyro.sample("s", dist.HalfNormal(1))), obs=y)

    runner = EnsembleMAP(model, ADAM, ensemble_size=3)
    good = {"p": np.array([0.2, 0.3, 0.5]), "s": 0.5}
    assert quiet(runner, key, 2, Y, init_params=good).finite.all()
    for name, value in (("p", np.array([0.5, 0.6, 0.2])), ("s", -1.0)):
        starts = {**good, name: value}
        if per_member:
            starts = {k: np.stack([good[k], v, good[k]]) for k, v in starts.items()}
        members = "1" if per_member else "0, 1, 2"
        with pytest.raises(
            ValueError, match=rf"init_params\['{name}'\] is outside .*members {members}\. It takes"
        ):
            quiet(runner, key, 2, Y, init_params=starts)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 4}, "batch_size traces 'x', batch_size traces 'y'"),
        (
            {"jit_model_args": True},
            "jit_model_args=True traces 'x', jit_model_args=True traces 'y'",
        ),
    ],
)
def test_a_model_that_looks_at_traced_values(options, named, key):
    def model(x, y):
        ridge(x, y / np.asarray(y).std())

    runner = EnsembleMAP(model, ADAM, ensemble_size=2)
    with pytest.raises(ValueError, match=f"reads the values.*{named}.*beforehand"):
        quiet(runner, key, 3, X, Y, **options)


def test_a_dead_member_is_named_once(key):
    runner = map_on_ridge()
    starts = {"w": np.array([[0.0, 0.0], [np.nan, 0.0]])}
    with pytest.warns(UserWarning) as caught:
        quiet(runner, key, 3, X, Y, init_params=starts)
    assert len(caught) == 1
    assert "1 of 2 members start where the loss is not finite: 1." in str(caught[0].message)


def test_params_need_a_fit(key):
    runner = map_on_ridge()
    with pytest.raises(TypeError, match="state takes what init, update or run of a runner"):
        runner.get_params(None)
    state = runner.init(key, X, Y)
    with pytest.raises(ValueError, match="get_params takes a state that init, update or run"):
        runner.get_params(SVIState(*state))


def test_data_of_equal_shapes_are_compiled_for_once(key, compile_count):
    runner = map_on_ridge()
    state = runner.init(key, X, Y)
    expected, _ = runner.update(state, X + 1, Y)
    step = jax.jit(runner.update)
    with compile_count() as count:
        for i in range(1, 6):
            state, _ = runner.update(state, X + i, Y)
    assert count.count == 0, count.names
    for i in range(2, 6):
        expected, _ = step(expected, X + i, Y)
    assert_allclose(runner.get_params(state)["w"], runner.get_params(expected)["w"], rtol=1e-9)


def test_a_failed_call_loses_nothing(key):
    runner = map_on_ridge()
    first = quiet(runner, key, 3, X, Y)
    with pytest.raises(ValueError, match="init_params"):
        quiet(runner, key, 3, X, Y, init_params={"v": 1.0})
    again = quiet(runner, key, 3, X, Y)
    assert_allclose(again.losses, first.losses, rtol=0)


@pytest.mark.long
def test_rows_that_depend_on_each_other_cannot_be_batched(key):
    def autoregressive(y):
        rho = numpyro.sample("rho", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(rho * y[:-1], 0.1), obs=y[1:])

    def joint(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        cov = jnp.eye(len(y)) + 0.5
        numpyro.sample("y", dist.MultivariateNormal(jnp.full(len(y), mu), cov), obs=y)

    def separate(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1).expand([len(y)]).to_event(1), obs=y)

    for model in (autoregressive, joint):
        with pytest.raises(ValueError, match="observed site 'y'.*depend on several rows at once"):
            quiet(EnsembleMAP(model, ADAM, ensemble_size=2), key, 2, Y, batch_size=4)
    assert quiet(EnsembleMAP(separate, ADAM, ensemble_size=2), key, 2, Y, batch_size=4).finite.all()


def test_a_scale_that_the_model_computes_is_seen(key):
    def model(y, n):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.handlers.scale(scale=n / len(y)), numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    runner = EnsembleMAP(model, ADAM, ensemble_size=2)
    with pytest.raises(ValueError, match="scaled by 1 with all rows and by 2 with batch_size=4"):
        quiet(runner, key, 2, Y, jnp.array(8.0), batch_size=4)


@pytest.mark.promotes_ranks
def test_a_scale_wider_than_the_density_is_seen(key):
    """Weights of all members that `member_args` does not name would be summed over members."""

    def model(y, weight):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.handlers.scale(scale=weight):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    runner = EnsembleMAP(model, ADAM, ensemble_size=2)
    weights = np.ones((2, len(Y)))
    with pytest.warns(UserWarning, match=r"'y', of shape \(8,\), by numbers of shape \(2, 8\)"):
        quiet(runner, key, 2, Y, weights)
    with pytest.raises(ValueError, match=r"by numbers of shape \(8, 2\): give one number"):
        quiet(runner, key, 2, Y, weights.T)
    quiet(runner, key, 2, Y, weights, member_args=["weight"])
    quiet(runner, key, 2, Y, weights[:1])

    def plate_inside(y, weight):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.handlers.scale(scale=weight), numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    quiet(EnsembleMAP(plate_inside, ADAM, ensemble_size=2), key, 2, Y, weights[0])


def test_arguments_of_the_constructor_are_checked():
    with pytest.raises(TypeError, match="init_loc_fn takes a NumPyro strategy, got 3"):
        EnsembleMAP(ridge, ADAM, init_loc_fn=3)
    with pytest.raises(TypeError, match="loss takes an ELBO"):
        EnsembleVI(ridge, AutoNormal(ridge), ADAM, Trace_ELBO)
    with pytest.raises(TypeError, match="optim takes an optimiser, got 'adam'"):
        EnsembleVI(ridge, AutoNormal(ridge), "adam", Trace_ELBO())


def test_an_argument_is_given_once(key):
    runner = EnsembleVI(ridge, AutoNormal(ridge), ADAM, Trace_ELBO(), ensemble_size=2, y=Y)
    with pytest.raises(TypeError, match="'y' is given both as a static keyword and in this call"):
        quiet(runner, key, 2, X, y=Y)
