"""Kernels by kind, and their sums and products."""

from numpyro_ensemble.gp.kernels.base import Constant, Kernel, Spectrum
from numpyro_ensemble.gp.kernels.derivatives import Derivatives
from numpyro_ensemble.gp.kernels.finite import (
    Categorical,
    Coregion,
    Envelope,
    Linear,
    Polynomial,
    change_point,
    multi_output,
)
from numpyro_ensemble.gp.kernels.nonstationary import ArcCosine, Gibbs
from numpyro_ensemble.gp.kernels.periodic import Cosine, Periodic, SpectralMixture
from numpyro_ensemble.gp.kernels.stationary import (
    RBF,
    Matern12,
    Matern32,
    Matern52,
    PiecewisePolynomial,
    PoweredExponential,
    RationalQuadratic,
    Stationary,
)

__all__ = [
    "RBF",
    "ArcCosine",
    "Categorical",
    "Constant",
    "Coregion",
    "Cosine",
    "Derivatives",
    "Envelope",
    "Gibbs",
    "Kernel",
    "Linear",
    "Matern12",
    "Matern32",
    "Matern52",
    "Periodic",
    "PiecewisePolynomial",
    "Polynomial",
    "PoweredExponential",
    "RationalQuadratic",
    "SpectralMixture",
    "Stationary",
    "Spectrum",
    "change_point",
    "multi_output",
]
