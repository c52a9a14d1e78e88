"""Inducing points: checks of given points, and the choice of points."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.util import is_prng_key

from numpyro_ensemble.gp.draw_paths import check_kernel
from numpyro_ensemble.gp.inputs import as_inputs
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.solvers import pivoted_cholesky
from numpyro_ensemble.handlers import check_count, key_of


def as_inducing(kernel: Kernel, X: jax.Array, Z: ArrayLike) -> jax.Array:
    """Return inducing points as a matrix `(M, D)`.

    Raises:
        ValueError: if Z and X differ in their number of columns, or Z has numbers of outputs that
            do not exist.
    """
    points = as_inputs(Z, "Z")
    if X.shape[1] != points.shape[1]:
        raise ValueError(f"X has {X.shape[1]} columns, and Z has {points.shape[1]}.")
    try:
        kernel.check_inputs(points)
    except ValueError as error:
        raise ValueError(
            f"Z: {error} Centres of k-means average such a column, unless choose_inducing(..., "
            f"numbered=) names it."
        ) from None
    return points


def choose_inducing(
    rng_key: jax.Array | None,
    X: ArrayLike,
    num_points: int,
    *,
    kernel: Kernel | None = None,
    numbered: int | Sequence[int] | None = None,
) -> jax.Array:
    """Choose inducing points `(num_points, D)`.

    With a kernel, each point is the input with the largest variance given the points before it
    (Burt et al., 2020). Without a kernel, the points are the centres that k-means finds.

    Args:
        rng_key: one key for the start of k-means; None with a kernel, where nothing is random.
        X: inputs `(N, D)` or `(N,)`.
        num_points: how many points to choose.
        kernel: a kernel.
        numbered: columns that hold numbers of outputs or categories, which are not averaged: -1
            for inputs of `numbered_inputs`. Each number has centres in proportion to its inputs,
            and at least one.

    Raises:
        ValueError: if there are more points than distinct inputs, fewer points than numbers, or no
            key for k-means.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, choose_inducing, numbered_inputs
        >>> choose_inducing(None, jnp.linspace(0.0, 1.0, 50), 5, kernel=RBF(lengthscale=0.2)).shape
        (5, 1)
        >>> X = numbered_inputs(jnp.linspace(0.0, 1.0, 40), jnp.linspace(0.0, 1.0, 20))
        >>> choose_inducing(jax.random.key(0), X, 6, numbered=-1)[:, 1].tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    rng_key = key_of(rng_key)
    if not (is_prng_key(rng_key) or (rng_key is None and kernel is not None)):
        raise ValueError(
            f"choose_inducing(rng_key, X, num_points) takes one key first, jax.random.key(0) say, "
            f"or None with a kernel; got {rng_key!r}."
        )
    check_count("num_points", num_points)
    X = as_inputs(X)
    distinct = len(np.unique(np.asarray(X), axis=0))
    if num_points > distinct:
        raise ValueError(f"num_points={num_points}, and there are {distinct} distinct inputs.")
    if kernel is not None:
        if numbered is not None:
            raise ValueError("numbered is for k-means: with a kernel, the points are inputs.")
        check_kernel(kernel, None)
        kernel.check_inputs(X)
        return X[pivoted_cholesky(kernel, X, num_points)[1]]
    highest = np.iinfo(np.int32).max
    seed = int(jax.random.randint(rng_key, (), 0, highest, jnp.int32))  # type: ignore[arg-type]
    columns = _numbered_columns(numbered, np.asarray(X))
    return jnp.asarray(_centres(np.asarray(X), num_points, columns, seed), X.dtype)


def _numbered_columns(numbered: int | Sequence[int] | None, X: np.ndarray) -> np.ndarray:
    """Return which columns hold numbers, `(D,)`.

    Raises:
        ValueError: for columns that do not exist, for entries that are not whole numbers, or if no
            other column is left.
    """
    columns = np.zeros(X.shape[1], bool)
    if numbered is None:
        return columns
    places = tuple(map(int, np.atleast_1d(numbered)))
    if any(not -len(columns) <= place < len(columns) for place in places):
        raise ValueError(f"numbered={places}, and the inputs have {len(columns)} columns.")
    columns[list(places)] = True
    if columns.all():
        raise ValueError(f"numbered={places} leaves no column to choose points in.")
    for column in np.flatnonzero(columns):
        wrong = np.flatnonzero(X[:, column] != np.round(X[:, column]))
        if len(wrong):
            raise ValueError(
                f"numbered names columns of whole numbers; column {column} has "
                f"{X[wrong[0], column]} in row {wrong[0]}."
            )
    return columns


def _centres(X: np.ndarray, num_points: int, numbered: np.ndarray, seed: int) -> np.ndarray:
    """Run k-means on the inputs of each number; return the centres in order of the numbers."""
    from scipy.cluster.vq import kmeans2

    kinds, kind = np.unique(X[:, numbered], axis=0, return_inverse=True)
    if num_points < len(kinds):
        raise ValueError(
            f"num_points={num_points}, and columns {tuple(map(int, np.flatnonzero(numbered)))} "
            f"hold {len(kinds)} different numbers, each of which takes at least one point."
        )
    sets = [X[kind.ravel() == i][:, ~numbered] for i in range(len(kinds))]
    spread = X[:, ~numbered].std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    rng, points = np.random.default_rng(seed), []
    for numbers, places, count in zip(kinds, sets, _shares(sets, num_points), strict=True):
        centres, _ = kmeans2(places / spread, count, minit="++", rng=rng, missing="raise")
        chosen = np.empty((count, X.shape[1]))
        chosen[:, numbered], chosen[:, ~numbered] = numbers, centres * spread
        points.append(chosen)
    return np.concatenate(points)


def _shares(sets: list[np.ndarray], total: int) -> np.ndarray:
    """Return how many points each set of inputs has: at least one, in proportion to its rows.

    No set has more points than distinct rows. Webster's rule: the next point goes to the set with
    the most rows for each of its points.
    """
    rows = np.array([len(places) for places in sets])
    most = np.array([len(np.unique(places, axis=0)) for places in sets])
    counts = np.ones(len(sets), int)
    for _ in range(total - len(sets)):
        counts[np.argmax(np.where(counts < most, rows / (counts + 0.5), 0.0))] += 1
    return counts
