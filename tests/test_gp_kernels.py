"""Kernels: their values, their algebra, their pytrees, and their errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import KERNELS, ONE_DIMENSION, inputs, within
from numpy.testing import assert_allclose
from scipy.special import gamma, kv

from numpyro_ensemble.gp import (
    RBF,
    Constant,
    Coregion,
    Cosine,
    GaussianProcess,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    RationalQuadratic,
)

X1, X2 = inputs(5, 2), inputs(4, 2, seed=1)
APART = X1[:, None] - X2[None]


def distance(lengthscale):
    return np.sqrt(((APART / lengthscale) ** 2).sum(-1))


def matern(smoothness, d):
    s = np.sqrt(2 * smoothness) * d
    return 2 ** (1 - smoothness) / gamma(smoothness) * s**smoothness * kv(smoothness, s)


ARD = np.array([0.5, 2.0])
SIN = np.sin(np.pi * APART / 1.3)
VALUES = {
    "RBF": (RBF(2.0, ARD), 2 * np.exp(-0.5 * distance(ARD) ** 2)),
    "Matern12": (Matern12(2.0, ARD), 2 * matern(0.5, distance(ARD))),
    "Matern32": (Matern32(2.0, 0.7), 2 * matern(1.5, distance(0.7))),
    "Matern52": (Matern52(2.0, ARD), 2 * matern(2.5, distance(ARD))),
    "RationalQuadratic": (
        RationalQuadratic(2.0, ARD, 0.8), 2 * (1 + distance(ARD) ** 2 / 1.6) ** -0.8,
    ),
    "Periodic": (Periodic(2.0, ARD, 1.3), 2 * np.exp(-2 * (SIN**2 / ARD**2).sum(-1))),
    "Cosine": (
        Cosine(2.0, 1.3, active_dims=1), 2 * np.cos(2 * np.pi * APART[..., 1] / 1.3),
    ),
    "Linear": (Linear(2.0), 2 * X1 @ X2.T),
    "Constant": (Constant(2.0), np.full((5, 4), 2.0)),
    "active dimensions": (
        RBF(2.0, 0.7, active_dims=(1,)), 2 * np.exp(-0.5 * (APART[..., 1] / 0.7) ** 2),
    ),
    "sum": (RBF() + 0.5, np.exp(-0.5 * distance(1.0) ** 2) + 0.5),
    "number of NumPy's": (np.float64(2.0) * Constant(), np.full((5, 4), 2.0)),
    "number of JAX's": (jnp.asarray(2.0) * Constant(), np.full((5, 4), 2.0)),
    "product": (3.0 * RBF() * Linear(), 3 * np.exp(-0.5 * distance(1.0) ** 2) * (X1 @ X2.T)),
    "warp": (Linear().warp(jnp.sin), np.sin(X1) @ np.sin(X2).T),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_the_formulas(name):
    kernel, values = VALUES[name]
    exact = within({"rtol": 1e-10}, {"rtol": 2e-4, "atol": 2e-6})
    assert_allclose(kernel(X1, X2), values, **exact)
    assert_allclose(kernel.diag(X1), np.diag(kernel(X1)), rtol=1e-6, atol=1e-7)
    assert_allclose(kernel(X1), kernel(X1).T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_pytrees(name):
    kernel = KERNELS[name]
    leaves, treedef = jax.tree.flatten(kernel)
    again = jax.tree.unflatten(treedef, leaves)
    assert_allclose(jax.jit(lambda k, X: k(X))(again, X1), kernel(X1), rtol=within(1e-10))
    stacked = jax.tree.map(lambda leaf: jnp.array([leaf, 2.0 * leaf]), kernel)
    many = jax.jit(jax.vmap(lambda k: k(X1)))(stacked)
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, kernel)
    assert_allclose(many[1], doubled(X1), rtol=within(1e-10))
    slopes = jax.jit(jax.grad(lambda k: k(X1).sum()))(jax.tree.map(jnp.asarray, kernel))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("smooth", [Matern32(2.0, 0.7), Matern52(2.0, 0.7), RBF(2.0, 0.7)])
def test_curvature_where_inputs_meet(smooth):
    """The variance of derivatives is -k''(0); JAX would find 0 through a safe square root."""
    degrees = getattr(smooth, "degrees", np.inf)
    expected = 2.0 / 0.7**2 * (1.0 if np.isinf(degrees) else degrees / (degrees - 2))
    one = jnp.zeros(1)
    mixed = jax.grad(lambda a: jax.grad(lambda b: smooth(a[None], b[None])[0, 0])(one)[0])
    assert_allclose(jax.jit(mixed)(one)[0], expected, rtol=1e-6)


def test_a_network_may_stand_in_front():
    net = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    kernel = RBF(lengthscale=jnp.ones(3)).warp(jax.vmap(net))
    expected = jax.jit(lambda a, b: RBF()(jax.vmap(net)(a), jax.vmap(net)(b)))(X1, X2)
    assert_allclose(jax.jit(kernel)(X1, X2), expected, rtol=within(1e-7))
    held = RBF().warp(jax.tree_util.Partial(lambda net, x: jax.vmap(net)(x), net))
    slopes = jax.jit(jax.grad(lambda k: k(X1, X2).sum()))(jax.tree.map(jnp.asarray, held))
    assert len(jax.tree.leaves(slopes)) == 2 + 4


def test_outputs_of_a_coregionalisation():
    W, kappa = np.array([[1.0, 0.5], [0.2, -1.0], [0.0, 0.3]]), np.array([0.1, 0.2, 0.3])
    B = W @ W.T + np.diag(kappa)
    X = np.column_stack([np.linspace(0, 1, 6), [0, 1, 2, 0, 1, 2]])
    kernel = RBF(active_dims=0) * Coregion(W, kappa, active_dims=1)
    number = X[:, 1].astype(int)
    assert_allclose(kernel(X), RBF()(X[:, 0]) * B[np.ix_(number, number)], rtol=1e-6)
    with pytest.raises(ValueError, match="numbers, 0 to 2; got 3.0 in row 0"):
        kernel(np.array([[0.0, 3.0]]))
    assert np.isnan(jax.jit(kernel)(np.array([[0.0, 3.0]]))).all()  # jit cannot raise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RBF(variance=np.ones(5)), r"variance takes one number, got shape \(5,\)"),
        (lambda: RBF(lengthscale=np.ones((5, 2))), r"lengthscale takes a number, or one for each"),
        (lambda: Periodic(period=np.ones(2)), "period takes one number"),
        (lambda: RationalQuadratic(alpha=np.ones(2)), "alpha takes one number"),
        (lambda: RBF(lengthscale=-1.0), "lengthscale must be positive, got -1.0"),
        (lambda: RBF(variance=np.nan), "variance must be positive"),
        (lambda: 0.0 * RBF(), "variance must be positive"),
        (lambda: RBF(lengthscale=np.ones(3))(X1), r"lengthscale has shape \(3,\), and the inputs"),
        (lambda: RBF(active_dims=2)(X1), r"active_dims=\(2,\), and the inputs have 2 columns"),
        (lambda: Cosine()(X1), "Cosine works on one dimension, and the inputs have 2"),
        (lambda: RBF()(X1, X2[:, :1]), "X1 has 2 columns, and X2 has 1"),
        (lambda: RBF()(X1[None]), r"inputs of shape \(N, D\) or \(N,\), got \(1, 5, 2\)"),
        (lambda: RBF().warp(lambda x: x[:2])(X1), "returned 2 rows for 5 inputs"),
        (
            lambda: GaussianProcess(Coregion(np.ones((2, 1))), np.arange(1.0, 3.0)),
            r"outputs' numbers, 0 to 1; got 2.0 in row 1",
        ),
        (lambda: RBF() * Coregion(np.ones((2, 1))), "RBF works on all columns.*active_dims"),
        (lambda: Coregion(np.ones(2)), r"W takes shape \(num_outputs, rank\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_kernel_of_one_dimension_has_its_diagonal():
    X = inputs(6, 1)
    for kernel in ONE_DIMENSION.values():
        assert_allclose(kernel.diag(X), np.diag(kernel(X)), rtol=within(1e-10))
