"""Likelihoods averaged over normal latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_ensemble.calls.arguments import has_tracers

_MOST_PRODUCTS = 640  # largest number of Gauss-Hermite points over all dimensions
_NUM_SOBOL = 1024
_MOST_NUMBERS = 2**20  # largest number of latent values computed at once


def _checked_variance(v: ArrayLike) -> jax.Array:
    """Return variances, of which negative ones are an error, or NaN if they are traced.

    Values that are negative by rounding become 0.
    """
    v = jnp.asarray(v)
    rounding = jnp.sqrt(jnp.finfo(jnp.result_type(v, float)).eps) * jnp.abs(v).max(initial=0.0)
    negative = v < -rounding
    if not has_tracers(negative) and negative.any():
        raise ValueError(
            f"v, the variance of the latents, has {int(negative.sum())} negative values: write "
            f"ExpectedLikelihood(likelihood, mean, variance)."
        )
    return jnp.where(negative, jnp.nan, jnp.where(v < 0, 0, v))


class ExpectedLikelihood(dist.Distribution):
    """The expected log likelihood of values over normal latents.

    `log_prob(y)` is `E log p(y | f)` for normal f: in closed form if the likelihood is normal
    around f itself, else by quadrature. Sampling draws f, then y.

    Args:
        likelihood: a function of f that returns a distribution of f's shape; with several latents
            for each value, f is `(L, N)` and the distribution `(N,)`.
        m: mean `(N,)` of the latents, or `(L, N)`.
        v: variance of the latents, of the same shape; the L latents of a value are independent.

    For one to four latents, Gauss-Hermite quadrature has errors of at most 3e-4 for likelihoods
    like softmax. For more latents, 1,024 points of a Sobol sequence have errors of 1e-3, and of
    some percent for `exp` of the latents' sum.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import ExpectedLikelihood
        >>> expected = ExpectedLikelihood(lambda f: dist.Normal(f, 2.0), jnp.zeros(3), jnp.ones(3))
        >>> expected.log_prob(jnp.zeros(3)).shape
        (3,)
        >>> m, v = jnp.zeros((2, 3)), jnp.ones((2, 3))  # a location and a log scale
        >>> expected = ExpectedLikelihood(lambda f: dist.Normal(f[0], jnp.exp(f[1])), m, v)
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
        self.likelihood, self.m, self.v = likelihood, jnp.asarray(m), _checked_variance(v)
        given = likelihood(self.m)
        several = self.m.ndim > 1 and given.batch_shape == self.m.shape[1:]
        several = several and not self._takes_rows()
        if not several and (given.event_shape or given.batch_shape != self.m.shape):
            of_many = f", or {self.m.shape[1:]} with {len(self.m)} latents for each value"
            raise ValueError(
                f"likelihood(f) must have batch shape {self.m.shape}, one number for each f"
                f"{of_many if self.m.ndim > 1 else ''}: its batch shape is {given.batch_shape}, "
                f"its event shape {given.event_shape}. The latents of a value stand on the first "
                f"axis of f, so that a softmax has logits=f.T."
            )
        super().__init__(given.batch_shape, given.event_shape, validate_args=validate_args)

    def _takes_rows(self) -> bool:
        """Return whether the likelihood takes the first axis of f for the axis of the values.

        With as many latents as values, the likelihood is traced for one more value. Its batch shape
        then shows which axis it uses.
        """
        if self.m.shape[0] != self.m.shape[-1]:
            return False
        wider = (*self.m.shape[:-1], self.m.shape[-1] + 1)
        shapes: list[tuple[int, ...]] = []

        def look(f: jax.Array) -> None:
            shapes.append(self.likelihood(f).batch_shape)

        try:
            jax.eval_shape(look, jax.ShapeDtypeStruct(wider, self.m.dtype))
        except (TypeError, ValueError):
            return False
        return shapes != [wider[1:]]

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

        def one(key: jax.Array) -> jax.Array:
            key_f, key_y = jax.random.split(key)
            noise = jax.random.normal(key_f, self.m.shape, self.m.dtype)
            return self.likelihood(self.m + jnp.sqrt(self.v) * noise).sample(key_y)

        if not sample_shape:
            return one(key)
        draws = jax.vmap(one)(jax.random.split(key, int(np.prod(sample_shape))))
        return draws.reshape(*sample_shape, *draws.shape[1:])

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the expected log density of values of the batch shape."""
        given = self.likelihood(self.m)
        if isinstance(given, dist.Normal) and self._is_normal_around_f():
            return given.log_prob(value) - 0.5 * self.v / given.scale**2
        return self._expect(lambda f: self.likelihood(f).log_prob(value))

    def _expect(self, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Take the mean over the latents of each value by quadrature."""
        tiny = jnp.finfo(self.v.dtype).tiny  # at 0 the gradient of sqrt is infinite
        sd = jnp.sqrt(jnp.maximum(self.v, tiny))
        if self.m.shape == self.batch_shape:
            points, weights = quadrature(1)
            pairs = zip(points[:, 0].tolist(), weights.tolist(), strict=True)
            terms = [w * fn(self.m + x * sd) for x, w in pairs]
            return sum(terms[1:], terms[0])
        points, weights = quadrature(len(self.m))
        rule = jnp.asarray(points, sd.dtype), jnp.asarray(weights, sd.dtype)

        def term(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            point, weight = pair
            return weight * fn(self.m + point.reshape(-1, *[1] * (sd.ndim - 1)) * sd)

        at_once = max(1, _MOST_NUMBERS // max(self.m.size, 1))
        if at_once >= len(rule[1]):
            return jax.vmap(term)(rule).sum(axis=0)
        return jax.lax.map(jax.checkpoint(term), rule, batch_size=at_once).sum(axis=0)

    def _is_normal_around_f(self) -> bool:
        """Return whether the location is f itself, and the scale does not depend on f."""

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


@lru_cache
def quadrature(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points `(P, dim)` and weights `(P,)` for means over independent standard normals.

    Gauss-Hermite points: 20 in one dimension, and for each dimension 12 in two, 8 in three and 5 in
    four. In more dimensions, a Sobol sequence and its mirror image.
    """
    each = 20 if dim == 1 else min(12, int(_MOST_PRODUCTS ** (1.0 / dim) + 1e-9))
    if each >= 5:
        points, weights = np.polynomial.hermite_e.hermegauss(each)
        grid = np.array(list(product(points, repeat=dim)))
        return grid, np.prod(list(product(weights / weights.sum(), repeat=dim)), axis=1)
    from scipy.stats import norm, qmc

    half = norm.ppf(qmc.Sobol(dim, rng=0).random(_NUM_SOBOL // 2))
    half = half / np.sqrt((half**2).mean(axis=0))[None, :]
    return np.concatenate([half, -half]), np.full(_NUM_SOBOL, 1.0 / _NUM_SOBOL)
