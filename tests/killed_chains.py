"""Chains that `test_mcmc_checkpoints` kills: `killed_chains.py kernel directory result`."""

import sys

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import AIES, MCMC, NUTS, DiscreteHMCGibbs

from numpyro_ensemble import Checkpoint
from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES, checkpointed, run_checkpointed

Y = np.random.default_rng(0).normal(size=12)


def model(y, scale=1.0):
    """A model with a scalar below a matrix, names in no order, and a deterministic site."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    a = numpyro.sample("a", dist.HalfNormal(scale))
    numpyro.deterministic("m", w.sum() + a)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(w.sum(), a), obs=y)


def mixed(y, scale=1.0):
    """A model with a discrete latent."""
    which = numpyro.sample("which", dist.Bernoulli(0.3))
    a = numpyro.sample("a", dist.Normal(0.0, scale))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(a + which, 1.0), obs=y)


KERNELS = {
    "MEADS": lambda: (MEADS(model, start="init", num_folds=2), 8),
    "ChEES": lambda: (ChEES(model, start="init", max_leapfrog_steps=4), 8),
    "MAMS": lambda: (MAMS(model, start="init", max_steps=4), 8),
    "MCLMC": lambda: (MCLMC(model, start="init", steps_per_draw=2), 8),
    "NUTS": lambda: (NUTS(model, max_tree_depth=3), 2),
    "one NUTS": lambda: (NUTS(model, max_tree_depth=3), 1),
    "AIES": lambda: (AIES(model), 16),
    "Gibbs": lambda: (DiscreteHMCGibbs(NUTS(mixed, max_tree_depth=3)), 2),
}


def chains(kernel, num_warmup=20, num_samples=31, **options):
    """Return an `MCMC` with the kernel of this name."""
    method = "sequential" if kernel == "Gibbs" else "vectorized"
    kernel, num_chains = KERNELS[kernel]()
    return MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains,
        chain_method=method, progress_bar=False, **options,
    )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    name, directory, target = sys.argv[1:]
    mcmc = chains(name, 300, 300)
    kept = Checkpoint(directory, every=20)
    print("started", flush=True)

    class Telling(checkpointed.Keeper):
        """A keeper that prints each step it has saved."""

        def save(self, step, tree):
            super().save(step, tree)
            print("kept", step, flush=True)

    checkpointed.Keeper = Telling
    run_checkpointed(mcmc, kept, jax.random.key(0), Y, extra_fields=("potential_energy",))
    samples = mcmc.get_samples(group_by_chain=True) | mcmc.get_extra_fields(group_by_chain=True)
    np.savez(target, key=jax.random.key_data(mcmc.last_state.rng_key), **samples)
