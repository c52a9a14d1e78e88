"""How members and chains fill a device: time a step and memory, from few to many.

Run `python benchmarks/devices.py` where an accelerator is, and `JAX_PLATFORMS=cpu python
benchmarks/devices.py` beside it; `members` or `chains` alone, or a largest number (`members 256`),
take less time. Each prints a line for every size, and writes them to
`benchmarks/results/devices_<platform>.json` (or to the folder in `RESULTS`).
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import optax
from common import X, Y, timed
from mcmc_problems import PROBLEMS
from numpyro.infer import MCMC, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from quickstart import model
from records import machine, versions

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.mcmc import MEADS, ChEES

FOLDER = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
MEMBERS = (1, 4, 16, 64, 256, 1024, 4096)
CHAINS = (64, 256, 1024, 4096, 16384)
STEPS, DRAWS = 200, 50


def peak_memory():
    """Return the process's peak so far on the device in MiB, where the device counts it."""
    counted = jax.devices()[0].memory_stats() or {}
    return counted.get("peak_bytes_in_use", 0) / 2**20


def warm_seconds(function, repeats=3):
    """Return the best of some repeats, after a first call."""
    timed(function)
    return min(timed(function) for _ in range(repeats))


def of_members(count):
    """Time a step of mean-field VI of the sinc network."""
    runner = EnsembleVI(
        model, AutoNormal(model), optax.adam(5e-3), Trace_ELBO(), ensemble_size=count
    )
    key = jax.random.key(0)

    def run():
        return runner.run(key, STEPS, X, Y, progress_bar=False).losses

    return warm_seconds(run) / STEPS


def of_chains(count, kernel):
    """Time a draw of the item response problem; adaptation is short, and steps are as they come."""
    problem, args = PROBLEMS["irt"]
    mcmc = MCMC(
        kernel(problem),
        num_warmup=100,
        num_samples=DRAWS,
        num_chains=count,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(jax.random.key(0), *args)

    def run():
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(jax.random.key(1), *args)
        return mcmc.get_samples()["slope"]

    return warm_seconds(run, repeats=2) / DRAWS


def measure(name, sizes, function):
    """Print and save a row for each size, until one fails."""
    rows = []
    for size in sizes:
        begin = time.perf_counter()
        try:
            seconds = function(size)
        except Exception as error:  # memory ends somewhere
            rows.append({"what": name, "size": size, "failed": str(error)[:200]})
            save(rows, name)
            print(f"{name:8} {size:6d} failed: {str(error)[:100]}", flush=True)
            break
        row = {"what": name, "size": size, "seconds": seconds, "MiB": peak_memory()}
        rows.append(row | {"whole": time.perf_counter() - begin})
        print(
            f"{name:8} {size:6d} {1e3 * seconds:9.3f} ms, {1e6 * seconds / size:9.2f} us each, "
            f"{row['MiB']:8.0f} MiB",
            flush=True,
        )
        save(rows, name)


def save(rows, name):
    """Write the rows of one kind, with the machine that they were measured on."""
    FOLDER.mkdir(exist_ok=True, parents=True)
    path = FOLDER / f"devices_{jax.devices()[0].platform}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in kept if row["what"] != name] + rows
    record = {"machine": machine(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(words):
    """Measure members, chains or both, up to the largest number if one is given."""
    largest = next((int(word) for word in words if word.isdigit()), 10**9)
    names = [word for word in words if not word.isdigit()] or ["members", "chains"]
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    if "members" in names:
        measure("members", [n for n in MEMBERS if n <= largest], of_members)
    if "chains" in names:
        for kernel in (MEADS, ChEES):
            sizes = [n for n in CHAINS if n <= largest]
            measure(kernel.__name__, sizes, lambda n, kernel=kernel: of_chains(n, kernel))


if __name__ == "__main__":
    main(sys.argv[1:])
