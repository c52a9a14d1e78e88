"""Ten folds in one program, compared in turns with one fit and with ten successive fits.

Run `python benchmarks/folds.py [repeats]`: a logistic regression of 1,000 rows and 5 coefficients,
AutoNormal, 2,000 steps, 200 draws of each fit. Each part compiles anew in each turn, as in a
user's first call. The ten separate fits share one compilation, because their masks are arguments.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked
from numpyro.infer import SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from records import note, saved

from numpyro_ensemble import EnsembleVI, scoring

RNG = np.random.default_rng(0)
X = RNG.normal(size=(1000, 5))
Y = RNG.binomial(1, 1 / (1 + np.exp(-X @ np.array([1.0, -1.0, 0.5, 0.0, 0.0]))))
STEPS, DRAWS, FOLDS = 2000, 200, np.arange(1000) % 10


def model(x, y=None, seen=True):
    """A logistic regression, whose likelihood is masked by `seen`."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w).mask(seen), obs=y)


def one_fit(key, seen, svi, guide):
    """Fit by NumPyro's SVI and return the log predictive densities of all rows."""
    result = svi.run(key, STEPS, X, Y, seen, progress_bar=False)
    draws = Predictive(guide, params=result.params, num_samples=DRAWS)(key, X)
    terms = log_likelihood(model, draws, X, Y)["y"]
    return np.asarray(jax.nn.logsumexp(terms, axis=0)) - np.log(DRAWS)


def separate(number):
    """Return the sum of elpd over some folds, each of them fitted separately."""
    guide = AutoNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    total = 0.0
    for k in range(number):
        seen = FOLDS != k
        total += one_fit(jax.random.key(k), jnp.asarray(seen), svi, guide)[~seen].sum()
    return total


def together():
    """Return elpd by cross-validation, with all folds in one program."""
    runner = EnsembleVI(
        model, AutoNormal(model), numpyro.optim.Adam(0.01), Trace_ELBO(), ensemble_size=1
    )
    found = scoring.cross_validate(
        model, runner, X, Y, rng_key=jax.random.key(0), folds=FOLDS, num_steps=STEPS,
        num_draws=DRAWS,
    )  # fmt: skip
    return found.elpd


def main(repeats="3"):
    """Time one fit, ten separate fits and ten folds, in turns."""
    parts = {
        "one fit (SVI)": lambda: separate(1),
        "ten fits (SVI)": lambda: separate(10),
        "ten folds": together,
    }
    times = {name: [] for name in parts}
    for i in range(int(repeats)):
        for name in list(parts)[:: 1 if i % 2 else -1]:
            jax.clear_caches()
            elpd, wall, cpu = clocked(parts[name])
            times[name].append((wall, cpu))
            print(f"{name}: {wall:.1f} s, processor {cpu:.1f} s, elpd {elpd:.2f}", flush=True)
            if i == 0 and name != "one fit (SVI)":
                note(f"{name}: sum of log predictive densities", elpd=float(elpd))
    one = np.array(times["one fit (SVI)"])
    for name in ("ten folds", "ten fits (SVI)"):
        wall, cpu = (np.array(times[name]) / one).T
        print(f"{name} / one fit: {statistics.median(wall):.2f} {np.sort(wall).round(2)} by the "
              f"clock, {statistics.median(cpu):.2f} by the processor")  # fmt: skip
        seconds = np.array(times[name])[:, 0], one[:, 0]
        note(f"{name} / one fit, cold", ours=list(seconds[0]), theirs=list(seconds[1]),
             ratio=list(wall), ratio_by_processor=list(cpu))  # fmt: skip


if __name__ == "__main__":
    with saved("folds"):
        main(*sys.argv[1:])
