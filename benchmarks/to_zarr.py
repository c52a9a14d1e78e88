"""Time and memory of predictions that go to a Zarr store, against the call in memory.

Run `python benchmarks/to_zarr.py [rows] [draws] [repeats]`; a linear model of 8 columns with
100,000 rows and 200 draws, five times each, by default. Ways of writing are measured in turns, each
time in a new process that compiles first. The time is that of the call, with checks and the opening
of the store. The memory is the peak of the process, including Python and JAX.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from records import note, peak, saved

COLUMNS = 8


def measure(how, rows, draws):
    """Print the seconds of a second call, this process's peak memory in GiB, and the errors.

    The errors are the largest differences from the call in memory: of all numbers, and of means
    over draws. Random numbers of blocks of rows are others.
    """
    import jax
    import numpy as np
    import numpyro
    import numpyro.distributions as dist

    from numpyro_ensemble import EnsemblePredictive

    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, COLUMNS)).astype(np.float32)
    samples = {
        "w": rng.normal(size=(4, draws // 4, COLUMNS)).astype(np.float32),
        "noise": np.ones((4, draws // 4), np.float32),
    }
    predictive = EnsemblePredictive(model, samples, batch_ndims=2)
    folder = tempfile.mkdtemp(dir=os.environ.get("TO_ZARR_FOLDER"))

    def call(seed):
        key = jax.random.key(seed)
        if how == "in memory":
            return jax.block_until_ready(predictive(key, x)["y"])
        path = f"{folder}/{seed}"
        cut = {"row_args": ["x"]} if how == "by rows" else {}
        return predictive.to_zarr(path, key, x, progress_bar=False, **cut)["y"]

    call(0)
    shutil.rmtree(f"{folder}/0", ignore_errors=True)
    begin = time.perf_counter()
    y = call(1)
    seconds = time.perf_counter() - begin
    assert y.shape == (4, draws // 4, rows)
    most = peak()
    kept, y = np.asarray(predictive(jax.random.key(1), x)["y"]), np.asarray(y)
    error = abs(y - kept).max() / abs(kept).max()
    of_means = abs((y - kept).mean(axis=(0, 1))).max() / abs(kept).max()
    shutil.rmtree(folder)
    print(json.dumps([seconds, most, float(error), float(of_means)]))


def main(rows=100_000, draws=200, repeats=5):
    """Compare writing by draws and by rows with the call in memory, in turns."""
    ways = ("in memory", "by draws", "by rows")
    found = {how: [] for how in ways}
    for turn in range(repeats):
        for how in ways if turn % 2 else reversed(ways):
            command = [sys.executable, __file__, how, str(rows), str(draws)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[how].append(json.loads(run.stdout.splitlines()[-1]))
    size = rows * draws * 4 / 2**30
    print(f"{rows:,} rows, {draws:,} draws: {size:.2f} GiB of predictions")
    for how in ways:
        seconds, peaks, errors, of_means = zip(*found[how], strict=True)
        pairs = zip(found[how], found["in memory"], strict=True)
        ratios = sorted(ours[0] / theirs[0] for ours, theirs in pairs)
        told = (
            f"{statistics.median(seconds):.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]",
            f"ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            f"peak {statistics.median(peaks):.2f} GiB [{min(peaks):.2f}, {max(peaks):.2f}]",
        )
        print(f"{how:10}", *told, sep="  ")
        if how == "in memory":
            note(f"{how}, warm", theirs=seconds, peak_gib=peaks)
            continue
        theirs, theirs_peaks, *_ = zip(*found["in memory"], strict=True)
        note(f"{how} / in memory, warm", ours=seconds, theirs=theirs, ratio=ratios, peak_gib=peaks,
             peak_gib_instead=theirs_peaks, largest_relative_difference=max(errors),
             of_means_over_draws=max(of_means))  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].isdigit():
        measure(sys.argv[1], *map(int, sys.argv[2:4]))
    else:
        with saved("to_zarr"):
            main(*map(int, sys.argv[1:4]))
