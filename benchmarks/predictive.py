"""Time of predictions from an ensemble, against NumPyro's `Predictive` on the flattened draws.

Run `python benchmarks/predictive.py [draws] [inputs]`; 16 members of 250 draws of the quickstart's
network at 2,000 inputs by default. `Predictive` makes one draw after the other by default, or with
`parallel=True` all at once. Both ways compile anew for each new `Predictive`. The second call of an
`EnsemblePredictive` compiles nothing.
"""

import sys

import jax
import jax.numpy as jnp
from common import difference, in_turns, report, uniform_start
from numpyro.infer import Predictive
from quickstart import model
from records import peak, saved, sized

from numpyro_ensemble import EnsemblePredictive

MEMBERS = 16


def main(number, rows):
    """Compare a first and a second call with both ways of NumPyro's `Predictive`."""
    x = jnp.linspace(-12.0, 12.0, rows)
    keys = jax.random.split(jax.random.key(0), (MEMBERS, number))
    grouped = jax.vmap(jax.vmap(uniform_start))(keys)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), grouped)
    kept = EnsemblePredictive(model, grouped, batch_ndims=2)
    plain = {how: Predictive(model, flat, parallel=how) for how in (False, True)}
    kept(jax.random.key(9), x)
    print(f"{MEMBERS} members, {number} draws, {rows} inputs; peak memory {peak():.2f} GiB")

    def first(key):
        return EnsemblePredictive(model, grouped, batch_ndims=2)(key, x)

    def second(key):
        return kept(key, x)

    for name, ours in (("first call", first), ("second call", second)):
        for how, label in ((False, "one by one"), (True, "all at once")):
            pairs = in_turns(ours, lambda key, how=how: plain[how](key, x), sized(5, 3))
            ours_y, theirs_y = (values["y"] for values in pairs.values)  # draws of the same key
            figures = difference(ours_y, theirs_y)
            report(f"{name} / Predictive, {label}", pairs, **figures)
            print(f"peak memory so far {peak():.2f} GiB")


if __name__ == "__main__":
    with saved("predictive"):
        main(*(int(a) for a in sys.argv[1:3]) if len(sys.argv) > 1 else (250, 2000))
