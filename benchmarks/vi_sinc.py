"""Speed of EnsembleVI on the sinc problem, as ratios measured in one process, in turns.

Run `python benchmarks/vi_sinc.py` (some minutes); `JAX_ENABLE_X64=1` for double precision. All fit
mean-field guides to the network of the quickstart: 16 members, 1,500 steps of Adam at 5e-3.
"""

import sys

import jax
import jax.numpy as jnp
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
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from quickstart import NOISE, STEPS, model, network
from records import saved, sized

from numpyro_ensemble import EnsembleVI

ADAM = optax.adam(5e-3)  # the same on all sides: in double precision numpyro.optim.Adam is slower


def hand_written(members, steps):
    """Return a jitted fit of all members in plain JAX: `vmap` of a `scan`."""

    def loss(params, key):
        leaves, treedef = jax.tree.flatten(params["loc"])
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
        scale = jax.tree.map(jax.nn.softplus, params["scale"])
        noise = jax.tree.map(lambda k, x: jax.random.normal(k, x.shape), keys, params["loc"])
        draw = jax.tree.map(lambda m, s, e: m + s * e, params["loc"], scale, noise)
        log_q = -sum(
            (0.5 * e**2 + jnp.log(s) + 0.5 * jnp.log(2 * jnp.pi)).sum()
            for e, s in zip(jax.tree.leaves(noise), jax.tree.leaves(scale), strict=True)
        )
        residual = (Y - network(draw, X)) / NOISE
        prior = sum((0.5 * w**2 + 0.5 * jnp.log(2 * jnp.pi)).sum() for w in draw.values())
        data = (0.5 * residual**2 + jnp.log(NOISE) + 0.5 * jnp.log(2 * jnp.pi)).sum()
        return data + prior + log_q

    def fit(key):
        def step(carry, _):
            params, state, key = carry
            key, key_step = jax.random.split(key)
            value, gradient = jax.value_and_grad(loss)(params, key_step)
            updates, state = ADAM.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, key), value

        key_start, key = jax.random.split(key)
        loc = uniform_start(key_start)
        scale = jax.tree.map(lambda x: jnp.full(x.shape, jnp.log(jnp.expm1(0.1))), loc)
        params = {"loc": loc, "scale": scale}
        carry, losses = jax.lax.scan(step, (params, ADAM.init(params), key), length=steps)
        return losses, carry[0]

    compiled = jax.jit(jax.vmap(fit))
    return lambda key: compiled(jax.random.split(key, members))


def runner(members=16):
    """Return a new runner."""
    return EnsembleVI(model, AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=members)


def run(ensemble, key):
    """Fit by a runner of this package."""
    return ensemble.run(key, STEPS, X, Y, progress_bar=False)


def svi(key):
    """Make a single run of SVI with a new guide."""
    single = SVI(model, AutoNormal(model), ADAM, Trace_ELBO())
    return single.run(key, STEPS, X, Y, progress_bar=False)


def first_and_second(key):
    """Return the seconds of a new runner's second run and of its first, and what they differ by."""
    jax.clear_caches()
    ensemble = runner()
    (one, first, _), (two, second, _) = (clocked(run, ensemble, key) for _ in range(2))
    return (second, first), difference(two.losses, one.losses)


def main(repeats):
    """Measure all ratios."""
    print(f"sinc problem, mean-field, {STEPS} steps")
    sixteen, by_hand = runner(), hand_written(16, STEPS)
    for fit in (by_hand, lambda key: run(sixteen, key)):
        timed(fit, jax.random.key(99))
    pairs = in_turns(lambda key: run(sixteen, key), by_hand, 3 * repeats)
    ours, (theirs, _) = pairs.values
    figures = final_losses(ours.losses, theirs)
    report("warm run / hand-written vmap + scan", pairs, "<= 1.1", **figures)
    ours_cold, svi_cold = cold(lambda key: run(runner(), key)), cold(svi)
    pairs = in_turns(ours_cold, svi_cold, repeats)
    figures = final_losses(*(result.losses for result in pairs.values))
    report("cold run of 16 / cold run of ONE SVI", pairs, "<= 0.9", **figures)
    found = [first_and_second(jax.random.key(i)) for i in range(repeats)]
    twice, values = zip(*found, strict=True)
    report("second run, same shapes / first", twice, "<= 0.6", **values[-1])

    number = sized(16, 4)

    def many_svis(key):
        return [svi(member) for member in jax.random.split(key, number)]

    pairs = in_turns(ours_cold, cold(many_svis), 1)
    ours, theirs = pairs.values
    theirs = jnp.stack([result.losses for result in theirs])
    figures = final_losses(ours.losses, theirs)
    report(f"cold run of 16 / {number} SVIs in turn", pairs, "<= 0.1", **figures)


if __name__ == "__main__":
    with saved("vi_sinc"):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
