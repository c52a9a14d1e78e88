"""Many-chain kernels on regressions on raw columns, by metric.

Run `python benchmarks/correlated.py [posteriordb] [kernel] [metric] [problem]` for the largest
R-hat and the smallest effective sample sizes of 64 x 1,000 draws after 1,000 of warm-up. The
first argument is a folder with the data files of posteriordb (`posterior_database/data/data`), or
`-` for data that are simulated with the same shapes and about the same correlations.
"""

import itertools
import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import clocked
from mcmc import figures
from numpyro.infer import MCMC
from records import note, saved

from numpyro_ensemble.mcmc import MEADS, ChEES

KERNELS = {"MEADS": MEADS, "ChEES": ChEES}


def flat(num_columns):
    """Return a flat prior, Stan's default."""
    return dist.ImproperUniform(dist.constraints.real_vector, (), (num_columns,))


def linear(x, y, sigma_prior=None):
    """Regress on raw columns, the first of which is constant."""
    beta = numpyro.sample("beta", flat(x.shape[1]))
    positive = dist.ImproperUniform(dist.constraints.positive, (), ())
    sigma = numpyro.sample("sigma", positive if sigma_prior is None else sigma_prior)
    numpyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


def logit(x, y):
    """Regress a binary outcome on raw columns."""
    beta = numpyro.sample("beta", flat(x.shape[1]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)


def diamonds(x, y):
    """Regress on 24 centred columns; the polynomials among them are nearly collinear (brms)."""
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3, 0, 10)))
    numpyro.sample("y", dist.Normal(intercept + x @ b, sigma).to_event(1), obs=y)


def columns(*parts):
    """Return a column of ones and other columns side by side."""
    return np.stack([np.ones(len(parts[0])), *map(np.asarray, parts)], axis=1)


def problems(read):
    """Return models and arguments by name; `read` returns a data set by its name."""
    d = {name: read(name) for name in SIMULATED}
    earnings, kidiq, mesquite, nes, wells = (
        {k: np.asarray(v, float) for k, v in d[name].items() if k != "N"}
        for name in ("earnings", "kidiq", "mesquite", "nes1972", "wells_data")
    )
    height, male, log_earn = earnings["height"], earnings["male"], np.log(earnings["earn"])
    hs, iq, score = (kidiq[k] for k in ("mom_hs", "mom_iq", "kid_score"))
    first, second = mesquite["diam1"], mesquite["diam2"]
    logs = [first * second * mesquite["canopy_height"], first * second, first / second]
    logs = [np.log(x) for x in (*logs, mesquite["total_height"])]
    ages = [(nes["age_discrete"] == k).astype(float) for k in (2, 3, 4)]
    party = [nes["real_ideo"], nes["race_adj"], *ages]
    party += [nes["educ1"], nes["gender"], nes["income"]]
    x = np.asarray(d["diamonds"]["X"], float)[:, 1:]
    cauchy = dist.HalfCauchy(2.5)
    raw = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    interacting = columns(hs, iq, hs * iq)
    return {
        "earnings-logearn_height": (linear, columns(height), log_earn),
        "earnings-logearn_interaction": (linear, columns(height, male, height * male), log_earn),
        "kidiq-kidscore_momhsiq": (linear, columns(hs, iq), score, cauchy),
        "kidiq-kidscore_interaction": (linear, interacting, score, cauchy),
        "mesquite-logmesquite_logvash": (
            linear,
            columns(*logs, mesquite["group"]),
            np.log(mesquite["weight"]),
        ),
        "mesquite-mesquite": (linear, columns(*(mesquite[k] for k in raw)), mesquite["weight"]),
        "nes1972-nes": (linear, columns(*party), nes["partyid7"]),
        "wells_data-wells_dist": (logit, columns(wells["dist"]), wells["switched"]),
        "wells_data-wells_dae": (
            logit,
            columns(wells["dist"] / 100, wells["arsenic"], wells["educ"] / 4),
            wells["switched"],
        ),
        "diamonds-diamonds": (diamonds, x - x.mean(axis=0), np.asarray(d["diamonds"]["Y"], float)),
    }


def stored(folder):
    """Return a reader of posteriordb's files, which may be zipped."""

    def read(name):
        path = Path(folder) / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        with zipfile.ZipFile(f"{path}.zip") as archive:
            return json.loads(archive.read(f"{name}.json"))

    return read


def _earnings(rng):
    male = rng.binomial(1, 0.4, 1192)
    height = 64.5 + 5.5 * male + 2.7 * rng.normal(size=1192)
    return {
        "male": male,
        "height": height,
        "earn": np.exp(5.8 + 0.06 * height + 0.9 * rng.normal(size=1192)),
    }


def _kidiq(rng):
    hs, iq = rng.binomial(1, 0.8, 434), 100 + 15 * rng.normal(size=434)
    score = 26 + 6 * hs + 0.55 * iq + 18 * rng.normal(size=434)
    return {"mom_hs": hs, "mom_iq": iq, "kid_score": score}


def _mesquite(rng):
    size = rng.normal(size=46)

    def near(mean, spread):
        return np.exp(np.log(mean) + 0.4 * size + spread * rng.normal(size=46))

    plants = {"diam1": near(2.1, 0.2), "diam2": near(1.6, 0.2), "total_height": near(1.5, 0.15)}
    plants["canopy_height"] = 0.75 * plants["total_height"] * np.exp(0.2 * rng.normal(size=46))
    plants["density"] = 1.0 + rng.poisson(0.7, 46)
    plants["group"] = rng.binomial(1, 0.43, 46)
    return plants | {"weight": 400 * np.exp(size + 0.3 * rng.normal(size=46))}


def _nes(rng):
    row = {"real_ideo": rng.integers(1, 8, 1330), "race_adj": 1 + 0.5 * rng.binomial(1, 0.1, 1330)}
    row |= {"age_discrete": rng.integers(1, 5, 1330), "educ1": rng.integers(1, 5, 1330)}
    row |= {"gender": rng.integers(1, 3, 1330), "income": rng.integers(1, 6, 1330)}
    party = 1.7 + 0.5 * row["real_ideo"] - row["race_adj"] + 1.8 * rng.normal(size=1330)
    return row | {"partyid7": party}


def _wells(rng):
    row = {"dist": rng.exponential(48, 3020), "arsenic": 0.5 + rng.exponential(1.15, 3020)}
    row["educ"] = rng.integers(0, 17, 3020)
    return row | {"switched": rng.binomial(1, 1 / (1 + np.exp(0.006 * row["dist"] - 0.6)))}


def _diamonds(rng):
    """Simulate polynomials of sizes that are nearly collinear, and contrasts of factors."""
    size = rng.gamma(2.0, 0.35, 5000) + 0.2
    wide = [np.log(size) + 0.03 * rng.normal(size=5000) for _ in range(4)]
    factors = [rng.normal(size=5000) for _ in range(20)]
    x = np.stack([np.ones(5000), *wide, *factors], axis=1)
    return {"X": x, "Y": 8.4 + 1.7 * np.log(size) + 0.13 * rng.normal(size=5000)}


SIMULATED = {
    "earnings": _earnings,
    "kidiq": _kidiq,
    "mesquite": _mesquite,
    "nes1972": _nes,
    "wells_data": _wells,
    "diamonds": _diamonds,
}


def simulated(name):
    """Return a simulated data set in the form of posteriordb's."""
    return SIMULATED[name](np.random.default_rng(0))


def main(folder="-", kernel="all", metric="auto", problem="", key="0"):
    """Print the figures of one kernel and metric, or of all kernels, problem by problem."""
    found = problems(simulated if folder == "-" else stored(folder))
    kernels = KERNELS if kernel == "all" else [kernel]
    for name, one in itertools.product((n for n in found if problem in n), kernels):
        model, *args = found[name]
        mcmc = MCMC(
            KERNELS[one](model, **({} if metric == "-" else {"metric": metric})),
            num_warmup=1000,
            num_samples=1000,
            num_chains=64,
            chain_method="vectorized",
            progress_bar=False,
        )
        _, seconds, _ = clocked(mcmc.run, jax.random.key(int(key)), *args)
        draws = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
        rhat, bulk, tail = figures(draws)
        print(
            f"{name:30} {one} {metric:9} R-hat {rhat:.4f}, ESS bulk {bulk:6.0f} tail {tail:6.0f}, "
            f"{seconds:5.1f} s",
            flush=True,
        )
        note(f"{name}, {one}, {metric}, cold", ours=seconds, rhat=rhat, bulk=bulk, tail=tail)


if __name__ == "__main__":
    with saved("correlated"):
        main(*sys.argv[1:])
