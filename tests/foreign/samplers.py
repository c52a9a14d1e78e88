"""Runs of many-chain kernels on a foreign model, compared with NUTS."""

import time
import warnings
from typing import Any

import arviz as az
import jax
import numpy as np
from cases import Case, Size
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy.stats import norm, rankdata

from numpyro_ensemble.mcmc import MEADS, ChEES

KERNELS = {"NUTS": NUTS, "ChEES": ChEES, "MEADS": MEADS}
LIMIT = 4.0  # standard errors between means
CONVERGED = 1.05  # R-hats above which means are not compared
LONGER = 10  # factor on the draws of NUTS if its means differ from a kernel's


def latent_names(case: Case):
    """Return the names of the continuous latents."""
    model = handlers.seed(case.model, 0)
    trace = handlers.trace(model).get_trace(*case.args, **case.kwargs)
    return [
        name
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and not site["fn"].is_discrete
    ]


def draw(kernel: str, case: Case, key, size: Size):
    """Run a kernel; return draws `(C, N, D)`, seconds and warnings, our own first."""
    chains = size.nuts_chains if kernel == "NUTS" else size.chains
    mcmc = MCMC(
        KERNELS[kernel](case.model),
        num_warmup=size.warmup,
        num_samples=size.draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begin = time.perf_counter()
        mcmc.run(key, *case.args, **case.kwargs)
        samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
        seconds = time.perf_counter() - begin
    flat = [
        np.asarray(samples[name], float).reshape(chains, size.draws, -1)
        for name in latent_names(case)
        if name in samples
    ]
    notes = [str(w.message) for w in caught if "numpyro_ensemble" in str(w.filename)]
    notes += [str(w.message) for w in caught if "numpyro_ensemble" not in str(w.filename)]
    return np.concatenate(flat, axis=-1), seconds, notes


def moving(draws):
    """Return which coordinates vary: the zeros of a Cholesky factor, for one, do not."""
    return np.ptp(draws, axis=(0, 1)) > 0


def figures(draws, seconds, notes) -> dict[str, Any]:
    """Return R-hat, effective draws and their rate."""
    data = az.convert_to_dataset({"x": draws[..., moving(draws)]})
    rhat, bulk = az.rhat(data)["x"].values, az.ess(data)["x"].values
    return {
        "latents": draws.shape[-1],
        "rhat": float(np.nanmax(rhat)),
        "ess": float(np.nanmin(bulk)),
        "seconds": seconds,
        "rate": float(np.nanmin(bulk)) / seconds,
        "warnings": notes,
    }


def normal_scores(*runs):
    """Replace draws `(C, N, D)` by the normal scores of their ranks among all runs."""
    pooled = np.concatenate([draws.reshape(-1, draws.shape[-1]) for draws in runs])
    scores = norm.ppf((rankdata(pooled, axis=0) - 0.375) / (len(pooled) + 0.25))
    parts = np.split(scores, np.cumsum([draws[..., 0].size for draws in runs])[:-1])
    return [part.reshape(draws.shape) for part, draws in zip(parts, runs, strict=True)]


def mean_gap(draws, other):
    """Return the largest difference of means in standard errors.

    The means are those of normal scores, as in a rank-normalised R-hat. The scales of a horseshoe
    have no variance, so the means of the scales themselves have no standard error.
    """
    keep = moving(draws) & moving(other)
    means, errors = [], []
    for scores in normal_scores(draws[..., keep], other[..., keep]):
        data = az.convert_to_dataset({"x": scores})
        means.append(scores.mean((0, 1)))
        errors.append(scores.var((0, 1)) / az.ess(data, method="mean")["x"].values)
    return float(np.nanmax(np.abs(means[0] - means[1]) / np.sqrt(errors[0] + errors[1])))


class Reference:
    """Draws of NUTS to compare with, from a longer run if a kernel's means differ from the first.

    Four chains of 500 draws with a smallest effective number of 400 were 4.0 standard errors from
    four chains of 5,000 in one of 62 coordinates (the example `stochastic_volatility`).
    """

    def __init__(self, case: Case, size: Size, draws, rhat: float) -> None:
        self.case, self.size, self.draws, self.rhat = case, size, draws, rhat
        self.long = False

    def compare(self, draws, rhat: float) -> dict[str, Any]:
        """Return the gap between the means of draws and of NUTS, and the number of NUTS's draws."""
        gap = mean_gap(draws, self.draws)
        if gap > LIMIT and max(rhat, self.rhat) < CONVERGED and not self.long:
            size = self.size._replace(draws=LONGER * self.size.draws)
            self.draws = draw("NUTS", self.case, jax.random.key(1), size)[0]
            self.long, gap = True, mean_gap(draws, self.draws)
        return {"gap": gap, "nuts_draws": self.draws.shape[1]}
