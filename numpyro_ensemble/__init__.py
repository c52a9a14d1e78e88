"""Ensembles of MAP fits, variational fits, chains and functions for NumPyro."""

from numpyro_ensemble.checkpoint import Checkpoint
from numpyro_ensemble.density import log_joint
from numpyro_ensemble.fit.repulsion import Repulsion
from numpyro_ensemble.fit.stopping import EarlyStopping
from numpyro_ensemble.handlers import reweight
from numpyro_ensemble.laplace_modes import LaplaceMixture, Modes, laplace, modes
from numpyro_ensemble.map import EnsembleMAP, ensemble_map
from numpyro_ensemble.pathfinder import Pathfinder
from numpyro_ensemble.predict.arviz import to_arviz
from numpyro_ensemble.predict.predictive import EnsemblePredictive
from numpyro_ensemble.primitives import (
    EnsembleState,
    ensemble_init,
    ensemble_loss,
    ensemble_predict,
    ensemble_step,
)
from numpyro_ensemble.results import EnsembleResult, PathfinderResult
from numpyro_ensemble.vi import EnsembleVI, ensemble_vi

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "EarlyStopping",
    "EnsembleMAP",
    "EnsemblePredictive",
    "EnsembleResult",
    "EnsembleState",
    "EnsembleVI",
    "LaplaceMixture",
    "Modes",
    "Pathfinder",
    "PathfinderResult",
    "Repulsion",
    "ensemble_init",
    "ensemble_loss",
    "ensemble_map",
    "ensemble_predict",
    "ensemble_step",
    "ensemble_vi",
    "laplace",
    "log_joint",
    "modes",
    "reweight",
    "to_arviz",
]
