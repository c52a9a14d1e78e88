"""Simulation-based calibration against NumPyro's `vsbc_diagnostic`, in turns in one process.

Run `python benchmarks/sbc.py [repeats]`: a logistic regression of 200 rows and 5 coefficients,
AutoNormal, 1,000 steps; 1,000 data sets for `sbc`, 100 for `vsbc_diagnostic`, which fits one after
another. Both compile anew in each turn, as each call of theirs does.
"""

import statistics
import sys
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.calibration import vsbc_diagnostic

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.calibration import sbc

X = np.random.default_rng(0).normal(size=(200, 5))
STEPS, DRAWS = 1000, 100


def model(x, y=None):
    """Regress a yes or no."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def ours(number):
    """Return fits a second."""
    runner = EnsembleVI(
        model, AutoNormal(model), numpyro.optim.Adam(0.02), Trace_ELBO(), ensemble_size=1
    )
    begin = time.perf_counter()
    found = sbc(
        model, runner, X, np.zeros(200, int), rng_key=jax.random.key(0), num_datasets=number,
        num_steps=STEPS, num_draws=DRAWS,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    print(
        f"sbc: {number} fits in {seconds:.1f} s, p {np.round(found.p_values['w'], 3)}", flush=True
    )
    return number / seconds


def theirs(number, chain_method="sequential"):
    """Return fits a second."""
    begin = time.perf_counter()  # it takes no typed keys
    vsbc_diagnostic(
        jax.random.PRNGKey(0), model, AutoNormal(model), numpyro.optim.Adam(0.02), Trace_ELBO(), X,
        observed_sites=["y"], num_simulations=number, num_svi_steps=STEPS, num_samples=DRAWS,
        chain_method=chain_method,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    print(f"vsbc_diagnostic, {chain_method}: {number} fits in {seconds:.1f} s", flush=True)
    return number / seconds


def main(repeats="3"):
    """Compare in turns."""
    ratios = []
    for i in range(int(repeats)):
        jax.clear_caches()
        parts = [lambda: ours(1000), lambda: theirs(100)]
        rates = [part() for part in (parts if i % 2 else parts[::-1])]
        mine, other = rates if i % 2 else rates[::-1]
        ratios.append(mine / other)
    print(f"throughput over vsbc_diagnostic: {statistics.median(ratios):.1f} {np.round(ratios, 1)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
