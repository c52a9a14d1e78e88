"""Memory of many members, speed on several devices, and the cost of a progress bar.

Run `python benchmarks/scaling.py` (ten minutes on two quiet cores), or one of `memory`, `devices`,
`weak`, `bar`. All fit mean-field guides to the network of the quickstart. Devices are forced host
devices of this machine's processor; each has the threads of one core at most.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
from common import X, Y, clocked, difference, in_turns, report, timed
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from quickstart import model
from records import note, peak, saved, sized

from numpyro_ensemble import EnsembleVI

ROOM = 2.0  # GiB of memory that a run may take


def runner(members, **options):
    """Return a new runner."""
    guide, optim, loss = AutoNormal(model), optax.adam(5e-3), Trace_ELBO()
    return EnsembleVI(model, guide, optim, loss, ensemble_size=members, **options)


def fit(ensemble, key, steps, progress_bar=False):
    """Fit, and return the losses."""
    return ensemble.run(key, steps, X, Y, progress_bar=progress_bar).losses


def in_process(call, devices=None):
    """Print the output of a call of this file in its own process, with that number of devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if devices:
        flags += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-W", "ignore", "-c", f"import scaling; {call}"]
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run(command, cwd=here, env=environment, check=True)


def many(size, groups):
    """Fit many members for a few steps, and print and record memory and time."""
    ensemble = runner(size, member_batch_size=groups)
    losses, seconds, _ = clocked(fit, ensemble, jax.random.key(0), 20)
    last = float(jnp.median(losses[:, -1]))  # the same for groups of any size
    leaves = jax.tree.leaves(ensemble.init(jax.random.key(0), X, Y).optim_state)
    state = sum(leaf.nbytes for leaf in leaves) / 2**30
    print(
        f"{size} members, {groups or 'all'} at a time: peak {peak():.2f} GiB (room {ROOM}), of "
        f"which {state:.2f} are parameters and Adam's; 20 steps cold {seconds:.1f} s, "
        f"median of the last losses {last:.7g}",
        flush=True,
    )
    note(f"{size} members, {groups or 'all'} at a time, 20 steps, cold", ours=seconds,
         peak_gib=peak(), state_gib=state, last_loss=last)  # fmt: skip


def memory():
    """Measure the peak memory of 10,000 members, each in a process of its own."""
    for groups in (100, 1000, None):
        in_process(f"scaling.many(10_000, {groups})")


def one_against_two(repeats, members=16, steps=1500):
    """Time one device against two, in turns."""
    one, two = runner(members), runner(members, mesh="all")
    for ensemble in (one, two):
        fit(ensemble, jax.random.key(9), steps)
    pairs = in_turns(lambda key: fit(one, key, steps), lambda key: fit(two, key, steps), repeats)
    name = f"one device / {jax.device_count()}, {members} members"
    report(name, pairs, ">= 1.6", **difference(*pairs.values))


def devices(repeats=7):
    """Measure how much faster two devices are."""
    for members in (16, 256):
        in_process(f"scaling.one_against_two({repeats}, {members}, {24_000 // members})", 2)


def of_mesh(each, steps=300):
    """Time a step with that number of members on each device."""
    number = jax.device_count()
    ensemble = runner(each * number, mesh="all")
    times = sorted(timed(fit, ensemble, jax.random.key(i), steps) for i in range(6))[:-1]
    print(
        f"{number} devices, {each} members on each: {1e3 * times[2] / steps:.3f} ms a step "
        f"[{1e3 * times[0] / steps:.3f}, {1e3 * times[-1] / steps:.3f}]",
        flush=True,
    )
    note(f"a step on {number} devices, {each} members on each", ours=[t / steps for t in times])


def weak(each=64):
    """Measure a step on 1 to 8 devices, with the same number of members on each."""
    for number in (1, 2, 4, 8):
        in_process(f"scaling.of_mesh({each})", number)


def bar(steps=1500):
    """Measure what a progress bar costs."""
    ensemble = runner(16)
    with open(os.devnull, "w") as nowhere:
        errors, sys.stderr = sys.stderr, nowhere
        try:
            for shown in (True, False):
                fit(ensemble, jax.random.key(9), steps, shown)
            pairs = in_turns(
                lambda key: fit(ensemble, key, steps, True),
                lambda key: fit(ensemble, key, steps),
                sized(15, 5),
            )
        finally:
            sys.stderr = errors
    report("with a progress bar / without", pairs, "<= 1.02", **difference(*pairs.values))


if __name__ == "__main__":
    tasks = {"memory": memory, "devices": devices, "weak": weak, "bar": bar}
    with saved("scaling"):
        for name in sys.argv[1:] or tasks:
            tasks[name]()
