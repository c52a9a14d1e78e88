"""Sparse process with normal noise: the bound of Titsias (2009)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.distribution import GaussianProcess, check_factor
from numpyro_ensemble.gp.inducing import as_inducing
from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.process import Process


class CollapsedSparseGP(Process):
    """Observations of a process with normal noise, approximated by inducing points (Titsias, 2009).

    `log_prob(y)` is the bound of Titsias (2009), which is optimal over all distributions of the
    inducing values. Use it as one observed site, with any inference for the hyperparameters.

    Args:
        kernel: a kernel.
        X: inputs `(N, D)` or `(N,)`.
        Z: inducing points `(M, D)` or `(M,)`.
        noise: variance, positive, one number or `(N,)`.
        mean_fn: a number, or a function of the inputs.
        jitter: added to the diagonal of the inducing points' covariance.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, CollapsedSparseGP
        >>> X = jnp.linspace(0.0, 1.0, 50)
        >>> CollapsedSparseGP(RBF(), X, X[::10], noise=0.1).log_prob(jnp.sin(X)).shape
        ()
    """

    pytree_data_fields = ("kernel", "X", "Z", "noise", "mean_fn", "jitter")

    def __init__(
        self,
        kernel: Kernel,
        X: ArrayLike,
        Z: ArrayLike,
        noise: ArrayLike,
        mean_fn: Any = None,
        jitter: ArrayLike | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(kernel, X, noise, mean_fn, jitter, validate_args)
        self.Z = as_inducing(kernel, self.X, Z)
        if not has_tracers(noise) and not (np.asarray(noise) > 0).all():
            raise ValueError("CollapsedSparseGP divides by the noise, which must be positive.")

    @property
    def inducing(self) -> GaussianProcess:
        """The process at the inducing points."""
        return GaussianProcess(self.kernel, self.Z, 0.0, self.mean_fn, self.jitter)

    @property
    def variance(self) -> jax.Array:
        """Variance `(N,)`, noise included."""
        return self.kernel.diagonal(self.X) + self.variances

    def _factors(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the factor of K_ZZ, the scaled projection A and the factor of I + A A'."""
        L = self.inducing.scale_tril()
        cross = self.kernel.matrix(self.Z, self.X)
        A = solve_triangular(L, cross, lower=True) / jnp.sqrt(self.variances)[None, :]
        B = jnp.eye(len(L), dtype=L.dtype) + jnp.matmul(A, A.T, precision=EXACT)
        return L, A, jnp.linalg.cholesky(B)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the bound for values `(..., N)`."""
        value = self._checked(value)
        _, A, LB = self._factors()
        left = (value - jnp.broadcast_to(self.mean, value.shape)).reshape(-1, len(self.X))
        scaled = left / jnp.sqrt(self.variances)[None, :]
        c = solve_triangular(LB, jnp.matmul(A, scaled.T, precision=EXACT), lower=True)
        trace = (self.kernel.diagonal(self.X) / self.variances - (A**2).sum(axis=0)).sum()
        constant = (
            0.5 * jnp.log(2.0 * jnp.pi * self.variances).sum()
            + jnp.log(jnp.diagonal(LB)).sum()
            + 0.5 * trace
        )
        squares = (scaled**2).sum(axis=1) - (c**2).sum(axis=0)
        return (-0.5 * squares - constant).reshape(value.shape[:-1])

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw inducing values, then values with independent errors around their predictions."""
        key_u, key_y = jax.random.split(key)
        L = self.inducing.scale_tril()
        A = solve_triangular(L, self.kernel.matrix(self.Z, self.X), lower=True)
        left = jnp.maximum(self.kernel.diagonal(self.X) - (A**2).sum(axis=0), 0.0)
        z = jax.random.normal(key_u, (*sample_shape, len(L)), L.dtype)
        values = jnp.einsum("mn,...m->...n", A, z, precision=EXACT)
        error = jax.random.normal(key_y, values.shape, L.dtype)
        sd, mean = jnp.sqrt(left + self.variances), self.mean
        sd, mean = (jnp.broadcast_to(a, values.shape) for a in (sd, mean))
        return mean + values + sd * error

    def mask(self, mask: Any) -> dist.Distribution:
        """Mask copies. A mask of observations is an error: the bound has no term for each."""
        return self.where(mask) if jnp.shape(mask) == self.event_shape else super().mask(mask)

    def where(self, mask: Any) -> Process:
        """Leave out all observations if the flag is false."""
        return super().where(mask) if jnp.ndim(mask) else self.tempered(jnp.where(mask, 1.0, 0.0))

    def optimal(self, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return mean `(M,)` and covariance factor `(M, M)` of the optimal inducing values."""
        L, A, LB = self._factors()
        scaled = (self._checked(values) - self.mean) / jnp.sqrt(self.variances)
        white = cho_solve((LB, True), jnp.matmul(A, scaled, precision=EXACT))
        mean = self.inducing.mean + jnp.matmul(L, white, precision=EXACT)
        return mean, solve_triangular(LB, L.T, lower=True).T

    def predict(
        self, values: ArrayLike, X_new: ArrayLike, full_cov: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Return moments of the function, without noise, for the optimal inducing values."""
        X_new = self._new_inputs(X_new)
        L, A, LB = self._factors()
        check_factor(LB)
        scaled = (self._checked(values) - self.mean) / jnp.sqrt(self.variances)
        P = solve_triangular(L, self.kernel.matrix(self.Z, X_new), lower=True)
        Q = solve_triangular(LB, P, lower=True)
        c = solve_triangular(LB, jnp.matmul(A, scaled, precision=EXACT), lower=True)
        mean = self.kernel.mean_at(self.mean_fn, X_new) + jnp.matmul(Q.T, c, precision=EXACT)
        if full_cov:
            inner = jnp.matmul(P.T, P, precision=EXACT) - jnp.matmul(Q.T, Q, precision=EXACT)
            return mean, self.kernel.matrix(X_new, X_new) - inner
        left = self.kernel.diagonal(X_new) - (P**2).sum(axis=0) + (Q**2).sum(axis=0)
        return mean, jnp.maximum(left, 0.0)

    def leave_one_out(self, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of each value given all others, each `(N,)`, noise included.

        The inducing points are kept. The inducing values are the optimal ones without that value.
        """
        _, A, LB = self._factors()
        check_factor(LB)
        root = jnp.sqrt(self.variances)
        scaled = (self._checked(values) - self.mean) / root
        half = solve_triangular(LB, A, lower=True)
        precision = (1.0 - (half**2).sum(axis=0)) / self.variances
        inner = jnp.matmul(half, scaled, precision=EXACT)
        left = (scaled - jnp.matmul(half.T, inner, precision=EXACT)) / root
        beside = self.kernel.diagonal(self.X) - (A**2).sum(axis=0) * self.variances
        mean = jnp.asarray(values) - left / precision
        return mean, 1.0 / precision + jnp.maximum(beside, 0.0)

    def draw_paths(
        self, rng_key: jax.Array, values: ArrayLike, *, num_paths: int = 1, **options: Any
    ) -> Paths:
        """Draw functions given inducing values, drawn from their optimal distribution."""
        key_u, key_paths = jax.random.split(rng_key)
        values = jnp.asarray(values)
        optimal = self.optimal
        if values.ndim == 2:
            mean, factor = jax.vmap(optimal, out_axes=(0, None))(values)
        else:
            mean, factor = optimal(values)
            mean = jnp.broadcast_to(mean, (num_paths, len(mean)))
        z = jax.random.normal(key_u, mean.shape, mean.dtype)
        u = mean + jnp.matmul(z, factor.T, precision=EXACT)
        options = {"latent": False} | options
        paths = self.inducing.draw_paths(key_paths, u, num_paths=num_paths, **options)
        LB = self._factors()[2]
        whitened = cho_solve((LB, True), jnp.eye(len(LB), dtype=LB.dtype))
        return replace(paths, noise=jnp.asarray(self.noise), whitened=whitened)
