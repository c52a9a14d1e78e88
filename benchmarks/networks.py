"""Networks sampled from every member: error and log score on held-out rows, and time.

Run `python benchmarks/networks.py airfoil FOLDER` or `bikesharing FOLDER`, with a folder that holds
`airfoil.csv` or `hour.csv` (those of the package sklearn-contrib-bde, in `bde/data`), or `diabetes`
where scikit-learn is installed. Further arguments are the numbers of warm-up iterations (35,000),
draws of a chain (100), members (10) and seeds (1). A gradient of `bikesharing` takes ten times as
long as one of `airfoil`. The network, its prior and the splits are those of that package's paper:
four layers of 16, a mean and a scale, standard normal weights, a fifth of the rows held out.
"""

import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, init_to_uniform
from records import note, saved

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive
from numpyro_ensemble.mcmc import MCLMC, starts
from numpyro_ensemble.mcmc.diagnostics import within_rhat

WIDTHS = (16, 16, 16, 16, 2)
ENERGY_VAR = 0.5, 0.1  # at the start and the end of warm-up, as in that package
STEPS_PER_DRAW = 50
BATCH = 256  # rows in a step of the members' optimiser
NUM_STEPS = 10_000  # of the members' optimiser
LEFT_OUT = ["cnt", "casual", "registered", "instant", "dteday"]


def read(name, folder=None):
    """Return a data set's inputs and target."""
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        return load_diabetes(return_X_y=True)
    path = Path(folder) / {"airfoil": "airfoil.csv", "bikesharing": "hour.csv"}[name]
    table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    target = "cnt" if name == "bikesharing" else table.dtype.names[-1]
    columns = [c for c in table.dtype.names if c != target and c not in LEFT_OUT]
    X = np.stack([table[c].astype(float) for c in columns], axis=1)
    return X, table[target].astype(float)


def split(X, y, seed=0):
    """Return standardised training and test data, split as by scikit-learn."""
    order = np.random.RandomState(seed).permutation(len(y))
    number = int(np.ceil(0.2 * len(y)))
    test, train = order[:number], order[number:]
    X = (X - X[train].mean(axis=0)) / X[train].std(axis=0)
    y = (y - y[train].mean()) / y[train].std()
    return [jnp.asarray(part, jnp.float32) for part in (X[train], y[train], X[test], y[test])]


def network(x, y=None):
    """Predict a mean and a scale for each row."""
    x = x.T  # with a column for each row, gradients take two thirds of the time
    for i, width in enumerate(WIDTHS):
        prior = dist.Normal(0.0, 1.0)
        weight = numpyro.sample(f"weight{i}", prior.expand([width, len(x)]).to_event(2))
        bias = numpyro.sample(f"bias{i}", prior.expand([width]).to_event(1))
        x = weight @ x + bias[:, None]
        if i < len(WIDTHS) - 1:
            x = jax.nn.relu(x)
    mean = numpyro.deterministic("mean", x[0])
    scale = numpyro.deterministic("scale", jax.nn.softplus(x[1]) + 1e-6)
    with numpyro.plate("row", len(mean)):
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


def times():
    """Return the wall-clock time and the processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def scores(draws, X, y):
    """Return RMSE, and NLL of a normal with all draws' moments (the paper's) and of the mixture."""
    sites = EnsemblePredictive(network, draws, batch_ndims=2, return_sites=["mean", "scale"])(
        jax.random.key(0), X
    )
    mean, scale = (np.asarray(sites[n], float).reshape(-1, len(y)) for n in ("mean", "scale"))
    y = np.asarray(y, float)
    centre = mean.mean(axis=0)
    spread = np.sqrt((scale**2).mean(axis=0) + mean.var(axis=0))

    def log_normal(y, mean, scale):
        return -0.5 * ((y - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2.0 * np.pi)

    mixture = jax.nn.logsumexp(log_normal(y, mean, scale), axis=0) - np.log(len(mean))
    rmse = np.sqrt(((centre - y) ** 2).mean())
    return rmse, -log_normal(y, centre, spread).mean(), -np.asarray(mixture).mean()


def one(parts, seed, warmup, draws, members):
    """Fit and sample, and print the scores and the times."""
    X, y, X_test, y_test = parts
    keys = jax.random.split(jax.random.key(seed), 3)
    begin = times()
    near = init_to_uniform(radius=0.6)  # a radius for weights of layers of 16
    rate = optax.cosine_decay_schedule(2e-2, NUM_STEPS)
    fits = EnsembleMAP(network, optax.adam(rate), ensemble_size=members, init_loc_fn=near)
    batch = min(BATCH, len(y))
    result = fits.run(keys[0], NUM_STEPS, X, y, batch_size=batch, progress_bar=False)
    fitted = times() - begin
    number = len(starts.chain_members(result))
    init_params = starts.from_ensemble(keys[1], fits, result, X, y, num_chains=number, jitter=0.0)
    mcmc = MCMC(
        MCLMC(network, adapt="each", desired_energy_var=ENERGY_VAR, steps_per_draw=STEPS_PER_DRAW),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=number,
        chain_method="vectorized",
        progress_bar=False,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mcmc.run(keys[2], X, y, init_params=init_params)
    jax.block_until_ready(mcmc.last_state.z)
    total = times() - begin
    sampled = mcmc.get_samples(group_by_chain=True)
    sampled = {n: x for n, x in sampled.items() if n not in ("mean", "scale")}
    modes = {name: value[:, None] for name, value in result.params.items()}
    for what, values, seconds in (("members", modes, fitted), ("chains", sampled, total)):
        rmse, nll, mixed = scores(values, X_test, y_test)
        print(
            f"{what}: RMSE {rmse:.4f}, NLL {nll:.4f} (mixture {mixed:.4f}), {seconds[0]:.1f} s, "
            f"{seconds[1]:.1f} s of the processor"
        )
        note(f"seed {seed}, {what}, cold", ours=seconds[0], processor=seconds[1],
             rmse=float(rmse), nll=float(nll), nll_of_the_mixture=float(mixed))  # fmt: skip
    settled = within_rhat(np.asarray(mcmc.get_samples(group_by_chain=True)["mean"]))
    error = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["energy_var"]).mean(axis=1)
    print(f"R-hat within chains of the means of rows: median {np.median(settled):.2f}")
    print(f"energy variance, asked for {ENERGY_VAR[1]}: {np.array2string(error, precision=2)}")
    for warning in told:
        print(f"  {str(warning.message)[:160]}", flush=True)


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    numbers = [int(word) for word in rest if word.isdigit()]
    warmup, draws, members, seeds = [*numbers, *(35_000, 100, 10, 1)[len(numbers) :]]
    folder = next((word for word in rest if not word.isdigit()), None)
    parts = split(*read(name, folder))
    with saved(f"networks_{name}"):
        for seed in range(seeds):
            one(parts, seed, warmup, draws, members)
