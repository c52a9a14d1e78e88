"""Kernels beyond the common ones: values by other formulas, features, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import inputs, relative, within
from jax.scipy.special import ndtri
from numpy.testing import assert_allclose

from numpyro_ensemble.gp import (
    RBF,
    ArcCosine,
    Categorical,
    Coregion,
    Envelope,
    GaussianProcess,
    Gibbs,
    Kernel,
    Linear,
    Matern12,
    Matern32,
    Periodic,
    PiecewisePolynomial,
    Polynomial,
    PoweredExponential,
    SpectralMixture,
    Stationary,
    change_point,
    draw_features,
    draw_paths,
)

X1, X2 = inputs(6, 2), inputs(4, 2, seed=1)
APART = X1[:, None] - X2[None]
WEIGHTS, TURNS = np.array([0.7, 0.3]), np.array([[0.2, 0.0], [0.5, 0.4]])
WIDTHS = np.array([[0.1, 0.3], [0.2, 0.05]])


def by_parts():
    """Return a spectral mixture's values, as a sum of its parts."""
    near = np.exp(-2 * np.pi**2 * ((APART[..., None, :] * WIDTHS) ** 2).sum(-1))
    return (WEIGHTS * near * np.cos(2 * np.pi * (APART[..., None, :] * TURNS).sum(-1))).sum(-1)


def wide(X):
    return 0.3 + 0.2 * X[:, 1] ** 2


def by_hand(before, after, location, steepness):
    share = [1 / (1 + np.exp(-steepness * (X[:, 1] - location))) for X in (X1, X2)]
    late = np.outer(*share) * np.asarray(after(X1, X2))
    return late + np.outer(1 - share[0], 1 - share[1]) * np.asarray(before(X1, X2))


R = np.sqrt((APART**2).sum(-1)) / 1.7
SUM = wide(X1)[:, None] ** 2 + wide(X2)[None] ** 2
LENGTHS = np.outer(wide(X1), wide(X2))
VALUES = {
    "linear in each": (Linear(np.array([2.0, 0.5])), (X1 * [2.0, 0.5]) @ X2.T),
    "Polynomial": (Polynomial(0.5, 1.3, 3), 0.5 * (X1 @ X2.T + 1.3) ** 3),
    "PoweredExponential": (
        PoweredExponential(2.0, 1.7, 1.4), 2 * np.exp(-(R**1.4)),
    ),
    "power of 1": (PoweredExponential(2.0, 1.7), Matern12(2.0, 1.7)(X1, X2)),
    "power of 2": (PoweredExponential(2.0, 1.7, 2.0), RBF(2.0, 1.7 / 2**0.5)(X1, X2)),
    "SpectralMixture": (SpectralMixture(WEIGHTS, TURNS, WIDTHS), by_parts()),
    "PiecewisePolynomial": (
        PiecewisePolynomial(2.0, 1.7, 1), 2 * np.maximum(1 - R, 0) ** 4 * (4 * R + 1),
    ),
    "Gibbs": (Gibbs(wide, 2.0), 2 * 2 * LENGTHS / SUM * np.exp(-(APART**2).sum(-1) / SUM)),
    "Gibbs of one lengthscale": (Gibbs(lambda X: 0.8 + 0.0 * X[:, 0]), RBF(1.0, 0.8)(X1, X2)),
    "change point": (
        change_point(RBF(), Matern32(2.0), 1.2, 3.0, active_dims=1),
        by_hand(RBF(), Matern32(2.0), 1.2, 3.0),
    ),
    "Categorical": (
        Categorical(4, 2.0, 0.25, active_dims=0), None,
    ),
}  # fmt: skip
OTHERS = {"Categorical"}
WITH_FEATURES = [
    "SpectralMixture",
    pytest.param("Polynomial", marks=pytest.mark.long),
    pytest.param("linear in each", marks=pytest.mark.long),
    pytest.param("PoweredExponential", marks=pytest.mark.long),
    pytest.param("change point", marks=pytest.mark.long),
]


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(set(VALUES) - OTHERS))
def test_values_are_those_of_another_formula(name):
    kernel, expected = VALUES[name]
    near = within({"rtol": 1e-9, "atol": 1e-12}, {"rtol": 1e-4, "atol": 1e-5})
    assert_allclose(kernel(X1, X2), expected, **near)
    square = np.asarray(kernel(X1))
    assert_allclose(kernel.diag(X1), np.diag(square), **near)
    assert np.linalg.eigvalsh(square).min() > -1e-5
    slopes = jax.grad(lambda k: k(X1).sum(), allow_int=True)(kernel)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    again = jax.tree.unflatten(jax.tree.structure(kernel), jax.tree.leaves(kernel))
    assert_allclose(again(X1, X2), kernel(X1, X2))


def test_categories_are_alike_or_not():
    numbers = np.array([[0.0], [3.0], [3.0], [1.0]])
    expected = np.where(numbers == numbers.T, 2.0, 0.5)
    kernel = Categorical(4, 2.0, 0.25)
    assert_allclose(kernel(numbers), expected, rtol=1e-6)
    assert_allclose(kernel.columns(jnp.asarray(numbers)).shape, (4, 5))
    both = np.concatenate([X1[:4, :1], numbers], axis=1)
    product = RBF(active_dims=0) * kernel
    assert_allclose(product(both), RBF()(X1[:4, :1]) * expected, rtol=1e-6)
    with pytest.raises(ValueError, match="Categorical: column -1 holds the categories' numbers"):
        GaussianProcess(kernel, np.array([[4.0]]), 0.1)


@pytest.mark.long
def test_slopes_at_the_edge_are_finite():
    """Gradients are finite at a correlation of 0, at a kappa of 0 and at a power of 2."""
    numbers = jnp.array([[0.0], [1.0], [1.0]])
    slope = jax.grad(lambda v: Categorical(2, v)(numbers).sum())(1.3)
    assert_allclose(slope, 5.0, rtol=1e-6)  # 1 + 4 pairs of equal categories
    slopes = jax.grad(lambda k: Coregion(np.ones((2, 1)), k)(numbers).sum())(jnp.zeros(2))
    assert_allclose(slopes, [1.0, 4.0], rtol=1e-6)
    y = np.array([0.3, -0.2, 0.1])

    @jax.jit
    def density(power):
        kernel = PoweredExponential(1.0, 1.0, power)
        return GaussianProcess(kernel, X1[:3], 0.1).log_prob(y)

    step = 1e-3
    for power in (2.0, 0.1):
        sign = -1.0 if power == 2.0 else 1.0
        near = (density(power + sign * step) - density(power)) / (sign * step)
        assert_allclose(jax.grad(density)(power), near, rtol=0.05, atol=1e-4)
    for power in (2.0, 0.05):
        drawn = draw_features(0, PoweredExponential(1.0, 1.0, power), 64, X1)(X1)
        assert np.isfinite(drawn).all()


@pytest.mark.long
def test_arc_cosine_is_the_mean_over_wide_layers():
    rng = np.random.default_rng(0)
    layer = rng.normal(size=(100_000, 3))
    one, other = (np.concatenate([np.ones((len(X), 1)), X], 1) @ layer.T for X in (X1, X2[:2]))
    for order in (0, 1, 2):
        units = [np.where(h > 0, h**order, 0.0) for h in (one, other)]
        mean = 2 * units[0] @ units[1].T / len(layer)
        assert_allclose(ArcCosine(1.0, order)(X1, X2[:2]), mean, rtol=0.03)
        slopes = jax.grad(lambda x, order=order: ArcCosine(1.0, order)(x).sum())(jnp.asarray(X1))
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_features_multiply_to_the_kernel(name, key):
    kernel = VALUES[name][0]
    features = draw_features(key, kernel, 4096, X1)
    wrong = draw_features(key, Periodic(), 4096, X1)
    columns = features(X1)
    assert relative(columns @ columns.T, np.asarray(kernel(X1))) < 0.03
    assert relative(wrong(X1) @ wrong(X1).T, np.asarray(kernel(X1))) > 0.1
    assert (columns.shape[1] <= 10) == (name in ("linear in each", "Polynomial"))


@pytest.mark.long
def test_a_constant_times_a_kernel_has_the_columns_of_the_kernel(key):
    scaled, plain = 3.0 * RBF(), RBF(3.0)
    assert_allclose(
        draw_features(key, scaled, 64, X1)(X1), draw_features(key, plain, 64, X1)(X1), rtol=1e-6
    )
    assert not draw_features(key, scaled, 64, X1).blocks[0].finite


@pytest.mark.long
def test_kernels_without_features_say_so(key):
    y = np.sin(X1[:, 0])
    for kernel in (Gibbs(wide), ArcCosine(), PiecewisePolynomial()):
        process = GaussianProcess(kernel, X1, 0.01)
        assert np.isfinite(process.log_prob(y))
        with pytest.raises(NotImplementedError, match=f"{type(kernel).__name__} has no spectral"):
            draw_paths(key, kernel, X1, y, noise=0.01)


@pytest.mark.long
def test_hyperparameters_may_be_latents(key):
    """Functions that hold traced values are pytrees, so `vmap` can draw paths of many draws."""

    def drawn(place):
        kernel = change_point(RBF(1.0, 0.5), Matern32(), place, 5.0)
        return draw_paths(key, kernel, X1, X1[:, 1], noise=0.01, num_features=32)(X2)

    many = jax.vmap(drawn)(jnp.array([0.5, 2.0]))
    assert many.shape == (2, 1, 4)
    assert abs(many[0] - many[1]).max() > 1e-3


def test_bad_calls():
    for build, message in (
        (lambda: Polynomial(degree=0), "degree"),
        (lambda: PoweredExponential(power=2.5), "power is at most 2"),
        (lambda: PoweredExponential(power=0.0), "power"),
        (lambda: PiecewisePolynomial(degree=4), "degree takes 0, 1, 2 or 3"),
        (lambda: ArcCosine(order=3), "order takes 0, 1 or 2"),
        (lambda: SpectralMixture(WEIGHTS, TURNS, WIDTHS[:1]), "frequencies and bandwidths"),
        (lambda: SpectralMixture(-WEIGHTS, TURNS, WIDTHS), "weights must be positive"),
        (lambda: SpectralMixture(WEIGHTS, TURNS, WIDTHS)(X1[:, :1]), "have 2 columns"),
        (lambda: Categorical(3, correlation=1.0), r"correlation lies in \[0, 1\)"),
        (lambda: Envelope(lambda X: X)(X1), "Envelope: fn returned shape"),
        (lambda: Gibbs(lambda X: X.sum())(X1), "lengthscale returned shape"),
        (lambda: change_point(RBF(), RBF(), 0.0, -1.0), "steepness must be positive"),
        (lambda: change_point(RBF(), RBF(), 0.0, active_dims=7)(X1), "change_point: active_dims"),
        (lambda: change_point(RBF(), RBF(), None), "change_point: location takes a number"),
        (lambda: change_point(RBF(), RBF(), np.ones(2)), "location is one place"),
        (lambda: RBF() * Categorical(2), "a Categorical it is multiplied with reads numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="lengthscale takes a function"):
        Gibbs(1.0)


# Kernels of one's own -----------------------------------------------------------------------------


class Cauchy(Stationary):
    """A stationary kernel with paths."""

    def profile(self, squared):
        return 1 / (1 + squared)

    def waves(self, uniforms):
        return jnp.sqrt(-2 * jnp.log(uniforms[:, :1])) * ndtri(uniforms[:, 1:])


class Bump(Stationary):
    """A stationary kernel with a hyperparameter, and without paths."""

    height: float = 1.0

    def profile(self, squared):
        return jnp.exp(-self.height * squared)


class Brownian(Kernel):
    """A kernel that is not stationary."""

    rate: float

    def matrix(self, X1, X2):
        return self.rate * jnp.minimum(X1[:, :1], X2[:, :1].T)


def test_kernels_of_ones_own_are_short(key):
    assert_allclose(Cauchy(2.0, 0.7)(X1, X2), 2 / (1 + (APART**2).sum(-1) / 0.49), rtol=1e-6)
    columns = draw_features(key, Cauchy(1.0, 0.7), 4096, X1)(X1)
    assert relative(columns @ columns.T, np.asarray(Cauchy(1.0, 0.7)(X1))) < 0.03
    paths = draw_paths(key, 0.5 * Cauchy() + RBF(), X1, X1[:, 0], noise=1e-4, num_features=128)
    assert_allclose(paths(X1)[0], X1[:, 0], atol=0.1)

    bump = Bump(2.0, lengthscale=0.5, height=0.3, active_dims=1)
    assert_allclose(bump(X1, X2), 2 * np.exp(-0.3 * APART[..., 1] ** 2 / 0.25), rtol=1e-6)
    assert jax.tree.leaves(bump) == [2.0, 0.5, 0.3]
    assert Bump().height == 1.0 and repr(bump).startswith("Bump(variance=2.0, lengthscale=0.5")
    slope = jax.grad(lambda kernel: kernel(X1).sum())(bump).height
    step = 1e-4
    higher, lower = (Bump(2.0, 0.5, 0.3 + s, active_dims=1)(X1).sum() for s in (step, -step))
    assert_allclose(slope, (higher - lower) / (2 * step), rtol=1e-3)
    with pytest.raises(NotImplementedError, match="Bump has no spectral density that is known"):
        draw_features(key, bump, 64, X1)

    assert_allclose(Brownian(3.0)(X1, X2), 3 * np.minimum(X1[:, :1], X2[:, 0]), rtol=1e-6)
    assert np.isfinite(GaussianProcess(Brownian(3.0), X1, 0.1).log_prob(X1[:, 0]))


class Smooth(Bump):
    """A kernel with another default for a field of its base class, and with a fixed field."""

    height: float = 2.0
    times: int = 2

    def profile(self, squared):
        return super().profile(squared) ** len(range(self.times))


def test_parts_may_have_other_defaults_and_be_fixed():
    kernel = Smooth(times=3)
    assert jax.tree.leaves(kernel) == [1.0, 1.0, 2.0] and Smooth().times == 2
    expected = np.exp(-6.0 * (APART**2).sum(-1))
    assert_allclose(jax.jit(lambda kernel: kernel(X1, X2))(kernel), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="Bump: height takes a number, got None"):
        Bump(height=None)
    lists = SpectralMixture([0.7, 0.3], [0.2, 0.5], [0.1, 0.2])
    assert len(jax.tree.leaves(lists)) == 3


def test_what_a_kernel_leaves_out_is_said_when_it_is_made():
    class NoValues(Kernel):
        rate: float

    class NoProfile(Stationary):
        pass

    with pytest.raises(TypeError, match="NoValues has to define matrix: Return the covariances"):
        NoValues(1.0)
    with pytest.raises(TypeError, match="NoProfile has to define profile: Return the correlation"):
        NoProfile()
    with pytest.raises(TypeError, match="Brownian: missing a required argument: 'rate'; it takes"):
        Brownian()
    with pytest.raises(TypeError, match="Bump: got an unexpected keyword argument 'heigth'"):
        Bump(heigth=1.0)
    with pytest.raises(ValueError, match="Cauchy: lengthscale must be positive"):
        Cauchy(1.0, -1.0)
