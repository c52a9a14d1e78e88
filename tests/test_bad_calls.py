"""An invalid call raises before anything is compiled; the error says what to do instead."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, to_arviz

ADAM = numpyro.optim.Adam(0.1)
X = np.arange(4.0)


def model(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    numpyro.deterministic("sum", slope + bias)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(slope * x + bias, 1.0), obs=y)


def density(params, x):
    return -((params - x) ** 2).sum(), 0.0


def point(of=model):
    return EnsembleMAP(of, ADAM, ensemble_size=2)


def variational(**options):
    return EnsembleVI(model, AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=2, **options)


@pytest.fixture(scope="module")
def fitted():
    return {
        make: make().run(jax.random.key(0), 2, X, X, progress_bar=False)
        for make in (point, variational)
    }


def test_keywords_that_nobody_knows_are_refused_before_anything_is_compiled(
    key, fitted, compile_count
):
    runner, result = variational(), fitted[variational]
    with compile_count() as compiled:
        for call, owner, meant in (
            (lambda: point().run(key, 3, X, X, progressbar=False), "run", "progress_bar"),
            (lambda: runner.run(key, 3, X, Y=X), "run", "y"),
            (lambda: runner.init(key, X, X, init_param={}), "init", "init_params"),
            (
                lambda: runner.sample_posterior(key, result, X, num_sample=3),
                "sample_p",
                "num_samples",
            ),
        ):
            with pytest.raises(TypeError, match=rf"{owner}.* has no option .*mean {meant}\?"):
                call()
        with pytest.raises(TypeError, match="update has no option 'zeta', and the model takes no"):
            runner.update(result.state, X, X, zeta=1)
    assert compiled.count == 0, compiled.names


def test_a_setting_is_named_where_run_is_given_it(key):
    raw = EnsembleMAP.from_log_joint(lambda w, x: (w, w), lambda _: X, ADAM)
    for runner in (point(), raw):
        with pytest.raises(TypeError, match=r"a setting: EnsembleMAP\(\.\.\., prior_weight="):
            runner.run(key, 3, X, prior_weight=0)


def test_keywords_of_a_model_are_passed_on(key):
    def takes_any(x, **more):
        numpyro.sample("y", dist.Normal(numpyro.sample("w", dist.Normal(0.0, 1.0)), more["scale"]))

    for runner in (point(), point(numpyro.handlers.scope(model, "a")), point(takes_any)):
        more = {"scale": 2.0} if runner.model is takes_any else {"y": X}
        assert runner.run(key, 2, X, progress_bar=False, **more).losses.shape == (2, 2)


def test_a_density_in_the_place_of_a_model_is_told_where_to_go(key):
    for args in ((X,), (X, X)):  # no params, or X as params
        with pytest.raises((TypeError, ValueError), match="goes to EnsembleMAP.from_log_joint or"):
            point(density).run(key, 3, *args)
    with pytest.raises(TypeError, match="cannot be called .*: missing a required argument: 'x'"):
        variational().run(key, 3)
    with pytest.raises(TypeError, match="too many positional"):
        point().run(key, 3, X, X, X)


def test_a_model_without_anything_to_fit_is_refused(key):
    with pytest.raises(ValueError, match="no latent site and no parameter"):
        point(lambda y: numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)).run(key, 3, 1.0)
    runner = point(lambda y: numpyro.sample("y", dist.Normal(numpyro.param("m", 0.0), 1.0), obs=y))
    starts = {"m": np.arange(2.0)}
    result = runner.run(key, 3, 1.0, init_params=starts, progress_bar=False)
    assert result.params["m"].shape == (2,)


def test_a_guide_class_is_no_guide():
    with pytest.raises(TypeError, match=r"guide takes an instance, AutoNormal\(model\) say"):
        EnsembleVI(model, AutoNormal, ADAM, Trace_ELBO())


def test_sites_that_nobody_has_are_not_returned(key, fitted):
    result = fitted[point]
    with pytest.raises(ValueError, match=r"return_sites names \['zeta'\]"):
        EnsemblePredictive(model, result, return_sites=["zeta", "y"])(key, X)
    predictions = EnsemblePredictive(model, result, return_sites=["sum", "y"])(key, X)
    assert set(predictions) == {"sum", "y"}


def test_a_state_of_the_other_runner_says_what_differs(key, fitted):
    with pytest.raises(
        ValueError, match=r"guide: it has \['bias_auto_scale', 'slope_auto_scale'\]"
    ):
        point().run(key, 3, X, X, init_state=fitted[variational].state)
    with pytest.raises(ValueError, match=r"guide: it lacks \['bias_auto_scale', 'slope_auto_"):
        variational().run(key, 3, X, X, init_state=fitted[point].state)


def test_a_schedule_must_return_one_number(key):
    runner = variational(kl_weight=lambda step: jnp.ones(1))
    with pytest.raises(ValueError, match=r"one number for a step; .* array of shape \(1,\)"):
        runner.run(key, 3, X, X)
    with pytest.raises(ValueError, match=r"one number for a step; .* array of shape \(1,\)"):
        runner.evaluate(runner.init(key, X, X), X, X)


def test_nan_in_the_data_is_named(key):
    y = np.where(X == 1, np.nan, X)
    with pytest.raises(ValueError, match="All 2 members start .* The data hold NaN: y. Leave"):
        point().run(key, 3, X, y, progress_bar=False)

    def labelled(x, names):
        assert len(names) == len(x)
        numpyro.sample("y", dist.Normal(numpyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="The data hold NaN: x. Leave"):  # text is not NaN
        point(labelled).run(key, 3, y, np.array(list("abcd"), object), progress_bar=False)
    with pytest.raises(ValueError, match="check the data"):  # not NaN, but infinite
        point().run(key, 3, X, np.where(X == 1, np.inf, X), progress_bar=False)


def test_arviz_data_of_dims_that_do_not_fit(key, fitted):
    runner, result = variational(), fitted[variational]
    with pytest.raises(TypeError, match="cannot be called|missing a required argument"):
        to_arviz(runner, result)
    with pytest.raises(ValueError, match="'zeta'"):
        to_arviz(runner, result, X, X, dims={"zeta": ["row"]})
    with pytest.raises(ValueError, match="'y'"):
        to_arviz(runner, result, X, X, dims={"y": ["row", "column"]})


def test_a_plate_of_two_sizes_is_named(key, compile_count):
    def two_sizes():
        for name, size in (("w", 10), ("b", 5)):
            with numpyro.plate("rows", size):
                numpyro.sample(name, dist.Normal(0.0, 1.0))

    runners = (
        point(two_sizes),
        EnsembleVI(two_sizes, AutoNormal(two_sizes), ADAM, Trace_ELBO(), ensemble_size=2),
    )
    with compile_count() as compiled:
        for runner in runners:
            with pytest.raises(
                ValueError, match="plate 'rows' has size 10 around 'w' and 5 around 'b'"
            ):
                runner.run(key, 3, progress_bar=False)
    assert not [name for name in compiled.names if name.startswith("jit_start")]
