"""Many-chain MCMC: kernels for `numpyro.infer.MCMC` that adapt over all chains at once."""

from numpyro_ensemble.mcmc import starts
from numpyro_ensemble.mcmc.checkpointed import run_checkpointed
from numpyro_ensemble.mcmc.chees import ChEES
from numpyro_ensemble.mcmc.diagnostics import rhat_nested
from numpyro_ensemble.mcmc.mams import MAMS
from numpyro_ensemble.mcmc.mclmc import MCLMC
from numpyro_ensemble.mcmc.meads import MEADS
from numpyro_ensemble.mcmc.sgmcmc import SGMCMC

__all__ = [
    "MAMS",
    "MCLMC",
    "MEADS",
    "SGMCMC",
    "ChEES",
    "rhat_nested",
    "run_checkpointed",
    "starts",
]
