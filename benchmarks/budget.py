"""How many sequential gradients many chains need for accurate second moments.

Run `python benchmarks/budget.py FOLDER problem [chains] [iterations] [kernels]` for "irt",
"credit" or "brownian". FOLDER holds the data and the moments of inference-gym, from the repository
of TensorFlow Probability: files of `internal/datasets` as they are, files of `targets/ground_truth`
with `truth_` before their names, and the `german.data-numeric` of the UCI repository.

The bias of a parameter x is `b^2 = (mean of x^2 - E[x^2])^2 / Var[x^2]`. The mean is over the
chains at one time, or over all draws so far. The expectation E is inference-gym's, and Var is the
variance among the draws. The largest bias of all parameters has to stay below .01. The gradients of
one chain are counted, which are computed one after another; those of the start and of warm-up are
included.
"""

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from records import note, saved

from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES, searches, starts

KERNELS = {"MEADS": MEADS, "ChEES": ChEES, "MAMS": MAMS, "MCLMC": MCLMC, "NUTS": NUTS}
ENOUGH = 0.01


def read(folder, name):
    """Return the numbers that a file of inference-gym defines."""
    found = runpy.run_path(str(Path(folder) / f"{name}.py"))
    return {k: np.asarray(v) for k, v in found.items() if k.isupper()}


def irt(folder):
    """One-parameter item response: 400 students, 100 questions, three answers of four."""
    data = read(folder, "synthetic_item_response_theory")
    student, question = data["STUDENT_IDS"], data["QUESTION_IDS"]
    y, given = np.zeros((400, 100), int), np.zeros((400, 100), bool)
    y[student, question], given[student, question] = data["CORRECT"], True

    def model(y, given):
        mean = numpyro.sample("mean_student_ability", dist.Normal(0.75, 1))
        with numpyro.plate("student", 400):
            ability = numpyro.sample("centered_student_ability", dist.Normal(0, 1))
        with numpyro.plate("question", 100):
            difficulty = numpyro.sample("question_difficulty", dist.Normal(0, 1))
        logits = mean + ability[:, None] - difficulty
        with numpyro.handlers.mask(mask=given):
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model, (jnp.asarray(y), jnp.asarray(given)), "synthetic_item_response_theory"


def credit(folder):
    """Logistic regression on 24 columns, with a scale for each weight and one for all."""
    table = np.loadtxt(Path(folder) / "german.data-numeric")
    x = (table[:, :-1] - table[:, :-1].mean(0)) / table[:, :-1].std(0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def model(x, y):
        weights = numpyro.sample("unscaled_weights", dist.Normal(0, 1).expand([25]).to_event(1))
        scales = numpyro.sample("local_scales", dist.Gamma(0.5, 0.5).expand([25]).to_event(1))
        scale = numpyro.sample("global_scale", dist.Gamma(0.5, 0.5))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ (weights * scales * scale)), obs=y)

    y = (table[:, -1] == table[:, -1].max()).astype(int)
    return model, (jnp.asarray(x), y), "german_credit_numeric_sparse_logistic_regression"


def brownian(folder):
    """A random walk of 30 steps with unknown scales, ten of whose places are not observed."""
    y = read(folder, "brownian_motion_missing_middle_observations")["OBSERVED_LOC"]

    def model(y):
        step = numpyro.sample("innovation_noise_scale", dist.LogNormal(0, 2))
        noise = numpyro.sample("observation_noise_scale", dist.LogNormal(0, 2))
        locs = numpyro.sample("locs", dist.ImproperUniform(dist.constraints.real, (), (30,)))
        before = jnp.concatenate([jnp.zeros(1), locs[:-1]])
        numpyro.factor("walk", dist.Normal(before, step).log_prob(locs).sum())
        seen = np.isfinite(y)
        numpyro.sample("y", dist.Normal(locs[seen], noise), obs=y[seen])

    return model, (y,), None


def brownian_squares(folder):
    """Return E[x^2] by quadrature over both scales: the mean noise is .1127, stored as .101."""
    y = read(folder, "brownian_motion_missing_middle_observations")["OBSERVED_LOC"].astype(float)
    seen, time = np.isfinite(y), np.arange(1.0, 31.0)
    walk, logs = np.minimum.outer(time, time), np.linspace(-7, 1, 321)
    values, vectors = np.linalg.eigh(walk[np.ix_(seen, seen)])
    turned, cross = vectors.T @ y[seen], walk[:, seen] @ vectors
    steps, noises = (np.exp(2 * x)[..., None] for x in np.meshgrid(logs, logs, indexing="ij"))
    spread = steps * values + noises
    density = -0.5 * (np.log(spread) + turned**2 / spread).sum(-1)
    weight = density - (logs[:, None] ** 2 + logs**2) / 8  # LogNormal(0, 2)
    weight = np.exp(weight - weight.max())[..., None] / np.exp(weight - weight.max()).sum()
    mean = (steps / spread * turned) @ cross.T
    variance = steps * time - (steps**2 / spread) @ (cross**2).T
    moments = steps[..., 0], noises[..., 0], mean**2 + variance
    names = "innovation_noise_scale", "observation_noise_scale", "locs"
    return {
        name: (weight.reshape(321, 321, *[1] * (m.ndim - 2)) * m).sum((0, 1))
        for name, m in zip(names, moments, strict=True)
    }


def squares(folder, name, sites):
    """Return E[x^2] of each site."""
    if name is None:
        return brownian_squares(folder)
    found = read(folder, f"truth_{name}")
    return {
        site: found[f"IDENTITY_{site.upper()}_MEAN"] ** 2
        + found[f"IDENTITY_{site.upper()}_STANDARD_DEVIATION"] ** 2
        for site in sites
    }


def walked(model, args, chains):
    """Return where the microcanonical walks end, and how many steps they took."""
    numbers, walk = [], searches.burn_in

    def counting(*arguments):
        rows, number = walk(*arguments)
        jax.debug.callback(lambda n: numbers.append(int(n)), number)
        return rows, number

    searches.burn_in = counting
    try:
        start = starts.from_microcanonical(jax.random.key(0), model, chains, *args)
        jax.block_until_ready(start)
    finally:
        searches.burn_in = walk
    return start, sum(numbers)


def budget(folder, problem="brownian", chains="4096", iterations="150", *names):
    """Print after how many gradients the bias of all second moments is small."""
    warmup = draws = int(iterations)
    model, args, name = {"irt": irt, "credit": credit, "brownian": brownian}[problem](folder)
    start, steps = walked(model, args, int(chains))
    print(f"{problem}: {steps} steps of the start", flush=True)
    for kernel in names or KERNELS:
        mcmc, fields = chains_of(kernel, model, int(chains), warmup, draws), ("num_steps",)
        init_params = None if kernel == "NUTS" else start
        key = jax.random.key(1)
        mcmc.warmup(key, *args, init_params=init_params, extra_fields=fields, collect_warmup=True)
        before, cost = seen(mcmc)
        mcmc.run(jax.random.key(2), *args, extra_fields=fields)
        after, more = seen(mcmc)
        expected = squares(folder, name, after)
        spent = np.cumsum(np.concatenate([cost, more])) + (0 if kernel == "NUTS" else steps)
        variances = {k: (v**2).var((0, 1)) for k, v in after.items()}
        now = {k: np.concatenate([(x[k] ** 2).mean(0) for x in (before, after)]) for k in after}
        so_far = {k: running((v**2).mean(0)) for k, v in after.items()}
        label = f"{problem}, {kernel}, {mcmc.num_chains} chains"
        report(f"{label} at one time", now, variances, expected, spent)
        report(f"{label}, all draws so far", so_far, variances, expected, spent[len(cost) :])


def chains_of(kernel, model, chains, warmup, draws):
    """Return an `MCMC` of one kernel; NUTS always has four chains and 5,000 draws of each."""
    if kernel == "NUTS":
        chains, warmup, draws = 4, 500, 5000
    return MCMC(
        KERNELS[kernel](model),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )


def running(values):
    """Return means of the first 1, 2, ... values."""
    number = np.arange(1, len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.cumsum(values, axis=0) / number


def seen(mcmc):
    """Return draws `(C, N, ...)`, and the mean number of gradients of each iteration."""
    draws = mcmc.get_samples(group_by_chain=True)
    number = mcmc.get_extra_fields(group_by_chain=True)["num_steps"]
    return {k: np.asarray(v) for k, v in draws.items()}, np.asarray(number, float).mean(0)


def report(label, moments, variances, expected, spent):
    """Print after how many gradients the largest bias stays below `ENOUGH`."""
    biases = {k: (v - expected[k]) ** 2 / variances[k] for k, v in moments.items()}
    largest = np.max([b.reshape(len(b), -1).max(1) for b in biases.values()], axis=0)
    worst = max(biases, key=lambda k: biases[k][-25:].mean(0).max())
    above = np.flatnonzero(largest >= ENOUGH)
    last = above[-1] + 1 if above.size else 0
    when = f"after {spent[last]:.0f} gradients" if last < len(largest) else "not reached"
    below = np.flatnonzero(largest < ENOUGH)
    first = f", for the first time after {spent[below[0]]:.0f}" if below.size else ""
    print(
        f"{label}: b^2 below {ENOUGH} {when}{first}; largest at first {largest[0]:.3f}, in the "
        f"last ones {largest[-25:].mean():.4f} ({worst}), of {spent[-1]:.0f} gradients",
        flush=True,
    )
    note(f"{label}: gradients until b^2 is below {ENOUGH}", when=when, largest_at_the_end=
         float(largest[-25:].mean()))  # fmt: skip


if __name__ == "__main__":
    with saved("budget"):
        budget(*sys.argv[1:])
