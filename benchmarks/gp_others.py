"""What is measured beside this package's Gaussian processes: exact algebra and other libraries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.hsgp.laplacian import eigenfunctions
from numpyro.contrib.hsgp.spectral_densities import (
    diag_spectral_density_matern,
    diag_spectral_density_squared_exponential,
)


def exact_posterior(kernel, X, y, X_new, noise):
    """Return mean and covariance of the posterior by dense algebra."""
    A = jnp.linalg.solve(kernel(X) + noise * jnp.eye(len(X)), kernel(X, X_new)).T
    return A @ y, kernel(X_new) - A @ kernel(X, X_new)


def error(covariance, exact):
    """Return the relative error of a covariance."""
    return float(jnp.linalg.norm(covariance - exact) / jnp.linalg.norm(exact))


def error_of_means(paths, mean, variance):
    """Return the RMS error of means over paths `(S, N)`, in posterior standard deviations.

    Of S exact paths it is about `S ** -0.5`.
    """
    return float(jnp.sqrt(((paths.mean(axis=0) - mean) ** 2 / variance).mean()))


class Hilbert:
    """NumPyro's Hilbert-space basis of 32 x 32 functions for inputs in `[-0.5, 0.5]^2`.

    Its box is twice as wide as the inputs. Half of its width is then 4 lengthscales of 0.25, and
    Riutort-Mayol et al. (2023) advise 3.2 at least. On a box 1.5 times as wide as the inputs, the
    error of the RBF covariance is 0.18 instead of 0.002.
    """

    BOX = 1.0

    def __init__(self, lengthscale, smoothness=None):
        if smoothness is None:
            density = diag_spectral_density_squared_exponential(1.0, lengthscale, self.BOX, 32, 2)
        else:
            density = diag_spectral_density_matern(smoothness, 1.0, lengthscale, self.BOX, 32, 2)
        self.scale = jnp.sqrt(density)

    def columns(self, X):
        """Return the basis functions at some inputs."""
        return eigenfunctions(X, self.BOX, 32) * self.scale[None, :]

    def precision(self, X, noise):
        """Return the precision of the weights' posterior."""
        A = self.columns(X)
        return A.T @ A / noise + jnp.eye(A.shape[1])

    def covariance(self, X, X_new, noise):
        """Return the covariance of the posterior at some inputs."""
        at = self.columns(X_new)
        return at @ jnp.linalg.solve(self.precision(X, noise), at.T)

    def draw(self, key, X, y, X_new, noise, number):
        """Draw functions from the posterior of the weights, and evaluate them: `(number, N)`."""
        L = jnp.linalg.cholesky(self.precision(X, noise))
        mean = jax.scipy.linalg.cho_solve((L, True), self.columns(X).T @ y / noise)
        z = jax.random.normal(key, (len(L), number))
        weights = mean[:, None] + jax.scipy.linalg.solve_triangular(L.T, z)
        return (self.columns(X_new) @ weights).T


def draw_exactly(key, kernel, X, y, X_new, noise, number):
    """Draw functions at some inputs by the Cholesky factor of the posterior's covariance."""
    mean, covariance = exact_posterior(kernel, X, y, X_new, noise)
    root = jnp.linalg.cholesky(covariance + 1e-8 * jnp.eye(len(covariance)))
    return mean + jax.random.normal(key, (number, len(mean))) @ root.T


def gpjax_paths(X, y, number, variance, lengthscale, noise):
    """Draw paths by GPJax with as many columns as ours; return None where it is not installed."""
    try:
        import gpjax
    except ImportError:
        return None
    dim = X.shape[1]
    kernel = gpjax.kernels.RBF(lengthscale=lengthscale, variance=variance, n_dims=dim)
    prior = gpjax.gps.Prior(mean_function=gpjax.mean_functions.Zero(), kernel=kernel)
    joint = prior * gpjax.likelihoods.Gaussian(obs_stddev=noise**0.5)
    data = gpjax.Dataset(X=X, y=y[:, None])
    return joint.sample_approx(number, data, jax.random.key(0), num_features=512)


def gpjax_rows(X, y, X_new):
    draw = partial(gpjax_paths, X, y, 256, 1.0, 0.25, 0.01)
    if draw() is None:
        return {}

    sample = draw()
    return {"draw, GPJax": lambda: draw()(X_new[:1]), "evaluate, GPJax": lambda: sample(X_new)}


def botorch_rows(X, y, X_new):
    try:
        import torch
        from botorch.models import SingleTaskGP
        from botorch.sampling.pathwise import draw_matheron_paths
    except ImportError:
        return {}
    X, y, X_new = (torch.tensor(np.asarray(a)).double() for a in (X, y, X_new))
    model = SingleTaskGP(X, y[:, None], torch.full_like(y[:, None], 0.01))
    draw = lambda: draw_matheron_paths(model, torch.Size([256]))  # noqa: E731
    sample = draw()
    return {"draw, BoTorch": draw, "evaluate, BoTorch": lambda: sample(X_new).detach().numpy()}
