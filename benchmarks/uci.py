"""The regression benchmark of deep ensembles: all splits and members in one run, and one by one.

Run `python benchmarks/uci.py FOLDER [names]`, where FOLDER holds `name.csv`, `name.txt` or
`name/data/data.txt` with the target in the last column, or `--shipped [names]` for tables that come
with scikit-learn and statsmodels (diabetes, engel, star98). `--rate 0.01` sets Adam's rate.

The protocol is that of Lakshminarayanan et al. (2017), after Hernandez-Lobato and Adams (2015): 20
random splits with a tenth of the rows held out, 5 networks with a hidden layer of 50 units, which
predict a mean and a variance, 40 epochs of Adam at 0.1 in batches of 100, without adversarial
examples. Both sides make the same 100 fits by maximum likelihood. This package makes them in one
`run` whose members have rows of their own, NumPyro in a loop over one compiled fit by `SVI`.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked, timed
from jax import lax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from records import note, option, peak, saved, sized

from numpyro_ensemble import EnsembleMAP, reweight

SPLITS, MEMBERS, EPOCHS, BATCH, HIDDEN = sized(20, 4), 5, 40, 100, 50
RATE = 0.1


def table(path):
    """Return a file's numbers, rows by columns; a first line without numbers is a header."""
    lines = [re.split(r"[,;\s]+", line.strip()) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line != [""]]
    if not re.fullmatch(r"[-+.\deE]+", lines[0][0]):
        lines = lines[1:]
    return np.array(lines, float)


def in_folder(folder):
    """Return the tables of a folder by name."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".csv", ".txt"))
    nested = [p for p in paths if p.name == "data.txt"]
    single = [p for p in paths if p.parent == Path(folder)]
    return {p.parent.parent.name: table(p) for p in nested} | {p.stem: table(p) for p in single}


def shipped():
    """Return data sets that scikit-learn and statsmodels ship."""
    from sklearn.datasets import load_diabetes
    from statsmodels.datasets import engel, star98

    foods, schools = engel.load_pandas().data, star98.load_pandas()
    share = schools.endog["NABOVE"] / schools.endog.sum(axis=1)
    return {
        "diabetes": np.column_stack(load_diabetes(return_X_y=True, scaled=False)),
        "engel": foods[["income", "foodexp"]].to_numpy(),
        "star98": np.column_stack([schools.exog.to_numpy(), share]),
    }


def splits(rows):
    """Return standardised inputs and targets of all splits, and the scales of the targets."""
    parts = []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(rows))
        test, train = np.split(order, [len(rows) // 10])
        mean, sd = rows[train].mean(axis=0), rows[train].std(axis=0)
        whole = (rows - mean) / np.where(sd > 0, sd, 1.0)
        sides = whole[train, :-1], whole[train, -1], whole[test, :-1], whole[test, -1], sd[-1]
        parts.append([np.asarray(part, np.float32) for part in sides])
    return [np.stack(column) for column in zip(*parts, strict=True)]


def network(weights, x):
    """Return means and standard deviations at inputs (N, D)."""
    hidden = jax.nn.relu(x @ weights["w0"] + weights["b0"][None])
    out = hidden @ weights["w1"] + weights["b1"][None]
    return out[:, 0], jnp.sqrt(jax.nn.softplus(out[:, 1]) + 1e-6)


def model(x, y):
    """A regression by a network; the prior of its weights has the usual width of starts."""
    weights, fan_in = {}, x.shape[1]
    for layer, width in enumerate((HIDDEN, 2)):
        prior = dist.Normal(0.0, fan_in**-0.5)
        weights[f"w{layer}"] = numpyro.sample(
            f"w{layer}", prior.expand([fan_in, width]).to_event(2)
        )
        weights[f"b{layer}"] = numpyro.sample(f"b{layer}", prior.expand([width]).to_event(1))
        fan_in = width
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(*network(weights, x)), obs=y)


def together(x, y, rate):
    """Return a function that fits all members of all splits in one run; weights are stacked."""
    runner = EnsembleMAP(
        model, numpyro.optim.Adam(rate), ensemble_size=len(x) * MEMBERS, prior_weight=0,
        init_loc_fn=numpyro.infer.init_to_sample,
    )  # fmt: skip
    steps = EPOCHS * -(-x.shape[1] // BATCH)
    data = np.repeat(x, MEMBERS, axis=0), np.repeat(y, MEMBERS, axis=0)
    options = {"batch_size": min(BATCH, x.shape[1]), "progress_bar": False}
    options["member_args"] = [0, 1]
    return lambda: runner.run(jax.random.key(0), steps, *data, **options).params


def one_by_one(x, y, rate):
    """Return a function that fits one member after another by `SVI`, with one compiled function."""
    likelihood = reweight(model, prior=0)
    guide = AutoDelta(likelihood, init_loc_fn=numpyro.infer.init_to_sample)
    svi = SVI(likelihood, guide, numpyro.optim.Adam(rate), Trace_ELBO())
    number, size = x.shape[1], min(BATCH, x.shape[1])
    starts = range(0, number, size)

    @jax.jit
    def fit(key, x, y):
        def epoch(state, key):
            rows = jax.random.permutation(key, number)
            for start in starts:
                batch = rows[start : start + size]
                state, _ = svi.update(state, x[batch], y[batch])
            return state, None

        init_key, key = jax.random.split(key)
        state = svi.init(init_key, x[:size], y[:size])
        state = lax.scan(epoch, state, jax.random.split(key, EPOCHS))[0]
        return svi.get_params(state)

    keys = jax.random.split(jax.random.key(0), (len(x), MEMBERS))

    def loop():
        fits = [fit(key, a, b) for row, a, b in zip(keys, x, y, strict=True) for key in row]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)
        return {name.removesuffix("_auto_loc"): value for name, value in stacked.items()}

    return loop


def scores(weights, x, y, scale):
    """Return RMSE and NLL of each split in units of the target, by the mixture's mean and sd."""
    by_split = jax.tree.map(lambda w: w.reshape(len(x), MEMBERS, *w.shape[1:]), weights)
    each = jax.vmap(jax.vmap(network, in_axes=(0, None)))
    mean, sd = (np.asarray(value, float) for value in each(by_split, x))
    centre, spread = mean.mean(axis=1), np.sqrt((sd**2).mean(axis=1) + mean.var(axis=1))
    rmse = np.sqrt(((centre - y) ** 2).mean(axis=1)) * scale
    terms = 0.5 * ((centre - y) / spread) ** 2 + np.log(spread * scale[:, None])
    return rmse, terms.mean(axis=1) + 0.5 * np.log(2.0 * np.pi)


def measure(name, rows, rate):
    """Print and record one data set's scores and seconds."""
    x, y, x_test, y_test, scale = splits(rows)
    ways = {"one run": together, "SVI, one by one": one_by_one}
    print(f"{name}: {len(rows)} rows, {x.shape[-1]} columns, {SPLITS} splits x {MEMBERS} networks")
    for label, way in ways.items():
        jax.clear_caches()
        fit = way(x, y, rate)
        weights, seconds, cpu = clocked(fit)
        warm = timed(fit)
        rmse, nll = scores(weights, x_test, y_test, scale)
        error = np.sqrt(SPLITS)
        print(
            f"  {label:16} RMSE {rmse.mean():.3f} +- {rmse.std() / error:.3f}, NLL "
            f"{nll.mean():.3f} +- {nll.std() / error:.3f}, cold {seconds:.1f} s (processor "
            f"{cpu:.1f}), warm {warm:.2f} s, peak {peak():.2f} GiB",
            flush=True,
        )
        note(
            f"{name}, {SPLITS} x {MEMBERS} fits, {label}, warm", cold=seconds,
            cold_by_processor=cpu, peak_gib_of_the_whole_process=peak(), rmse=rmse.mean(),
            rmse_error=rmse.std() / error, nll=nll.mean(), nll_error=nll.std() / error,
            **{"ours" if label == "one run" else "theirs": warm},
        )  # fmt: skip


def main(rate, where, *names):
    """Measure the named data sets, or all."""
    found = shipped() if where == "--shipped" else in_folder(where)
    missing = set(names) - set(found)
    if missing or not found:
        sys.exit(f"{', '.join(sorted(missing)) or 'A data set'} is not there: {sorted(found)}")
    for name in names or found:
        measure(name, found[name], rate)


if __name__ == "__main__":
    words = sys.argv[1:]
    rate = float(option(words, "--rate", RATE))
    if not words:
        sys.exit(__doc__)
    with saved("uci" if rate == RATE else f"uci_rate_{rate:g}"):
        main(rate, *words)
