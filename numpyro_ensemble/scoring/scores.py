"""Scores of predictions: proper scores, calibration, and variances.

Each function takes draws `(S, N)` and observations `(N,)`, or ArviZ data with both. It returns the
mean over the observations, or with `pointwise=True` one value for each. Observations that the model
masks, and draws that are not finite, are left out. `weights` has one weight for each draw, `(S,)`,
or with ArviZ data one for each member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mapping import map_draws
from numpyro_ensemble.scoring.reading import (
    find_draws,
    is_array,
    observed,
    read,
    variable,
    without_failed,
)

LEVELS = (0.5, 0.8, 0.9, 0.95)


def rmse(draws: Any, y: ArrayLike | None = None, *, weights: Any = None, **where: Any) -> jax.Array:
    """Return the root mean squared error of the mean prediction.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`; ArviZ data has its own.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Raises:
        ValueError: if shapes do not fit, or `y` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> print(f"{scoring.rmse(jnp.array([[0.0, 2.0], [2.0, 2.0]]), jnp.array([1.0, 3.0])):.3f}")
        0.707
    """
    draws, y, p = read(draws, y, weights, **where)
    return jnp.sqrt(jnp.mean((jnp.average(draws, axis=0, weights=p) - y) ** 2))


def nll(
    log_likelihood: Any,
    *,
    weights: Any = None,
    pointwise: bool = False,
    var_name: str | None = None,
) -> jax.Array:
    """Return the negative log score of the mixture of all draws.

    Args:
        log_likelihood: `(S, N)` log likelihoods of the observations, or ArviZ data.
        weights: weights `(S,)` of the draws.
        pointwise: one value for each observation.
        var_name: the observed site, where ArviZ data has several.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> print(f"{scoring.nll(jnp.log(jnp.array([[0.2], [0.4]]))):.3f}")
        1.204
    """
    data, seen = None, None
    if not is_array(log_likelihood):
        data = log_likelihood
        name, log_likelihood = variable(data, "log_likelihood", var_name)
        seen = observed(data, name)
    terms = jnp.asarray(log_likelihood)
    if terms.ndim < 2 or not terms.size:
        raise ValueError(f"log_likelihood takes (S, N), got shape {terms.shape}.")
    if seen is not None and seen.shape == terms.shape[1:] and np.isnan(seen).any():
        terms = terms[:, ~np.isnan(seen)]
    terms, p = without_failed(terms, weights, data, lambda rows: ~jnp.isnan(rows))
    p = jnp.full(len(terms), 1.0 / len(terms)) if p is None else p / p.sum()
    p = p.reshape(-1, *[1] * (terms.ndim - 1))
    # a weight of 0 leaves its draw out, whatever its likelihood
    kept = jnp.where(p > 0, terms, -jnp.inf)
    scores = -jax.nn.logsumexp(kept, axis=0, b=jnp.broadcast_to(p, terms.shape))
    return scores if pointwise else scores.mean()


def crps(
    draws: Any,
    y: ArrayLike | None = None,
    *,
    weights: Any = None,
    pointwise: bool = False,
    **where: Any,
) -> jax.Array:
    """Return the continuous ranked probability score, as `scoringrules` computes it from draws.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        weights: weights `(S,)` of the draws.
        pointwise: one value for each observation.
        **where: `group` and `var_name` of ArviZ data.

    Raises:
        ValueError: if shapes do not fit, or `y` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> print(scoring.crps(jnp.array([[0.0], [2.0]]), jnp.array([1.0])))
        0.5
    """
    import scoringrules

    draws, y, p = read(draws, y, weights, **where)
    if p is not None:
        p = jnp.broadcast_to(p[:, None], draws.shape)
    scores = scoringrules.crps_ensemble(y, draws, m_axis=0, ens_w=p, backend="jax")
    return scores if pointwise else scores.mean()


def energy_score(
    draws: Any, y: ArrayLike | None = None, *, weights: Any = None, **where: Any
) -> jax.Array:
    """Return the energy score of all observations together, the `crps` of a vector.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Raises:
        ValueError: if shapes do not fit, or `y` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.array([[0.0, 0.0], [2.0, 0.0]])
        >>> print(scoring.energy_score(draws, jnp.array([1.0, 0.0])))
        0.5
    """
    draws, y, p = read(draws, y, weights, **where)
    return _energy_score(draws, y, jnp.full(len(draws), 1.0 / len(draws)) if p is None else p)


@jax.jit
def _energy_score(draws: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    # scoringrules keeps all pairs (S, S, N), and its gradient at a pair of the same is NaN
    p = p / p.sum()

    def norm(x: jax.Array) -> jax.Array:
        square = (x**2).sum(axis=-1)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    spread = map_draws(lambda draw: p @ norm(draws - draw[None]), draws)
    return p @ norm(draws - y[None]) - 0.5 * p @ spread


def interval(
    draws: ArrayLike, levels: Sequence[float] = LEVELS, *, weights: Any = None
) -> jax.Array:
    """Return the ends of central intervals, `(2, levels, N)`.

    Quantiles interpolate between draws. With weights, a quantile is the first draw that reaches the
    probability.

    Args:
        draws: `(S, N)` draws.
        levels: probabilities between 0 and 1.
        weights: weights `(S,)` of the draws.

    Raises:
        ValueError: if a level is not between 0 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.linspace(0.0, 1.0, 101)[:, None] * jnp.array([1.0, 2.0])
        >>> low, high = scoring.interval(draws, (0.5,))
        >>> print(low.round(2), high.round(2))
        [[0.25 0.5 ]] [[0.75 1.5 ]]
    """
    level = np.asarray(levels, float)
    if level.ndim != 1:
        raise ValueError(f"levels takes a sequence of probabilities, got {levels}.")
    if not ((level > 0) & (level < 1)).all():
        raise ValueError(f"levels takes probabilities between 0 and 1, got {levels}.")
    ends = jnp.stack([(1 - level) / 2, (1 + level) / 2])
    draws, _, _ = find_draws(draws)
    draws, p = without_failed(draws, weights, None, jnp.isfinite)
    if p is None:
        return jnp.quantile(draws, ends.ravel(), axis=0).reshape(*ends.shape, *draws.shape[1:])
    order = jnp.argsort(draws, axis=0)
    ranked = jnp.take_along_axis(draws, order, axis=0).reshape(len(draws), -1)
    heaped = jnp.cumsum((p / p.sum())[order], axis=0).reshape(ranked.shape)

    def column(ranked: jax.Array, heaped: jax.Array) -> jax.Array:
        places = jnp.searchsorted(heaped, ends.ravel())
        return ranked[jnp.minimum(places, len(ranked) - 1)]

    values = jax.vmap(column, in_axes=1, out_axes=1)(ranked, heaped)
    return values.reshape(*ends.shape, *draws.shape[1:])


def coverage(
    draws: Any,
    y: ArrayLike | None = None,
    levels: Sequence[float] = LEVELS,
    *,
    weights: Any = None,
    **where: Any,
) -> jax.Array:
    """Return the share of observations inside central intervals, one for each level.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        levels: probabilities of the intervals.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Raises:
        ValueError: if shapes do not fit, or `y` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.linspace(0.0, 1.0, 101)[:, None] * jnp.array([1.0, 2.0])
        >>> print(scoring.coverage(draws, jnp.array([0.5, 1.9]), (0.5, 0.95)))
        [0.5 1. ]
    """
    draws, y, p = read(draws, y, weights, **where)
    low, high = interval(draws, levels, weights=p)
    return ((low <= y[None]) & (y[None] <= high)).mean(axis=1)


def interval_width(
    draws: Any, levels: Sequence[float] = LEVELS, *, weights: Any = None, **where: Any
) -> jax.Array:
    """Return the mean width of central intervals (sharpness), one for each level.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        levels: probabilities of the intervals.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.linspace(0.0, 1.0, 101)[:, None] * jnp.array([1.0, 2.0])
        >>> print(scoring.interval_width(draws, (0.5,)).round(2))
        [0.75]
    """
    draws, _, data = find_draws(draws, **where)
    draws, p = without_failed(draws.reshape(len(draws), -1), weights, data, jnp.isfinite)
    low, high = interval(draws, levels, weights=p)
    return (high - low).mean(axis=1)


def calibration_curve(
    draws: Any, y: ArrayLike | None = None, *, num_levels: int = 19, **options: Any
) -> tuple[np.ndarray, jax.Array]:
    """Return levels of central intervals, and the share of observations inside each.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        num_levels: number of levels between 0 and 1.
        **options: as for `coverage`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.linspace(0.0, 1.0, 101)[:, None] * jnp.array([1.0, 2.0])
        >>> levels, shares = scoring.calibration_curve(draws, jnp.array([0.5, 1.9]), num_levels=3)
        >>> print(levels, shares)
        [0.25 0.5  0.75] [0.5 0.5 0.5]
    """
    check_count("num_levels", num_levels)
    levels = np.arange(1, num_levels + 1) / (num_levels + 1)
    return levels, coverage(draws, y, tuple(levels), **options)


def pit(draws: Any, y: ArrayLike | None = None, *, weights: Any = None, **where: Any) -> jax.Array:
    """Return the predictive probability below each observation; draws equal to it count half.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = jnp.linspace(0.0, 1.0, 101)[:, None] * jnp.array([1.0, 2.0])
        >>> print(scoring.pit(draws, jnp.array([0.505, 5.0])).round(2))
        [0.5 1. ]
    """
    draws, y, p = read(draws, y, weights, **where)
    below = (draws < y[None]) + 0.5 * (draws == y[None])
    return jnp.average(below, axis=0, weights=p)


def variance_decomposition(means: ArrayLike, variances: ArrayLike = 0.0) -> dict[str, jax.Array]:
    """Split the predictive variance by its source; the parts add up to `total`.

    Args:
        means: `(E, S, ...)` means of the observations at each draw of each member.
        variances: variances of the observations at each draw, of a shape that broadcasts.

    Returns:
        `aleatoric`, `between` members, `within` members and `total`.

    Raises:
        ValueError: if `means` has no axes of members and draws.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> means = jnp.array([[0.0, 2.0], [4.0, 6.0]])  # two members, two draws of each
        >>> parts = scoring.variance_decomposition(means, variances=0.5)
        >>> print({name: float(part) for name, part in parts.items()})
        {'aleatoric': 0.5, 'between': 4.0, 'within': 1.0, 'total': 5.5}
    """
    means = jnp.asarray(means)
    if means.ndim < 2:
        raise ValueError(f"means takes (E, S, ...), got shape {means.shape}.")
    noise = jnp.broadcast_to(jnp.asarray(variances), means.shape).mean(axis=(0, 1))
    between = means.mean(axis=1).var(axis=0)
    within = means.var(axis=1).mean(axis=0)
    total = noise + between + within
    return {"aleatoric": noise, "between": between, "within": within, "total": total}
