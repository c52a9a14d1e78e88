"""The table of scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.scoring.reading import group_of, is_array, observed, read, variable
from numpyro_ensemble.scoring.scores import coverage, crps, interval_width, nll, rmse


def _own(data: Any, y: ArrayLike | None, var_name: str | None) -> bool:
    """Return whether ArviZ data has the log likelihood of these observations."""
    if group_of(data, "log_likelihood") is None:
        return False
    name, _ = variable(data, "log_likelihood", var_name)
    own = np.asarray(observed(data, name))
    return y is None or np.array_equal(np.asarray(y), own, equal_nan=True)


def summary(
    predictions: Mapping[str, Any],
    y: ArrayLike | None = None,
    *,
    truth: ArrayLike | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    level: float = 0.95,
    var_name: str | None = None,
) -> Any:
    """Return a pandas frame of scores, a row for each set of predictions.

    Args:
        predictions: a dict by row name of draws `(S, N)`, or of ArviZ data.
        y: the observations `(N,)`. ArviZ data has its own.
        truth: true values `(N,)`, for the column `RMSE truth` of the mean prediction.
        log_likelihood: a dict by row name of log likelihoods `(S, N)`, for the column `NLL`. ArviZ
            data has its own, for its own observations.
        level: probability of the intervals.
        var_name: the observed site, if ArviZ data has several.

    Raises:
        TypeError: if `predictions` or `log_likelihood` is not a dict.
        ValueError: if shapes or names do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> near, far = jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([[4.0, 4.0], [6.0, 6.0]])
        >>> draws = {"near": near, "far": far}
        >>> print(scoring.summary(draws, jnp.array([1.0, 2.0]))[["RMSE", "CRPS"]])
              RMSE  CRPS
        near ...
        far ...
    """
    import pandas as pd

    for option, given in (("predictions", predictions), ("log_likelihood", log_likelihood or {})):
        if not isinstance(given, Mapping):
            raise TypeError(f"{option} takes a dict by row name, got {type(given).__name__}.")
    terms = dict(log_likelihood or {})
    unknown = sorted(terms.keys() - predictions.keys())
    if unknown:
        raise ValueError(f"log_likelihood names {unknown}; the rows are {sorted(predictions)}.")
    rows = {}
    for name, given in predictions.items():
        where = {} if is_array(given) else {"var_name": var_name}
        draws, seen, _ = read(given, y, **where)
        row = {}
        if truth is not None:
            row["RMSE truth"] = rmse(draws, truth)
        row["RMSE"] = rmse(draws, seen)
        if name in terms:
            if np.shape(terms[name])[1:] != np.shape(seen):
                raise ValueError(
                    f"log_likelihood[{name!r}] has shape {np.shape(terms[name])}, and there are "
                    f"{len(seen)} observations."
                )
            row["NLL"] = nll(terms[name])
        elif not is_array(given) and _own(given, y, var_name):
            row["NLL"] = nll(given, var_name=var_name)
        row["CRPS"] = crps(draws, seen)
        row[f"coverage {level:g}"] = coverage(draws, seen, (level,))[0]
        row[f"width {level:g}"] = interval_width(draws, (level,))[0]
        rows[name] = {column: float(value) for column, value in row.items()}
    return pd.DataFrame.from_dict(rows, orient="index")
