"""Gaussian processes as functions: kernels, a distribution, and posterior paths."""

from numpyro_ensemble.gp.collapsed import CollapsedSparseGP
from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.draw_paths import draw_paths
from numpyro_ensemble.gp.features import Features, draw_features
from numpyro_ensemble.gp.inducing import choose_inducing
from numpyro_ensemble.gp.inputs import numbered_inputs
from numpyro_ensemble.gp.kernels import (
    RBF,
    ArcCosine,
    Categorical,
    Constant,
    Coregion,
    Cosine,
    Derivatives,
    Envelope,
    Gibbs,
    Kernel,
    Linear,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    PiecewisePolynomial,
    Polynomial,
    PoweredExponential,
    RationalQuadratic,
    SpectralMixture,
    Stationary,
    change_point,
    multi_output,
)
from numpyro_ensemble.gp.likelihood import ExpectedLikelihood
from numpyro_ensemble.gp.mixtures import JointMoments, Moments
from numpyro_ensemble.gp.optima import Optimum, maximise, minimise
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.pathwise import Pathwise
from numpyro_ensemble.gp.sparse import sparse_gp
from numpyro_ensemble.gp.whiten import WhitenReparam

__all__ = [
    "RBF",
    "ArcCosine",
    "Categorical",
    "CollapsedSparseGP",
    "Constant",
    "Coregion",
    "Cosine",
    "Derivatives",
    "Envelope",
    "ExpectedLikelihood",
    "Features",
    "GaussianProcess",
    "Gibbs",
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
    "PiecewisePolynomial",
    "Polynomial",
    "PoweredExponential",
    "RationalQuadratic",
    "SpectralMixture",
    "Stationary",
    "WhitenReparam",
    "change_point",
    "choose_inducing",
    "draw_features",
    "draw_paths",
    "maximise",
    "minimise",
    "multi_output",
    "numbered_inputs",
    "sparse_gp",
]
