"""Gaussian processes as functions: kernels, a distribution, and posterior paths."""

from numpyro_ensemble.gp.collapsed import CollapsedSparseGP
from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.features import Features, draw_features
from numpyro_ensemble.gp.finite import Coregion, Linear
from numpyro_ensemble.gp.kernels import Constant, Kernel
from numpyro_ensemble.gp.likelihood import ExpectedLikelihood
from numpyro_ensemble.gp.matheron import draw_paths
from numpyro_ensemble.gp.mixtures import JointMoments, Moments
from numpyro_ensemble.gp.optima import Optimum, maximise, minimise
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.pathwise import Pathwise
from numpyro_ensemble.gp.sparse import choose_inducing, sparse_gp
from numpyro_ensemble.gp.stationary import (
    RBF,
    Cosine,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    RationalQuadratic,
)
from numpyro_ensemble.gp.whiten import WhitenReparam

__all__ = [
    "RBF",
    "CollapsedSparseGP",
    "Constant",
    "Coregion",
    "Cosine",
    "ExpectedLikelihood",
    "Features",
    "GaussianProcess",
    "JointMoments",
    "Kernel",
    "Linear",
    "Matern12",
    "Matern32",
    "Matern52",
    "Moments",
    "Optimum",
    "Paths",
    "Pathwise",
    "Periodic",
    "RationalQuadratic",
    "WhitenReparam",
    "choose_inducing",
    "draw_features",
    "draw_paths",
    "maximise",
    "minimise",
    "sparse_gp",
]
