"""Modes by L-BFGS and by Adam: cold and warm seconds, and distances from the best loss.

Run `JAX_ENABLE_X64=1 python benchmarks/quasi_newton.py` (several minutes, most of them for Adam on
the GP), or with `pathfinder` for the rows of Pathfinder alone. Ensembles have 16 members. They are
compared with one cold `SVI` with Adam, and with SciPy's L-BFGS-B for each member in turn; all of
SciPy's searches share one compiled function of value and gradient. Warm times are measured three
times in turns, that of Adam once.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optimistix
from common import clocked, cold, timed
from jax.flatten_util import ravel_pytree
from mcmc_problems import decentred_schools, item_response, item_response_data
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from records import note, peak, saved
from scipy.optimize import minimize

from numpyro_ensemble import EnsembleMAP, Pathfinder
from numpyro_ensemble.gp import RBF, GaussianProcess

MEMBERS, STEPS, SCIPY = 16, 1500, "SciPy L-BFGS-B"


def logistic(x, y):
    """A logistic regression whose first two columns are nearly equal."""
    base = numpyro.sample("base", dist.Normal(0, 5))
    slopes = numpyro.sample("slopes", dist.Normal(0, 5).expand([20]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=base + x @ slopes), obs=y)


def logistic_data(seed=0):
    """Simulate 500 rows of 20 columns, the first two correlated by .999."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 20))
    x[:, 1] = 0.999 * x[:, 0] + np.sqrt(1 - 0.999**2) * x[:, 1]
    logits = x @ rng.normal(size=20)
    return x, rng.binomial(1, 1 / (1 + np.exp(-logits)))


def process(x, y):
    """Hyperparameters of a Gaussian process with a lengthscale for each of three columns."""
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    lengths = numpyro.sample("lengths", dist.LogNormal(0, 1).expand([3]).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(-2, 1))
    kernel = RBF(scale**2, lengths)
    numpyro.sample("y", GaussianProcess(kernel, x, noise=noise**2 + 1e-6), obs=y)


def process_data(seed=0):
    """Simulate 150 points of a function of the first two columns."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(150, 3))
    return x, np.sin(6 * x[:, 0]) + x[:, 1] + 0.1 * rng.normal(size=150)


def network(x, y):
    """A hidden layer of eight units; their order and signs are free, so there are many optima."""
    inner = numpyro.sample("inner", dist.Normal(0, 1).expand([1, 8]).to_event(2))
    shift = numpyro.sample("shift", dist.Normal(0, 1).expand([8]).to_event(1))
    outer = numpyro.sample("outer", dist.Normal(0, 1).expand([8]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ inner + shift) @ outer, 0.1), obs=y)


def network_data(seed=0):
    """Simulate 100 points of a wave."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, size=(100, 1))
    return x, np.sin(3 * x[:, 0]) + 0.1 * rng.normal(size=100)


def groups(group, y):
    """Twenty group means whose scale is near zero."""
    scale = numpyro.sample("scale", dist.LogNormal(-4, 0.5))
    centre = numpyro.sample("centre", dist.Normal(0, 2))
    with numpyro.plate("groups", 20):
        mean = numpyro.sample("mean", dist.Normal(centre, scale))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(mean[group], 1), obs=y)


def groups_data(seed=0):
    """Simulate 200 rows whose groups do not differ."""
    return np.repeat(np.arange(20), 10), 1 + np.random.default_rng(seed).normal(size=200)


PROBLEMS = {
    "item response, 160-d": (item_response, item_response_data),
    "logistic, correlated, 21-d": (logistic, logistic_data),
    "GP hyperparameters, 5-d": (process, process_data),
    "network, 24-d": (network, network_data),
    "scale near zero, 22-d": (groups, groups_data),
}


def scipys(model, args, starts):
    """Return a function that makes SciPy's searches, without compilation."""
    guide = AutoDelta(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    svi.init(jax.random.key(0), *args)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], starts))[1]

    def loss(flat):
        params = svi.constrain_fn(unravel(flat))
        return svi.loss.loss(jax.random.key(0), params, model, guide, *args)

    both = jax.jit(jax.value_and_grad(loss))
    flats = [ravel_pytree(jax.tree.map(lambda x, e=e: x[e], starts))[0] for e in range(MEMBERS)]
    both(flats[0])

    def every():
        options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-8}
        fun = lambda x: tuple(np.asarray(v, float) for v in both(x))  # noqa: E731
        return [minimize(fun, x, jac=True, method="L-BFGS-B", options=options) for x in flats]

    return every


def svi_cold(model, args):
    """Return the seconds of one cold SVI with Adam."""
    svi = SVI(model, AutoDelta(model), numpyro.optim.Adam(0.01), Trace_ELBO())
    run = cold(lambda key: svi.run(key, STEPS, *args, progress_bar=False).params)
    return timed(run, jax.random.key(0))


def ensembles(model, args, solvers):
    """Return each solver's warm run, its runner and its cold seconds, and the members' starts."""
    runs, starts = {}, None
    for label, optim in solvers.items():
        runner = EnsembleMAP(model, optim, ensemble_size=MEMBERS)

        def run(runner=runner):
            return runner.run(jax.random.key(0), STEPS, *args, progress_bar=False)

        jax.clear_caches()
        runs[label] = run, runner, timed(run)
        starts = runner.optim.get_params(runner.init(jax.random.key(0), *args).optim_state)
    return runs, starts


def measure(name, with_adam):
    """Print the rows of one problem."""
    model, data = PROBLEMS[name]
    args = data()
    solvers = {
        "L-BFGS": optimistix.LBFGS(rtol=1e-8, atol=1e-8),
        "BFGS": optimistix.BFGS(rtol=1e-8, atol=1e-8),
    }
    if with_adam:
        solvers["Adam"] = numpyro.optim.Adam(0.01)
    runs, starts = ensembles(model, args, solvers)
    calls = {SCIPY: scipys(model, args, starts)} | {label: run for label, (run, *_) in runs.items()}
    for label, (run, *_) in runs.items():
        if label != "Adam":  # the last cold run emptied the caches of the others
            timed(run)
    times, found = {label: [] for label in calls}, {}
    for repeat in range(3):
        for label in list(calls)[:: -1 if repeat % 2 else 1]:
            if label != "Adam" or repeat == 0:
                found[label], seconds, _ = clocked(calls[label])
                times[label].append(seconds)
    losses = {SCIPY: np.array([r.fun for r in found[SCIPY]])}
    steps = {SCIPY: np.array([r.nfev for r in found[SCIPY]])}
    for label, (_, runner, _) in runs.items():
        losses[label] = np.asarray(runner.evaluate(found[label].state, *args))
        steps[label] = np.isfinite(np.asarray(found[label].losses)).sum(axis=1)
    best = min(np.nanmin(v) for v in losses.values())
    print(name)
    for label in (*runs, SCIPY):
        apart = np.sort(losses[label] - best)
        cold_seconds = runs[label][2] if label in runs else None
        print(
            f"  {label:16} cold {cold_seconds or np.nan:7.2f} s, warm "
            f"{np.median(times[label]):7.3f} s [{min(times[label]):.3f}, {max(times[label]):.3f}], "
            f"evaluations {np.median(steps[label]):5.0f} (most {steps[label].max():5d}), above the "
            f"best: least {apart[0]:.0e}, median {np.median(apart):.0e}, most {apart[-1]:.0e}",
            flush=True,
        )
        sides = {"theirs": times[SCIPY]}
        if label != SCIPY:
            ratio = [a / b for a, b in zip(times[label], times[SCIPY], strict=False)]
            sides |= {"ours": times[label], "ratio": ratio}
        note(f"{name}: {label} / {SCIPY}, warm" if label != SCIPY else f"{name}: {SCIPY}, warm",
             **sides, cold=cold_seconds, evaluations=list(steps[label]),
             worst_above_the_best=apart[-1])  # fmt: skip
    if with_adam:
        seconds = svi_cold(model, args)
        print(f"  one SVI, Adam    cold {seconds:7.2f} s", flush=True)
        note(f"{name}: one SVI, Adam, cold", theirs=seconds)


def pathfinder():
    """Print cold and warm seconds of Pathfinder, Pareto k, and peak memory so far."""
    problems = {name: PROBLEMS[name] for name in list(PROBLEMS)[:2]}
    problems["eight schools, decentred, 10-d"] = (decentred_schools, tuple)
    for name, (model, data) in problems.items():
        args, finder, ks = data(), Pathfinder(model), []

        def run(key, finder=finder, args=args, ks=ks):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # k is printed
                result = finder.run(key, *args)
            weights = np.exp(result.pool_log_weights)
            ks.append((result.pareto_k, 1 / (weights**2).sum()))
            return result.samples

        jax.clear_caches()
        first = timed(run, jax.random.key(0))
        times = [clocked(run, jax.random.key(seed))[1:] for seed in range(1, 6)]
        warm, processors = zip(*times, strict=True)
        processor = np.mean(processors)
        print(
            f"Pathfinder, {name:30} cold {first:6.2f} s, warm {np.median(warm):6.3f} s "
            f"(processor {processor:.3f}), k "
            f"{min(k for k, _ in ks):.2f} to {max(k for k, _ in ks):.2f}, effective draws "
            f"{np.median([n for _, n in ks]):.0f}; peak {peak():.2f} GiB",
            flush=True,
        )
        note(f"Pathfinder, {name}, warm", ours=warm, cold=first, pareto_k=[k for k, _ in ks],
             peak_gib_of_the_whole_process=peak())  # fmt: skip


if __name__ == "__main__":
    chosen = [name for name in PROBLEMS if any(word in name for word in sys.argv[1:])]
    print(f"{MEMBERS} members, at most {STEPS} steps", flush=True)
    with saved("quasi_newton"):
        if not chosen:
            pathfinder()
        for problem in [] if "pathfinder" in sys.argv else chosen or PROBLEMS:
            measure(problem, "--no-adam" not in sys.argv)
