"""One picture of what the package does: ensembles, many chains, functions from a process."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_ensemble import plotting
from numpyro_ensemble.gp import RBF, GaussianProcess, Pathwise
from numpyro_ensemble.mcmc import ChEES

COLOURS = 48  # in the picture's palette, to keep the file small


def curved():
    """Two latents along a bent ridge."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("a", dist.Normal(z**2, 0.3))


def process(X, y=None):
    """Observe a Gaussian process with fixed hyperparameters."""
    numpyro.sample("y", GaussianProcess(RBF(1.0, 0.6), X, 0.01), obs=y)


def draw_chains(ax):
    """Draw samples of many chains, and the path of one chain."""
    mcmc = MCMC(
        ChEES(curved),
        num_warmup=200,
        num_samples=50,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)
    ax.plot(draws["z"].ravel(), draws["a"].ravel(), "C0.", ms=3, mew=0, alpha=0.4)
    ax.plot(draws["z"][2, :20], draws["a"][2, :20], "C1o-", ms=3, lw=1)
    ax.set_title("64 chains, one of them traced", fontsize=10)
    ax.set(xlabel="z", ylabel="a")


def draw_paths(ax):
    """Draw posterior functions of a process between and beyond its observations."""
    X = jnp.array([0.2, 0.6, 1.1, 1.3, 2.4, 2.6])
    y = jnp.sin(3.0 * X)
    grid = jnp.linspace(-0.5, 3.5, 200)
    paths = Pathwise(process, {}, X, y, num_paths=24)(jax.random.key(0), grid)["y_f"]
    ax.plot(grid, np.asarray(paths).T, color="C0", lw=0.7, alpha=0.6)
    ax.plot(X, y, "k.")
    ax.set_title("24 functions of a Gaussian process", fontsize=10)
    ax.set(xlabel="x", ylabel="f")


def overview(inputs, means, draws, data, path="overview.png"):
    """Save the three panels; the first shows an ensemble's means (members, draws, N)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    plotting.plot_predictive(inputs, means, draws, data=data, ax=axes[0])
    axes[0].set_title(f"{len(means)} variational fits of one network", fontsize=10)
    axes[0].set(xlabel="x", ylabel="y", ylim=(-1.2, 1.8))
    draw_chains(axes[1])
    draw_paths(axes[2])
    memory = io.BytesIO()
    figure.savefig(memory, dpi=100)
    plt.close(figure)
    Image.open(memory).convert("RGB").quantize(COLOURS).save(path, optimize=True)
