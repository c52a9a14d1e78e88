"""Posterior functions from the samples of any inference, called like `Predictive`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import inputs, within
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.module import flax_module
from numpyro.handlers import reparam
from numpyro.infer import Predictive

from numpyro_ensemble import EnsembleMAP, to_arviz
from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    ExpectedLikelihood,
    GaussianProcess,
    Matern52,
    Pathwise,
    WhitenReparam,
    sparse_gp,
)

X, X_NEW = inputs(12, 1, width=5.0), np.linspace(0.0, 6.0, 7)[:, None]
Y = np.sin(X[:, 0])
SCALES = np.array([0.8, 1.0, 1.3])
OPTIONS = {"num_features": 64}


def observed(X, y=None):
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 0.5))
    noise = numpyro.sample("noise", dist.LogNormal(-3.0, 0.5))
    numpyro.deterministic("twice", 2 * lengthscale)
    numpyro.sample("y", GaussianProcess(RBF(1.0, lengthscale), X, noise, 0.2), obs=y)


SAMPLES = {"lengthscale": SCALES, "noise": np.full(3, 0.01), "twice": 2 * SCALES}


@pytest.fixture(scope="module")
def pathwise():
    return Pathwise(observed, SAMPLES, X, Y, num_paths=200, **OPTIONS)


def means_agree(values, moments, number):
    """Return whether draws `(S * P, N)` have the moments of the mixture."""
    error = np.sqrt(moments.variance / number)
    return bool(
        (abs(values.mean(axis=0) - moments.mean) < 5 * error).all()
        and (abs(values.var(axis=0) / moments.variance - 1) < 0.25).all()
    )


@pytest.mark.core
def test_an_observed_process(pathwise, key):
    out = pathwise(key, X_NEW)
    assert {name: value.shape for name, value in out.items()} == {
        "y": (600, 7), "y_f": (600, 7), "twice": (600,),
    }  # fmt: skip
    assert_allclose(out["twice"], np.repeat(2 * SCALES, 200), rtol=1e-6)
    moments = pathwise.moments(X_NEW)["y_f"]
    each = [GaussianProcess(RBF(1.0, s), X, 0.01, 0.2).predict(Y, X_NEW) for s in SCALES]
    mean, variance = (np.stack(part) for part in zip(*each, strict=True))
    exact = within({"rtol": 1e-6}, {"rtol": 1e-4, "atol": 1e-5})
    assert_allclose(moments.mean, mean.mean(axis=0), **exact)
    assert_allclose(moments.variance, variance.mean(axis=0) + mean.var(axis=0), **exact)
    noise = np.asarray(out["y"] - out["y_f"])
    assert abs(noise.std() / 0.1 - 1) < 0.1


@pytest.mark.long
def test_its_functions_have_the_exact_moments(key):
    many = Pathwise(observed, SAMPLES, X, Y, num_paths=300, num_bases=10, num_features=512)
    values = np.asarray(many(key, X_NEW)["y_f"])
    moments = many.moments(X_NEW)["y_f"]
    assert means_agree(values, moments, 900)
    assert not means_agree(0.5 * (values + values.mean(axis=0)), moments, 900)
    # plain Predictive at new inputs draws from the prior without a warning
    prior = Predictive(observed, SAMPLES)(key, X_NEW)["y"]
    tight = int(np.argmin(moments.variance))
    narrow = np.sqrt(moments.variance[tight])
    assert narrow < 0.1 and np.std(prior[:, tight]) > 3 * narrow


@pytest.mark.core
def test_one_key_is_one_set_of_functions(pathwise, key, compile_count):
    whole = pathwise(key, X_NEW)["y_f"]
    paths = pathwise.draw(key)["y"]
    assert paths.num_paths == 600 and paths.num_draws == 3
    exact = within({"rtol": 1e-6, "atol": 1e-9}, {"rtol": 1e-5, "atol": 1e-4})
    assert_allclose(paths(X_NEW), whole, **exact)
    part = pathwise(key, X_NEW[2:5])["y_f"]
    assert_allclose(part, whole[:, 2:5], **exact)
    with compile_count() as count:
        other = pathwise(jax.random.key(1), X_NEW + 0.1)["y_f"]
        pathwise.draw(jax.random.key(1))
    assert count.count <= 1, count.names  # the program that makes the key
    assert abs(other - whole).max() > 1e-2


@pytest.mark.long
def test_keys_of_both_styles_are_one(pathwise):
    styles = jax.random.key(0), jax.random.PRNGKey(0)
    old, new = (pathwise(key, X_NEW)["y_f"] for key in styles)
    assert_allclose(old, new, **within({"rtol": 1e-6, "atol": 1e-9}, {"rtol": 1e-5, "atol": 1e-4}))


@pytest.mark.long
def test_shapes_on_request(key):
    grouped = Pathwise(
        observed, SAMPLES, X, Y, num_paths=2, group_by_draw=True, return_sites=["y_f"], **OPTIONS
    )
    out = grouped(key, X_NEW)
    assert {name: value.shape for name, value in out.items()} == {"y_f": (3, 2, 7)}
    flat = Pathwise(observed, SAMPLES, X, Y, num_paths=2, return_sites=("y_f",), **OPTIONS)
    assert_array_equal(flat(key, X_NEW)["y_f"].reshape(3, 2, 7), out["y_f"])
    chains = {name: np.stack([value, value]) for name, value in SAMPLES.items()}
    two = Pathwise(observed, chains, X, Y, batch_ndims=2, batch_size=2, **OPTIONS)
    assert two(key, X_NEW)["y"].shape == (6, 7)
    one = {name: value[0] for name, value in SAMPLES.items()}
    single = Pathwise(observed, one, X, Y, batch_ndims=0, num_paths=6, **OPTIONS)
    assert single(key, X_NEW)["y"].shape == (6, 7)  # 4 bases of 2 paths, less 2 paths
    exact = within({"rtol": 1e-6}, {"rtol": 1e-5, "atol": 1e-4})
    assert_allclose(single.draw(key)["y"](X_NEW), single(key, X_NEW)["y_f"], **exact)


def latent(X, y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    f = numpyro.sample("f", GaussianProcess(RBF(1.0, scale), X))
    with numpyro.plate("data", len(X)):
        numpyro.sample("y", dist.Normal(f, 0.1), obs=y)


def test_latent_processes_whitened_and_not(key):
    white = reparam(latent, config={"f": WhitenReparam()})
    bases = np.random.default_rng(0).normal(size=(3, 12))
    filled = Predictive(white, {"scale": SCALES, "f_base": bases}, return_sites=["f"])
    values = filled(key, X)["f"]
    # samples of MCMC have deterministic sites such as f: given values are ignored
    samples = {"scale": SCALES, "f_base": bases, "f": values + 100.0}
    whitened = Pathwise(white, samples, X, Y, **OPTIONS)
    plain = Pathwise(latent, {"scale": SCALES, "f": values}, X, Y, **OPTIONS)
    ours, theirs = whitened(key, X_NEW), plain(key, X_NEW)
    assert {name: value.shape for name, value in ours.items()} == {"f": (3, 7), "y": (3, 7)}
    assert_allclose(ours["f"], theirs["f"], atol=within(1e-4, 5e-3))
    assert 0.02 < np.std(ours["y"] - ours["f"]) < 0.3  # the likelihood is drawn on top
    # functions pass through the values, up to the root of the jitter
    assert_allclose(whitened(key, X)["f"], values, atol=within(1e-4, 2e-2))


@pytest.mark.long
def test_sparse_processes(key):
    Z = np.linspace(0.0, 5.0, 6)[:, None]

    def model(X, y=None):
        m, v = sparse_gp("f", Matern52(1.0, 1.0), X, Z)
        with numpyro.plate("data", len(X)):
            numpyro.sample("y", ExpectedLikelihood(lambda f: dist.Normal(f, 0.1), m, v), obs=y)

    base = np.random.default_rng(0).normal(size=(2, 6))
    out = Pathwise(model, {"f_u_base": base}, X, Y, num_paths=500, **OPTIONS)
    values = out(key, X_NEW)
    moments = out.moments(X_NEW)["f"]
    assert means_agree(values["f"], moments, 1000)
    assert np.std(values["y"] - values["f"]) < 0.12  # noise only; the function's variance is in f

    def collapsed(X, y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", CollapsedSparseGP(RBF(1.0, scale), X, Z, 0.01), obs=y)

    many = Pathwise(collapsed, {"scale": SCALES}, X, Y, num_paths=300, **OPTIONS)
    assert means_agree(many(key, X_NEW)["y_f"], many.moments(X_NEW)["y_f"], 900)


@pytest.mark.long
def test_additive_processes_and_their_parts(key):
    def model(X, y=None):
        f = numpyro.sample("f", GaussianProcess(RBF(1.0, 1.0), X))
        g = numpyro.sample("g", GaussianProcess(RBF(0.5, 0.3), X))
        h = numpyro.deterministic("h", f + g)
        numpyro.sample("y", dist.Normal(h, 0.1).to_event(1), obs=y)

    samples = {name: np.random.default_rng(0).normal(size=(2, 12)) * 0.1 for name in "fg"}
    out = Pathwise(model, samples, X, Y, **OPTIONS)
    values = out(key, X_NEW)
    assert_allclose(values["h"], values["f"] + values["g"], rtol=1e-6, atol=within(0.0, 1e-6))
    drawn = out.draw(key)
    # without noise, weights in the thousands multiply the kernel's rounding
    exact = within({"rtol": 1e-6}, {"atol": 2e-2})
    assert_allclose(drawn["f"](X_NEW) + drawn["g"](X_NEW), values["h"], **exact)


@pytest.mark.long
def test_copies_in_a_plate(key):
    def model(X, y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("task", 3):
            numpyro.sample("y", GaussianProcess(RBF(1.0, scale), X, 0.01), obs=y)

    y = np.stack([Y, -Y, 0 * Y])
    out = Pathwise(model, {"scale": SCALES}, X, y, num_paths=100, **OPTIONS)
    values = out(key, X_NEW)["y_f"]
    assert values.shape == (300, 3, 7)
    moments = out.moments(X_NEW)["y_f"]
    assert moments.mean.shape == (3, 7)
    assert means_agree(values, moments, 300)
    assert_allclose(out.draw(key)["y"](X_NEW).reshape(300, 3, 7), values, atol=within(1e-6, 1e-4))


@pytest.mark.long
def test_parameters_and_networks_of_each_draw(key):
    net = eqx.nn.MLP(1, 2, 4, 1, key=key)

    def deep(X, y=None):
        weights = numpyro.param("weights", jnp.ones(2))
        kernel = RBF(1.0, 1.0).warp(jax.tree_util.Partial(lambda w, x: x * w[0], weights))
        numpyro.sample("y", GaussianProcess(kernel, X, 0.01, weights[1]), obs=y)

    params = {"weights": np.array([[1.0, 0.0], [2.0, 0.5]])}
    each = Pathwise(deep, {"unused": np.zeros(2)}, X, Y, params=params, **OPTIONS)
    moments = each.moments(X_NEW)["y_f"]
    singles = [
        GaussianProcess(RBF(1.0, 1.0), w * X, 0.01, m).predict(Y, w * X_NEW)[0]
        for w, m in params["weights"]
    ]
    exact = within({"rtol": 1e-6}, {"rtol": 1e-5, "atol": 1e-5})
    assert_allclose(moments.mean, np.mean(singles, axis=0), **exact)
    shared = Pathwise(
        deep, {"unused": np.zeros(3)}, X, Y, params={"weights": np.array([2.0, 0.5])}, **OPTIONS
    )
    assert_allclose(shared.moments(X_NEW)["y_f"].mean, singles[1], **exact)
    with pytest.raises(ValueError, match=r"params\['weights'\] has shapes \[\(3,\)\]"):
        Pathwise(deep, {"unused": np.zeros(2)}, X, Y, params={"weights": np.ones(3)})

    def closes(X, y=None):  # a function of latents that is no pytree
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        kernel = RBF().warp(lambda x: jax.vmap(net)(x) + shift)
        numpyro.sample("y", GaussianProcess(kernel, X, 0.01), obs=y)

    out = Pathwise(closes, {"shift": np.zeros(2)}, X, Y, **OPTIONS)
    assert np.isfinite(out(key, X_NEW)["y"]).all()
    with pytest.raises(TypeError, match="give it as a pytree"):
        out.draw(key)


@pytest.mark.long
def test_a_flax_network_in_front_of_a_kernel(key):
    from flax import linen

    def model(X, y=None):
        net = flax_module("net", linen.Dense(2), input_shape=(1, 1))
        numpyro.sample("y", GaussianProcess(RBF().warp(net), X, 0.01), obs=y)

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.01), ensemble_size=3)
    result = runner.run(key, 3, X, Y, progress_bar=False)
    out = Pathwise(model, {"unused": np.zeros(3)}, X, Y, params=result.params, **OPTIONS)
    values = out(key, X_NEW)["y_f"]
    assert values.shape == (3, 7)
    assert_allclose(out.draw(key)["y"](X_NEW), values, rtol=1e-5, atol=within(0.0, 1e-4))


@pytest.mark.long
def test_from_a_map_ensemble_into_arviz(key):
    runner = EnsembleMAP(observed, numpyro.optim.Adam(0.05), ensemble_size=3)
    result = runner.run(key, 5, X, Y, progress_bar=False)
    out = Pathwise(observed, result, X, Y, num_paths=4, return_sites=["y", "y_f"], **OPTIONS)
    predictions = out(key, X_NEW)
    assert predictions["y"].shape == (12, 7)
    data = to_arviz(
        runner, result, X, Y, num_samples=4, predictions=predictions,
        posterior_predictive=False, log_likelihood=False,
    )  # fmt: skip
    assert data["predictions"]["y_f"].shape == (3, 4, 7)


@pytest.mark.long
def test_a_model_may_look_at_the_values_of_its_inputs(key):
    def model(X, y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        assert len(np.unique(X)) > 3
        numpyro.sample("y", GaussianProcess(RBF(1.0, scale), X, 0.01), obs=y)

    out = Pathwise(model, {"scale": SCALES}, X, Y, **OPTIONS)
    assert out(key, X_NEW)["y"].shape == (3, 7)
    assert out(key, X_NEW[:4])["y"].shape == (3, 4)


def by_hand(X, y=None):
    Z = jnp.linspace(0.0, 5.0, 5)[:, None]
    u = numpyro.sample("u", GaussianProcess(RBF(), Z))
    f = RBF()(X, Z) @ jnp.linalg.solve(RBF()(Z) + 1e-6 * jnp.eye(5), u)
    numpyro.sample("y", dist.Normal(f, 0.1).to_event(1), obs=y)


def transformed(X, y=None):
    gp = dist.TransformedDistribution(GaussianProcess(RBF(), X), dist.transforms.ExpTransform())
    numpyro.sample("f", gp)


def no_process(X, y=None):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


BAD = {
    "no process": (no_process, {"a": np.zeros(2)}, "the model has no Gaussian process"),
    "a hyperparameter": (
        observed,
        {"noise": np.ones(2)},
        r"\['lengthscale'\] are neither observed",
    ),
    "no data": (latent, {"scale": SCALES}, r"\['f'\] are neither observed"),
    "transformed": (transformed, {"f": np.ones((2, 12))}, "'f' transforms a Gaussian process"),
    "axes": (observed, {"lengthscale": np.ones(2), "noise": np.ones(3)}, "must lead with the same"),
    "one draw": (
        observed,
        {"lengthscale": np.array(1.0), "noise": np.array(0.1)},
        "0 for one draw without an axis of draws",
    ),
    "none": (observed, {"lengthscale": np.ones(0), "noise": np.ones(0)}, "hold no draw"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_and_samples_that_do_not_fit(name):
    model, samples, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Pathwise(model, samples, X, Y)


@pytest.mark.long
def test_draws_that_no_functions_can_be_made_of(key):
    for samples, message in (
        ([1.0, -1.0], r"not positive in 1 of 2 .*: \[1\]"),
        ([np.nan, 1.0], r"not positive in 1 of 2 .*: \[0\]"),
    ):
        given = {"lengthscale": np.array(samples), "noise": np.ones(2)}
        with pytest.raises(ValueError, match=message):
            Pathwise(observed, given, X, Y, **OPTIONS)(key, X_NEW)

    def repeated(X, y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", GaussianProcess(RBF(1.0, scale), X), obs=y)

    twice = np.concatenate([X, X[:1]])
    with pytest.raises(
        ValueError, match="different values at equal inputs without noise in 3 of 3"
    ):
        Pathwise(repeated, {"scale": SCALES}, twice, np.append(Y, Y[0] + 1), **OPTIONS)(key, X_NEW)
    values = np.random.default_rng(0).normal(size=(2, 12))
    values[1, 0] = np.nan
    with pytest.raises(ValueError, match="not finite in 1 of 2"):
        Pathwise(latent, {"scale": np.ones(2), "f": values}, X, Y, **OPTIONS)(key, X_NEW)


@pytest.mark.long
def test_calls_that_cannot_be_answered(key, pathwise):
    with pytest.raises(ValueError, match="'y' is observed in this call: let the model take y=None"):
        pathwise(key, X_NEW, Y[:7])
    with pytest.raises(ValueError, match="return_sites names"):
        Pathwise(observed, SAMPLES, X, Y, return_sites=["z"], **OPTIONS)(key, X_NEW)
    u = np.random.default_rng(0).normal(size=(2, 5))
    inducing = Pathwise(by_hand, {"u": u}, X, Y, **OPTIONS)
    np.testing.assert_allclose(inducing(key, X_NEW)["u"], u, atol=1e-3)  # the inputs of u are fixed
    assert inducing.draw(key)["u"](X_NEW).shape == (2, 7)
    with pytest.raises(ValueError, match="rng_key takes one key"):
        pathwise(jax.random.split(key, 2), X_NEW)
    for options in ({"num_paths": 0}, {"num_features": 7}, {"num_features": 0}, {"solver": "lu"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Pathwise(observed, SAMPLES, X, Y, **options)
    with pytest.raises(TypeError, match="posterior_samples takes a dict"):
        Pathwise(observed, [1.0], X, Y)
