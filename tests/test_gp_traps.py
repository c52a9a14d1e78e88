"""Cases in which a process could be silently wrong: the result is right, or an error is raised."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import columns, inputs
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.module import flax_module
from numpyro.handlers import mask, reparam, seed
from zoo import Linen

from numpyro_ensemble import EnsembleMAP
from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    Coregion,
    GaussianProcess,
    Linear,
    Pathwise,
    Periodic,
    WhitenReparam,
    draw_features,
    draw_paths,
)

X, X_NEW = inputs(12, 1, width=5.0), np.linspace(0.0, 6.0, 7)[:, None]
Y = np.sin(X[:, 0])
Z = np.linspace(0.0, 5.0, 4)[:, None]
SCALES = {"lengthscale": np.array([0.8, 1.2])}
OPTIONS = {"num_features": 64}


def scale():
    return numpyro.sample("lengthscale", dist.LogNormal(0.0, 0.5))


@pytest.mark.long
def test_a_latent_process_keeps_its_noise_where_it_is_whitened(key):
    def model(X, y=None):
        f = numpyro.sample("f", GaussianProcess(RBF(1.0, scale()), X, 0.5))
        numpyro.sample("y", dist.Normal(f, 0.1).to_event(1), obs=y)

    whitened = reparam(model, config={"f": WhitenReparam()})
    samples = SCALES | {"f_base": np.zeros((2, 12))}
    pathwise = Pathwise(whitened, samples, X, Y, num_paths=500, **OPTIONS)
    out = pathwise(key, X_NEW[:3] + 100.0)  # far away: the prior
    assert_allclose(out["f_f"].var(axis=0), 1.0, atol=0.25)
    assert_allclose(out["f"].var(axis=0), 1.5, atol=0.3)
    assert pathwise.moments(X_NEW).keys() == {"f", "f_f"}


@pytest.mark.long
def test_updates_of_some_paths_are_those_of_all(key):
    paths = draw_paths(key, RBF(), X, Y, noise=0.1, num_paths=6, num_bases=2, **OPTIONS)
    new, values = np.array([1.1, 2.3]), np.array([0.5, 0.4])
    whole = paths.update(new, values)
    part = paths[np.array([4, 1])].update(new, values)
    assert_allclose(part.rhs[:, 12:], whole.rhs[np.array([4, 1]), 12:], rtol=1e-4, atol=1e-6)
    draws = Pathwise(observed, SCALES, X, Y, num_paths=3, **OPTIONS).draw(key)["y"]
    error = draws[:3].update(new, values).rhs[..., 12:]
    assert np.std(np.asarray(error), axis=0).min() > 1e-3
    old = draw_paths(jax.random.key(0, impl="rbg"), RBF(), X, Y, noise=0.1, **OPTIONS)
    assert np.isfinite(old.update(new, values)(X_NEW)).all()


@pytest.mark.long
def test_updates_add_the_jitter_that_more_points_need(key):
    few = np.linspace(0.0, 1.0, 3)
    paths = draw_paths(key, RBF(), few, np.sin(few), num_paths=2, **OPTIONS)
    many = np.linspace(0.01, 0.99, 150)
    assert paths.update(many, np.sin(many)).ok.all()


@pytest.mark.long
def test_updates_that_contradict_what_is_known_are_refused(key):
    X, y = np.arange(6.0), np.sin(np.arange(6.0))
    sure = draw_paths(key, RBF(), X, y, num_paths=3)
    with pytest.raises(ValueError, match="values at equal points differ although noise is 0"):
        sure.update([2.0, 7.0], [0.5, 0.0])
    with pytest.raises(ValueError, match="values at equal points differ"):
        sure.update([7.0, 7.0], [0.5, 0.0])
    agrees = sure.update(np.array([2.0]), y[2:3])
    np.testing.assert_allclose(agrees(X), np.tile(y, (3, 1)), atol=0.1)
    noisy = sure.update([2.0, 7.0], [0.5, 0.0], noise=0.01)
    assert abs(noisy(np.array([2.0])) - y[2]).max() < 0.1
    hidden = draw_paths(key, RBF(), X, y, observed=X != 2.0, num_paths=3)
    np.testing.assert_allclose(hidden.update([2.0], [0.5])(np.array([2.0])), 0.5, atol=0.01)


@pytest.mark.long
def test_no_inputs_give_no_values(key):
    pathwise = functions(num_paths=3)
    assert pathwise(key, X[:0])["y"].shape == (6, 0)
    assert pathwise.draw(key)["y"](X[:0]).shape == (6, 0)


@pytest.mark.long
def test_one_term_cannot_be_updated(key):
    paths = draw_paths(key, RBF() + Linear(), X, Y, noise=0.1, **OPTIONS)
    with pytest.raises(ValueError, match="update the whole first"):
        paths.components()[1].update(X_NEW, np.zeros(7))


@pytest.mark.long
def test_updates_of_collapsed_paths_have_the_models_noise(key):
    paths = CollapsedSparseGP(RBF(), X, Z, 0.25).draw_paths(key, Y, num_paths=4, **OPTIONS)
    assert_allclose(paths.noise, 0.25)
    assert np.std(paths.update([2.5], [3.0])([2.5])) > 1e-2


def observed(X, y=None):
    numpyro.sample("y", GaussianProcess(RBF(1.0, scale()), X, 0.1), obs=y)


def deep(X, y=None):
    h = numpyro.sample("h", GaussianProcess(RBF(1.0, scale()), X))
    numpyro.sample("y", GaussianProcess(RBF(1.0, 0.5), h, 0.1), obs=y)


def with_noise(X, y=None, noise=None):
    numpyro.sample("y", GaussianProcess(RBF(1.0, scale()), X, noise), obs=y)


def obs_mask(X, y=None):
    gp = GaussianProcess(RBF(1.0, scale()), X, 0.1)
    numpyro.sample("y", gp, obs=y, obs_mask=None if y is None else np.ones(len(X), bool))


def in_a_plate(X, y=None, tasks=2):
    gp = GaussianProcess(RBF(1.0, scale()), X, 0.1)
    with numpyro.plate("task", tasks):
        numpyro.sample("y", gp, obs=y)


def functions(model=observed, samples=SCALES, x=X, y=Y, **options):
    return Pathwise(model, samples, x, y, **OPTIONS, **options)


def test_moments_need_inputs_of_their_own():
    pathwise = functions(deep, SCALES | {"h": np.stack([Y, Y])})
    with pytest.raises(ValueError, match=r"inputs of \['y'\] depend on another process"):
        pathwise.moments(X_NEW)


HOLE = np.where(X > 4.0, np.nan, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: functions(samples={"lengthscale": -np.ones(2)}).moments(X_NEW), "positive in"),
        (lambda key: functions()(key, HOLE), "inputs of 'y' in this call are not all finite"),
        (lambda key: functions().moments(HOLE), "inputs of 'y' in this call are not all finite"),
        (lambda key: draw_paths(key, RBF(), X, Y, **OPTIONS)(HOLE), "X has .* not finite, at"),
        (lambda key: GaussianProcess(RBF(), X, 0.1).predict(Y, HOLE), "X_new has .* not finite"),
        (lambda key: functions(x=HOLE), "X has .* not finite, at"),
        (lambda key: functions(y=np.where(Y > 0.9, np.nan, Y)), "'y' has .* not finite, at"),
        (
            lambda key: jax.jit(lambda s: GaussianProcess(RBF(1.0, s), HOLE).log_prob(Y))(1.0),
            "X has .* not finite, at",
        ),
        (lambda key: functions(y=Y[:, None]), r"'y' has values of shape \(12, 1\)"),
        (
            lambda key: functions(samples={"lengthscale": np.ones((2, 3))}),
            r"one sample of 'lengthscale' has shape \(3,\), .* has \(\) .*batch_ndims",
        ),
        (
            lambda key: functions(with_noise, SCALES, x=X, y=Y, noise=0.1)(key, X_NEW),
            "noise takes a number, got None.*arguments are those of the fit but for the data",
        ),
        (lambda key: RBF(lengthscale=None), "RBF: lengthscale takes a number, got None"),
        (lambda key: functions(num_bases=0), "num_bases must be at least 1"),
        (lambda key: functions(obs_mask), "takes no obs_mask"),
        (
            lambda key: functions(samples={**SCALES, "y": np.ones((2, 12))}),
            "the samples and the data both have values of 'y'",
        ),
        (
            lambda key: draw_paths(key, RBF(), X, np.where(Y > 0.9, np.nan, Y), observed=Y < 0.99),
            "values has .* not finite, at",
        ),
        (lambda key: draw_paths(key, RBF(), X[:0], Y[:0]), "points has no row"),
        (lambda key: draw_paths(key, RBF(), X, Y, observed=Y[:5] > 0), "observed takes shape"),
        (
            lambda key: draw_paths(key, RBF(), Z, Z[:, 0], covariance=np.tri(4)),
            "not symmetric: pass the covariance itself, L @ L.T",
        ),
        (
            lambda key: draw_paths(key, RBF(), Z, Z[:, 0], covariance=-np.eye(4)),
            "covariance has the eigenvalue -1, and none may be negative",
        ),
        (
            lambda key: functions(in_a_plate, y=np.stack([Y, Y]))(key, X_NEW, tasks=3),
            r"\(3,\) copies in this call, and had \(2,\)",
        ),
        (
            lambda key: GaussianProcess(RBF(1.0, 100.0), X, jitter=0.0).predict(Y, X_NEW),
            "could not be factored",
        ),
        (
            lambda key: GaussianProcess(RBF(1.0, 100.0), X, jitter=0.0).sample(key),
            "could not be factored",
        ),
        (lambda key: GaussianProcess(RBF(), X, jitter=np.ones(12)), "jitter takes one number"),
        (lambda key: draw_paths(key, RBF(), X, Y, jitter=np.ones(12)), "jitter takes one number"),
        (lambda key: CollapsedSparseGP(RBF(), X, Z, 0.1).predict(Y[:1], X_NEW), "has values"),
        (lambda key: CollapsedSparseGP(RBF(), X, Z, 0.1).mask(Y > 0), "takes no mask"),
        (lambda key: Coregion(np.ones((2, 1)), active_dims=5)(np.ones((3, 2))), "active_dims="),
        (lambda key: Coregion(np.ones((2, 1)), np.array([-1, 1])), "kappa is not negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_an_error(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)


@pytest.mark.long
def test_covariances_of_single_precision_are_taken(key):
    """Its least eigenvalue, 0 but for rounding, is further below 0 than double precision rounds."""
    factor = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    covariance = factor @ factor.T
    paths = draw_paths(key, RBF(), Z, Z[:, 0], covariance=covariance, num_paths=3, **OPTIONS)
    assert np.isfinite(paths(Z)).all()


def test_arguments_of_kernels_and_signatures(key):
    with pytest.raises(
        TypeError, match=r"RBF: got an unexpected .*'width'; it takes variance, len"
    ):
        RBF(width=1.0)
    with pytest.raises(TypeError, match="Coregion: missing a required argument: 'W'"):
        Coregion()
    by_place = draw_paths(key, RBF(), X, Y, 0.1, 0.5, 1e-6, **OPTIONS)
    by_name = draw_paths(key, RBF(), X, Y, noise=0.1, mean_fn=0.5, jitter=1e-6, **OPTIONS)
    assert_array_equal(by_place.alpha, by_name.alpha)

    def no_latent(X, y=None):
        numpyro.sample("y", GaussianProcess(RBF(), X, 0.1), obs=y)

    mean, variance = GaussianProcess(RBF(), X, 0.1).predict(Y, X_NEW)
    ours = Pathwise(no_latent, {}, X, Y, batch_ndims=0).moments(X_NEW)["y_f"]
    assert_allclose(ours, (mean, variance), rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_inputs_of_the_fit_may_be_asked_for_again(key):
    def counts(X, exposure, y=None):
        f = numpyro.sample("f", GaussianProcess(RBF(1.0, scale()), X))
        numpyro.sample("y", dist.Poisson(exposure * jnp.exp(f)).to_event(1), obs=y)

    samples = SCALES | {"f": np.stack([Y, Y])}
    pathwise = Pathwise(counts, samples, X, np.ones(12), np.ones(12, int), **OPTIONS)
    out = pathwise(key, X, np.full(12, 1000.0))
    assert_allclose(out["f"], samples["f"], atol=1e-2)
    assert out["y"].min() > 100
    assert functions()(key, X)["y"].shape == (2, 12)


def test_a_process_on_a_fixed_grid_is_read_by_an_index():
    """Inputs of a process may be fixed: independent of the arguments of the call."""

    def ages(age, dose, y=None):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        f = numpyro.sample("f", GaussianProcess(RBF(1.0, width), Z))
        with numpyro.plate("person", len(dose)):
            numpyro.sample("b", dist.Normal(f[age] + dose, 1e-6), obs=y)

    age, dose = np.arange(12) % 4, np.linspace(0.0, 1.0, 12)
    samples = {"width": np.array([0.8, 1.2]), "f": np.array([[1.0, 2.0, 3.0, 4.0]] * 2)}
    pathwise = Pathwise(ages, samples, age, dose, Y, **OPTIONS)
    mean, variance = pathwise.moments(np.array([3, 0, 1]), np.array([0.5, 0.25, 0.125]))["f"]
    assert_allclose(mean, samples["f"][0], atol=1e-3)
    assert_allclose(variance, np.zeros(4), atol=1e-3)


def test_latents_are_not_masked(key):
    def masked():
        with mask(mask=X[:, 0] > 1):
            numpyro.sample("f", GaussianProcess(RBF(), X))

    with pytest.raises(ValueError, match="mask its likelihood"):
        seed(reparam(masked, config={"f": WhitenReparam()}), key)()


@pytest.mark.long
def test_data_changed_in_place_do_not_change_the_functions(key):
    y = Y.copy()
    pathwise = functions(y=y)
    before = pathwise(key, X_NEW)["y_f"]
    y += 3.0
    assert_allclose(pathwise.draw(key)["y"](X_NEW), before, rtol=1e-4, atol=1e-5)
    assert_array_equal(pathwise(key, X_NEW)["y_f"], before)


@pytest.mark.long
def test_parameters_that_were_not_given_are_named():
    def model(X, y=None):
        kernel = RBF(scale(), numpyro.param("width", 3.0))
        numpyro.sample("y", GaussianProcess(kernel, X, 0.1), obs=y)

    with pytest.warns(UserWarning, match=r"\['width'\] are not in params"):
        functions(model, params={"witdh": 0.4})


@pytest.mark.long
def test_products_whose_columns_starve_the_frequencies_are_told_of(key):
    kernel = RBF(active_dims=0) * Coregion(np.ones((12, 1)), np.ones(12))
    points = np.stack([np.linspace(0.0, 1.0, 12), np.arange(12.0)], axis=1)
    with pytest.warns(UserWarning, match=r"13 columns .* has only 4 of these: 416 columns"):
        draw_features(key, kernel, 128, points)


@pytest.mark.parametrize(
    ("dim", "lengthscale"), [(1, 0.1), pytest.param(2, 0.003, marks=pytest.mark.long)]
)
def test_periodic_features_keep_the_variance(dim, lengthscale, key):
    features = draw_features(key, Periodic(2.0, lengthscale), 256 * dim**4, np.ones((3, dim)))
    squares = np.asarray(columns(features, np.ones((1, dim)))) ** 2
    assert_allclose(squares.sum(), 2.0, rtol=0.15 if dim == 2 else 1e-4)


@pytest.mark.long
def test_calls_may_be_transformed(key):
    pathwise = functions(num_paths=2)
    plain = pathwise(key, X_NEW)["y_f"]
    assert_allclose(jax.jit(lambda x: pathwise(key, x)["y_f"])(X_NEW), plain, rtol=1e-3, atol=1e-4)
    keys = jax.random.split(key, 2)
    assert jax.vmap(lambda key: pathwise(key, X_NEW)["y_f"])(keys).shape == (2, 4, 7)
    slope = jax.jit(jax.grad(lambda x: pathwise.draw(key)["y"](x).sum()))(jnp.asarray(X_NEW))
    assert np.isfinite(slope).all()


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_from_a_map_ensemble_with_a_network(key):
    def model(X, y=None):
        net = flax_module("net", Linen(), input_shape=(1, 1))
        gp = GaussianProcess(RBF(1.0, scale()), net(X), 0.1)
        numpyro.sample("y", gp, obs=y)

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.01), ensemble_size=2)
    result = runner.run(key, 3, X, Y, progress_bar=False)
    assert Pathwise(model, result, X, Y, **OPTIONS)(key, X_NEW)["y_f"].shape == (2, 7)
