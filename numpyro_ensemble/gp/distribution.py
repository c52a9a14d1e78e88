"""A Gaussian process at its inputs, as a NumPyro distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike
from numpyro.util import is_prng_key

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.gp.draw_paths import draw_paths
from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.process import Process
from numpyro_ensemble.gp.solvers import covariance, default_jitter, why_unfactored


def check_factor(L: jax.Array) -> jax.Array:
    """Return a Cholesky factor; raise a ValueError if it is not finite, unless it is traced."""
    if not has_tracers(L) and not bool(jnp.isfinite(L).all()):
        raise ValueError(f"the kernel matrix could not be factored: {why_unfactored(L.dtype)}")
    return L


class GaussianProcess(Process):
    """Values of a Gaussian process, with noise or without, at inputs; one event of shape `(N,)`.

    Args:
        kernel: a kernel.
        X: inputs `(N, D)` or `(N,)`.
        noise: variance of the noise, one number or `(N,)`.
        mean_fn: a number, or a function of the inputs `(N, D) -> (N,)`.
        jitter: added to the diagonal of the covariance, as a part of the model (default: `4 N eps`
            times the mean variance).
        observed: which values are observed, `(N,)`; the others may be NaN. `handlers.mask` sets it
            too.

    Raises:
        ValueError: for shapes that do not match, or inputs that are not finite.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import RBF, GaussianProcess
        >>> def model(X, y=None):
        ...     lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        ...     noise = numpyro.sample("noise", dist.HalfNormal(0.1))
        ...     gp = GaussianProcess(RBF(lengthscale=lengthscale), X, noise)
        ...     numpyro.sample("y", gp, obs=y)
        >>> gp = GaussianProcess(RBF(), jnp.linspace(0.0, 1.0, 5), noise=0.1)
        >>> gp.event_shape
        (5,)
    """

    pytree_data_fields = ("kernel", "X", "noise", "mean_fn", "jitter", "observed")

    def __init__(
        self,
        kernel: Kernel,
        X: ArrayLike,
        noise: ArrayLike = 0.0,
        mean_fn: Any = None,
        jitter: ArrayLike | None = None,
        *,
        observed: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(kernel, X, noise, mean_fn, jitter, validate_args)
        if observed is not None and jnp.shape(observed) != (len(self.X),):
            raise ValueError(f"observed takes shape ({len(self.X)},), got {jnp.shape(observed)}.")
        self.observed = None if observed is None else jnp.asarray(observed, bool)

    # Moments ------------------------------------------------------------------------------------

    @property
    def extra(self) -> jax.Array:
        """Jitter, added to the kernel matrix's diagonal in addition to the noise."""
        given = self.jitter is not None
        return jnp.asarray(self.jitter) if given else default_jitter(self.kernel, self.X)

    @property
    def added(self) -> jax.Array:
        """Noise and jitter, which are added to the kernel matrix's diagonal."""
        return self.variances + self.extra

    @property
    def variance(self) -> jax.Array:
        """Variance `(N,)`, noise and jitter included."""
        return self.kernel.diagonal(self.X) + self.added

    @property
    def covariance_matrix(self) -> jax.Array:
        """Covariance `(N, N)`, noise and jitter included."""
        return covariance(self.kernel, self.X, self.added, None)

    def scale_tril(self) -> jax.Array:
        """Return the Cholesky factor of the covariance; NaN if the factorisation fails."""
        return jnp.linalg.cholesky(covariance(self.kernel, self.X, self.added, self.observed))

    # The distribution ---------------------------------------------------------------------------

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw values, noise and jitter included."""
        if not is_prng_key(key):
            raise ValueError(f"key takes one key, jax.random.key(0) say; got {key!r}.")
        L = check_factor(jnp.linalg.cholesky(self.covariance_matrix))
        normal = jax.random.normal(key, (*sample_shape, len(self.X)), L.dtype)
        values = jnp.einsum("ij,...j->...i", L, normal, precision=EXACT)
        return jnp.broadcast_to(self.mean, values.shape) + values

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the log density of values `(..., N)`; with a mask, of the observed values."""
        value = self._checked(value)
        L = self.scale_tril()
        left = self._centred(value)
        flat = left.reshape(-1, len(self.X))
        white = solve_triangular(L, flat.T, lower=True)
        number = len(self.X) if self.observed is None else self.observed.sum()
        constant = jnp.log(jnp.diagonal(L)).sum() + 0.5 * number * jnp.log(2.0 * jnp.pi)
        return (-0.5 * (white**2).sum(axis=0) - constant).reshape(left.shape[:-1])

    def _centred(self, value: jax.Array) -> jax.Array:
        mean = jnp.broadcast_to(self.mean, value.shape)
        if self.observed is None:
            return value - mean
        return jnp.where(jnp.broadcast_to(self.observed, value.shape), value - mean, 0.0)

    def mask(self, mask: Any) -> dist.Distribution:
        """Leave out the observations where a mask `(N,)` is false.

        A mask of shape `(N,)` always refers to observations, never to N copies in a plate.
        """
        return self.where(mask) if jnp.shape(mask) == self.event_shape else super().mask(mask)

    def where(self, mask: Any) -> GaussianProcess:
        """Return the process without the observations where a mask, `(N,)` or `()`, is false."""
        observed = jnp.broadcast_to(jnp.asarray(mask, bool), self.event_shape)
        observed = observed if self.observed is None else observed & self.observed
        parts = (self.kernel, self.X, self.noise, self.mean_fn, self.jitter)
        return GaussianProcess(*parts, observed=observed)

    def tempered(self, weight: Any) -> Process:
        """Return the process with a weight on its likelihood; 0 leaves out all observations."""
        if not has_tracers(weight):
            return super().tempered(weight)
        process = self.where(weight > 0)
        process.noise = self.variances / jnp.where(weight > 0, weight, 1.0)
        return process

    # The posterior ------------------------------------------------------------------------------

    def predict(
        self, values: ArrayLike, X_new: ArrayLike, full_cov: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Return the exact moments of the function, without noise, given values at the inputs.

        Args:
            values: `(N,)`.
            X_new: inputs `(M, D)` or `(M,)`.
            full_cov: return the covariance `(M, M)`, not the variance `(M,)`.
        """
        values, X_new = self._checked(values), self._new_inputs(X_new)
        return self.given(check_factor(self.scale_tril()), values, X_new, full_cov)

    def leave_one_out(self, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of each value given all others, each `(N,)`, noise included.

        Rasmussen and Williams (2006), equations 5.10 to 5.12. The moments of an unobserved value
        are those given all observed values.

        Args:
            values: `(N,)`.
        """
        values = self._checked(values)
        L = check_factor(self.scale_tril())
        inverse = cho_solve((L, True), jnp.eye(len(L), dtype=L.dtype))
        precision = jnp.diagonal(inverse)
        left = jnp.matmul(inverse, self._centred(values), precision=EXACT)
        mean, variance = values - left / precision, 1.0 / precision
        if self.observed is None:
            return mean, variance
        others, spread = self.given(L, values, self.X)
        mean = jnp.where(self.observed, mean, others)
        return mean, jnp.where(self.observed, variance, spread + self.added)

    def given(
        self, L: jax.Array, values: jax.Array, X_new: jax.Array, full_cov: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Compute `predict` from the factor that `scale_tril` returned."""
        cross = self.kernel.matrix(self.X, X_new)
        if self.observed is not None:
            cross = jnp.where(self.observed[:, None], cross, 0.0)
        white = solve_triangular(L, cross, lower=True)
        left = solve_triangular(L, self._centred(values), lower=True)
        mean = self.kernel.mean_at(self.mean_fn, X_new) + jnp.matmul(white.T, left, precision=EXACT)
        if full_cov:
            inner = jnp.matmul(white.T, white, precision=EXACT)
            return mean, self.kernel.matrix(X_new, X_new) - inner
        left = self.kernel.diagonal(X_new) - (white**2).sum(axis=0)
        return mean, jnp.maximum(left, 0.0)

    def draw_paths(self, rng_key: jax.Array, values: ArrayLike, **options: Any) -> Paths:
        """Draw functions given values at the inputs; options as of `gp.draw_paths`."""
        return draw_paths(
            rng_key,
            self.kernel,
            self.X,
            values,
            noise=self.noise,
            mean_fn=self.mean_fn,
            jitter=self.jitter,
            observed=self.observed,
            **options,
        )
