"""Tools of all benchmarks: timing in turns, and the sinc problem of the quickstart."""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
from records import ROOT, note, peak

sys.path.insert(0, str(ROOT / "examples"))
from quickstart import WIDTHS, make_data

X, Y, *_ = (jnp.asarray(part) for part in make_data())


def uniform_start(key):
    """Draw weights from Uniform(-2, 2), like NumPyro's `init_to_uniform`."""
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        key, key_w, key_b = jax.random.split(key, 3)
        weights[f"w{layer}"] = jax.random.uniform(key_w, (fan_in, fan_out), minval=-2, maxval=2)
        weights[f"b{layer}"] = jax.random.uniform(key_b, (fan_out,), minval=-2, maxval=2)
    return weights


def clocked(function, *args, **options):
    """Return a call's value, its wall-clock seconds and its processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = jax.block_until_ready(function(*args, **options))
    return value, time.perf_counter() - wall, time.process_time() - cpu


def timed(function, *args, **options):
    """Return the wall-clock seconds of a call until its arrays are ready."""
    return clocked(function, *args, **options)[1]


class Pairs(list):
    """Pairs of wall-clock seconds.

    `processor` has the pairs of processor seconds, `values` what both functions returned last.
    """

    def __init__(self):
        self.processor, self.values = [], []


def in_turns(ours, theirs, repeats):
    """Time two functions of a key in turns, and return the pairs of seconds."""
    pairs = Pairs()
    for i in range(repeats):
        key = jax.random.key(i)
        pair = [(ours, 0), (theirs, 1)]
        times, processor, values = [0.0, 0.0], [0.0, 0.0], [None, None]
        for function, place in pair if i % 2 else reversed(pair):
            value, times[place], processor[place] = clocked(function, key)
            if i + 1 == repeats:  # earlier values would only take memory
                values[place] = value
            del value
        pairs.append(times)
        pairs.processor.append(processor)
        pairs.values = values
    return pairs


def cold(fit):
    """Wrap a fit so that everything it needs is compiled again."""

    def fresh(key):
        jax.clear_caches()
        return fit(key)

    return fresh


def difference(ours, theirs):
    """Return the largest difference of two trees of arrays, over the largest number of theirs."""

    def flat(tree):
        return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])

    ours, theirs = flat(ours), flat(theirs)
    return {"largest_relative_difference": float(abs(ours - theirs).max() / abs(theirs).max())}


def final_losses(ours, theirs):
    """Return the final losses of both sides: means of 100 steps, medians over fits `(..., S)`."""
    each = (float(jnp.median(losses[..., -100:].mean(axis=-1))) for losses in (ours, theirs))
    return dict(zip(("final_loss", "final_loss_instead"), each, strict=True))


def report(name, pairs, target=None, **figures):
    """Print and record the medians of both, the ratios of the pairs, and other figures."""
    ratios = sorted(a / b for a, b in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    goal = f" (target {target})" if target else ""
    print(
        f"{name:44} {ours:8.3f} s / {theirs:8.3f} s, ratio {statistics.median(ratios):.3f} "
        f"[{ratios[0]:.3f}, {ratios[-1]:.3f}]{goal}",
        *(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items()),
        sep=", ",
        flush=True,
    )
    by_processor = [a / b for a, b in getattr(pairs, "processor", ()) if b > 0.0]
    if by_processor:
        figures["ratio_by_processor"] = by_processor
    columns = dict(zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True))
    figures["peak_gib_of_the_whole_process"] = peak()
    note(name.strip(), ratio=ratios, target=target, **columns, **figures)
