"""Proper scores, calibration, importance weights and the weights of members."""

from numpyro_ensemble.scoring.comparison import Comparison, compare, mix
from numpyro_ensemble.scoring.folds import CrossValidation, cross_validate
from numpyro_ensemble.scoring.leave_one_out import loo_pit
from numpyro_ensemble.scoring.scores import (
    calibration_curve,
    coverage,
    crps,
    energy_score,
    interval,
    interval_width,
    nll,
    pit,
    rmse,
    variance_decomposition,
)
from numpyro_ensemble.scoring.table import summary
from numpyro_ensemble.scoring.weights import (
    Khat,
    importance_resample,
    khat,
    member_weights,
    psis,
)

__all__ = [
    "Comparison",
    "CrossValidation",
    "Khat",
    "calibration_curve",
    "compare",
    "coverage",
    "cross_validate",
    "crps",
    "energy_score",
    "importance_resample",
    "interval",
    "interval_width",
    "khat",
    "loo_pit",
    "member_weights",
    "mix",
    "nll",
    "pit",
    "psis",
    "rmse",
    "summary",
    "variance_decomposition",
]
