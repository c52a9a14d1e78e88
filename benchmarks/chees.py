"""ChEES compared with BlackJAX's ChEES, and the effect of the layout of gradients.

Run `python benchmarks/chees.py blackjax [problems]` for draws of both kernels from the same starts.
Run `python benchmarks/chees.py layout [problems]` for gradients of 64 chains, at once and a few at
a time, in turns.
"""

import statistics
import sys
import warnings
from functools import partial

import blackjax
import jax
import numpy as np
import optax
from blackjax.adaptation.chees_adaptation import chees_adaptation
from common import clocked, difference, timed
from mcmc import figures
from mcmc_problems import PROBLEMS
from numpyro.infer import MCMC
from numpyro.infer.util import potential_energy
from records import note, saved, sized

from numpyro_ensemble.mcmc import ChEES, starts
from numpyro_ensemble.mcmc.layout import laid_out

CHAINS, WARMUP, DRAWS = 64, 500, 500


def density_of(model, args):
    """Return the log density over a dict of unconstrained values."""
    return lambda z: -potential_energy(model, args, {}, z)


def ours(model, args, init_params, key):
    """Return draws `(C, N, ...)` of unconstrained values by this package's kernel."""
    density = density_of(model, args)
    mcmc = MCMC(
        ChEES(potential_fn=lambda z: -density(z)),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )

    @jax.jit  # MCMC compiles its loop in every run, which has nothing to do with kernels
    def run(key):
        mcmc.run(key, init_params=init_params)
        return mcmc.get_samples(group_by_chain=True)

    return run(key), run


def theirs(model, args, init_params, key, metric):
    """Return the same draws by BlackJAX's adaptation and its kernel."""
    density = density_of(model, args)
    adaptation = chees_adaptation(density, CHAINS, mass_matrix_estimation=metric)

    @jax.jit
    def program(key):
        warm_key, key = jax.random.split(key)
        (states, parameters), _ = adaptation.run(
            warm_key, init_params, 0.1, optax.adam(0.02), WARMUP, max_sampling_steps=DRAWS
        )
        kernel = blackjax.dynamic_hmc(density, **parameters)

        def step(states, key):
            states, _ = jax.vmap(kernel.step)(jax.random.split(key, CHAINS), states)
            return states, states.position

        draws = jax.lax.scan(step, states, jax.random.split(key, DRAWS))[1]
        return jax.tree.map(lambda x: x.swapaxes(0, 1), draws)

    return program(key), program


def beside_blackjax(*problems):
    """Print R-hat, effective draws and cold and warm seconds of both kernels."""
    for problem in problems or ("irt", "radon", "correlated"):
        model, args = PROBLEMS[problem]
        init_params = starts.from_nuts(jax.random.key(0), model, CHAINS, *args)
        kinds = {
            "ours": ours,
            "BlackJAX": partial(theirs, metric=None),
            "BlackJAX, diagonal": partial(theirs, metric="diagonal"),
        }
        runs, cold = {}, {}
        for label, kind in kinds.items():
            found, cold[label], _ = clocked(kind, model, args, init_params, jax.random.key(1))
            runs[label] = found[1]
        rows = {label: [] for label in kinds}
        for seed in range(2, 5):
            for label, run in runs.items():
                draws, seconds, _ = clocked(run, jax.random.key(seed))
                rhat, bulk, _ = figures({k: np.asarray(x) for k, x in draws.items()})
                rows[label].append((rhat, bulk, seconds))
        for label, values in rows.items():
            rhat, bulk, seconds = np.median(np.array(values), axis=0)
            print(
                f"{problem:11} {label:19} R-hat {rhat:.4f}, effective draws {bulk:6.0f}, cold "
                f"{cold[label]:5.1f} s, warm {seconds:5.2f} s, {bulk / seconds:6.0f} a second",
                flush=True,
            )
            side = {"ours" if label == "ours" else "theirs": [v[2] for v in values]}
            note(f"{problem}, {label}, warm", **side, cold=cold[label], rhat=rhat, bulk=bulk)


def layout(*problems):
    """Print milliseconds for the gradients of 64 chains, at once and a few chains at a time."""
    for problem in problems or ("irt", "radon", "schools", "correlated"):
        model, args = PROBLEMS[problem]
        z = starts.from_pathfinder(jax.random.key(0), model, CHAINS, *args)
        density = density_of(model, args)
        of_few = laid_out(lambda z, _, density=density: density(z))
        ways = {"at once": density, "laid out": lambda z, fn=of_few: fn(z, None)}
        programs = {k: jax.jit(jax.vmap(jax.value_and_grad(fn))) for k, fn in ways.items()}
        times = {k: [] for k in ways}
        for repeat in range(sized(32, 12)):
            for label, program in programs.items():
                seconds = sum(timed(program, z) for _ in range(10))
                if repeat > 1:
                    times[label].append(100.0 * seconds)
        each = {label: statistics.median(t) for label, t in times.items()}
        ratios = [a / b for a, b in zip(times["laid out"], times["at once"], strict=True)]
        print(f"{problem:11} {each} ms, ratio {statistics.median(ratios):.2f}", flush=True)
        sides = ([1e-3 * t for t in times[label]] for label in ("laid out", "at once"))
        pairs = dict(zip(("ours", "theirs"), sides, strict=True))
        name = f"{problem}: gradients of {CHAINS} chains, laid out / at once"
        apart = difference(*(programs[label](z)[1] for label in ("laid out", "at once")))
        note(name, **pairs, ratio=ratios, **apart)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    task = {"blackjax": beside_blackjax, "layout": layout}[sys.argv[1]]
    with saved(f"chees_{sys.argv[1]}"):
        task(*sys.argv[2:])
