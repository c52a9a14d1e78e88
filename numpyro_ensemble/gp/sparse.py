"""Processes through inducing points: stochastic, and collapsed onto Titsias' bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_ensemble.arguments import has_tracers
from numpyro_ensemble.gp.distribution import GaussianProcess, Process, check_factor
from numpyro_ensemble.gp.inputs import EXACT, as_inputs, mean_at
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.solvers import pivoted_cholesky
from numpyro_ensemble.gp.whiten import announce
from numpyro_ensemble.handlers import check_count


def sparse_gp(
    name: str,
    kernel: Kernel,
    X: ArrayLike,
    Z: ArrayLike,
    whiten: bool = True,
    *,
    mean_fn: Any = None,
    jitter: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sample a process at inducing points, and return its moments at inputs given these values.

    Its only latent is `{name}_u_base`, independent standard normals (`{name}_u` if not whitened).
    Call it outside the plate of the data, and `ExpectedLikelihood` inside, so that ordinary guides
    and batches optimise the bound of Hensman et al. (2013).

    Args:
        name: of the process.
        kernel: a kernel.
        X: inputs `(N, D)`, those of a batch say.
        Z: inducing points `(M, D)`, fixed or parameters.
        whiten: sample independent normals.
        mean_fn: a number, or a function of the inputs.
        jitter: what is added to the inducing points' diagonal.

    Returns:
        Mean and variance `(N,)`; functions and 0 where `Pathwise` predicts.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import RBF, ExpectedLikelihood, sparse_gp
        >>> def model(X, y=None, Z=jnp.linspace(0.0, 1.0, 5)):
        ...     m, v = sparse_gp("f", RBF(), X, Z)
        ...     with numpyro.plate("data", len(X)):
        ...         likelihood = ExpectedLikelihood(lambda f: dist.Bernoulli(logits=f), m, v)
        ...         numpyro.sample("y", likelihood, obs=y)
    """
    X, process = as_inputs(X), GaussianProcess(kernel, Z, 0.0, mean_fn, jitter)
    if X.shape[1] != process.X.shape[1]:
        raise ValueError(f"X has {X.shape[1]} columns, and Z has {process.X.shape[1]}.")
    L = process.scale_tril()

    def draw() -> jax.Array:
        normal = dist.Normal(jnp.zeros(len(process.X), L.dtype), 1.0).to_event(1)
        site, fn = (f"{name}_u_base", normal) if whiten else (f"{name}_u", process)
        z = numpyro.sample(site, fn)
        if z.ndim > 1:
            raise ValueError(
                f"sparse_gp({name!r}) stands inside a plate, which would copy its inducing values: "
                f"call it before the plate, with the inputs of the batch."
            )
        return process.mean + jnp.matmul(L, z, precision=EXACT) if whiten else z

    message = announce(name, process, X, draw)
    if message["answered"]:
        return message["value"], jnp.zeros_like(message["value"])
    return process.given(L, message["value"], X)


class ExpectedLikelihood(dist.Distribution):
    """The likelihood of values whose mean log density is taken over normal latents.

    `log_prob(y)` is `E log p(y | f)`, f normal: in closed form where the likelihood is normal
    around f itself, by quadrature else. Sampling draws f, then y.

    Args:
        likelihood: a function of f that returns a distribution of the same batch shape.
        m: mean `(N,)` of the latents.
        v: variance `(N,)` of the latents.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import ExpectedLikelihood
        >>> expected = ExpectedLikelihood(lambda f: dist.Normal(f, 2.0), jnp.zeros(3), jnp.ones(3))
        >>> expected.log_prob(jnp.zeros(3)).shape
        (3,)
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("m", "v")
    pytree_aux_fields = ("likelihood",)

    def __init__(
        self,
        likelihood: Callable[[jax.Array], dist.Distribution],
        m: ArrayLike,
        v: ArrayLike,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(likelihood) or isinstance(likelihood, dist.Distribution):
            raise TypeError(
                f"likelihood takes a function of f, lambda f: dist.Normal(f, 0.1) say; got "
                f"{likelihood!r}."
            )
        if jnp.shape(m) != jnp.shape(v):
            raise ValueError(f"m has shape {jnp.shape(m)}, and v has {jnp.shape(v)}.")
        self.likelihood, self.m, self.v = likelihood, jnp.asarray(m), jnp.asarray(v)
        given = likelihood(self.m)
        if given.event_shape or given.batch_shape != self.m.shape:
            raise ValueError(
                f"likelihood(f) must be one number for each f {self.m.shape}: its batch shape is "
                f"{given.batch_shape}, its event shape {given.event_shape}."
            )
        super().__init__(given.batch_shape, (), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Support of the values."""
        return self.likelihood(self.m).support

    @property
    def mean(self) -> jax.Array:
        """Mean of the values."""
        return self._expect(lambda f: self.likelihood(f).mean)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw latents, then values."""
        key_f, key_y = jax.random.split(key)
        noise = jax.random.normal(key_f, (*sample_shape, *self.m.shape), self.m.dtype)
        m, sd = (jnp.broadcast_to(a, noise.shape) for a in (self.m, jnp.sqrt(self.v)))
        return self.likelihood(m + sd * noise).sample(key_y)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the mean log density of values of the batch shape."""
        given = self.likelihood(self.m)
        if isinstance(given, dist.Normal) and self._is_normal_around_f():
            return given.log_prob(value) - 0.5 * self.v / given.scale**2
        return self._expect(lambda f: self.likelihood(f).log_prob(value))

    def _expect(self, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Take the mean over the latents by Gauss-Hermite quadrature of 20 points."""
        points, weights = np.polynomial.hermite_e.hermegauss(20)
        weights = weights / weights.sum()
        tiny = jnp.finfo(self.v.dtype).tiny  # the root has a slope everywhere
        sd = jnp.sqrt(jnp.maximum(self.v, tiny))
        pairs = zip(points.tolist(), weights.tolist(), strict=True)
        terms = [w * fn(self.m + x * sd) for x, w in pairs]
        return sum(terms[1:], terms[0])

    def _is_normal_around_f(self) -> bool:
        """Say whether the location is f itself, and the scale does not depend on it."""

        def parts(f: jax.Array) -> tuple[jax.Array, jax.Array]:
            given = self.likelihood(f)
            return given.loc, given.scale  # type: ignore[attr-defined]

        jaxpr = jax.make_jaxpr(parts)(self.m).jaxpr
        reached = set(jaxpr.invars)
        for eqn in jaxpr.eqns:
            if any(var in reached for var in eqn.invars if not hasattr(var, "val")):
                reached.update(eqn.outvars)
        loc, scale = jaxpr.outvars
        return loc is jaxpr.invars[0] and (hasattr(scale, "val") or scale not in reached)


class CollapsedSparseGP(Process):
    """Observations of a process with normal noise through inducing points, as Titsias' bound.

    `log_prob(y)` is the bound of Titsias (2009): the best there is over all distributions of the
    inducing values. As one observed site it goes with any inference for the hyperparameters.

    Args:
        kernel: a kernel.
        X: inputs `(N, D)` or `(N,)`.
        Z: inducing points `(M, D)` or `(M,)`.
        noise: variance, positive, one number or `(N,)`.
        mean_fn: a number, or a function of the inputs.
        jitter: what is added to the inducing points' diagonal.

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
        self.Z = as_inputs(Z, "Z")
        if self.Z.shape[1] != self.X.shape[1]:
            raise ValueError(f"X has {self.X.shape[1]} columns, and Z has {self.Z.shape[1]}.")
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
        trace = (self.kernel.diagonal(self.X) / self.variances).sum() - (A**2).sum()
        constant = (
            0.5 * jnp.log(2.0 * jnp.pi * self.variances).sum()
            + jnp.log(jnp.diagonal(LB)).sum()
            + 0.5 * trace
        )
        squares = (scaled**2).sum(axis=1) - (c**2).sum(axis=0)
        return (-0.5 * squares - constant).reshape(value.shape[:-1])

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw inducing values, then values of independent errors around what they say."""
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
        """Mask copies; the bound has no part for each observation."""
        if jnp.shape(mask) == self.event_shape:
            raise ValueError(
                "CollapsedSparseGP takes no mask of its observations: leave rows out of X and y."
            )
        return super().mask(mask)

    def optimal(self, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return mean `(M,)` and covariance factor `(M, M)` of the best inducing values."""
        L, A, LB = self._factors()
        scaled = (self._checked(values) - self.mean) / jnp.sqrt(self.variances)
        white = cho_solve((LB, True), jnp.matmul(A, scaled, precision=EXACT))
        mean = self.inducing.mean + jnp.matmul(L, white, precision=EXACT)
        return mean, solve_triangular(LB, L.T, lower=True).T

    def predict(
        self, values: ArrayLike, X_new: ArrayLike, full_cov: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Return moments of the function, without noise, under the best inducing values."""
        X_new = as_inputs(X_new, "X_new")
        L, A, LB = self._factors()
        check_factor(LB)
        scaled = (self._checked(values) - self.mean) / jnp.sqrt(self.variances)
        P = solve_triangular(L, self.kernel.matrix(self.Z, X_new), lower=True)
        Q = solve_triangular(LB, P, lower=True)
        c = solve_triangular(LB, jnp.matmul(A, scaled, precision=EXACT), lower=True)
        mean = mean_at(self.mean_fn, X_new) + jnp.matmul(Q.T, c, precision=EXACT)
        if full_cov:
            inner = jnp.matmul(P.T, P, precision=EXACT) - jnp.matmul(Q.T, Q, precision=EXACT)
            return mean, self.kernel.matrix(X_new, X_new) - inner
        left = self.kernel.diagonal(X_new) - (P**2).sum(axis=0) + (Q**2).sum(axis=0)
        return mean, jnp.maximum(left, 0.0)

    def draw_paths(
        self, rng_key: jax.Array, values: ArrayLike, *, num_paths: int = 1, **options: Any
    ) -> Paths:
        """Draw functions through inducing values drawn from the best distribution of these."""
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
        paths = self.inducing.draw_paths(key_paths, u, num_paths=num_paths, **options)
        return replace(paths, noise=jnp.asarray(self.noise))  # of later observations


def choose_inducing(
    X: ArrayLike,
    num_points: int,
    *,
    kernel: Kernel | None = None,
    rng_key: jax.Array | None = None,
) -> jax.Array:
    """Choose inducing points `(num_points, D)`.

    With a kernel, the inputs where most of its variance is left, one after the other (Burt et al.,
    2020); without, the centres that k-means finds.

    Raises:
        ValueError: if there are more points than distinct inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, choose_inducing
        >>> choose_inducing(jnp.linspace(0.0, 1.0, 50), 5, kernel=RBF(lengthscale=0.2)).shape
        (5, 1)
    """
    check_count("num_points", num_points)
    X = as_inputs(X)
    distinct = len(np.unique(np.asarray(X), axis=0))
    if num_points > distinct:
        raise ValueError(f"num_points={num_points}, and there are {distinct} distinct inputs.")
    if kernel is not None:
        return X[pivoted_cholesky(kernel, X, num_points)[1]]
    from scipy.cluster.vq import kmeans2

    key = jax.random.key(0) if rng_key is None else rng_key
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max, jnp.int32))
    spread = np.asarray(X).std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    centres, _ = kmeans2(np.asarray(X) / spread, num_points, minit="++", rng=seed, missing="raise")
    return jnp.asarray(centres * spread, X.dtype)
