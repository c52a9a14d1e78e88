"""Seconds a step and memory of few to many members and chains on one device.

Run `python benchmarks/devices.py` on a machine with an accelerator, and `JAX_PLATFORMS=cpu python
benchmarks/devices.py` for its CPU. `members` or `chains` alone, or a largest number
(`members 256`), take less time. Members are compared with one fit by a compiled scan of
`SVI.update`. Chains are timed by a compiled scan over steps of the kernel, because `MCMC.run`
compiles its loop in each call.
"""

import sys

import jax
import optax
from common import X, Y, clocked, timed
from mcmc_problems import PROBLEMS
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from quickstart import model
from records import note, saved, sized

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.mcmc import MCLMC, MEADS, ChEES

MEMBERS = (1, 4, 16, 64, 256, 1024, 4096)
CHAINS = (64, 256, 1024, 4096, 16384)
STEPS, DRAWS = sized(1000, 200), 50
REPEATS = 3
ADAM = optax.adam(5e-3)


def peak_memory():
    """Return the process's peak memory on the device in GiB, None where the device counts none."""
    counted = jax.devices()[0].memory_stats() or {}
    bytes_used = counted.get("peak_bytes_in_use")
    return None if bytes_used is None else bytes_used / 2**30


def warm_seconds(function):
    """Return the seconds of some calls after a first, untimed one."""
    timed(function)
    return [timed(function) for _ in range(REPEATS)]


def by_hand():
    """Return a function that fits once by `SVI`, with all steps in one compiled scan."""
    svi = SVI(model, AutoNormal(model), ADAM, Trace_ELBO())
    state = svi.init(jax.random.key(0), X, Y)

    def step(state, _):
        return svi.update(state, X, Y)

    scan = jax.jit(lambda state: jax.lax.scan(step, state, length=STEPS)[1])
    return lambda: scan(state)


def of_members(count):
    """Time a run of mean-field VI of the sinc network."""
    runner = EnsembleVI(model, AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=count)
    key = jax.random.key(0)
    return warm_seconds(lambda: runner.run(key, STEPS, X, Y, progress_bar=False).losses), STEPS


def of_chains(count, kernel):
    """Time draws of the item response problem, after a short adaptation and with adapted steps."""
    problem, args = PROBLEMS["irt"]
    sampler = kernel(problem)
    mcmc = MCMC(
        sampler, num_warmup=100, num_samples=DRAWS, num_chains=count,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.warmup(jax.random.key(0), *args)

    def step(state, _):
        state = sampler.sample(state, args, {})
        return state, state.potential_energy

    scan = jax.jit(lambda state: jax.lax.scan(step, state, length=DRAWS)[1])
    return warm_seconds(lambda: scan(mcmc.last_state)), DRAWS


def measure(name, sizes, function, theirs=None):
    """Print and record a row for each size, until one fails."""
    for size in sizes:
        try:
            (seconds, steps), whole, _ = clocked(function, size)
        except Exception as error:  # memory runs out at some size
            note(f"{name}, {size}", failed=str(error)[:100])
            print(f"{name:8} {size:6d} failed: {str(error)[:100]}", flush=True)
            break
        each = [value / steps for value in seconds]
        figures = {"theirs": theirs, "whole_seconds": whole, "peak_gib": peak_memory()}
        if theirs is not None:
            figures["ratio"] = [value / min(theirs) for value in each]
        note(f"a step of {name}, {size}", ours=each, **figures)
        print(
            f"{name:8} {size:6d} {1e3 * min(each):9.3f} ms a step, {whole:.1f} s in all", flush=True
        )


def main(words):
    """Measure members, chains or both, up to the largest number if one is given."""
    largest = next((int(word) for word in words if word.isdigit()), 10**9)
    names = [word for word in words if not word.isdigit()] or ["members", "chains"]
    if "members" in names:
        one = [value / STEPS for value in warm_seconds(by_hand())]
        print(f"SVI by hand, 1 {1e3 * min(one):9.3f} ms a step", flush=True)
        measure("members", [n for n in MEMBERS if n <= largest], of_members, one)
    if "chains" in names:
        for kernel in (MEADS, ChEES, MCLMC):
            sizes = [n for n in CHAINS if n <= largest]
            measure(kernel.__name__, sizes, lambda n, kernel=kernel: of_chains(n, kernel))


if __name__ == "__main__":
    with saved(f"devices_{jax.devices()[0].platform}"):
        main(sys.argv[1:])
