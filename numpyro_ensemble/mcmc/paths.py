"""Pathfinder: the paths of L-BFGS to the modes, and the best normal approximation on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.optimizers import lbfgs
from jax import lax
from jax.scipy.linalg import solve_triangular

from numpyro_ensemble.fit.minimisers import Minimiser, MinimiserState, default_minimiser

_TOLERANCE = 1e-4  # of a search: with 1e-6, paths are a third longer without better approximations


class PathState(NamedTuple):
    """A `MinimiserState` with loss and gradient at `point`, and the number of accepted points."""

    params: Any
    point: jax.Array
    solver: list[jax.Array]
    loss: jax.Array
    converged: jax.Array
    gradient: jax.Array
    accepted: jax.Array


class PathMinimiser(Minimiser):
    """An L-BFGS whose state holds the gradient at its point."""

    def _begin(self, params: Any) -> Any:
        begun = super()._begin(params)
        return PathState(*begun, jnp.zeros_like(begun.point), jnp.asarray(0))

    def noted(self, new: MinimiserState, solver: Any) -> Any:
        """Return the state after a step, with loss and gradient at the new point."""
        # the states of optimistix's quasi-Newton solvers have these fields
        found, accepted = solver.f_info, solver.num_accepted_steps
        new = new._replace(loss=found.f)
        return PathState(*new, found.grad, accepted.astype(jnp.asarray(0).dtype))


class Paths(NamedTuple):
    """The points that P searches have accepted.

    Attributes:
        points: `(P, L, D)`, of which the first `length` on each path are used.
        gradients: `(P, L, D)`, gradients of the negative log density.
        length: `(P,)`, the number of points.
        converged: `(P,)`, whether the search has met its criterion.
        log_density: `(P,)`, log density at the end.
    """

    points: jax.Array
    gradients: jax.Array
    length: jax.Array
    converged: jax.Array
    log_density: jax.Array


def search(log_density: Callable, starts: jax.Array, history: int, max_steps: int) -> Paths:
    """Minimise the negative log density from starts `(P, D)`, and return the paths.

    Args:
        log_density: log density of one point `(D,)`.
        starts: first points of the searches.
        history: number of steps from which L-BFGS estimates the curvature.
        max_steps: largest number of evaluations in each search.
    """
    optim = PathMinimiser(default_minimiser(_TOLERANCE, history))

    def loss(point: jax.Array) -> tuple[jax.Array, None]:
        return -log_density(point), None

    def step(state: Any) -> Any:
        new = optim.eval_and_update(loss, state)[1]
        return jax.tree.map(lambda a, b: jnp.where(state[1].converged, a, b), state, new)

    def body(carry: tuple) -> tuple:
        i, states, kept = carry
        new = jax.vmap(step)(states)
        now = new[1].point, new[1].gradient, new[1].accepted > states[1].accepted
        kept = jax.tree.map(lambda x, row: lax.dynamic_update_index_in_dim(x, row, i, 0), kept, now)
        return i + 1, new, kept

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[0] < max_steps) & ~carry[1][1].converged.all()

    states = jax.vmap(optim.init)(starts)
    rows = jnp.zeros((max_steps, *starts.shape), states[1].point.dtype)
    kept = rows, rows, jnp.zeros(rows.shape[:2], bool)
    _, states, kept = lax.while_loop(unfinished, body, (jnp.asarray(0), states, kept))
    points, gradients, accepted = (x.swapaxes(0, 1) for x in kept)
    order = jnp.argsort(~accepted, axis=1, stable=True)[..., None]
    points, gradients = (jnp.take_along_axis(x, order, axis=1) for x in (points, gradients))
    state = states[1]
    return Paths(points, gradients, state.accepted, state.converged, -state.loss)


class Normal(NamedTuple):
    """A normal approximation, whose covariance is `diag(alpha) + beta gamma beta'`.

    Attributes:
        elbo: its evidence lower bound, minus infinity if there is no approximation.
        place: index of its point on the path.
        mean: `(D,)`.
        alpha: `(D,)`.
        beta: `(D, 2 J)`.
        gamma: `(2 J, 2 J)`.
    """

    elbo: jax.Array
    place: jax.Array
    mean: jax.Array
    alpha: jax.Array
    beta: jax.Array
    gamma: jax.Array


class _Sweep(NamedTuple):
    """The state of the loop over the points of a path."""

    alpha: jax.Array
    steps: jax.Array  # (D, J), the last differences of points
    turns: jax.Array  # (D, J), the last differences of gradients
    best: Normal


def normal_at(
    point: jax.Array, gradient: jax.Array, alpha: jax.Array, steps: jax.Array, turns: jax.Array
) -> Normal:
    """Return the normal approximation at a point, without its evidence bound.

    Args:
        point: `(D,)`.
        gradient: `(D,)`, gradient of the negative log density.
        alpha: `(D,)`, the diagonal covariance that the differences then correct.
        steps: `(D, J)`, the last differences of points.
        turns: `(D, J)`, the last differences of gradients.
    """
    # BlackJAX adds the rounding unit to the products of steps and turns. Near a mode they are far
    # below it. So pairs are divided by their length, on which the covariance does not depend.
    products = (steps * turns).sum(axis=0, keepdims=True)
    length = jnp.where(products > 0, jnp.sqrt(jnp.where(products > 0, products, 1.0)), 1.0)
    beta, gamma = lbfgs.lbfgs_inverse_hessian_factors(steps / length, turns / length, alpha)
    mean = point - alpha * gradient - beta @ (gamma @ (beta.T @ gradient))
    none = jnp.asarray(-jnp.inf, point.dtype)
    return Normal(none, jnp.asarray(0), mean, alpha, beta, gamma)


def best_normal(
    log_density: Callable,
    path: tuple[jax.Array, jax.Array, jax.Array],
    noise: jax.Array,
    history: int,
) -> Normal:
    """Return the normal approximation along one path that has the highest evidence bound.

    Algorithm 1 of Zhang et al. (2022), "Pathfinder: Parallel quasi-Newton variational inference".

    Args:
        log_density: log density of one point `(D,)`.
        path: points `(L, D)`, gradients of the negative log density `(L, D)`, and their number.
        noise: `(M, D)` standard normal numbers for the M draws of each bound. All bounds use the
            same numbers, so bounds differ only as much as the approximations do.
        history: number of differences J from which an approximation is made.
    """
    points, gradients, length = path
    size, dtype = points.shape[1], points.dtype

    def push(window: jax.Array, new: jax.Array, fits: jax.Array) -> jax.Array:
        return jnp.where(fits, jnp.concatenate([window[:, 1:], new[:, None]], axis=1), window)

    def at(place: jax.Array, sweep: _Sweep) -> _Sweep:
        step = points[place] - points[place - 1]
        turn = gradients[place] - gradients[place - 1]
        alpha, fits = lbfgs.lbfgs_recover_alpha(sweep.alpha, step, turn)
        steps, turns = push(sweep.steps, step, fits[0]), push(sweep.turns, turn, fits[0])
        new = normal_at(points[place], gradients[place], alpha, steps, turns)
        draws, log_q = draw(new, noise)
        elbo = (jax.vmap(log_density)(draws) - log_q).mean()
        new = new._replace(elbo=jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf), place=place)
        better = new.elbo > sweep.best.elbo
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, sweep.best)
        return _Sweep(alpha, steps, turns, best)

    window, ones = jnp.zeros((size, history), dtype), jnp.ones(size, dtype)
    start = normal_at(points[0], jnp.zeros_like(points[0]), ones, window, window)
    start = start._replace(place=jnp.zeros_like(length))
    return lax.fori_loop(1, length, at, _Sweep(ones, window, window, start)).best


def triangle(normal: Normal) -> tuple[jax.Array, jax.Array]:
    """Return Q and L of an approximation: lines 1 and 2 of Algorithm 4 of Zhang et al. (2022).

    With `R = I + Q (L - I) Q'` and the root `r` of alpha, the covariance is `(r R) (r R)'`.
    """
    q, r = jnp.linalg.qr(normal.beta / jnp.sqrt(normal.alpha)[:, None])
    return q, jnp.linalg.cholesky(jnp.eye(r.shape[0], dtype=r.dtype) + r @ normal.gamma @ r.T)


def inverse_of(low: jax.Array) -> jax.Array:
    """Invert a lower triangle, since XLA's solves with many columns are slow on CPUs."""
    return solve_triangular(low, jnp.eye(len(low), dtype=low.dtype), lower=True)


def draw(normal: Normal, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn standard normal numbers `(N, D)` into draws, and return these with their log densities.

    These are lines 3 to 8 of Algorithm 4 of Zhang et al. (2022).
    """
    q, low = triangle(normal)
    inner = noise @ q
    bent = noise + (inner @ low.T - inner) @ q.T
    points = normal.mean[None] + jnp.sqrt(normal.alpha)[None] * bent
    return points, _standard(noise) - 0.5 * _log_det(normal, low)


def _standard(noise: jax.Array) -> jax.Array:
    return -0.5 * ((noise**2).sum(axis=1) + noise.shape[1] * jnp.log(2.0 * jnp.pi))


def _log_det(normal: Normal, low: jax.Array) -> jax.Array:
    return jnp.log(normal.alpha).sum() + 2.0 * jnp.log(jnp.diag(low)).sum()


def log_density_of(normal: Normal, points: jax.Array) -> jax.Array:
    """Return the log density of one approximation at points `(N, D)`."""
    q, low = triangle(normal)
    scaled = (points - normal.mean[None]) / jnp.sqrt(normal.alpha)[None]
    inner = scaled @ q
    noise = scaled + (inner @ inverse_of(low).T - inner) @ q.T
    return _standard(noise) - 0.5 * _log_det(normal, low)
