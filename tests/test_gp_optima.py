"""Maxima and minima of paths, inside and on the border, against a dense grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import within
from numpy.testing import assert_allclose

from numpyro_ensemble.gp import (
    RBF,
    Categorical,
    GaussianProcess,
    Matern32,
    draw_paths,
    maximise,
    minimise,
)

X = np.random.default_rng(0).uniform(size=(14, 2)) * [2.0, 1.0]
Y = np.sin(4.0 * X[:, 0]) * np.cos(3.0 * X[:, 1]) + X[:, 0]
BOUNDS = [(0.0, 2.0), (-0.5, 1.0)]
SIDES = np.meshgrid(np.linspace(0.0, 2.0, 81), np.linspace(-0.5, 1.0, 61), indexing="ij")
GRID = np.stack([side.ravel() for side in SIDES], axis=1)


@pytest.fixture(scope="module")
def paths():
    key, kernel = jax.random.key(0), Matern32(1.0, 0.6) + RBF(0.5, 0.3)
    return draw_paths(key, kernel, X, Y, noise=1e-3, num_paths=4, num_features=64)


@pytest.mark.core
@pytest.mark.long
@pytest.mark.parametrize(("find", "sign"), [(maximise, 1.0), (minimise, -1.0)])
def test_no_point_of_a_grid_is_better(paths, find, sign, key, compile_count):
    found = find(key, paths, BOUNDS)
    assert found.place.shape == (4, 2) and found.value.shape == (4,)
    best = (sign * np.asarray(paths(GRID))).max(axis=1)
    assert (sign * found.value >= best - 1e-5).all()
    assert (sign * found.value - best < 0.1).all()  # the cells of the grid are small
    low, high = np.transpose(BOUNDS)
    place = np.asarray(found.place)
    assert ((place >= low) & (place <= high)).all()
    near = within({"rtol": 1e-9}, {"rtol": 1e-3, "atol": 1e-4})
    assert_allclose(paths.each(found.place[:, None])[:, 0], found.value, **near)
    # the best of as many points, without a gradient search, is lower
    rough = find(key, paths, BOUNDS, num_points=64, max_steps=1)
    assert (sign * (found.value - rough.value)).max() > 1e-4
    with compile_count() as count:
        find(jax.random.key(1), paths, [(0.0, 1.5), (0.0, 1.0)])
    assert count.count <= 1, count.names  # the program that makes the key


@pytest.mark.long
def test_places_inside_have_no_slope_and_corners_are_found(paths, key):
    found = minimise(key, paths, BOUNDS)
    low, high = np.transpose(BOUNDS)
    slope = jax.grad(lambda x: paths.each(x[:, None]).sum())(found.place)
    place = np.asarray(found.place)
    inside = (place > low + 1e-4) & (place < high - 1e-4)
    assert abs(np.where(inside, slope, 0.0)).max() < 1e-3
    steep = draw_paths(key, RBF(1.0, 50.0), X, 3.0 * X[:, 0] - X[:, 1], noise=1e-4, num_paths=3)
    assert_allclose(maximise(key, steep, BOUNDS).place, np.tile([2.0, -0.5], (3, 1)), atol=1e-3)
    assert_allclose(minimise(key, steep, BOUNDS).place, np.tile([0.0, 1.0], (3, 1)), atol=1e-3)


@pytest.mark.long
def test_many_draws_one_dimension_and_jit(key, compile_count):
    def drawn(width):
        process = GaussianProcess(RBF(1.0, width), X[:, 0], 0.01)
        return process.draw_paths(key, Y, num_paths=3, num_features=64)

    many = jax.vmap(drawn)(jnp.array([0.4, 0.8]))
    found = maximise(0, many, (0.0, 2.0))
    assert found.place.shape == (6, 1)
    grid = np.linspace(0.0, 2.0, 400)
    assert (found.value >= many(grid).max(axis=1) - 1e-6).all()
    inside = jax.jit(lambda p: maximise(jax.random.key(0), p, (0.0, 2.0)))(many)
    assert_allclose(inside.value, found.value, rtol=1e-6)
    other = jax.vmap(drawn)(jnp.array([0.5, 0.9]))
    with compile_count() as count:
        maximise(1, other, (-1.0, 2.5))
    assert count.count == 0, count.names


def test_bad_calls(paths, key):
    for bounds in ([(0.0, 1.0)], (0.0, 1.0), [(0.0, 1.0), (1.0, 0.5)], [(0.0, np.inf), (0.0, 1.0)]):
        with pytest.raises(ValueError, match="bounds"):
            maximise(key, paths, bounds)
    with pytest.raises(TypeError, match="paths takes functions"):
        minimise(key, lambda x: x, BOUNDS)
    for options in ({"num_points": 0}, {"num_starts": 0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            minimise(key, paths, BOUNDS, **options)
    with pytest.raises(ValueError, match="num_starts=9 of num_points=8"):
        minimise(key, paths, BOUNDS, num_points=8, num_starts=9)


@pytest.mark.long
def test_a_column_of_numbers_has_no_slope_to_follow(key):
    inputs = np.concatenate([X[:, :1], (np.arange(14) % 2)[:, None]], axis=1)
    kernel = RBF(active_dims=0) * Categorical(2)
    mixed = draw_paths(key, kernel, inputs, Y, noise=1e-3, num_paths=2, num_features=128)
    with pytest.raises(ValueError, match="Categorical: column -1 holds the categories' numbers"):
        maximise(key, mixed, [(0.0, 2.0), (0.0, 1.0)])
