"""Moments and quantiles of functions over the mixture of all posterior draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from numpyro_ensemble.gp.sites import EvaluatePaths, Site


class Moments(NamedTuple):
    """Mean and variance of a function over all draws.

    The example of `gp.Pathwise` makes one.
    """

    mean: jax.Array
    variance: jax.Array


class JointMoments(NamedTuple):
    """Mean, variance and covariance of a function over all draws.

    The example of `gp.Pathwise` makes one.
    """

    mean: jax.Array
    variance: jax.Array
    covariance: jax.Array


class Conditional(NamedTuple):
    """Normal distribution of one process at the inputs of a call, given one posterior draw.

    Attributes:
        mean: `(*copies, N)`.
        spread: variance without noise, of the same shape, or covariance `(*copies, N, N)`.
        noise: variance of the noise, `(N,)`, or None for a process without noise.
    """

    mean: jax.Array
    spread: jax.Array
    noise: jax.Array | None


def conditionals(
    sites: dict[str, Site], run: Callable[[dict[str, Callable]], EvaluatePaths], joint: bool
) -> tuple[dict[str, Conditional], dict[str, jax.Array], EvaluatePaths]:
    """Return the distribution of each process at the inputs of a call, for one posterior draw.

    Args:
        sites: the processes of the fit, without their means.
        run: runs the model on functions in place of its processes.
        joint: whether to compute covariances instead of variances.

    Returns:
        The distributions by site name, whether the inputs of each process are independent of the
        other processes, and the handler after its run.
    """
    found: dict[str, tuple] = {}

    def answers(shift: Callable) -> EvaluatePaths:
        def conditional(name: str, X: jax.Array) -> jax.Array:
            site, shape = sites[name], (*sites[name].copies, len(X))
            predict = jax.vmap(lambda values: site.process.predict(values, X, full_cov=joint))
            mean, spread = predict(site.flat())
            mean = mean.reshape(shape)
            found[name] = mean, spread.reshape(*shape, len(X)) if joint else spread.reshape(shape)
            return shift(mean)

        return run({name: partial(conditional, name) for name in sites})

    answer = answers(lambda mean: mean)
    each = {
        name: Conditional(
            mean + jnp.broadcast_to(answer.means[name], mean.shape),
            spread,
            answer.noises.get(name),
        )
        for name, (mean, spread) in found.items()
    }
    # inputs that depend on other processes change with the values of these processes
    other = answers(lambda x: x + 3.0 * jax.random.normal(jax.random.key(1), x.shape))
    free = {name: (X == other.inputs[name]).all() for name, X in answer.inputs.items()}
    return each, free, answer


def named(each: dict[str, Conditional]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return mean and spread by the names of a call: `{name}` with noise, `{name}_f` without.

    The first axis is that of the posterior draws.
    """
    found = {}
    for name, (mean, spread, noise) in each.items():
        if noise is None:
            found[name] = mean, spread
            continue
        found[f"{name}_f"] = mean, spread
        added = noise.reshape(len(noise), *[1] * (mean.ndim - 2), noise.shape[-1])
        if spread.ndim > mean.ndim:
            added = jax.vmap(jnp.diag)(added.reshape(-1, added.shape[-1]))
            added = added.reshape(len(noise), *[1] * (mean.ndim - 2), *added.shape[1:])
        found[name] = mean, spread + added
    return found


def mixed_moments(mean: jax.Array, spread: jax.Array) -> Moments | JointMoments:
    """Return the moments of the equal mixture of normals, one for each posterior draw.

    `spread` holds the variance of each normal, or its covariance.
    """
    if spread.ndim == mean.ndim:
        return Moments(mean.mean(axis=0), spread.mean(axis=0) + mean.var(axis=0))
    left = mean - mean.mean(axis=0, keepdims=True)
    between = jnp.einsum("s...i,s...j->...ij", left, left) / len(mean)
    covariance = spread.mean(axis=0) + between
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    return JointMoments(mean.mean(axis=0), variance, covariance)


def mixed_quantiles(mean: jax.Array, variance: jax.Array, probabilities: np.ndarray) -> jax.Array:
    """Return quantiles of the equal mixture of normals, `(*probabilities.shape, ...)`.

    Bisection starts from the smallest and the largest of the normals' own quantiles.
    """
    tiny = jnp.finfo(variance.dtype).tiny
    sd = jnp.sqrt(jnp.maximum(variance, tiny))

    def one(probability: jax.Array) -> jax.Array:
        ends = mean + sd * norm.ppf(probability)

        def halve(_: Any, bracket: tuple) -> tuple:
            low, high = bracket
            middle = 0.5 * (low + high)
            below = norm.cdf((middle[None] - mean) / sd).mean(axis=0) < probability
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        halvings = jnp.finfo(mean.dtype).nmant + 3  # full precision for the widest bracket
        low, high = jax.lax.fori_loop(0, halvings, halve, (ends.min(axis=0), ends.max(axis=0)))
        return 0.5 * (low + high)

    flat = jax.lax.map(one, jnp.asarray(probabilities, mean.dtype).ravel())
    return flat.reshape(*probabilities.shape, *mean.shape[1:])
