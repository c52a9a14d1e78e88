"""What the benchmarks share: timing in turns, and the sinc problem of the quickstart."""

import resource
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import WIDTHS, make_data

X, Y, *_ = (jnp.asarray(part) for part in make_data())


def uniform_start(key):
    """Draw weights from Uniform(-2, 2), as NumPyro's `init_to_uniform`."""
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        key, key_w, key_b = jax.random.split(key, 3)
        weights[f"w{layer}"] = jax.random.uniform(key_w, (fan_in, fan_out), minval=-2, maxval=2)
        weights[f"b{layer}"] = jax.random.uniform(key_b, (fan_out,), minval=-2, maxval=2)
    return weights


def peak():
    """Return this process's peak memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(function, *args, **options):
    """Return the seconds that a call takes until its arrays are there."""
    begin = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(function(*args, **options)))
    return time.perf_counter() - begin


def in_turns(ours, theirs, repeats):
    """Time two functions of a key in turns, and return the pairs of seconds."""
    pairs = []
    for i in range(repeats):
        key = jax.random.key(i)
        pair = [(ours, 0), (theirs, 1)]
        times = [0.0, 0.0]
        for function, place in pair if i % 2 else reversed(pair):
            times[place] = timed(function, key)
        pairs.append(times)
    return pairs


def report(name, pairs, target=None):
    """Print the medians and the ratios, pair by pair."""
    ratios = sorted(a / b for a, b in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    goal = f" (target {target})" if target else ""
    print(
        f"{name:44} {ours:8.3f} s / {theirs:8.3f} s, ratio {statistics.median(ratios):.3f} "
        f"[{ratios[0]:.3f}, {ratios[-1]:.3f}]{goal}",
        flush=True,
    )


def cold(fit):
    """Wrap a fit so that everything it needs is compiled again."""

    def fresh(key):
        jax.clear_caches()
        return fit(key)

    return fresh
