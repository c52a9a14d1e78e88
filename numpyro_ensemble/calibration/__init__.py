"""Whether fits recover what data were simulated from: simulation-based calibration."""

from numpyro_ensemble.calibration.sbc import Calibration, sbc
from numpyro_ensemble.calibration.uniformity import ecdf_band, uniformity

__all__ = ["Calibration", "ecdf_band", "sbc", "uniformity"]
