"""Samplers on stochastic gradients: bias and effective draws at equal numbers of gradients.

Run `python benchmarks/minibatches.py steps linear` (or `logistic`) for steps of SGHMC, SGNHT and
MCLMC on one regression, in coordinates in which the covariance of the posterior is the identity;
`kernel 100000 [batch] [names]` for `SGMCMC` on a logistic regression of that many rows, with and
without control variates, and MCLMC on all rows; `draws 100000 [batch]` for the time that drawing
rows takes.
"""

import sys
import warnings

import arviz as az
import blackjax.sgmcmc.sghmc as sghmc
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from blackjax.mcmc import mclmc
from blackjax.mcmc.integrators import IntegratorState, isokinetic_velocity_verlet
from blackjax.sgmcmc import diffusions
from blackjax.util import generate_unit_vector
from common import clocked, in_turns, report
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from records import note, saved

from numpyro_ensemble.mcmc import MCLMC, SGMCMC
from numpyro_ensemble.mcmc.minibatches import drawn_rows
from numpyro_ensemble.mcmc.sgmcmc_scheme import thermal

CHAINS, GRADIENTS, EVERY = 256, 4000, 20
ROWS, SIZE, BATCH = 2000, 6, 50


def regression(kind):
    """Return the likelihood of rows, the data, and the posterior's mean and covariance."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(5, size=(ROWS, SIZE)) @ (np.eye(SIZE) + 0.5 * rng.normal(size=(SIZE, SIZE)))
    x[:, 0] = 1.0
    w = rng.normal(size=SIZE) * 0.5
    if kind == "linear":  # the noise of the data is not the model's
        y = x @ w + rng.normal(size=ROWS) * (0.5 + (np.abs(x[:, 1]) > 1))
        covariance = np.linalg.inv(x.T @ x + np.eye(SIZE))
        mean = covariance @ x.T @ y
        return lambda w, x, y: -0.5 * (y - x @ w) ** 2, (x, y), mean, covariance
    y = (rng.uniform(size=ROWS) < 1 / (1 + np.exp(-x @ w))).astype(float)

    def likelihood(w, x, y):
        return y * (x @ w) - jnp.logaddexp(0.0, x @ w)

    def density(w):
        return likelihood(w, x, y).sum() - 0.5 * (w**2).sum()

    mode = jnp.zeros(SIZE)
    for _ in range(30):
        mode = mode - jnp.linalg.solve(jax.hessian(density)(mode), jax.grad(density)(mode))
    factor = np.linalg.cholesky(np.linalg.inv(-np.asarray(jax.hessian(density)(mode))))
    # importance sampling from Student's t
    number, freedom = 400_000, 10
    z = rng.normal(size=(number, SIZE))
    z /= np.sqrt(rng.chisquare(freedom, size=(number, 1)) / freedom)
    places = np.asarray(mode) + z @ factor.T
    parts = [np.asarray(jax.vmap(density)(jnp.asarray(part))) for part in np.split(places, 400)]
    logs = np.concatenate(parts) + 0.5 * (freedom + SIZE) * np.log1p((z**2).sum(1) / freedom)
    weights = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
    mean = weights @ places
    off = places - mean
    return likelihood, (x, y), mean, off.T @ (off * weights[:, None])


def gradients(likelihood, data, mean, covariance):
    """Return gradients `(row, key)` of batches in whitened coordinates, plain and centred."""
    x, y = map(jnp.asarray, data)
    factor, mean = jnp.linalg.cholesky(jnp.asarray(covariance)), jnp.asarray(mean)

    def density(z, rows):
        w = mean + factor @ z
        return ROWS / len(rows) * likelihood(w, x[rows], y[rows]).sum() - 0.5 * (w**2).sum()

    grad, centre = jax.grad(density), jnp.zeros(SIZE)
    whole = grad(centre, jnp.arange(ROWS))

    def plain(z, key):
        return grad(z, drawn_rows(key, ROWS, BATCH))

    def centred(z, key):
        rows = drawn_rows(key, ROWS, BATCH)
        return grad(z, rows) - grad(centre, rows) + whole

    return {"plain": plain, "control variates": centred}


def methods(grad, noise):
    """Return steps `(key, state, step_size)`, their first states, and gradients a step."""
    ten = sghmc.build_kernel(1.0, 0.0)
    inverse = isokinetic_velocity_verlet
    micro = mclmc.build_kernel(integrator=inverse)

    def blackjax_sghmc(key, state, h):
        rows = jax.random.fold_in(key, 3)
        return (ten(key, state[0], grad, rows, h, 10),)

    def corrected_sghmc(key, state, h):
        step_key, rows = jax.random.split(key)
        move = diffusions.sghmc(1.0, jnp.minimum(noise, 2.0 / h))
        return move(step_key, *state, grad(state[0] + h * state[1], rows), h)

    def blackjax_sgnht(key, state, h):
        step_key, rows = jax.random.split(key)
        return diffusions.sgnht(1.0, 0.0)(step_key, *state, grad(state[0], rows), h)

    def ours(key, state, h):
        step_key, rows = jax.random.split(key)
        temperature, alpha, beta = thermal(h, noise)
        there = grad(state[0] + h * state[1], rows)
        return diffusions.sgnht(alpha, beta)(step_key, *state, there, h, temperature)

    def microcanonical(key, state, h):
        step_key, rows = jax.random.split(key)

        @jax.custom_jvp
        def density(z):
            return jnp.zeros(())

        @density.defjvp
        def slope(z, tangent):
            return jnp.zeros(()), (grad(z[0], rows) * tangent[0]).sum()

        before = IntegratorState(state[0], state[1], jnp.zeros(()), state[2])
        unit = SIZE**0.5
        new, _ = micro(step_key, before, density, 1.0, unit, h * unit)
        return new.position, new.momentum, new.logdensity_grad

    def normal(key):
        return jax.random.normal(jax.random.fold_in(key, 1), (SIZE,))

    return {
        "SGHMC, BlackJAX's kernel": (blackjax_sghmc, lambda z, key: (z,), 10),
        "SGHMC, noise taken off": (corrected_sghmc, lambda z, key: (z, normal(key)), 1),
        "SGNHT, BlackJAX's kernel": (
            blackjax_sgnht, lambda z, key: (z, normal(key), jnp.ones(())), 1
        ),
        "SGNHT, as in SGMCMC": (ours, lambda z, key: (z, normal(key), jnp.ones(())), 1),
        "MCLMC": (
            microcanonical, lambda z, key: (z, generate_unit_vector(key, z), grad(z, key)), 1
        ),
    }  # fmt: skip


def walk(step, init, each, h):
    """Return positions of all chains, which start at normal draws, without their first fifth."""

    def one(key):
        start_key, key = jax.random.split(key)
        state = init(jax.random.normal(start_key, (SIZE,)), start_key)

        def draw(state, key):
            keys = jax.random.split(key, EVERY // each)
            state = jax.lax.scan(lambda s, key: (step(key, s, h), None), state, keys)[0]
            return state, state[0]

        keys = jax.random.split(key, GRADIENTS // EVERY)
        return jax.lax.scan(draw, state, keys)[1][len(keys) // 5 :]

    return jax.vmap(one)(jax.random.split(jax.random.key(1), CHAINS))


def compare_steps(kind):
    """Print errors of means and variances, and effective draws per 1,000 gradients of a chain."""
    for name, grad in gradients(*regression(kind)).items():
        z, keys = jax.random.normal(jax.random.key(6), (4000, SIZE)), jax.random.key(5)
        pairs = jax.random.split(keys, (2, 4000))
        differ = jax.jit(jax.vmap(lambda z, a, b, grad=grad: grad(z, a) - grad(z, b)))(z, *pairs)
        noise = 0.5 * (differ**2).mean(axis=0)
        print(f"{kind}, {name}: variance of the gradient {noise.min():.2g} to {noise.max():.2g}")
        for method, (step, init, each) in methods(grad, noise).items():
            run = jax.jit(lambda h, args=(step, init, each): walk(*args, h))
            for h in (0.01, 0.02) if name == "plain" else (0.1, 0.2, 0.3):
                draws = np.asarray(run(h))
                sizes, squares = effective_sample_size(draws), effective_sample_size(draws**2)
                off, spread = abs(draws.mean((0, 1))).max(), draws.var((0, 1))
                each_thousand = 1000 / (0.8 * GRADIENTS * CHAINS)
                print(
                    f"{method:25s} h {h}: mean {off:.3f} ({sizes.min() ** -0.5:.3f}), variance "
                    f"{spread.mean():.3f} ({spread.min():.3f} to {spread.max():.3f}; "
                    f"{(2 / squares.min()) ** 0.5:.3f}), ESS {sizes.min() * each_thousand:.1f}, of "
                    f"squares {squares.min() * each_thousand:.1f}",
                    flush=True,
                )
                note(f"{kind}, {name}: {method}, step {h}", error_of_a_mean=float(off),
                     variances=list(spread), ess=float(sizes.min() * each_thousand))  # fmt: skip


def logistic(x, y, batch=None):
    """A logistic regression on columns, some rows at a time."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", len(y), subsample_size=batch) as rows:
        numpyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


def compare_kernels(rows, batch, *names):
    """Print errors of 64 chains in a logistic regression of many rows."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 10)) @ (np.eye(10) + 0.4 * rng.normal(size=(10, 10)))
    y = (rng.uniform(size=rows) < 1 / (1 + np.exp(-x @ (0.3 * rng.normal(size=10))))).astype(int)
    x, y = jnp.asarray(x, float), jnp.asarray(y)
    truth = None
    kernels = {
        "MCLMC": MCLMC(logistic, start="microcanonical"),
        "SGMCMC": SGMCMC(logistic),
        "plain": SGMCMC(logistic, control_variates=False),
    }
    for name, kernel in ((name, kernels[name]) for name in names or kernels):
        size = () if name == "MCLMC" else (batch,)
        mcmc = MCMC(
            kernel, num_warmup=300, num_samples=100 if name == "MCLMC" else 500, num_chains=64,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _, seconds, _ = clocked(mcmc.run, jax.random.key(0), x, y, *size)
        draws = mcmc.get_samples(group_by_chain=True)
        data = az.convert_to_dataset({"w": np.asarray(draws["w"])})
        rhat, bulk = float(az.rhat(data)["w"].max()), float(az.ess(data)["w"].min())
        w = np.asarray(draws["w"], np.float64)
        mean, scale = w.mean((0, 1)), w.std((0, 1))
        truth = truth or (mean, scale)
        off, spread = abs((mean - truth[0]) / truth[1]).max(), (scale / truth[1]) ** 2
        print(
            f"{name}: {seconds:.1f} s, R-hat {rhat:.4f}, bulk {bulk:.0f}, means off by {off:.3f}, "
            f"variances {spread.min():.3f} to {spread.max():.3f}, step size "
            f"{float(mcmc.last_state.adapt_state.step_size[0]):.2g}; {len(said)} warnings",
            flush=True,
        )
        note(f"{rows} rows, {name}, cold", ours=seconds, rhat=rhat, bulk=bulk,
             means_off=float(off), variances=list(spread))  # fmt: skip


def time_draws(rows, batch):
    """Compare how long 64 chains take to draw rows, by NumPyro and by this package.

    The standard deviation of a batch's mean is about `batch ** -0.5` where batches are random.
    """

    def theirs(key):
        with numpyro.handlers.seed(rng_seed=key):
            return numpyro.plate("data", rows, subsample_size=batch)._indices

    keys = jax.random.split(jax.random.key(0), 64)
    draws = (lambda key: drawn_rows(key, rows, batch)), theirs
    values = jnp.asarray(np.random.default_rng(0).normal(size=rows))
    programs = [jax.jit(jax.vmap(draw)) for draw in draws]
    figures = {}
    for program, side in zip(programs, ("", "_instead"), strict=True):
        means = [values[program(jax.random.split(keys[i], 64))].mean(axis=1) for i in range(10)]
        figures["sd_of_a_mean" + side] = float(jnp.concatenate(means).std())
    ours, theirs = (lambda key, run=run: run(jax.random.split(key, 64)) for run in programs)
    name = f"{batch} of {rows} rows for 64 chains, strata / NumPyro, warm"
    report(name, in_turns(ours, theirs, 5), **figures)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    numpyro.enable_x64(what == "steps")
    with saved(f"minibatches_{what}"):
        if what == "steps":
            compare_steps(*rest)
        else:
            task = {"kernel": compare_kernels, "draws": time_draws}[what]
            task(int(rest[0]), int(rest[1]) if len(rest) > 1 else 100, *rest[2:])
