"""Observed and predicted slopes of processes, against dense algebra with separate formulas."""

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
    minimise,
    multi_output,
    numbered_inputs,
    sparse_gp,
)

WIDTHS = np.array([0.8, 1.4])
X = numbered_inputs(inputs(4, 2), inputs(3, 2, seed=1), inputs(2, 2, seed=2))
X_NEW = numbered_inputs(inputs(3, 2, seed=3), inputs(2, 2, seed=4), inputs(2, 2, seed=5))
VALUES = np.random.default_rng(0).normal(size=9)
NOISE = np.r_[np.full(4, 0.01), np.full(5, 0.05)]


def rbf(X1, X2):
    """Return the covariances of values and slopes of RBF(1.3, WIDTHS), entry by entry."""
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
    """Return mean and covariance at X_NEW given VALUES; the prior mean is `line`."""
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
    values = GaussianProcess(RBF(1.3, WIDTHS), X[:, :2], NOISE, line)  # takes slopes for values
    assert abs(values.predict(VALUES, X_NEW[:, :2])[0] - expected[0]).max() > 0.1
    numbers = GaussianProcess(Derivatives(RBF()), X, mean_fn=2.0)
    assert_allclose(numbers.mean, np.r_[np.full(4, 2.0), np.zeros(5)])


# by name: a kernel, and the variance of its slopes, which JAX has to find at equal inputs
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


@pytest.mark.long
def test_features_have_the_slopes_of_the_waves(key):
    kernel = Derivatives(RBF(1.3, WIDTHS) + 0.5 * Linear() * Matern52(1.0, 2.0))
    features = draw_features(key, kernel, 256, X)
    values = draw_features(key, kernel.kernel, 256, X[:, :2])
    columns, (rows, slopes) = features(X), (values(X[:, :2]), jax.jacfwd(values)(X[:, :2]))
    for i, number in enumerate(np.asarray(X[:, 2], int)):
        expected = slopes[i, :, i, number - 1] if number else rows[i]
        assert_allclose(columns[i], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.long
def test_paths_pass_through_slopes_and_have_them(key):
    paths = GP.draw_paths(key, VALUES, num_paths=2000, num_features=512)
    mean, covariance = posterior()
    draws = np.asarray(paths(X_NEW))
    error = np.sqrt(np.diag(covariance) / len(draws))
    assert (abs(draws.mean(axis=0) - mean) < 5 * error + 0.02).all()
    assert_allclose(draws.var(axis=0), np.diag(covariance), rtol=0.15, atol=0.01)
    of_values = GaussianProcess(GP.kernel, X[:4], NOISE[:4], line)
    unseen = jax.jit(of_values.predict)(VALUES[:4], X_NEW)[0]
    assert (abs(draws.mean(axis=0) - unseen) > 5 * error + 0.02).any()  # slopes change the mean

    def of_first(x):
        return paths[0](jnp.append(x, 0.0)[None])[0, 0]

    place = jnp.array([0.7, 1.9])
    slopes = paths[0](numbered_inputs(jnp.zeros((0, 2)), place[None], place[None]))[0]
    assert_allclose(slopes, jax.jit(jax.grad(of_first))(place), rtol=1e-5, atol=1e-6)
    two = GP.draw_paths(key, VALUES, num_paths=2)
    assert_allclose(sum(part(X_NEW) for part in two.components()), two(X_NEW), rtol=1e-6)


@pytest.mark.long
def test_a_model_with_slopes(key):
    """Values at both ends and three slopes condition the moments, the draws and an update."""

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
    assert abs(moments.mean[1] - 1.0) < 0.1  # no value is observed in the middle
    draws = pathwise(key, X_new, noise)["y_f"]
    assert (abs(draws - moments.mean[None]) < 5 * jnp.sqrt(moments.variance)[None] + 0.02).all()
    again = pathwise.draw(key)["y"].update(numbered_inputs([1.0]), np.array([1.0]), noise=1e-6)
    assert_allclose(again(numbered_inputs([1.0])), np.ones((2, 1)), atol=0.01)


@pytest.mark.long
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
        (lambda: Derivatives(Matern12()), ValueError, "takes no Matern12"),
        (lambda: Derivatives(RBF() * Matern12()), ValueError, "takes no Matern12"),
        (lambda: Derivatives(Matern12().warp(jnp.sin)), ValueError, "takes no"),
        (lambda: Derivatives(ArcCosine()), ValueError, "takes no ArcCosine"),
        (lambda: Derivatives(PiecewisePolynomial()), ValueError, "takes no P"),
        (lambda: Derivatives(PoweredExponential()), ValueError, "takes no P"),
        (lambda: Derivatives(Derivatives(RBF())), TypeError, "takes a kernel of values"),
        (lambda: Derivatives(2.0), TypeError, "takes a kernel of values"),
        (lambda: Derivatives(RBF()) + RBF(), TypeError, "comes last, around a whole kernel"),
        (lambda: RBF() * Derivatives(RBF()), TypeError, "comes last, around a whole kernel"),
        (lambda: Derivatives(RBF()).warp(jnp.sin), TypeError, "comes last, around a whole kernel"),
        (
            lambda: GaussianProcess(Derivatives(RBF()), np.array([[0.0, 0.0], [1.0, 2.0]])),
            ValueError,
            r"0 for a value, and 1 to 1 for a slope; got 2.0 in row 1",
        ),
        (lambda: GaussianProcess(Derivatives(RBF()), np.ones(3)), ValueError, "one column alone"),
        (
            lambda: Derivatives(multi_output(RBF(), np.ones((2, 1))))(np.array([[0.5, 1, 2.0]])),
            ValueError,
            "column 1 holds the numbers that Coregion reads, and nothing has a slope",
        ),
        (lambda: numbered_inputs(), ValueError, "takes inputs, one set for each output"),
        (lambda: numbered_inputs(np.ones(2), np.ones((2, 2))), ValueError, "equally many columns"),
        (lambda: multi_output(2.0, np.ones((2, 1))), TypeError, "kernel takes a kernel, got 2.0"),
    ],
)  # fmt: skip
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sets_of_inputs_may_be_empty():
    assert numbered_inputs(np.zeros((3, 2)), [], np.ones((1, 2)))[:, 2].tolist() == [0, 0, 0, 2]


@pytest.mark.long
def test_algebra_goes_inside(key):
    both = 2.0 * Derivatives(RBF()) + Derivatives(Linear())
    assert_allclose(both(X), Derivatives(2.0 * RBF() + Linear())(X))
    unknown = X.at[0, 2].set(3.0)
    assert np.isnan(jax.jit(both)(unknown)[0]).all()
    assert draw_paths(key, both, X, VALUES, NOISE, num_paths=2)(X_NEW).shape == (2, 7)


@pytest.mark.core
@pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
def test_units_of_values_and_slopes_do_not_mix(length):
    """In single precision, a jitter of the mean variance's size would swamp values or slopes."""
    points = numbered_inputs(length * np.array([0.0, 1.0, 2.0]), length * np.array([0.5, 1.5]))
    values = np.r_[0.1, 0.741, 1.009, np.cos([0.5, 1.5]) / length]
    noise = np.r_[np.full(3, 1e-3), np.full(2, 1e-3 / length**2)]
    new = numbered_inputs(length * np.array([0.3, 0.9]), length * np.array([0.3]))
    unit = np.r_[1.0, 1.0, 1.0 / length]

    def cov(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        apart, (m, n) = (a[:, :1] - b[:, 0]) / length, (a[:, 1:], b[:, 1])
        k = np.exp(-0.5 * apart**2)
        steep = [k, -apart * k / length, apart * k / length, (1 - apart**2) * k / length**2]
        return np.select(
            [(m == 0) & (n == 0), (m == 1) & (n == 0), (m == 0) & (n == 1)], steep[:3], steep[3]
        )

    expected = cov(new, points) @ np.linalg.solve(cov(points, points) + np.diag(noise), values)
    process = GaussianProcess(Derivatives(RBF(1.0, length)), points, noise)
    found = np.asarray(process.predict(values, new)[0])
    assert_allclose(found / unit, expected / unit, atol=within(1e-8, 2e-3))
    mixed = 4 * 5 * 1.2e-7 * np.diag(cov(points, points)).mean()
    wrong = cov(new, points) @ np.linalg.solve(cov(points, points) + np.diag(noise + mixed), values)
    assert length == 1.0 or abs(wrong / unit - expected / unit).max() > 1e-3


def test_means_of_whole_numbers_have_slopes():
    at = numbered_inputs([0.0, 1.0], [1.0])
    for mean in (1, lambda X: jnp.ones(len(X), int)):
        assert_allclose(GaussianProcess(Derivatives(RBF()), at, 0.1, mean).mean, [1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "at",
    [
        numbered_inputs([0.0, 1.0], [1.0]),
        pytest.param(numbered_inputs([0.0, 4.0]), marks=pytest.mark.long),
    ],
)
def test_values_do_not_depend_on_slopes_of_the_mean(at):
    """The mean, a square root, has a value at 0, and no finite slope there."""
    places, numbers = np.asarray(at).T
    by_height = np.where(numbers == 0, np.sqrt(places), 0.5)
    y = np.linspace(0.3, -0.4, len(at))

    def log_prob(height):
        root = GaussianProcess(Derivatives(RBF()), at, 0.1, lambda X: height * jnp.sqrt(X[:, 0]))
        return root.log_prob(y), root.mean

    slope, mean = jax.jit(jax.grad(log_prob, has_aux=True))(2.0)
    assert_allclose(mean, 2.0 * by_height, rtol=1e-6)
    K = np.asarray(GaussianProcess(Derivatives(RBF()), at, 0.1).covariance_matrix)
    assert_allclose(slope, by_height @ np.linalg.solve(K, y - 2.0 * by_height), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("bounds", [(0.0, 2.0), [(0.0, 2.0), (0.0, 0.0)]])
def test_where_functions_with_known_slopes_are_lowest(bounds, key):
    """A negative slope at one end and a positive one at the other imply a minimum between."""
    known = numbered_inputs([0.0], [0.0, 2.0])
    paths = draw_paths(
        key, Derivatives(RBF()), known, np.array([0.0, -2.0, 2.0]), 1e-4, num_paths=3
    )
    lowest = minimise(key, paths, bounds, num_points=64)
    assert_allclose(lowest.place[:, 1], np.zeros(3))
    assert (abs(lowest.place[:, 0] - 1.0) < 0.6).all()
    assert (lowest.value < -0.3).all()
    with pytest.raises(ValueError, match=r"each of 2 columns of the inputs, shape \(2, 2\)"):
        minimise(key, paths, [(0.0, 1.0)] * 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda gp: gp.predict(np.zeros(2), np.array([[0.0, 2.0]])),
        lambda gp: gp.kernel(np.array([[0.0, 2.0]])),
        lambda gp: draw_features(jax.random.key(0), gp.kernel, 16, np.zeros(3)),
        lambda gp: sparse_gp("f", gp.kernel, np.array([[0.0, 3.0]]), gp.X),
    ],
)
def test_numbers_of_calls_are_checked(call):
    with pytest.raises(ValueError, match="the last column of the inputs is 0 for a value"):
        call(GaussianProcess(Derivatives(RBF()), numbered_inputs([0.0], [1.0]), 0.1))
