"""A short subset that asv runs over the repository's commits, so that a slower one shows.

`asv run --quick HEAD^!` tries it on one commit, `asv continuous main HEAD` compares two and names
what became slower or faster; see asv.conf.json. First calls and chains, most of whose time is
compilation, are timed once in a process of their own, everything else after a first call.
"""

import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI
from numpyro_ensemble.gp import RBF, GaussianProcess, Pathwise, draw_paths
from numpyro_ensemble.mcmc import MEADS, ChEES

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (500, 8))
Y = X.sum(axis=1) + 0.5 * jax.random.normal(jax.random.key(4), (500,))
POINTS = jax.random.uniform(jax.random.key(2), (200, 2))
NEW = jax.random.uniform(jax.random.key(3), (500, 2))
VALUES = jnp.sin(6 * POINTS.sum(axis=1))


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def process(X, y=None):
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(-1.0, 0.5))
    numpyro.sample("y", GaussianProcess(RBF(1.0, lengthscale), X, 0.01), obs=y)


def vi():
    optim, loss = numpyro.optim.Adam(1e-2), Trace_ELBO()
    return EnsembleVI(regression, AutoNormal(regression), optim, loss, ensemble_size=16)


class Fit:
    """Sixteen members."""

    def setup(self):
        self.runner = vi()
        self.state = self.runner.init(KEY, X, Y)
        self.time_thousand_steps()
        self.time_update()

    def time_thousand_steps(self):
        losses = self.runner.run(KEY, 1000, X, Y, progress_bar=False).losses
        jax.block_until_ready(losses)

    def time_update(self):
        jax.block_until_ready(self.runner.update(self.state, X, Y)[1])


class FirstCall:
    """A first call, most of which is tracing and compilation."""

    number, repeat, rounds, warmup_time = 1, 3, 1, 0.0

    def setup(self):
        jax.clear_caches()

    def time_vi(self):
        jax.block_until_ready(vi().run(KEY, 10, X, Y, progress_bar=False).losses)

    def time_map(self):
        runner = EnsembleMAP(regression, ensemble_size=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ten steps are too few for L-BFGS to end
            jax.block_until_ready(runner.run(KEY, 10, X, Y, progress_bar=False).losses)

    def peakmem_vi(self):
        self.time_vi()


class Chains:
    """A whole run of 64 chains, whose loop MCMC compiles in each call."""

    params, param_names = ["MEADS", "ChEES"], ["kernel"]
    number, repeat, rounds, warmup_time, timeout = 1, 3, 1, 0.0, 300

    def time_run(self, name):
        kernel = {"MEADS": MEADS, "ChEES": ChEES}[name](regression)
        mcmc = MCMC(
            kernel,
            num_warmup=200,
            num_samples=200,
            num_chains=64,
            chain_method="vectorized",
            progress_bar=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mcmc.run(KEY, X, Y)
        jax.block_until_ready(mcmc.get_samples()["w"])


class Functions:
    """Posterior paths of 200 points."""

    def setup(self):
        self.paths = self.draw()
        samples = {"lengthscale": jnp.linspace(0.2, 0.4, 50)}
        self.pathwise = Pathwise(process, samples, POINTS, VALUES, num_paths=4)
        self.time_draw()
        self.time_evaluate()
        self.time_pathwise()

    def draw(self):
        return draw_paths(KEY, RBF(1.0, 0.3), POINTS, VALUES, noise=0.01, num_paths=64)

    def time_draw(self):
        jax.block_until_ready(jax.tree.leaves(self.draw()))

    def time_evaluate(self):
        jax.block_until_ready(self.paths(NEW))

    def time_pathwise(self):
        jax.block_until_ready(self.pathwise(KEY, NEW)["y"])


class Predictions:
    """Sixteen members of 100 draws at 500 rows."""

    def setup(self):
        samples = {"w": jnp.ones((16, 100, 8)), "noise": jnp.ones((16, 100))}
        self.predictive = EnsemblePredictive(regression, samples, batch_ndims=2)
        self.time_call()

    def time_call(self):
        jax.block_until_ready(self.predictive(KEY, X)["y"])
