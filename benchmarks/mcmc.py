"""Many-chain kernels against NumPyro's NUTS: speed, convergence, correctness, calibration.

Run `python benchmarks/mcmc.py speed irt [repeats]` (or `radon`) for effective draws a second,
compilation included, in turns with NUTS; `chains irt` for 16 to 1,024 chains; `moments
[problems] [kernels]` for means and standard deviations against theory or a long NUTS run; `sbc`
for calibration;
`traps [kernel] [seeds] [problem]` for problems on which searches may end where there is no mass;
`starts [kernel] [seeds] [problem]` to compare the starts with each other;
`gradients irt [start] [kernels]` for effective draws a gradient.
"""

import statistics
import sys
import warnings

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked
from mcmc_problems import PROBLEMS, TRAPS, known_moments
from numpyro.infer import MCMC, NUTS
from records import note, peak, saved

from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES

warnings.filterwarnings("ignore", category=FutureWarning)
KERNELS = {"MEADS": MEADS, "ChEES": ChEES, "MAMS": MAMS, "MCLMC": MCLMC, "NUTS": NUTS}
SMALL_STEPS = {  # for the necks of centred effects: see docs/many_chains.md
    "MEADS": {"step_size_multiplier": 0.05, "steps_per_draw": 160},
    "ChEES": {"target_accept_prob": 0.998},
    "NUTS": {"target_accept_prob": 0.99},
}


def run(name, problem, key, num_chains=64, num_warmup=1000, num_samples=1000, **options):
    """Run one kernel; return draws `(C, N, ...)`, wall-clock seconds and processor seconds."""
    model, args = PROBLEMS[problem]
    if name == "NUTS":
        num_chains, num_warmup = 4, num_warmup // 2
    mcmc = MCMC(
        KERNELS[name](model, **options),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    def draw():
        mcmc.run(key, *args)
        return mcmc.get_samples(group_by_chain=True)

    draws, *times = clocked(draw)
    return {k: np.asarray(v) for k, v in draws.items()}, *times


def figures(draws):
    """Return the largest R-hat and the smallest bulk and tail ESS over all parameters."""
    data = az.convert_to_dataset(draws)
    tables = az.rhat(data), az.ess(data), az.ess(data, method="tail")
    largest, bulk, tail = (
        op([op(np.asarray(table[name])) for name in table.data_vars])
        for table, op in zip(tables, (np.max, np.min, np.min), strict=True)
    )
    return float(largest), float(bulk), float(tail)


def line(label, draws, wall, cpu):
    """Print the figures of one run; return effective draws per wall-clock and processor second."""
    rhat, bulk, tail = figures(draws)
    print(
        f"{label:24} R-hat {rhat:.4f}, ESS bulk {bulk:6.0f} tail {tail:6.0f}, {wall:6.1f} s: "
        f"{bulk / wall:6.1f} a second; processor {cpu:6.1f} s: {bulk / cpu:6.1f}",
        flush=True,
    )
    side = "theirs" if "NUTS" in label else "ours"
    note(f"{label}, cold", **{side: wall}, processor=cpu, rhat=rhat, bulk=bulk, tail=tail)
    return bulk / wall, bulk / cpu


def speed(problem="irt", repeats="2", *names):
    """Compare effective draws a second, in turns; every run compiles anew."""
    rates = {name: [] for name in (*(names or ("MEADS", "ChEES")), "NUTS")}
    for i in range(int(repeats)):
        for name in rates if i % 2 else reversed(rates):
            jax.clear_caches()
            outcome = run(name, problem, jax.random.key(i))
            rates[name].append(line(f"{problem}, {name}, key {i}", *outcome))
    for name in rates:
        ratios = np.array(rates[name]) / np.array(rates["NUTS"])
        wall, cpu = map(statistics.median, ratios.T)
        print(f"{name} / NUTS: {wall:.2f} by the clock, {cpu:.2f} by the processor")
        if name != "NUTS":
            rate, rate_cpu = (list(column) for column in ratios.T)
            each, instead = ([1.0 / a for a, _ in rates[side]] for side in (name, "NUTS"))
            note(f"{problem}: an effective draw by {name} / NUTS, cold", ours=each, theirs=instead,
                 ratio=[1.0 / value for value in rate], rate_ratio=rate,
                 rate_ratio_by_processor=rate_cpu,
                 peak_gib_of_the_whole_process=peak())  # fmt: skip


def chains(problem="irt", *names):
    """Print the figures of 16 to 1,024 chains; each of many chains makes fewer draws."""
    for name in names or ("MEADS", "ChEES"):
        for num_chains in (16, 64, 256, 1024):
            draws = max(1000 * 64 // num_chains, 100) if num_chains > 64 else 1000
            warmup = 1000 if num_chains <= 64 else 500
            outcome = run(name, problem, jax.random.key(0), num_chains, warmup, draws)
            line(f"{name}, {num_chains} chains x {draws}", *outcome)


def gradients(problem="irt", start="microcanonical", *names):
    """Print effective draws a gradient, without the gradients of the start, and R-hat."""
    model, args = PROBLEMS[problem]
    for name in names or ("MEADS", "ChEES", "MAMS", "MCLMC"):
        mcmc = MCMC(
            KERNELS[name](model, start=start),
            num_warmup=500,
            num_samples=500,
            num_chains=64,
            chain_method="vectorized",
            progress_bar=False,
        )
        fields = ("num_steps",)
        key = jax.random.key(0)
        mcmc.warmup(key, *args, extra_fields=fields, collect_warmup=True)
        before = float(np.mean(mcmc.get_extra_fields()["num_steps"])) * 500
        mcmc.run(jax.random.key(1), *args, extra_fields=fields)
        draws = mcmc.get_samples(group_by_chain=True)
        rhat, bulk, tail = figures({k: np.asarray(v) for k, v in draws.items()})
        number = np.asarray(mcmc.get_extra_fields()["num_steps"]).sum()
        print(
            f"{problem}, {name}, start={start!r}: R-hat {rhat:.4f}, ESS bulk {bulk:.0f} tail "
            f"{tail:.0f}; gradients of warm-up {before:.0f} a chain, of draws {number / 64:.0f}; "
            f"bulk a gradient {bulk / number:.4f}, tail {tail / number:.4f}",
            flush=True,
        )


def moments(*names):
    """Compare means and standard deviations with theory, or with a long run of NUTS."""
    known = known_moments()
    problems = [name for name in names if name not in KERNELS] or PROBLEMS
    kernels = [name for name in names if name in KERNELS] or [*KERNELS]
    for problem in problems:
        reference = known.get(problem)
        longest = None
        if reference is None:
            better = "decentred schools" if problem == "schools" else problem
            longest, *_ = run("NUTS", better, jax.random.key(99), 4, 2000, 5000)
        for name in kernels:
            options = SMALL_STEPS.get(name, {}) if problem == "schools" else {}
            draws, *_ = run(name, problem, jax.random.key(1), **options)
            scores = np.concatenate(
                [
                    z_scores(draws[k], (reference or {}).get(k), longest and longest[k])
                    for k in draws
                    if reference is None or k in reference
                    if longest is None or k in longest
                ]
            )
            rhat, bulk, _ = figures(draws)
            ratios = variance_ratios(draws, reference, longest)
            print(
                f"{problem:18} {name:6} largest |z| of {scores.size:4}: {np.abs(scores).max():5.2f}"
                f", mean z^2 {np.mean(scores**2):5.2f}, R-hat {rhat:.4f}, ESS {bulk:.0f}, "
                f"variances {np.median(ratios):.3f} [{ratios.min():.3f}, {ratios.max():.3f}]",
                flush=True,
            )


def variance_ratios(draws, reference, longest):
    """Return the variance of each number over the true one, or over that of a long NUTS run."""
    if longest is None:
        true = {name: np.square(sd) for name, (_, sd) in reference.items()}
    else:
        true = {name: value.var((0, 1)) for name, value in longest.items()}
    known = [name for name in draws if name in true]
    return np.concatenate([np.ravel(draws[name].var((0, 1)) / true[name]) for name in known])


def z_scores(draws, truth, longest):
    """Return errors of mean and variance in standard errors, or no numbers without a reference."""
    if truth is None and longest is None:
        return np.zeros(0)
    mean, sd = truth or (longest.mean((0, 1)), longest.std((0, 1)))
    scores = []
    for power, expected in ((1, 0.0), (2, np.asarray(sd) ** 2)):
        value = (draws - mean) ** power
        error = value.var((0, 1)) / ess(value)
        if longest is not None:
            other = (longest - mean) ** power
            error = error + other.var((0, 1)) / ess(other)
            expected = other.mean((0, 1))
        scores.append(np.ravel((value.mean((0, 1)) - expected) / np.sqrt(error)))
    return np.concatenate(scores)


def ess(draws):
    """Return the effective sample size of means."""
    data = az.convert_to_dataset({"x": draws})
    return np.asarray(az.ess(data, method="mean")["x"])


def traps(kernel="ChEES", seeds="10", *problems):
    """Count frozen chains and dropped searches over seeds, in double precision."""
    numpyro.enable_x64()
    for problem in problems or TRAPS:
        model, args = TRAPS[problem]
        mcmc = MCMC(
            KERNELS[kernel](model),
            num_warmup=500,
            num_samples=500,
            num_chains=64,
            chain_method="vectorized",
            progress_bar=False,
            jit_model_args=True,  # one program for all seeds
        )
        largest, frozen = [], []
        for seed in range(int(seeds)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                fields = {"extra_fields": ("frozen",)}
                _, _, cpu = clocked(mcmc.run, jax.random.key(seed), *args, **fields)
            draws = mcmc.get_samples(group_by_chain=True)
            rhat, bulk, _ = figures({k: np.asarray(v) for k, v in draws.items()})
            flags = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["frozen"])
            largest.append(rhat)
            frozen.append(int(flags.all(axis=1).sum()))
            print(
                f"{problem}, {kernel}, key {seed}: R-hat {rhat:.4f}, ESS {bulk:.0f}, {frozen[-1]} "
                f"chains frozen; processor {cpu:.0f} s",
                *(f"    {warning.message}" for warning in said),
                sep="\n",
                flush=True,
            )
        print(
            f"{problem}, {kernel}: largest R-hat of {len(largest)} runs {max(largest):.4f}, "
            f"{sum(count > 0 for count in frozen)} runs with frozen chains",
            flush=True,
        )


STARTS = ("nuts", "pathfinder", "microcanonical")
START_PROBLEMS = ("irt", "radon", "correlated")


def starts(kernel="ChEES", seeds="2", *problems):
    """Compare starts over seeds: failures, seconds until chains start, and later R-hat."""
    for problem in problems or START_PROBLEMS:
        model, args = PROBLEMS[problem]
        kernels = {start: KERNELS[kernel](model, start=start) for start in STARTS}
        rows = {start: [] for start in kernels}
        for seed in range(-1, int(seeds)):  # the first seed compiles
            for start, one in kernels.items():
                rows[start].append(started(one, args, seed))
        for start, (cold, *warm) in rows.items():
            good = np.array([row for row in warm if row is not None]).reshape(-1, 3)
            print(
                f"{problem}, {kernel}, start={start!r}: {len(warm) - len(good)} of {len(warm)} "
                f"failed; start cold {cold[0] if cold else np.nan:.1f} s, warm, median "
                f"{np.median(good[:, 0]):.2f} s; R-hat median {np.median(good[:, 1]):.4f}, largest "
                f"{np.max(good[:, 1], initial=0.0):.4f}; ESS median {np.median(good[:, 2]):.0f}",
                flush=True,
            )


def started(kernel, args, seed, num_chains=64):
    """Return seconds until chains start, largest R-hat and smallest ESS; None after a failure."""
    keys = jax.random.split(jax.random.key(seed + 1), num_chains)
    try:
        seconds = clocked(lambda: kernel.init(keys, 500, None, args).z)[1]
        if seed < 0:
            return seconds, np.nan, np.nan
        mcmc = MCMC(
            kernel,
            num_warmup=500,
            num_samples=500,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=False,
            jit_model_args=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mcmc.run(jax.random.key(seed + 1), *args)
    except (RuntimeError, ValueError) as error:
        print(f"seed {seed}: {error}", flush=True)
        return None
    draws = mcmc.get_samples(group_by_chain=True)
    rhat, bulk, _ = figures({name: np.asarray(x) for name, x in draws.items()})
    return seconds, rhat, bulk


def small(y=None):
    """A mean, a scale, and five normal observations."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("row", 5):
        return numpyro.sample("y", dist.Normal(mu, s), obs=y)


def sbc(datasets="200", *names):
    """Rank true values among posterior draws, and test whether ranks are uniform."""
    from scipy.stats import chisquare

    number, bins, kept = int(datasets), 10, 99
    prior = numpyro.infer.Predictive(small, num_samples=number)(jax.random.key(0))
    for name in names or ("MEADS", "ChEES"):
        mcmc = MCMC(
            KERNELS[name](small),
            num_warmup=300,
            num_samples=50,
            num_chains=64,
            chain_method="vectorized",
            progress_bar=False,
        )

        @jax.jit
        def draw(key, y, mcmc=mcmc):
            mcmc.run(key, y)
            return mcmc.get_samples()

        ranks = {"mu": [], "s": []}
        for i in range(number):
            draws = draw(jax.random.fold_in(jax.random.key(1), i), prior["y"][i])
            pick = np.random.default_rng(i).choice(len(draws["mu"]), kept, replace=False)
            for site in ranks:
                below = np.asarray(draws[site])[pick] < float(prior[site][i])
                ranks[site].append(int(below.sum()))
        for site, values in ranks.items():
            histogram = np.histogram(values, bins, (0, kept + 1))[0]
            p = chisquare(histogram).pvalue
            print(f"{name} {site:3} ranks {histogram.tolist()}, p = {p:.3f}", flush=True)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["speed"]
    commands = {"speed": speed, "chains": chains, "moments": moments, "sbc": sbc, "traps": traps}
    commands |= {"starts": starts, "gradients": gradients}
    with saved(f"mcmc_{command}"):
        commands[command](*rest)
