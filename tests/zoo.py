"""Models of every kind that an ensemble must run, small enough to compile fast."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from numpyro import handlers
from numpyro.contrib.module import (
    eqx_module,
    flax_module,
    nnx_module,
    random_eqx_module,
    random_flax_module,
    random_nnx_module,
)
from numpyro.distributions import constraints, transforms
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import CircularReparam, LocScaleReparam, TransformReparam

from numpyro_ensemble import EnsembleMAP, EnsembleVI

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 2)).round(2)
Y = (X @ np.array([1.0, -1.0]) + 0.3 * RNG.normal(size=8)).round(2)
GROUP = np.array([0, 0, 1, 1, 2, 2, 2, 0])


# for programs that run once: compilation takes half as long, and numbers agree to rounding
jit_once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


PROMOTES = ("correlation", "local_latents")  # NumPyro's LKJCholesky and Dirichlet promote ranks


def chosen(names, quick=None):
    """Parametrise by names, in their order; names that are not quick are left to `make long`."""
    return [
        pytest.param(
            name,
            marks=[pytest.mark.promotes_ranks] * (name in PROMOTES)
            + [pytest.mark.long] * (quick is not None and name not in quick),
        )
        for name in names
    ]


class Case(NamedTuple):
    """A model and the arguments that it is called with."""

    model: Callable
    args: tuple
    kwargs: dict[str, Any] = {}


def ridge(x, y):
    w = numpyro.sample("w", dist.Normal(0, 2).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@cache
def map_on_ridge():
    """Return a runner that many tests share, so that it compiles once in a process."""
    return EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=2)


@cache
def vi_on_ridge():
    """Return a shared runner with a guide."""
    guide, optim = AutoNormal(ridge), numpyro.optim.Adam(0.05)
    return EnsembleVI(ridge, guide, optim, Trace_ELBO(), ensemble_size=2)


def positive(x, y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    loc = numpyro.sample("loc", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc - rate, scale), obs=y)


def simplex(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.full(3, 2.0)))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Categorical(p), obs=y)


def ordered(y):
    base = dist.Normal(0, 1).expand([3]).to_event(1)
    cut = numpyro.sample("cut", dist.TransformedDistribution(base, transforms.OrderedTransform()))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.OrderedLogistic(0.3, cut), obs=y)


def correlation(x):
    chol = numpyro.sample("chol", dist.LKJCholesky(2, 2.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), scale_tril=chol), obs=x)


def interval(y):
    low = numpyro.sample("low", dist.Uniform(-3.0, 1.0))
    p = numpyro.sample("p", dist.Beta(2.0, 2.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(low + p, 1.0), obs=y)


def dependent_support(y):
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    high = numpyro.sample("high", dist.Uniform(low, low + 3.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(high, 1.0), obs=y)


def hierarchy(group, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("groups", len(np.unique(group))):  # reads the values of its data
        a = numpyro.sample("a", dist.Normal(mu, tau))
        b = numpyro.sample(
            "b",
            dist.TransformedDistribution(
                dist.Normal(0.0, 1.0), transforms.AffineTransform(mu, 2.0)
            ),
        )
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal((a + b)[group], 0.5), obs=y)


decentred = handlers.reparam(hierarchy, config={"a": LocScaleReparam(0), "b": TransformReparam()})
learned_centring = handlers.reparam(hierarchy, config={"a": LocScaleReparam(None)})


def angle(y):
    mu = numpyro.sample("mu", dist.VonMises(0.5, 2.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.VonMises(mu, 3.0), obs=y)


circular = handlers.reparam(angle, config={"mu": CircularReparam()})


def subsampled(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("data", len(y), subsample_size=4) as rows:
        numpyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])


def local_latents(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y), subsample_size=4):
        batch = numpyro.subsample(y, event_dim=0)
        z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(2)))
        numpyro.sample("y", dist.Normal(mu + z + p[..., 0], 1.0), obs=batch)


def scaled_and_masked(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("data", len(y)):
        with handlers.scale(scale=2.5), handlers.mask(mask=jnp.arange(len(y)) < 5):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def partly_observed(y, seen):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


def with_factor(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -jnp.abs(mu - 0.3))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def scoped(x, y):
    with handlers.scope(prefix="left"):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    with handlers.scope(prefix="right"):
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu + x[:, 0], s), obs=y)


def with_param(x, y):
    w = numpyro.param("w", jnp.ones(2))
    s = numpyro.param("s", lambda key: jax.random.exponential(key), constraint=constraints.positive)
    top = numpyro.param("top", 0.5, constraint=constraints.interval(0.0, jnp.max(y) + 1.0))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w + mu * top, s), obs=y)


class Linen(linen.Module):
    """A small Flax network, with batch normalisation on request."""

    normalise: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(2)(x))
        if self.normalise:
            x = linen.BatchNorm(use_running_average=False)(x)
        return linen.Dense(1)(x)[:, 0]


NNX = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
EQX = eqx.nn.MLP(2, "scalar", 2, 1, activation=jax.nn.tanh, key=jax.random.PRNGKey(0))


def _regress(mean, y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def flax_net(x, y):
    _regress(flax_module("net", Linen(), input_shape=(1, 2))(x), y)


def batch_norm(x, y):
    net = flax_module("net", Linen(True), input_shape=(1, 2), mutable=["batch_stats"])
    _regress(net(x), y)


def nnx_net(x, y):
    _regress(nnx_module("net", NNX)(x)[:, 0], y)


def eqx_net(x, y):
    _regress(jax.vmap(eqx_module("net", EQX))(x), y)


def random_flax_net(x, y):
    net = random_flax_module("net", Linen(), dist.Normal(0, 1), input_shape=(1, 2))
    _regress(net(x), y)


def random_nnx_net(x, y):
    _regress(random_nnx_module("net", NNX, dist.Normal(0, 1))(x)[:, 0], y)


def random_eqx_net(x, y):
    _regress(jax.vmap(random_eqx_module("net", EQX, dist.Normal(0, 1)))(x), y)


CASES = {
    "ridge": Case(ridge, (X, Y)),
    "positive": Case(positive, (X, Y)),
    "simplex": Case(simplex, (np.array([0, 1, 1, 2, 2, 2]),)),
    "ordered": Case(ordered, (np.array([0, 1, 1, 2, 3, 2]),)),
    "correlation": Case(correlation, (X,)),
    "interval": Case(interval, (Y,)),
    "dependent_support": Case(dependent_support, (Y,)),
    "hierarchy": Case(hierarchy, (GROUP, Y)),
    "decentred": Case(decentred, (GROUP,), {"y": Y}),
    "learned_centring": Case(learned_centring, (GROUP, Y)),
    "circular": Case(circular, (Y,)),
    "subsampled": Case(subsampled, (jnp.asarray(X), jnp.asarray(Y))),
    "local_latents": Case(local_latents, (Y,)),
    "scaled_and_masked": Case(scaled_and_masked, (X, Y)),
    "partly_observed": Case(partly_observed, (Y, np.arange(8) < 6)),
    "with_factor": Case(with_factor, (Y,)),
    "scoped": Case(scoped, (X, Y)),
    "with_param": Case(with_param, (X, Y)),
    "flax_net": Case(flax_net, (X, Y)),
    "batch_norm": Case(batch_norm, (X, Y)),
    "nnx_net": Case(nnx_net, (X, Y)),
    "eqx_net": Case(eqx_net, (X, Y)),
    "random_flax_net": Case(random_flax_net, (X, Y)),
    "random_nnx_net": Case(random_nnx_net, (X, Y)),
    "random_eqx_net": Case(random_eqx_net, (X, Y)),
}
