"""Users' kernels whose functions have no slopes are recognised by their profiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import within
from numpy.testing import assert_allclose

from numpyro_ensemble.gp import (
    RBF,
    Constant,
    Cosine,
    Derivatives,
    Gibbs,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    Polynomial,
    RationalQuadratic,
    SpectralMixture,
    Stationary,
    change_point,
    multi_output,
    numbered_inputs,
)
from numpyro_ensemble.gp.kernels.smoothness import is_smooth

# Profiles of squared distances -------------------------------------------------------------------


def safe_root(squared: Any) -> Any:
    """Return the distance, with a slope of 0 at 0, where the true slope is infinite."""
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def series_near_zero(squared: Any) -> Any:
    """Return Matern 3/2, written with its series near 0, so that JAX can compute slopes."""
    near = squared < 1e-8
    r = jnp.sqrt(3.0 * jnp.where(near, 1.0, squared))
    return jnp.where(near, 1.0 - 1.5 * squared, (1.0 + r) * jnp.exp(-r))


def sine_over_distance(squared: Any) -> Any:
    """Return sin(r) / r, by its series near 0, where slopes of the ratio are inaccurate."""
    near = squared < 1e-8
    r = jnp.sqrt(jnp.where(near, 1.0, squared))
    return jnp.where(near, 1.0 - squared / 6.0, jnp.sin(r) / r)


ROUGH = {
    "exponential": lambda s: jnp.exp(-jnp.sqrt(s)),
    "exponential, safe": lambda s: jnp.exp(-safe_root(s)),
    "power 1.9": lambda s: jnp.exp(-jnp.where(s > 0, jnp.where(s > 0, s, 1.0) ** 0.95, 0.0)),
    "clipped": lambda s: jnp.exp(-jnp.sqrt(jnp.maximum(s, 1e-12))),
    "triangle": lambda s: jnp.maximum(1.0 - safe_root(s), 0.0),
    "sum": lambda s: 0.99 * jnp.exp(-0.5 * s) + 0.01 * jnp.exp(-safe_root(s)),
    "logarithm": lambda s: 1.0 / (1.0 - jnp.log1p(-jnp.minimum(safe_root(s), 0.9))),
    # smooth functions, written so that JAX cannot compute their curvature
    "Matern 3/2": lambda s: (1.0 + jnp.sqrt(3.0 * s)) * jnp.exp(-jnp.sqrt(3.0 * s)),
    "Matern 3/2, safe": lambda s: (1.0 + safe_root(3.0 * s)) * jnp.exp(-safe_root(3.0 * s)),
}
SMOOTH = {
    "Cauchy": lambda s: 1.0 / (1.0 + s),
    "Matern 3/2": series_near_zero,
    "sine over distance": sine_over_distance,
    "constant": lambda s: jnp.ones_like(s),
    "of its own width": lambda s: jnp.exp(-0.5 * s / 1e-4**2),
    "wide": lambda s: jnp.exp(-0.5 * s / 1e4**2),
    "heavy tail": lambda s: (1.0 + s / 0.002) ** -0.001,
    "two widths": lambda s: 0.5 * jnp.exp(-0.5 * s) + 0.5 * jnp.exp(-5e5 * s),
    "rounded root": lambda s: jnp.exp(-jnp.sqrt(s + 1e-6)),
    "waves": lambda s: jnp.exp(-s) * (1.0 - s / 3.0),
    "slowly": lambda s: jnp.exp(-s - s**1.1),
    "int power": lambda s: (1.0 + s) ** -2,
}


def of(profile):
    """Return a class of kernels with this profile."""

    class Own(Stationary):
        def profile(self, squared):
            return profile(squared)

    return Own


@pytest.mark.core
@pytest.mark.parametrize("name", ROUGH)
def test_a_rough_profile_is_refused(name):
    kernel = of(ROUGH[name])
    for lengthscale in (0.01, 1.0, 100.0):
        with pytest.raises(ValueError, match=r"takes no Own: its functions have no slopes, or JAX"):
            Derivatives(kernel(2.0, lengthscale))
    wrapped = (Linear() * kernel(active_dims=0)).warp(jnp.tanh).with_features(jnp.square)
    with pytest.raises(ValueError, match="takes no Own"):
        Derivatives(RBF() + wrapped)


@pytest.mark.core
@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_profile_is_not(name):
    for lengthscale in (0.01, 1.0, 100.0):
        Derivatives(of(SMOOTH[name])(2.0, lengthscale))


def gibbs(lengthscale):
    return Gibbs(lambda X: lengthscale * (1.5 + jnp.sin(X[:, 0] / lengthscale)))


SHIPPED = {  # a kernel as a function of lengthscale, and the variance of slopes at lengthscale 1
    "RBF": (lambda w: RBF(1.0, w), 1.0),
    "Matern32": (lambda w: Matern32(1.0, w), 3.0),
    "Matern52": (lambda w: Matern52(1.0, w), 5.0 / 3.0),
    "RationalQuadratic": (lambda w: RationalQuadratic(1.0, w, 0.01), 1.0),
    "Periodic": (lambda w: Periodic(1.0, 0.5, w), 16.0 * np.pi**2),
    "Cosine": (lambda w: Cosine(1.0, w), 4.0 * np.pi**2),
    "SpectralMixture": (lambda w: SpectralMixture([1.0], [0.0], [1.0 / w]), 4.0 * np.pi**2),
    "Linear": (lambda w: Linear(w**-2.0), 1.0),
    "Polynomial": (lambda w: Polynomial(w**-2.0, 1e-6, 1), 1.0),
    "Constant": (lambda w: Constant(1.0), 0.0),
    "product": (lambda w: RBF(1.0, w) * Matern32(1.0, w), 4.0),
    "change point": (lambda w: change_point(RBF(1.0, w), Matern52(1.0, w), 1e3), 1.0),
    "Gibbs": (gibbs, None),
    "outputs": (lambda w: multi_output(Matern32(1.0, w), np.ones((1, 1))), 3.0),
}


@pytest.mark.core
@pytest.mark.parametrize("name", SHIPPED)
def test_no_kernel_of_the_package_is_taken_for_a_rough_one(name):
    make, curvature = SHIPPED[name]
    for lengthscale in (0.01, 1.0, 100.0):
        place = np.array([[0.3 * lengthscale]])
        place = np.append(place, [[0.0]], axis=1) if name == "outputs" else place
        variance = Derivatives(make(lengthscale)).diag(numbered_inputs(place[:0], place))
        if curvature is not None:
            assert_allclose(variance * lengthscale**2, [curvature], rtol=within(1e-9, 1e-4))
        assert np.isfinite(variance).all()


def test_profiles_are_known_inside_of_transformations():
    """Traced lengthscales do not matter; a profile with a traced number is taken for smooth."""
    Rough, Smooth = of(ROUGH["exponential, safe"]), of(SMOOTH["Cauchy"])

    class Power(Stationary):
        power: Any = 1.0

        def profile(self, squared):
            apart = squared > 0
            raised = jnp.where(apart, squared, 1.0) ** (0.5 * self.power)
            return jnp.exp(-jnp.where(apart, raised, 0.0))

    found = []

    def trace(number):
        for kernel in (Rough(number, number), Smooth(number, number), Power(power=number)):
            found.append(is_smooth(kernel.profile))
        return number

    jax.jit(trace)(1.5)
    jax.vmap(jax.grad(trace))(jnp.ones(2))
    assert found == 2 * [False, True, True]
    with pytest.raises(ValueError, match="takes no Power"):
        Derivatives(Power(power=1.5))


def test_a_class_may_say_it_itself():
    class Sure(of(SMOOTH["Cauchy"])):
        is_differentiable = False

    class Known(of(ROUGH["Matern 3/2"])):
        is_differentiable = True

    with pytest.raises(ValueError, match="takes no Sure"):
        Derivatives(Sure())
    assert Derivatives(Known()) is not None
    with pytest.raises(ValueError, match="takes no Matern12"):
        Derivatives(Matern12())
