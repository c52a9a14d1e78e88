"""A call that writes a store, which `test_zarr` kills: `killed_store.py directory`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_ensemble import EnsemblePredictive

X = np.random.default_rng(0).normal(size=(6_000, 2))
KEY = jax.random.key(3)


def model(x, y=None):
    """Have a scalar below a vector, names in no order, numbers and counts."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.HalfNormal(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, a), obs=y)
        numpyro.sample("b", dist.Poisson(jnp.full(len(x), a)))


def write(store):
    """Write 400 blocks of two arrays."""
    samples = {"w": jnp.arange(40.0).reshape(2, 10, 2) / 40, "a": jnp.linspace(1, 2, 20)}
    samples["a"] = samples["a"].reshape(2, 10)
    predictive = EnsemblePredictive(model, samples, batch_ndims=2, batch_size=5)
    return predictive.to_zarr(
        store, KEY, X, row_args=["x"], row_batch_size=60, progress_bar=False
    )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print("begun", flush=True)
    write(sys.argv[1])
