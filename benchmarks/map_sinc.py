"""Speed of EnsembleMAP on the sinc problem, as ratios measured in one process, in turns.

Run `python benchmarks/map_sinc.py` (a few minutes); `JAX_ENABLE_X64=1` for double precision. The
competitors do the same work: 16 members, 1,500 steps of Adam at 5e-3 from Uniform(-2, 2).
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpyro
import optax
from common import (
    X,
    Y,
    clocked,
    cold,
    difference,
    final_losses,
    in_turns,
    report,
    timed,
    uniform_start,
)
from numpyro.infer import SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import AutoDelta
from quickstart import NOISE, STEPS, model, network
from records import note, peak, saved, sized

from numpyro_ensemble import EnsembleMAP


def hand_written(members, steps):
    """Return a jitted fit of all members in plain JAX: `vmap` of a `scan`."""
    adam = optax.adam(5e-3)

    def loss(weights):
        residual = (Y - network(weights, X)) / NOISE
        penalty = sum((w**2).sum() for w in weights.values())
        count = sum(w.size for w in weights.values())
        constant = 0.5 * (Y.size + count) * jnp.log(2 * jnp.pi) + Y.size * jnp.log(NOISE)
        return 0.5 * (residual**2).sum() + 0.5 * penalty + constant

    def fit(key):
        def step(carry, _):
            weights, state = carry
            value, gradient = jax.value_and_grad(loss)(weights)
            updates, state = adam.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), value

        weights = uniform_start(key)
        (weights, _), losses = jax.lax.scan(step, (weights, adam.init(weights)), length=steps)
        return losses, weights

    compiled = jax.jit(jax.vmap(fit))
    return lambda key: compiled(jax.random.split(key, members))


def runner(members=16):
    """Return a new runner."""
    return EnsembleMAP(model, numpyro.optim.Adam(5e-3), ensemble_size=members)


def run(ensemble, key, **options):
    """Fit by a runner of this package."""
    return ensemble.run(key, STEPS, X, Y, **{"progress_bar": False, **options})


def ours_cold(key):
    """Make one cold run of the ensemble."""
    return run(runner(), key)


def svi_cold(key):
    """Make one cold run of a single SVI with AutoDelta."""
    guide = AutoDelta(model, init_loc_fn=init_to_uniform)
    svi = SVI(model, guide, numpyro.optim.Adam(5e-3), Trace_ELBO())
    return svi.run(key, STEPS, X, Y, progress_bar=False)


def memory(members):
    """Print time and peak memory of one run with many members; the process is its own."""
    result, first, _ = clocked(run, runner(members), jax.random.key(0))
    again = timed(run, runner(members), jax.random.key(1))
    print(
        f"{members} members: cold {first:.1f} s, again (compiled anew) {again:.1f} s, "
        f"peak memory {peak():.2f} GiB, {int(result.finite.sum())} finite"
    )
    note(f"{members} members, cold", ours=[first, again], peak_gib=peak())


def main():
    """Measure all ratios, and then memory."""
    print(f"sinc problem, {STEPS} steps")
    many, sixteen = runner(256), runner()
    by_hand = hand_written(16, STEPS)
    for fit in (by_hand, lambda key: run(sixteen, key), lambda key: run(many, key)):
        timed(fit, jax.random.key(99))
    pairs = in_turns(lambda key: run(sixteen, key), by_hand, sized(15, 5))
    ours, (theirs, _) = pairs.values
    figures = final_losses(ours.losses, theirs)
    report("warm run / hand-written vmap + scan", pairs, "<= 1.05", **figures)
    pairs = in_turns(lambda key: run(sixteen, key, progress_bar=True),
                     lambda key: run(sixteen, key), sized(15, 5))  # fmt: skip
    figures = difference(*(result.losses for result in pairs.values))
    report("with progress bar / without", pairs, "<= 1.02", **figures)
    pairs = in_turns(lambda key: run(many, key), lambda key: run(sixteen, key), 3)
    figures = final_losses(*(result.losses for result in pairs.values))
    report("256 members / 16 members, warm", pairs, **figures)
    pairs = in_turns(cold(ours_cold), cold(svi_cold), sized(5, 3))
    figures = final_losses(*(result.losses for result in pairs.values))
    report("cold run of 16 / cold run of ONE SVI", pairs, "<= 0.6", **figures)
    subprocess.run([sys.executable, __file__, sized("1000", "100")], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        memory(int(sys.argv[1]))
    else:
        with saved("map_sinc"):
            main()
