"""Problems for the many-chain kernels: from BlackJAX's pages, and well-known hard ones."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer.reparam import LocScaleReparam


def item_response(student, item, y):
    """Two-parameter logistic model: 100 students, 30 items."""
    ability = numpyro.sample("ability", dist.Normal(0, 1).expand([100]).to_event(1))
    difficulty = numpyro.sample("difficulty", dist.Normal(0, 1).expand([30]).to_event(1))
    slope = numpyro.sample("slope", dist.HalfNormal(1).expand([30]).to_event(1))
    with numpyro.plate("answer", len(y)):
        logits = slope[item] * (ability[student] - difficulty[item])
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def item_response_data(seed=0):
    """Simulate the answers of all students to all items."""
    rng = np.random.default_rng(seed)
    ability, difficulty = rng.normal(size=100), rng.normal(size=30)
    slope = np.abs(rng.normal(size=30)) + 0.1
    student, item = np.divmod(np.arange(3000), 30)
    p = 1 / (1 + np.exp(-slope[item] * (ability[student] - difficulty[item])))
    return student, item, rng.binomial(1, p)


def radon(county, floor, y):
    """Radon levels with partial pooling over 85 counties."""
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    spread = numpyro.sample("spread", dist.HalfNormal(1))
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("county", 85):
        level = numpyro.sample("level", dist.Normal(mean, spread))
    with numpyro.plate("home", len(y)):
        numpyro.sample("y", dist.Normal(level[county] + slope * floor, noise), obs=y)


def radon_data(seed=0):
    """Simulate Poisson(10) homes a county, slope -0.7, standard deviation 0.5."""
    rng = np.random.default_rng(seed)
    county = np.repeat(np.arange(85), rng.poisson(10, 85))
    level = 1.3 + 0.5 * rng.normal(size=85)
    floor = rng.binomial(1, 0.5, len(county)).astype(float)
    return county, floor, level[county] - 0.7 * floor + 0.5 * rng.normal(size=len(county))


def schools():
    """The centred model of the eight schools."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample(
            "y", dist.Normal(theta, sigma), obs=jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
        )


decentred_schools = handlers.reparam(schools, config={"theta": LocScaleReparam(0)})


def funnel():
    """Neal's funnel in ten dimensions, with a neck of moderate width."""
    v = numpyro.sample("v", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


def banana():
    """A normal variable, and another one whose mean is its square."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x**2, 0.5))


CORRELATION = 0.9 ** np.abs(np.subtract.outer(np.arange(50), np.arange(50)))
SCALES = np.geomspace(0.1, 10.0, 50)


def gaussian():
    """A correlated Gaussian with scales from 0.1 to 10."""
    covariance = jnp.asarray(CORRELATION * np.outer(SCALES, SCALES))
    numpyro.sample("x", dist.MultivariateNormal(jnp.arange(50.0), covariance))


def logistic(x, y):
    """A logistic regression on ten inputs."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def logistic_data(seed=0):
    """Simulate 300 answers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 10))
    return x, rng.binomial(1, 1 / (1 + np.exp(-x @ rng.normal(size=10))))


def correlated(x, y):
    """A regression on raw columns, two of which are nearly equal, with an unknown noise."""
    base = numpyro.sample("base", dist.Normal(0, 20))
    slopes = numpyro.sample("slopes", dist.Normal(0, 5).expand([x.shape[1]]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(5))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(base + x @ slopes, noise), obs=y)


def correlated_data(seed=0):
    """Simulate 200 rows of 6 columns around 3, the first two correlated by .999."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 6))
    x[:, 1] = 0.999 * x[:, 0] + np.sqrt(1 - 0.999**2) * x[:, 1]
    x = 3 + x
    return x, x @ rng.normal(size=6) + rng.normal(size=200)


def constrained(y):
    """Latents on a simplex, and ordered latents."""
    p = numpyro.sample("p", dist.Dirichlet(jnp.full(4, 2.0)))
    base = dist.Normal(0, 2).expand([3]).to_event(1)
    cut = numpyro.sample("cut", dist.TransformedDistribution(base, transforms.OrderedTransform()))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Categorical(p), obs=y)
        numpyro.sample("z", dist.OrderedLogistic(0.3, cut), obs=y)


def arma(y):
    """An ARMA(1, 1) model, whose recursion explodes where theta is beyond 1."""
    mean = numpyro.sample("mean", dist.Normal(0, 10))
    phi = numpyro.sample("phi", dist.Normal(0, 2))
    theta = numpyro.sample("theta", dist.Normal(0, 2))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(error, pair):
        error = pair[1] - (mean + phi * pair[0] + theta * error)
        return error, error

    first = y[0] - (mean + phi * mean)
    _, errors = jax.lax.scan(step, first, (y[:-1], y[1:]))
    errors = jnp.concatenate([first[None], errors])
    numpyro.sample("errors", dist.Normal(0, sigma), obs=errors)


def arma_data(seed=0):
    """Simulate 200 points of the ARMA model."""
    error, y = np.random.default_rng(seed).normal(size=201), [0.0]
    for before, now in zip(error[:-1], error[1:], strict=True):
        y.append(0.3 + 0.6 * y[-1] + now + 0.4 * before)
    return (np.array(y[1:]),)


def far_mode():
    """A normal far from the searches' starts, and near them a mode with exp(-20) of its mass."""
    modes = dist.Normal(jnp.array([-20.0, 1.0]), jnp.array([1.0, 0.05]))
    logits = jnp.array([0.0, -20.0])
    numpyro.sample("place", dist.MixtureSameFamily(dist.Categorical(logits=logits), modes))
    numpyro.sample("other", dist.Normal(0, 1).expand([3]).to_event(1))


def walk(y):
    """A random walk whose steps have a scale near zero, observed with noise."""
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    level = numpyro.sample("level", dist.Normal(0, 1))
    steps = numpyro.sample("steps", dist.Normal(0, 1).expand([len(y)]).to_event(1))
    numpyro.sample("y", dist.Normal(level + scale * jnp.cumsum(steps), 1), obs=y)


TRAPS = {  # searches or chains may end where there is hardly any mass
    "arma": (arma, arma_data()),
    "far mode": (far_mode, ()),
    "walk": (walk, (np.random.default_rng(0).normal(size=50),)),
}


def known_moments():
    """Return mean and standard deviation by site, where they are known in closed form."""
    nine = np.zeros(9)
    return {
        "funnel": {"v": (0.0, 1.0), "x": (nine, nine + np.exp(0.25))},
        "banana": {"x": (0.0, 1.0), "y": (1.0, np.sqrt(2.25))},
        "gaussian": {"x": (np.arange(50.0), SCALES)},
    }


PROBLEMS = {
    "irt": (item_response, item_response_data()),
    "radon": (radon, radon_data()),
    "schools": (schools, ()),
    "decentred schools": (decentred_schools, ()),
    "funnel": (funnel, ()),
    "banana": (banana, ()),
    "gaussian": (gaussian, ()),
    "logistic": (logistic, logistic_data()),
    "correlated": (correlated, correlated_data()),
    "simplex, ordered": (constrained, (np.array([0, 1, 1, 2, 3, 2, 0, 0, 1, 2]),)),
}
