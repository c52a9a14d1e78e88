"""Gaussian processes by dense linear algebra, and covariances that a random basis implies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.gp import (
    RBF,
    Constant,
    Cosine,
    Features,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    RationalQuadratic,
)

KERNELS = {
    "RBF": RBF(1.5, 0.7),
    "Matern12": Matern12(1.5, 0.7),
    "Matern32": Matern32(1.5, 0.7),
    "Matern52": Matern52(1.5, 0.7),
    "RationalQuadratic": RationalQuadratic(1.5, 0.7, 1.3),
    "Periodic": Periodic(1.5, 0.8, 1.3),
    "Linear": Linear(0.5),
    "sum": RBF(1.0, 0.7) + Periodic(0.5, 0.8, 1.3),
    "product": RBF(1.0, 0.7) * Periodic(0.5, 0.8, 1.3),
    "linear product": Linear(0.5) * RBF(1.0, 0.7),
    "scaled sum": 2.0 * (Matern32() + Constant(0.3)),
}
ONE_DIMENSION = {"Cosine": Cosine(1.5, 1.3), "damped": Matern32(1.0, 2.0) * Cosine(1.0, 1.3)}


def within(double, single=1e-5):
    """Return `double` if the tests run in double precision, and `single` if they do not."""
    return double if jax.config.jax_enable_x64 else single


@jax.jit
def columns(features, X):
    return features(X)


@jax.jit
def _matrix(kernel, *inputs):
    return kernel(*inputs)


def gram(kernel, *inputs):
    """Return a kernel's matrix in numpy, by one program instead of one for each operation."""
    return np.asarray(_matrix(kernel, *inputs))


def inputs(number, dim, seed=0, width=3.0):
    return np.random.default_rng(seed).uniform(0.0, width, (number, dim))


def posterior(kernel, X, y, X_new, noise):
    """Return mean and covariance of the function, by numpy."""
    K, cross = gram(kernel, X), gram(kernel, X, X_new)
    A = np.linalg.solve(K + np.diag(np.broadcast_to(noise, len(X))), cross).T
    return A @ np.asarray(y), gram(kernel, X_new) - A @ cross


def implied(features, kernel, X, X_new, added):
    """Return the covariance that paths on one basis have; `added` is noise and jitter."""
    C = gram(kernel, X) + np.diag(np.broadcast_to(added, len(X)))
    A = np.linalg.solve(C, gram(kernel, X, X_new)).T
    at = partial(columns, features) if isinstance(features, Features) else features
    M = np.asarray(at(X_new)) - A @ np.asarray(at(X))
    return M @ M.T + (A * np.broadcast_to(added, len(X))) @ A.T


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def jitter(kernel, X):
    diag = jnp.asarray(kernel.diag(X))
    return float(4 * len(X) * jnp.finfo(diag.dtype).eps * diag.mean())
