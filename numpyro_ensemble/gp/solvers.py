"""Solves with a kernel matrix plus a diagonal: by Cholesky, or by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jax.scipy.sparse.linalg import cg

from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.kernels import Kernel

RANK = 100  # rank of the preconditioner
_ENTRIES = 1 << 22  # entries of the kernel matrix in memory at once

_REFINEMENTS = 2  # refinement steps of a solve in single precision
_LEFT_OVER = 1.0  # largest residual, in standard deviations of noise and jitter

SOLVERS = ("cholesky", "cg")


class Solution(NamedTuple):
    """Solutions, and their accuracy.

    Attributes:
        values: one row for each right-hand side.
        residuals: the norm of each residual, relative to that of its right-hand side; NaN where it
            is not computed, since that would take a tenth of the time.
        ok: whether each solve is accurate enough.
    """

    values: jax.Array
    residuals: jax.Array
    ok: jax.Array


def why_unfactored(dtype: Any) -> str:
    """Return the likely causes of a failed Cholesky factorisation of a kernel matrix."""
    return (
        f"inputs that repeat or nearly so, hyperparameters that are no numbers, or too little "
        f"noise or jitter for {dtype}."
    )


def default_jitter(kernel: Kernel, X: jax.Array) -> jax.Array:
    """Return the jitter that is added to a kernel matrix's diagonal so that it can be factored.

    The rounding error of a matrix of N rows is of this size. The jitter is one number, or one for
    each row if the rows have different units (values and slopes).
    """
    variance = kernel.typical_variance(X)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (variance.dtype, X.dtype))
    return 4 * len(X) * eps * variance


def covariance(
    kernel: Kernel, X: jax.Array, diagonal: jax.Array, observed: jax.Array | None
) -> jax.Array:
    """Return `K + diag`; rows and columns of unobserved values are those of the identity."""
    K = kernel.matrix(X, X) + jnp.diag(diagonal)
    if observed is None:
        return K
    both = observed[:, None] & observed[None, :]
    return jnp.where(both, K, jnp.eye(len(X), dtype=K.dtype))


def solve(
    kernel: Kernel,
    X: jax.Array,
    diagonal: jax.Array,
    observed: jax.Array | None,
    rhs: jax.Array,
    solver: str,
    tolerance: float | jax.Array | None,
    whitened: jax.Array | None = None,
) -> Solution:
    """Solve `(K + diag) x = b` for each row b of `rhs`, which is 0 where nothing is observed.

    If `whitened` `(M, M)` is given, it is the whitened covariance of the values at the first M
    inputs. Otherwise all values are known, up to the variances of the diagonal.
    """
    if whitened is not None and len(X) > len(whitened):
        return _after_inducing(kernel, X, diagonal, rhs, whitened)
    if solver == "cholesky":
        return _by_factor(kernel, X, diagonal, observed, rhs)
    return _conjugate_gradients(kernel, X, diagonal, observed, rhs, tolerance)


def _by_factor(
    kernel: Kernel,
    X: jax.Array,
    diagonal: jax.Array,
    observed: jax.Array | None,
    rhs: jax.Array,
) -> Solution:
    """Solve by Cholesky; refine in single precision, where errors are comparable to the jitter."""
    factor = cho_factor(covariance(kernel, X, diagonal, observed), lower=True)
    values = cho_solve(factor, rhs.T).T
    if rhs.dtype == jnp.float64:
        ok = jnp.isfinite(values).all(axis=1)
        return Solution(values, jnp.full_like(rhs[:, 0], jnp.nan), ok)
    product, total = _product(kernel, X, diagonal, observed)
    for _ in range(_REFINEMENTS):
        values = values + cho_solve(factor, rhs.T - product(values.T)).T
    left = rhs - product(values.T).T
    # the residual must be small compared with the standard deviation of noise and jitter
    ok = (left**2).mean(axis=1) <= (_LEFT_OVER**2) * total.mean()
    return Solution(values, _relative(left, rhs), ok)


def _after_inducing(
    kernel: Kernel, X: jax.Array, diagonal: jax.Array, rhs: jax.Array, whitened: jax.Array
) -> Solution:
    """Solve for the inducing values first, then for the data given the inducing values.

    Let `L L'` be the prior covariance of the inducing values, `L W L'` their posterior covariance,
    and `P = L^-1 k(Z, X)`. Before the data, functions have the covariance `k - P' (I - W) P`.
    """
    M = len(whitened)
    Z, X = X[:M], X[M:]
    first = _by_factor(kernel, Z, diagonal[:M], None, rhs[:, :M])
    L = jnp.linalg.cholesky(covariance(kernel, Z, diagonal[:M], None))
    cross = kernel.matrix(Z, X)
    P = solve_triangular(L, cross, lower=True)
    known = P - jnp.matmul(whitened, P, precision=EXACT)
    C = covariance(kernel, X, diagonal[M:], None) - jnp.matmul(P.T, known, precision=EXACT)
    b = rhs[:, M:] - jnp.matmul(first.values, cross, precision=EXACT)
    values = cho_solve(cho_factor(C, lower=True), b.T).T
    residuals = _relative(b - jnp.matmul(values, C, precision=EXACT), b)
    moved = jnp.matmul(values, known.T, precision=EXACT)
    at_inducing = first.values - solve_triangular(L, moved.T, lower=True, trans=1).T
    return Solution(
        jnp.concatenate([at_inducing, values], axis=1),
        jnp.maximum(first.residuals, residuals),
        first.ok & jnp.isfinite(values).all(axis=1),
    )


def _relative(left: jax.Array, rhs: jax.Array) -> jax.Array:
    scale = jnp.maximum(jnp.linalg.norm(rhs, axis=1), jnp.finfo(rhs.dtype).tiny)
    return jnp.linalg.norm(left, axis=1) / scale


def _product(
    kernel: Kernel, X: jax.Array, diagonal: jax.Array, observed: jax.Array | None
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Return the product of `covariance` with columns, in bounded memory, and its diagonal part."""
    if observed is None:
        seen = jnp.ones(len(X), diagonal.dtype)
    else:
        seen, diagonal = observed.astype(diagonal.dtype), jnp.where(observed, diagonal, 1.0)

    def product(v: jax.Array) -> jax.Array:
        alike = (slice(None), *(None,) * (v.ndim - 1))
        return seen[alike] * times(kernel, X, X, seen[alike] * v) + diagonal[alike] * v

    return product, diagonal


def _conjugate_gradients(
    kernel: Kernel,
    X: jax.Array,
    diagonal: jax.Array,
    observed: jax.Array | None,
    rhs: jax.Array,
    tolerance: float | jax.Array | None,
) -> Solution:
    if tolerance is None:
        tolerance = float(jnp.finfo(rhs.dtype).eps) ** 0.5
    seen = jnp.ones(len(X), rhs.dtype) if observed is None else observed.astype(rhs.dtype)
    product, diagonal = _product(kernel, X, diagonal, observed)
    precondition = _preconditioner(kernel, X, diagonal, seen)
    run = partial(cg, product, tol=tolerance, maxiter=min(1000, 2 * len(X)), M=precondition)
    values = jax.vmap(lambda b: run(b)[0])(rhs)
    residuals = _relative(rhs - jax.vmap(product)(values), rhs)
    # the true residual differs from that of the recurrence by rounding
    return Solution(values, residuals, residuals <= 10 * tolerance)


def times(kernel: Kernel, X1: jax.Array, X2: jax.Array, v: jax.Array) -> jax.Array:
    """Multiply `kernel(X1, X2)` with a vector, a block of rows at a time."""
    return by_rows(
        lambda rows: jnp.matmul(kernel.matrix(rows, X2), v, precision=EXACT), X1, len(X2)
    )


def by_rows(fn, X: jax.Array, width: int):  # type: ignore[no-untyped-def]
    """Apply `fn` to blocks of rows of X whose results, `width` wide, are held one at a time."""
    rows = max(1, _ENTRIES // max(width, 1))
    if len(X) <= rows:
        return fn(X)
    blocks = -(-len(X) // rows)
    rows = -(-len(X) // blocks)
    filled = jnp.concatenate([X, jnp.repeat(X[-1:], blocks * rows - len(X), axis=0)])
    results = jax.lax.map(fn, filled.reshape(blocks, rows, *X.shape[1:]))
    return results.reshape(blocks * rows, *results.shape[2:])[: len(X)]


def _preconditioner(kernel: Kernel, X: jax.Array, diagonal: jax.Array, seen: jax.Array):  # type: ignore[no-untyped-def]
    """Return `v -> (L L' + diag)^-1 v`, where L has low rank, by greedy pivots.

    The inverse is `D^-1/2 (I - Q Q') D^-1/2`, with Q the upper part of the QR factor of the scaled
    L stacked on I.
    """
    L = seen[:, None] * pivoted_cholesky(kernel, X, min(RANK, len(X)), seen)[0]
    root = jnp.sqrt(diagonal)
    both = jnp.concatenate([L / root[:, None], jnp.eye(L.shape[1], dtype=L.dtype)])
    Q = jnp.linalg.qr(both)[0][: len(L)]

    def apply(v: jax.Array) -> jax.Array:
        w = v / root
        inside = jnp.matmul(Q.T, w, precision=EXACT)
        return (w - jnp.matmul(Q, inside, precision=EXACT)) / root

    return apply


def pivoted_cholesky(
    kernel: Kernel, X: jax.Array, rank: int, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return a factor `(N, rank)` of the kernel matrix, and the rows that are its pivots.

    Each pivot is the row with the largest remaining variance, in the row's own unit. The pivots are
    a greedy choice of inducing points.
    """
    variance = kernel.diagonal(X)
    unit = kernel.typical_variance(X)  # one for each row with Derivatives
    unit = jnp.where(unit > 0, unit, 1.0) if unit.ndim else jnp.ones_like(variance)
    variance = variance if seen is None else jnp.where(seen > 0, variance, -1.0)
    smallest = jnp.finfo(variance.dtype).eps * (variance / unit).max()

    def step(i: jax.Array, state: tuple) -> tuple:
        L, left, pivots = state
        pivot = jnp.argmax(left / unit)
        floor = smallest * unit[pivot]
        row = kernel.matrix(X[pivot][None], X)[0] - jnp.matmul(L, L[pivot], precision=EXACT)
        column = jnp.where(left[pivot] > floor, row / jnp.sqrt(jnp.maximum(left[pivot], floor)), 0)
        # rows that were taken, or must not be, stay below zero: they are not chosen
        left = jnp.where(left < 0, left, jnp.maximum(left - column**2, 0.0)).at[pivot].set(-1.0)
        return L.at[:, i].set(column), left, pivots.at[i].set(pivot)

    start = (jnp.zeros((len(X), rank), variance.dtype), variance, jnp.zeros(rank, int))
    L, _, pivots = jax.lax.fori_loop(0, rank, step, start)
    return L, pivots
