"""Simulation-based calibration against NumPyro's `vsbc_diagnostic`, in turns in one process.

Run `python benchmarks/sbc.py [repeats]`: a logistic regression of 200 rows and 5 coefficients,
AutoNormal, 1,000 steps; 1,000 data sets for `sbc`, 100 for `vsbc_diagnostic`, which fits one after
another. Both compile anew in each turn, as `vsbc_diagnostic` does in each call. Rates are printed
with and without compilation, and by processor time, which other jobs disturb less.
"""

import statistics
import sys

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked
from jax import monitoring
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.calibration import vsbc_diagnostic
from records import note, saved

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.calibration import sbc

X = np.random.default_rng(0).normal(size=(200, 5))
STEPS, DRAWS = 1000, 100


def model(x, y=None):
    """A logistic regression."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


compiled = [0.0]


def _note(event, seconds, **_):
    if event.startswith("/jax/core/compile"):
        compiled[0] += seconds


def rates(name, number, run):
    """Return fits per second: with compilation, without it, and by processor time."""
    compiled[0] = 0.0
    _, wall, cpu = clocked(run)
    print(f"{name}: {number} fits, {wall:.1f} s, {compiled[0]:.1f} s of them compilation, "
          f"{cpu:.1f} s of the processor", flush=True)  # fmt: skip
    return np.array([number / wall, number / (wall - compiled[0]), number / cpu])


def ours(number):
    """Return the rates of this package's `sbc`."""
    runner = EnsembleVI(
        model, AutoNormal(model), numpyro.optim.Adam(0.02), Trace_ELBO(), ensemble_size=1
    )
    return rates("sbc", number, lambda: sbc(
        model, runner, X, np.zeros(200, int), rng_key=jax.random.key(0), num_datasets=number,
        num_steps=STEPS, num_draws=DRAWS,
    ))  # fmt: skip


def theirs(number, chain_method="sequential"):
    """Return the rates of `vsbc_diagnostic`, which takes no typed keys."""
    return rates("vsbc_diagnostic", number, lambda: vsbc_diagnostic(
        jax.random.PRNGKey(0), model, AutoNormal(model), numpyro.optim.Adam(0.02), Trace_ELBO(), X,
        observed_sites=["y"], num_simulations=number, num_svi_steps=STEPS, num_samples=DRAWS,
        chain_method=chain_method,
    ))  # fmt: skip


def main(repeats="3"):
    """Compare the rates in turns."""
    monitoring.register_event_duration_secs_listener(_note)
    found = []
    for i in range(int(repeats)):
        jax.clear_caches()
        parts = [lambda: ours(1000), lambda: theirs(100)]
        both = [part() for part in (parts if i % 2 else parts[::-1])]
        found.append(both if i % 2 else both[::-1])
    ratios = np.array([mine / other for mine, other in found])
    names = ("with compilation", "without", "by the processor's clock")
    for place, (name, column) in enumerate(zip(names, ratios.T, strict=True)):
        print(f"throughput over vsbc_diagnostic, {name}: {statistics.median(column):.1f} "
              f"{np.round(np.sort(column), 1)}")  # fmt: skip
        sides = [list(1.0 / np.array(side)[:, place]) for side in zip(*found, strict=True)]
        note(f"a fit by sbc / by vsbc_diagnostic, {name}", ours=sides[0], theirs=sides[1],
             ratio=list(1.0 / column), fits_ratio=list(column))  # fmt: skip


if __name__ == "__main__":
    with saved("sbc"):
        main(*sys.argv[1:])
