"""Multi-path Pathfinder: draws of all paths, weighted as draws of their mixture, and refits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.util import psis_weights
from jax import lax
from jax.scipy.special import gammaln

from numpyro_ensemble.mapping import map_draws, platform_of
from numpyro_ensemble.mcmc.paths import (
    Normal,
    Paths,
    best_normal,
    draw,
    inverse_of,
    log_density_of,
    search,
)
from numpyro_ensemble.results import LEAST_DRAWS, SAME_RATIOS

_FREEDOM = 5  # degrees of freedom of the refits: heavier tails than most posteriors have
_DRAWS_PER_DIMENSION = 10  # with fewer draws a refit's covariance is noise
_LEAST_PART = 0.1  # effective draws per dimension: with fewer there is no further refit
_ENOUGH = 0.5  # with this part of one round's draws effective, no further round is made


class Settings(NamedTuple):
    """Settings of the search for paths and of the draws. A compiled program depends on them."""

    history: int = 6
    num_elbo_draws: int = 10
    max_steps: int = 200
    num_refits: int = 4


class Pool(NamedTuple):
    """Draws from the mixture of all approximations.

    Attributes:
        points: `(N, D)`.
        log_weights: `(N,)`, importance weights smoothed by PSIS, which add up to 1.
        pareto_k: shape parameter of the tail of the importance ratios.
        path: `(N,)`, the number of each draw's path, -1 for draws of refits.
    """

    points: jax.Array
    log_weights: jax.Array
    pareto_k: jax.Array
    path: jax.Array


class _Refit(NamedTuple):
    """A multivariate t distribution: its location, and the Cholesky factor of its scale."""

    mean: jax.Array
    root: jax.Array


def pathfind(
    log_density: Callable, key: jax.Array, starts: jax.Array, num_draws: int, settings: Settings
) -> tuple[Paths, Normal, Pool]:
    """Return the paths from starts `(P, D)`, the best approximation on each, and draws.

    Args:
        log_density: log density of one point `(D,)`.
        key: one key.
        starts: first points of the searches.
        num_draws: number of draws in each round. The first round draws from the paths, and each
            refit makes one more.
        settings: settings of searches and draws.
    """
    paths = search(log_density, starts, settings.history, settings.max_steps)
    normal_key, pool_key = jax.random.split(key)
    best = partial(best_normal, log_density, history=settings.history)
    along = (paths.points, paths.gradients, paths.length)
    shape = (len(starts), settings.num_elbo_draws, starts.shape[1])
    noise = normal_numbers(normal_key, shape, paths.points.dtype)
    # one after the other on CPUs, where XLA can hang on many factorisations at once
    over = lax.map if platform_of() == "cpu" else lambda fn, xs: jax.vmap(fn)(xs)
    normals = over(lambda pair: best(*pair), (along, noise))
    return paths, normals, _pool(log_density, pool_key, normals, num_draws, settings.num_refits)


class _Rounds(NamedTuple):
    """Draws of T rounds: the first is from the paths, and rounds not yet made are empty."""

    points: jax.Array  # (T + 1, N, D)
    log_p: jax.Array  # (T, N)
    log_q: jax.Array  # (T + 1, T, N), log density of each round's distribution at all draws
    refits: _Refit  # (T + 1, ...), distribution of each round; that of the first is unused
    done: jax.Array  # number of rounds made
    effective: jax.Array  # number of effective draws of these rounds, by their weights

    def log_ratios(self) -> jax.Array:
        """Return log importance ratios `(T, N)`: the rounds so far are an equal mixture."""
        rounds = jnp.arange(len(self.log_p))
        there = jnp.append(rounds < self.done, False)[:, None, None]
        log_q = jax.nn.logsumexp(jnp.where(there, self.log_q, -jnp.inf), axis=0)
        ratios = self.log_p - log_q + jnp.log(self.done * 1.0)
        ratios = jnp.where(jnp.isfinite(ratios), ratios, jnp.finfo(ratios.dtype).min / 4)
        return jnp.where(rounds[:, None] < self.done, ratios, -jnp.inf)


def _no_rounds(first: jax.Array, num_rounds: int) -> _Rounds:
    """Return room for `num_rounds` rounds, with the draws `(N, D)` of the first one."""
    (total, size), dtype, room = first.shape, first.dtype, num_rounds + 1
    identity = jnp.tile(jnp.eye(size, dtype=dtype), (room, 1, 1))
    return _Rounds(
        jnp.zeros((room, total, size), dtype).at[0].set(first),
        jnp.zeros((num_rounds, total), dtype),
        jnp.zeros((room, num_rounds, total), dtype),
        _Refit(jnp.zeros((room, size), dtype), identity),
        jnp.asarray(0),
        jnp.zeros((), dtype),
    )


def _pool(
    log_density: Callable, key: jax.Array, normals: Normal, num_draws: int, num_refits: int
) -> Pool:
    """Draw from the approximations, and in further rounds from fits to the weighted draws.

    The draws of all rounds are weighted as draws of the equal mixture of all rounds (Cornuet et al.
    2012, "Adaptive multiple importance sampling").
    """
    num_paths, size = normals.mean.shape
    each = max(-(-num_draws // num_paths), -(-LEAST_DRAWS // num_paths))
    total, dtype = each * num_paths, normals.mean.dtype
    # paths with an approximation also make the draws of paths without one
    good = jnp.isfinite(normals.elbo)
    owner = jnp.argsort(~good, stable=True)[jnp.arange(num_paths) % jnp.maximum(good.sum(), 1)]
    taken = jax.tree.map(lambda leaf: leaf[owner], normals)
    num_rounds = 1 + (num_refits if total >= _DRAWS_PER_DIMENSION * size else 0)
    noise = normal_numbers(key, (num_rounds + 1, total, size + _FREEDOM), dtype)
    pairs = (taken, noise[0, :, :size].reshape(num_paths, each, size))
    first = lax.map(lambda pair: draw(*pair)[0], pairs).reshape(total, size)

    def of_paths(points: jax.Array) -> jax.Array:
        terms = lax.map(lambda normal: log_density_of(normal, points), taken)
        return jax.nn.logsumexp(terms, axis=0) - jnp.log(float(num_paths))

    def add_round(rounds: _Rounds) -> _Rounds:
        i, points, log_p, log_q, refits = (
            rounds.done, rounds.points, rounds.log_p, rounds.log_q, rounds.refits
        )  # fmt: skip
        log_p = log_p.at[i].set(map_draws(log_density, points[i]))
        here = lax.map(lambda refit: _log_density_of_refit(refit, points[i]), refits)
        log_q = log_q.at[:, i].set(here.at[0].set(of_paths(points[i])))
        rounds = rounds._replace(log_p=log_p, log_q=log_q, done=i + 1)
        refit, effective = _refitted(rounds)
        there = _log_density_of_refit(refit, points[:-1].reshape(-1, size)).reshape(log_p.shape)
        return rounds._replace(
            points=points.at[i + 1].set(_draw_refit(refit, noise[i + 1])),
            log_q=log_q.at[i + 1].set(there),
            refits=jax.tree.map(lambda x, new: x.at[i + 1].set(new), refits, refit),
            effective=effective,
        )

    def unfinished(rounds: _Rounds) -> jax.Array:
        # if a few draws hold all the weight, they cannot estimate a shape in D dimensions
        useful = (rounds.effective >= _LEAST_PART * size) & (rounds.effective < _ENOUGH * total)
        return (rounds.done < num_rounds) & ((rounds.done == 0) | useful)

    rounds = _no_rounds(first, num_rounds)
    rounds = lax.while_loop(unfinished, add_round, rounds)
    # rounds that were not made have no weight: the tail's length is that of one round's draws
    tail = min(int(3.0 * total**0.5), total // 5) + 0.5
    ratios = rounds.log_ratios().reshape(-1)
    log_weights, k = psis_weights(ratios, r_eff=len(ratios) * (3.0 / tail) ** 2)
    known = ratios > jnp.finfo(dtype).min / 8  # the others had no finite ratio
    spread = ratios.max() - jnp.nanmedian(jnp.where(known, ratios, jnp.nan))
    # if all ratios are equal there is no tail, and the approximation is the posterior
    k = jnp.where(jnp.isnan(k), jnp.where(spread < SAME_RATIOS, 0.0, jnp.inf), k)
    k = jnp.where(known.any(), k, jnp.inf)
    path = jnp.full(num_rounds * total, -1).at[:total].set(jnp.repeat(owner, each))
    return Pool(rounds.points[:-1].reshape(-1, size), log_weights, k, path)


def _refitted(rounds: _Rounds) -> tuple[_Refit, jax.Array]:
    """Return a t distribution with the mean and the covariance of the weighted draws.

    The weights are mixed with equal weights: the part of the former is ESS / (ESS + D). Before,
    weights are cut at their mean times the square root of the number of draws (Ionides 2008,
    "Truncated importance sampling").

    Returns:
        The distribution, and the number of effective draws (ESS).
    """
    size = rounds.points.shape[2]
    points, ratios = rounds.points[:-1].reshape(-1, size), rounds.log_ratios().reshape(-1)
    there = ratios > -jnp.inf
    weights = jnp.exp(ratios - ratios.max())
    weights = jnp.minimum(weights, weights.sum() / jnp.sqrt(there.sum()))
    weights = weights / weights.sum()
    effective = 1.0 / (weights**2).sum()
    part = effective / (effective + size)
    weights = part * weights + (1.0 - part) * there / there.sum()
    mean = weights @ points
    centred = points - mean[None]
    covariance = (weights[:, None] * centred).T @ centred
    # factored in units of the standard deviations, with a little added to the diagonal
    sd = jnp.sqrt(jnp.diagonal(covariance))
    near = 10 * size * jnp.finfo(points.dtype).eps
    unit = covariance / (sd[:, None] * sd[None, :]) + near * jnp.eye(size, dtype=points.dtype)
    root = jnp.linalg.cholesky(unit * ((_FREEDOM - 2) / _FREEDOM)) * sd[:, None]
    usable = jnp.isfinite(root).all() & (sd > 0).all()
    return _Refit(mean, root), jnp.where(usable, effective, 0.0)  # with 0 this is the last round


def _draw_refit(refit: _Refit, noise: jax.Array) -> jax.Array:
    """Turn standard normal numbers `(N, D + freedom)` into draws from a refit."""
    noise, rest = noise[:, :-_FREEDOM], noise[:, -_FREEDOM:]
    width = jnp.sqrt((rest**2).mean(axis=1, keepdims=True))
    return refit.mean[None] + (noise / width) @ refit.root.T


def _log_density_of_refit(refit: _Refit, points: jax.Array) -> jax.Array:
    scaled = (points - refit.mean[None]) @ inverse_of(refit.root).T
    size, half = len(refit.mean), 0.5 * (_FREEDOM + len(refit.mean))
    front = gammaln(half) - gammaln(0.5 * _FREEDOM) - 0.5 * size * jnp.log(_FREEDOM * jnp.pi)
    log_det = jnp.log(jnp.diag(refit.root)).sum()
    return front - log_det - half * jnp.log1p((scaled**2).sum(axis=1) / _FREEDOM)


def normal_numbers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return standard normal numbers, drawn as one axis: XLA compiles 0.4 s, for three axes 4 s."""
    return jax.random.normal(key, (prod(shape),), dtype).reshape(shape)


def choose(key: jax.Array, log_weights: jax.Array, number: int, *, replace: bool) -> jax.Array:
    """Choose draws by weight, and return their indices.

    Without replacement no draw is chosen twice: chains that start at draws must differ.
    """
    if replace:
        return jax.random.choice(key, len(log_weights), (number,), p=jnp.exp(log_weights))
    noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    return lax.top_k(jnp.maximum(log_weights, -1e30) + noise, number)[1]
