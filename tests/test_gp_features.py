"""Random features against the kernels and posteriors that they approximate; no Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import KERNELS, ONE_DIMENSION, implied, inputs, jitter, posterior, relative, within
from numpy.testing import assert_allclose

from numpyro_ensemble.gp import (
    RBF,
    Cosine,
    Kernel,
    Linear,
    Matern52,
    Periodic,
    RationalQuadratic,
    draw_features,
)
from numpyro_ensemble.gp.kernels import Spectrum
from numpyro_ensemble.gp.spectra import bessel_weights, scale_mixture, sobol

NOISE = 0.01
draw = jax.jit(draw_features, static_argnums=2)
QUICK = {"RBF", "product"}  # in two dimensions
CASES = [
    pytest.param(
        name,
        dim,
        kernel,
        id=f"{name}-{dim}",
        marks=[pytest.mark.long] * (dim != 2 or name not in QUICK),
    )
    for dim in (1, 2, 5)
    for name, kernel in (KERNELS | (ONE_DIMENSION if dim == 1 else {})).items()
]


def variance_ratio(kernel, features, X, X_new, exact_kernel=None):
    """Return the mean ratio of a basis's posterior variances to the exact ones."""
    added = NOISE + jitter(kernel, X)
    ours = np.diag(implied(features, kernel, X, X_new, added))
    exact = np.diag(posterior(exact_kernel or kernel, X, np.zeros(len(X)), X_new, added)[1])
    return (ours / exact).mean()


@pytest.mark.parametrize(("name", "dim", "kernel"), CASES)
def test_posterior_variances_are_exact_on_average(name, dim, kernel):
    X, X_new = inputs(40, dim), inputs(30, dim, seed=1)
    ratios = [
        variance_ratio(kernel, draw(jax.random.key(seed), kernel, 4096, X), X, X_new)
        for seed in range(3)
    ]
    assert abs(np.mean(ratios) - 1.0) < 0.02, ratios
    if name in ("RBF", "Matern52"):  # a wrong kernel is rejected
        off = type(kernel)(kernel.variance, 1.1 * kernel.lengthscale)
        features = draw(jax.random.key(0), kernel, 4096, X)
        assert abs(variance_ratio(kernel, features, X, X_new, off) - 1.0) > 0.02
        assert abs(variance_ratio(kernel, lambda X: np.zeros((len(X), 1)), X, X_new) - 1.0) > 0.02


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(RBF(1.0, 0.4), id="RBF"),
        pytest.param(Matern52(1.0, 0.4), id="Matern52", marks=pytest.mark.long),
    ],
)
def test_the_error_falls_with_the_features(kernel):
    X, X_new = inputs(60, 2, width=1.0), inputs(40, 2, seed=1, width=1.0)
    exact = posterior(kernel, X, np.zeros(60), X_new, NOISE)[1]
    numbers = [256, 1024, 4096]
    errors = [
        np.mean(
            [
                relative(
                    implied(
                        draw(jax.random.key(seed), kernel, number, X),
                        kernel, X, X_new, NOISE,
                    ),
                    exact,
                )
                for seed in range(4)
            ]
        )
        for number in numbers
    ]  # fmt: skip
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope <= -0.4, errors


@pytest.mark.parametrize(
    ("kernel", "one", "four"),
    [
        pytest.param(RBF(1.0, 0.25), 0.055, 0.025, id="RBF"),
        pytest.param(Matern52(1.0, 0.25), 0.12, 0.06, id="Matern52", marks=pytest.mark.long),
    ],
)
def test_tight_posteriors_are_within_the_target(kernel, one, four):
    X, X_new = inputs(512, 2, width=1.0), inputs(100, 2, seed=1, width=1.0)
    exact = posterior(kernel, X, np.zeros(512), X_new, NOISE)[1]
    each = [
        implied(draw(jax.random.key(seed), kernel, 1024, X), kernel, X, X_new, NOISE)
        for seed in range(8)
    ]
    errors = [relative(covariance, exact) for covariance in each]
    assert np.mean(errors) <= one, errors
    together = [relative(np.mean(each[i : i + 4], axis=0), exact) for i in (0, 4)]
    assert np.mean(together) <= four, together


def test_matern_frequencies_share_one_chi_square():
    """If each coordinate has its own chi-square, the posterior variances are not exact."""
    rng, degrees = np.random.default_rng(0), 5
    kernel, X, X_new = Matern52(1.0, 0.7), inputs(40, 5), inputs(30, 5, seed=1)
    w = rng.standard_t(degrees, (2048, 5)) / 0.7

    def apart(X):
        phase = np.asarray(X) @ w.T
        return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / np.sqrt(2048)

    assert abs(variance_ratio(kernel, apart, X, X_new) - 1.0) > 0.02


@pytest.mark.long
def test_a_widened_rational_quadratic_against_plain_sampling():
    class Plain(RationalQuadratic):
        def spectrum(self, uniforms, dim):
            frequencies, weights = scale_mixture(uniforms, self.alpha, widening=1.0)
            return Spectrum(self._unscaled(frequencies), weights)

    X, X_new = inputs(25, 1), inputs(30, 1, seed=1)
    errors = []
    for kernel in (RationalQuadratic(1.0, 0.25, 1.0), Plain(1.0, 0.25, 1.0)):
        exact = posterior(kernel, X, np.zeros(25), X_new, 1e-3)[1]
        each = [
            implied(draw(jax.random.key(seed), kernel, 512, X), kernel, X, X_new, 1e-3)
            for seed in range(8)
        ]
        errors.append(np.mean([relative(covariance, exact) for covariance in each]))
    assert errors[0] < 0.9 * errors[1], errors


def test_amplitudes_are_bounded_and_unbiased():
    for kernel in (KERNELS["RBF"], KERNELS["Matern12"], KERNELS["RationalQuadratic"]):
        squared = np.concatenate(
            [
                draw(jax.random.key(seed), kernel, 1024, inputs(2, 2)).blocks[0].amplitudes ** 2
                for seed in range(8)
            ]
        ) * (512 / 1.5)
        assert squared.max() <= 2.0 + 1e-6
        assert_allclose(squared.mean(), 1.0, atol=0.01)


@pytest.mark.long
@pytest.mark.parametrize(
    "kernel",
    [Linear(0.5), Cosine(1.5, 1.3), Periodic(1.5, 0.8, 1.3), Linear() * Cosine(), 2.0 * Linear()],
)
def test_kernels_with_few_features_have_exact_ones(kernel):
    X = inputs(12, 1)
    features = draw(jax.random.key(0), kernel, 128, X)
    exact = within({"atol": 1e-10}, {"rtol": 1e-5, "atol": 1e-5})
    assert_allclose(features(X) @ features(X).T, kernel(X), **exact)


def test_columns_are_counted():
    X = inputs(3, 2)

    def columns(kernel):
        return jax.eval_shape(lambda: draw_features(jax.random.key(0), kernel, 64, X)(X)).shape

    assert columns(RBF()) == (3, 64)
    assert columns(RBF() + Linear()) == (3, 64)  # two of Linear, and 62 of RBF
    assert columns(RBF() * Linear()) == (3, 64)
    assert columns(RBF() + RBF()) == (3, 64)


@pytest.mark.core
def test_uniform_numbers_never_reach_the_ends():
    dtype = jnp.result_type(float)
    u = sobol(jax.random.key(0), 1000, 3, dtype)
    assert u.dtype == dtype and 0 < u.min() and u.max() < 1
    assert_allclose(u.mean(axis=0), 0.5, atol=2e-3)
    other = sobol(jax.random.key(1), 1000, 3, dtype)
    assert abs(u - other).max() > 0.1


def test_weights_of_harmonics_are_bessel_functions():
    from scipy.special import ive

    z = np.array([0.01, 1.0, 30.0, 2000.0])
    ours = bessel_weights(jnp.asarray(z), 64)
    least = within(1e-300, float(np.finfo(np.float32).tiny))  # a smaller weight may become 0
    assert_allclose(ours, ive(np.arange(64)[:, None], z[None]), rtol=within(1e-6), atol=least)


def test_features_of_ones_own():
    class Brownian(Kernel):
        def matrix(self, X1, X2):
            return jnp.minimum(X1, X2[:, 0][None, :])

    X = inputs(5, 1)
    assert_allclose(Brownian().diag(X), X[:, 0])
    with pytest.raises(
        NotImplementedError, match="Brownian has no spectral density.*with_features"
    ):
        draw_features(jax.random.key(0), RBF() + Brownian(), 64, X)

    def steps(X):  # indicators of the steps below x
        grid = jnp.linspace(0.0, 3.0, 3001)[1:]
        return (X >= grid[None, :]).astype(X.dtype) * jnp.sqrt(1e-3)

    kernel = Brownian().with_features(steps)
    features = draw_features(jax.random.key(0), kernel, 64, X)
    assert_allclose(features(X) @ features(X).T, kernel(X), atol=2e-3)


@pytest.mark.parametrize("number", [0, -2, 3, 2.5])
def test_bad_numbers_of_features(number):
    with pytest.raises((ValueError, TypeError), match="num_features"):
        draw_features(jax.random.key(0), RBF(), number, inputs(3, 1))
