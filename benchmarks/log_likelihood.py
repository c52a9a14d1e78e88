"""Time of the pointwise log likelihood of an ensemble, against `numpyro.infer.log_likelihood`.

Run `python benchmarks/log_likelihood.py [draws] [observations]`; 16 members of 500 draws and 10,000
observations by default. `numpyro.infer.log_likelihood` takes one draw after the other by default,
or with `parallel=True` all at once.
"""

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from common import difference, in_turns, report, timed
from numpyro.infer import log_likelihood
from records import peak, saved

from numpyro_ensemble import to_arviz

MEMBERS = 16


def model(x, y):
    """A linear regression on five inputs."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def main(number, rows):
    """Compare the package with NumPyro's sequential and parallel calls."""
    key_x, key_w, key_n = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (rows, 5))
    y = x.sum(axis=1)
    shape = (MEMBERS, number)
    samples = {
        "w": 1.0 + 0.1 * jax.random.normal(key_w, (*shape, 5)),
        "noise": jnp.exp(0.1 * jax.random.normal(key_n, shape)),
    }
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in samples.items()}

    def ours(key):
        data = to_arviz(model, samples, x, y, rng_key=key, posterior_predictive=False)
        return data["log_likelihood"]["y"].values

    def one_by_one(key):
        return log_likelihood(model, flat, x, y)["y"]

    def at_once(key):
        return log_likelihood(model, flat, x, y, parallel=True)["y"]

    print(f"{MEMBERS} members, {number} draws, {rows} observations")
    timed(ours, jax.random.key(9))
    timed(one_by_one, jax.random.key(9))
    pairs = in_turns(ours, one_by_one, 3)
    name = "to_arviz, density and likelihood / one by one, warm"
    report(name, pairs, **difference(*pairs.values))
    outcome = MEMBERS * number * rows * 4 / 2**30
    print(f"peak memory so far {peak():.2f} GiB; one outcome is {outcome:.2f}")
    timed(at_once, jax.random.key(9))
    pairs = in_turns(ours, at_once, 3)
    name = "to_arviz, density and likelihood / all at once, warm"
    report(name, pairs, **difference(*pairs.values))
    print(f"peak memory {peak():.2f} GiB")


if __name__ == "__main__":
    with saved("log_likelihood"):
        main(*(int(a) for a in (sys.argv[1:3] if len(sys.argv) > 2 else (500, 10_000))))
