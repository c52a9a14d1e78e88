"""Log predictive densities of rows in the form that ArviZ compares."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from numpyro_ensemble.predict.assembly import makes_inference_data
from numpyro_ensemble.results import TRUSTED_K


def are_unreliable(pareto_k: np.ndarray) -> np.ndarray:
    """Return which terms have a Pareto k above 0.7, or an unknown one."""
    return ~(pareto_k <= TRUSTED_K)


def standard_error(terms: np.ndarray) -> float:
    """Return the standard error of a sum of terms, as the installed line of ArviZ computes it."""
    degrees = 0 if makes_inference_data() else 1
    return float(np.sqrt(terms.size * terms.var(ddof=degrees)))


def as_elpd(
    terms: np.ndarray,
    num_draws: int,
    *,
    folds: int | None = None,
    pareto_k: np.ndarray | None = None,
    num_parameters: float = np.nan,
) -> Any:
    """Return log predictive densities in the form of `az.compare` of the installed line.

    Args:
        terms: `(N,)`, finite.
        num_draws: number of draws that each term averages.
        folds: number of folds of cross-validation, None for leave-one-out.
        pareto_k: `(N,)`, of leave-one-out.
        num_parameters: the effective number of parameters.
    """
    import xarray as xr

    each = xr.DataArray(terms, dims=["row"])
    shapes = None if pareto_k is None else xr.DataArray(pareto_k, dims=["row"])
    elpd, se = float(terms.sum()), standard_error(terms)
    unreliable = pareto_k is not None and bool(are_unreliable(pareto_k).any())
    if makes_inference_data():
        old: Any = importlib.import_module("arviz.stats.stats_utils")
        values = {
            "elpd_loo": elpd, "se": se, "p_loo": num_parameters, "n_samples": num_draws,
            "n_data_points": terms.size, "warning": unreliable, "loo_i": each, "scale": "log",
        }  # fmt: skip
        if shapes is not None:
            values |= {"pareto_k": shapes, "good_k": TRUSTED_K}
        return old.ELPDData(data=list(values.values()), index=list(values))
    new: Any = importlib.import_module("arviz_stats.utils")
    common: Any = {
        "elpd": elpd, "se": se, "p": num_parameters, "n_samples": num_draws, "scale": "log",
        "n_data_points": terms.size, "warning": unreliable, "elpd_i": each,
    }  # fmt: skip
    if folds is not None:
        return new.ELPDDataLOOKFold(**common, good_k=None, n_folds=folds)
    return new.ELPDDataLOO(**common, good_k=TRUSTED_K, pareto_k=shapes)
