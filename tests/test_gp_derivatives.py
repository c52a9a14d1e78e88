"""Slopes of processes, observed and predicted, beside dense algebra with formulas of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import inputs, within
from numpy.testing import assert_allclose

from numpyro_ensemble.gp import (
    RBF,
    ArcCosine,
    CollapsedSparseGP,
    Derivatives,
    GaussianProcess,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Pathwise,
    Periodic,
    PiecewisePolynomial,
    PoweredExponential,
    RationalQuadratic,
    draw_features,
    draw_paths,
    numbered_inputs,
)

WIDTHS = np.array([0.8, 1.4])
X = numbered_inputs(inputs(4, 2), inputs(3, 2, seed=1), inputs(2, 2, seed=2))
X_NEW = numbered_inputs(inputs(3, 2, seed=3), inputs(2, 2, seed=4), inputs(2, 2, seed=5))
VALUES = np.random.default_rng(0).normal(size=9)
NOISE = np.r_[np.full(4, 0.01), np.full(5, 0.05)]


def rbf(X1, X2):
    """Give the covariances of values and slopes of RBF(1.3, WIDTHS), entry by entry."""
    covariances = np.empty((len(X1), len(X2)))
    for i, (*x, a) in enumerate(np.asarray(X1, float)):
        for j, (*z, b) in enumerate(np.asarray(X2, float)):
            apart = (np.array(x) - z) / WIDTHS
            k = 1.3 * np.exp(-0.5 * apart @ apart)
            steep = apart / WIDTHS
            a, b = int(a), int(b)
            if a and b:
                same = (a == b) / WIDTHS[a - 1] ** 2
                k *= same - steep[a - 1] * steep[b - 1]
            elif a:
                k *= -steep[a - 1]
            elif b:
                k *= steep[b - 1]
            covariances[i, j] = k
    return covariances


def posterior():
    """Give mean and covariance at X_NEW given VALUES, whose mean is `line`."""
    K, cross = rbf(X, X) + np.diag(NOISE), rbf(X, X_NEW)
    return (
        _mean(X_NEW) + cross.T @ np.linalg.solve(K, VALUES - _mean(X)),
        rbf(X_NEW, X_NEW) - cross.T @ np.linalg.solve(K, cross),
    )


def _mean(x):
    x = np.asarray(x)
    return np.where(x[:, 2] == 0, 0.5 - x[:, 1], np.where(x[:, 2] == 2, -1.0, 0.0))


def line(X):
    return 0.5 - X[:, 1]


NEAR = within({"rtol": 1e-6, "atol": 1e-8}, {"rtol": 2e-3, "atol": 5e-4})
GP = GaussianProcess(Derivatives(RBF(1.3, WIDTHS)), X, NOISE, line)


@pytest.mark.core
def test_covariances_and_posteriors_are_those_of_dense_algebra():
    assert_allclose(GP.kernel(X, X_NEW), rbf(X, X_NEW), **NEAR)
    assert_allclose(GP.kernel.diag(X), np.diag(rbf(X, X)), **NEAR)
    assert_allclose(GP.mean, _mean(X))
    mean, covariance = GP.predict(VALUES, X_NEW, full_cov=True)
    expected = posterior()
    assert_allclose(mean, expected[0], **NEAR)
    assert_allclose(covariance, expected[1], **NEAR)
    values = GaussianProcess(RBF(1.3, WIDTHS), X[:, :2], NOISE, line)  # slopes taken for values
    assert abs(values.predict(VALUES, X_NEW[:, :2])[0] - expected[0]).max() > 0.1
    numbers = GaussianProcess(Derivatives(RBF()), X, mean_fn=2.0)
    assert_allclose(numbers.mean, np.r_[np.full(4, 2.0), np.zeros(5)])


# the variance of a slope, and that of a kernel at equal inputs by JAX must agree
CURVATURES = {
    "RBF": (RBF(2.0, 0.5), 2.0 / 0.25),
    "Matern52": (Matern52(2.0, 0.5), 2.0 * 5 / 3 / 0.25),
    "Matern32": (Matern32(2.0, 0.5), 2.0 * 3 / 0.25),
    "RationalQuadratic": (RationalQuadratic(2.0, 0.5, 0.7), 2.0 / 0.25),
    "Periodic": (Periodic(2.0, 0.5, 3.0), 2.0 * 4 * (np.pi / 3.0) ** 2 / 0.25),
    "Linear": (Linear(2.0), 2.0),
    "sum": (Linear(2.0) + 3.0 * RBF(2.0, 0.5), 2.0 + 3.0 * 2.0 / 0.25),
}


@pytest.mark.parametrize("name", CURVATURES)
def test_slopes_of_kernels(name):
    kernel, curvature = CURVATURES[name]
    at = numbered_inputs([1.3], [1.3])
    matrix = np.asarray(Derivatives(kernel)(at, at))
    assert_allclose(matrix[1, 1], curvature, rtol=1e-5)
    h = within(1e-4, 1e-2)
    left, right = jnp.array([[0.2]]), jnp.array([[0.9], [2.4]])
    by_steps = (kernel(left + h, right) - kernel(left - h, right)) / (2 * h)
    slopes = Derivatives(kernel)(numbered_inputs([], left[:, 0]), numbered_inputs(right))
    assert_allclose(slopes, by_steps, rtol=within(1e-5, 2e-2), atol=within(1e-7, 2e-3))


def test_features_have_the_slopes_of_the_waves(key):
    kernel = Derivatives(RBF(1.3, WIDTHS) + 0.5 * Linear() * Matern52(1.0, 2.0))
    features = draw_features(key, kernel, 256, X)
    values = draw_features(key, kernel.kernel, 256, X[:, :2])
    columns, (rows, slopes) = features(X), (values(X[:, :2]), jax.jacfwd(values)(X[:, :2]))
    for i, number in enumerate(np.asarray(X[:, 2], int)):
        expected = slopes[i, :, i, number - 1] if number else rows[i]
        assert_allclose(columns[i], expected, rtol=1e-6, atol=1e-8)


def test_paths_pass_through_slopes_and_have_them(key):
    paths = GP.draw_paths(key, VALUES, num_paths=2000, num_features=512)
    mean, covariance = posterior()
    draws = np.asarray(paths(X_NEW))
    error = np.sqrt(np.diag(covariance) / len(draws))
    assert (abs(draws.mean(axis=0) - mean) < 5 * error + 0.02).all()
    assert_allclose(draws.var(axis=0), np.diag(covariance), rtol=0.15, atol=0.01)
    unseen = GaussianProcess(GP.kernel, X[:4], NOISE[:4], line).predict(VALUES[:4], X_NEW)[0]
    assert (abs(draws.mean(axis=0) - unseen) > 5 * error + 0.02).any()  # as without slopes

    def of_first(x):
        return paths[0](jnp.append(x, 0.0)[None])[0, 0]

    place = jnp.array([0.7, 1.9])
    slopes = paths[0](numbered_inputs(jnp.zeros((0, 2)), place[None], place[None]))[0]
    assert_allclose(slopes, jax.grad(of_first)(place), rtol=1e-5, atol=1e-6)
    parts = GP.draw_paths(key, VALUES, num_paths=2).components()
    assert_allclose(
        sum(part(X_NEW) for part in parts),
        GP.draw_paths(key, VALUES, num_paths=2)(X_NEW),
        rtol=1e-6,
    )


def test_a_model_with_slopes(key):
    """A monotone curve, a slope observed at an end, a process whose prior has a weight."""

    def model(X, noise, y=None):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        gp = GaussianProcess(Derivatives(RBF(1.0, width)), X, noise)
        numpyro.sample("y", gp, obs=y)

    X = numbered_inputs(np.array([0.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    y, noise = np.array([0.0, 2.0, 1.0, 1.0, 1.0]), 1e-4
    pathwise = Pathwise(model, {"width": np.array([0.9, 1.4])}, X, noise, y)
    X_new = numbered_inputs(np.array([0.5, 1.0, 1.5]), np.array([0.5, 1.5]))
    moments = pathwise.moments(X_new, noise)["y_f"]
    processes = [GaussianProcess(Derivatives(RBF(1.0, w)), X, noise) for w in (0.9, 1.4)]
    expected = np.mean([process.predict(y, X_new)[0] for process in processes], axis=0)
    assert_allclose(moments.mean, expected, **NEAR)
    assert abs(moments.mean[1] - 1.0) < 0.1  # the slope in the middle is not observed by values
    draws = pathwise(key, X_new, noise)["y_f"]
    assert (abs(draws - moments.mean[None]) < 5 * jnp.sqrt(moments.variance)[None] + 0.02).all()
    again = pathwise.draw(key)["y"].update(numbered_inputs([1.0]), np.array([1.0]), noise=1e-6)
    assert_allclose(again(numbered_inputs([1.0])), np.ones((2, 1)), atol=0.01)


def test_inducing_slopes():
    data = numbered_inputs(inputs(30, 1)[:, 0])
    y = np.sin(2.0 * np.asarray(data[:, 0]))
    Z = numbered_inputs(np.array([0.5, 1.5, 2.5]), np.array([0.5, 1.5, 2.5]))
    both = CollapsedSparseGP(Derivatives(RBF()), data, Z, 0.01)
    values = CollapsedSparseGP(RBF(), data[:, :1], Z[:3, :1], 0.01)
    exact = GaussianProcess(RBF(), data[:, :1], 0.01)
    assert values.log_prob(y) < both.log_prob(y) - 1.0
    assert both.log_prob(y) < exact.log_prob(y) + 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Derivatives(Matern12()), ValueError, "Matern12 has no slopes"),
        (lambda: Derivatives(RBF() * Matern12()), ValueError, "Matern12 has no slopes"),
        (lambda: Derivatives(Matern12().warp(jnp.sin)), ValueError, "no slopes"),
        (lambda: Derivatives(ArcCosine()), ValueError, "ArcCosine has no slopes"),
        (lambda: Derivatives(PiecewisePolynomial()), ValueError, "has no slopes"),
        (lambda: Derivatives(PoweredExponential()), ValueError, "has no slopes"),
        (lambda: Derivatives(Derivatives(RBF())), TypeError, "takes a kernel of values"),
        (lambda: Derivatives(2.0), TypeError, "takes a kernel of values"),
        (lambda: Derivatives(RBF()) + RBF(), TypeError, "wraps whole kernels"),
        (lambda: RBF() * Derivatives(RBF()), TypeError, "wraps whole kernels"),
        (lambda: Derivatives(RBF()).warp(jnp.sin), TypeError, "wraps whole kernels"),
        (
            lambda: GaussianProcess(Derivatives(RBF()), np.array([[0.0, 0.0], [1.0, 2.0]])),
            ValueError,
            r"0 for a value, and 1 to 1 for a slope; got 2.0 in row 1",
        ),
        (lambda: GaussianProcess(Derivatives(RBF()), np.ones(3)), ValueError, "last column"),
        (lambda: numbered_inputs(), ValueError, "takes inputs, one set for each output"),
        (lambda: numbered_inputs(np.ones(2), np.ones((2, 2))), ValueError, "equally many columns"),
    ],
)  # fmt: skip
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_algebra_goes_inside(key):
    both = 2.0 * Derivatives(RBF()) + Derivatives(Linear())
    assert_allclose(both(X), Derivatives(2.0 * RBF() + Linear())(X))
    unknown = X.at[0, 2].set(3.0)
    assert np.isnan(jax.jit(both)(unknown)[0]).all()
    assert draw_paths(key, both, X, VALUES, NOISE, num_paths=2)(X_NEW).shape == (2, 7)
