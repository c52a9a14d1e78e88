"""Likelihoods averaged over normal latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints


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
