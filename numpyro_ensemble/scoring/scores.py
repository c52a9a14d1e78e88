"""How good predictions are: proper scores, calibration, and the weights of members.

Functions of draws take an array that leads with the draws, `(S, N)`, or ArviZ data, whose
predictive draws and observations they then find. They return means over the observations, or with
`pointwise=True` one value for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.scoring.reading import (
    check_draw_weights,
    group_of,
    is_array,
    read,
    variable,
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
    draws, y = read(draws, y, **where)
    mean = jnp.average(draws, axis=0, weights=check_draw_weights(weights, draws))
    return jnp.sqrt(jnp.mean((mean - y) ** 2))


def nll(
    log_likelihood: Any,
    *,
    weights: Any = None,
    pointwise: bool = False,
    var_name: str | None = None,
) -> jax.Array:
    """Return the negative log score of the mixture of all draws.

    Args:
        log_likelihood: `(S, N)` log likelihoods of the observations, for any likelihood, or ArviZ
            data that has them.
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
    if not is_array(log_likelihood):
        log_likelihood = variable(log_likelihood, "log_likelihood", var_name)
    terms = jnp.asarray(log_likelihood)
    if terms.ndim < 2:
        raise ValueError(f"log_likelihood takes (S, N), got shape {terms.shape}.")
    p = check_draw_weights(weights, terms)
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

    draws, y = read(draws, y, **where)
    p = check_draw_weights(weights, draws)
    if p is not None:
        p = jnp.broadcast_to(p[:, None], draws.shape)
    scores = scoringrules.crps_ensemble(y, draws, m_axis=0, ens_w=p, backend="jax")
    return scores if pointwise else scores.mean()


def energy_score(
    draws: Any, y: ArrayLike | None = None, *, weights: Any = None, **where: Any
) -> jax.Array:
    """Return the energy score of all observations together, a `crps` for vectors.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.

    Raises:
        ValueError: if shapes do not fit, or `y` is missing.
    """
    import scoringrules

    draws, y = read(draws, y, **where)
    p = check_draw_weights(weights, draws)
    return scoringrules.es_ensemble(y, draws, m_axis=0, v_axis=1, ens_w=p, backend="jax")


def interval(
    draws: ArrayLike, levels: Sequence[float] = LEVELS, *, weights: Any = None
) -> jax.Array:
    """Return the ends of central intervals, `(2, levels, N)`.

    Args:
        draws: `(S, N)` draws.
        levels: probabilities between 0 and 1.
        weights: weights `(S,)` of the draws.

    Raises:
        ValueError: if a level is not between 0 and 1.
    """
    level = np.asarray(levels, float)
    if level.ndim != 1 or not ((level > 0) & (level < 1)).all():
        raise ValueError(f"levels takes probabilities between 0 and 1, got {levels}.")
    ends = jnp.stack([(1 - level) / 2, (1 + level) / 2])
    draws = jnp.asarray(draws)
    p = check_draw_weights(weights, draws)
    if p is None:
        return jnp.quantile(draws, ends.ravel(), axis=0).reshape(*ends.shape, *draws.shape[1:])
    order = jnp.argsort(draws, axis=0)
    heaped = jnp.cumsum((p / p.sum())[order], axis=0)  # (S, N)
    below = (heaped[None, None] < ends[:, :, None, None]).sum(axis=2)
    ranked = jnp.take_along_axis(draws, order, axis=0)
    below = jnp.minimum(below, len(draws) - 1)
    return jnp.take_along_axis(ranked[None, None], below[:, :, None], axis=2)[:, :, 0]


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
    """
    draws, y = read(draws, y, **where)
    low, high = interval(draws, levels, weights=weights)
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
    """
    if not is_array(draws):
        draws, _ = read(draws, None, **where)
    low, high = interval(draws, levels, weights=weights)
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
    """
    levels = np.arange(1, num_levels + 1) / (num_levels + 1)
    return levels, coverage(draws, y, tuple(levels), **options)


def pit(draws: Any, y: ArrayLike | None = None, *, weights: Any = None, **where: Any) -> jax.Array:
    """Return the predictive probability below each observation; draws equal to it count half.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        weights: weights `(S,)` of the draws.
        **where: `group` and `var_name` of ArviZ data.
    """
    draws, y = read(draws, y, **where)
    below = (draws < y[None]) + 0.5 * (draws == y[None])
    return jnp.average(below, axis=0, weights=check_draw_weights(weights, draws))


def variance_decomposition(means: ArrayLike, variances: ArrayLike = 0.0) -> dict[str, jax.Array]:
    """Split the predictive variance by its source; the parts add up to `total`.

    Args:
        means: `(E, S, ...)` means of the observations at each draw of each member.
        variances: variances of the observations at each draw, of a shape that broadcasts.

    Returns:
        `aleatoric`, `between` members, `within` members and `total`.

    Raises:
        ValueError: if `means` has no axes of members and draws.
    """
    means = jnp.asarray(means)
    if means.ndim < 2:
        raise ValueError(f"means takes (E, S, ...), got shape {means.shape}.")
    noise = jnp.broadcast_to(jnp.asarray(variances), means.shape).mean(axis=(0, 1))
    between = means.mean(axis=1).var(axis=0)
    within = means.var(axis=1).mean(axis=0)
    total = noise + between + within
    return {"aleatoric": noise, "between": between, "within": within, "total": total}


def summary(
    predictions: Mapping[str, Any],
    y: ArrayLike | None = None,
    *,
    truth: ArrayLike | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    level: float = 0.95,
) -> Any:
    """Return a pandas frame of scores, a row for each set of predictions.

    Args:
        predictions: draws `(S, N)`, or ArviZ data, by the row's name.
        y: the observations; ArviZ data has its own.
        truth: what the mean prediction is compared with besides.
        log_likelihood: `(S, N)` by the row's name, for the column `NLL`.
        level: of the intervals.
    """
    import pandas as pd

    rows = {}
    for name, given in predictions.items():
        draws, seen = read(given, y)
        row = {}
        if truth is not None:
            row["RMSE truth"] = rmse(draws, truth)
        row["RMSE"] = rmse(draws, seen)
        if log_likelihood is not None and name in log_likelihood:
            row["NLL"] = nll(log_likelihood[name])
        elif not is_array(given) and group_of(given, "log_likelihood") is not None:
            row["NLL"] = nll(given)
        row["CRPS"] = crps(draws, seen)
        row[f"coverage {level:g}"] = coverage(draws, seen, (level,))[0]
        row[f"width {level:g}"] = interval_width(draws, (level,))[0]
        rows[name] = {column: float(value) for column, value in row.items()}
    return pd.DataFrame.from_dict(rows, orient="index")
