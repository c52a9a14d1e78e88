"""Sine and cosine, computed together, against extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ensemble.gp import RBF, draw_paths
from numpyro_ensemble.gp.waves import sine_cosine

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_sine_and_cosine_are_right_to_rounding(dtype, size):
    if dtype == "float64" and not jax.config.jax_enable_x64:
        dtype = "float32"
    turns = np.linspace(-size, size, 20_001).astype(dtype)
    known = turns.astype(np.longdouble)
    for value, truth in zip(
        sine_cosine(jnp.asarray(turns)), (np.sin(known), np.cos(known)), strict=True
    ):
        assert value.dtype == dtype
        assert np.abs(np.asarray(value, np.longdouble) - truth).max() < 2 * np.finfo(dtype).eps


def test_quarters_of_a_turn_are_told_apart():
    sine, cosine = sine_cosine(jnp.arange(-4, 5) * (0.5 * jnp.pi))
    np.testing.assert_allclose(sine, [0, 1, 0, -1, 0, 1, 0, -1, 0], atol=1e-6)
    np.testing.assert_allclose(cosine, [1, 0, -1, 0, 1, 0, -1, 0, 1], atol=1e-6)


def test_slopes_are_waves_too():
    x = jnp.linspace(-5.0, 5.0, 11)
    slope = jax.vmap(jax.grad(lambda x: 2.0 * sine_cosine(x)[0] + sine_cosine(x)[1]))(x)
    np.testing.assert_allclose(slope, 2.0 * jnp.cos(x) - jnp.sin(x), atol=1e-5)
    curvature = jax.vmap(jax.grad(jax.grad(lambda x: sine_cosine(x)[0])))(x)
    np.testing.assert_allclose(curvature, -jnp.sin(x), atol=1e-5)


def test_no_wave_is_above_one_whatever_the_phase():
    waves = jnp.stack(sine_cosine(jnp.array([1e9, -1e12, 1e15, 3e30])))
    assert (abs(waves) <= 1.0 + 1e-6).all()
    assert jnp.isnan(jnp.stack(sine_cosine(jnp.array([jnp.inf, jnp.nan])))).all()


def test_the_program_is_that_of_the_platform_it_runs_on():
    """A program for a GPU may be lowered where the default platform is the CPU."""
    paths = draw_paths(jax.random.key(0), RBF(), jnp.arange(3.0), jnp.ones(3), num_features=64)
    traced = jax.jit(paths._prior).trace(jnp.ones((2, 1)))
    for platform, operation in (("cpu", "stablehlo.while"), ("cuda", "stablehlo.sine")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert operation in text
        assert ("stablehlo.sine" in text) == (platform == "cuda")
        assert ("stablehlo.while" in text) == (platform == "cpu")
