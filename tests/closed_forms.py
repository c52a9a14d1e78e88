"""Models whose likelihood and prior are written out by hand, at one value of their latents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats
from zoo import CASES, GROUP, X, Y


class Parts(NamedTuple):
    """A model, values of its latents, and the exact values of the two parts of its log density."""

    model: Callable
    args: tuple
    params: dict[str, Any]
    likelihood: float
    prior: float


def normal(x, loc=0.0, scale=1.0):
    return stats.norm.logpdf(x, loc, scale).sum()


def chain(y):
    """An autoregression, observed with noise whose scale is a latent of each step."""

    def move(x, now):
        v = numpyro.sample("v", dist.HalfNormal(1.0))
        x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        numpyro.sample("y", dist.Normal(x, v), obs=now)
        return x, None

    scan(move, 0.0, jnp.asarray(y))


def _ridge():
    w = np.array([0.3, -0.7])
    return {"w": w}, normal(Y, X @ w, 0.5), normal(w, 0.0, 2.0)


def _positive():
    scale, rate, loc = 0.7, 1.3, 0.9
    prior = (
        stats.halfnorm.logpdf(scale)
        + stats.gamma.logpdf(rate, 2.0, scale=0.5)
        + stats.lognorm.logpdf(loc, 1.0)
    )
    return {"scale": scale, "rate": rate, "loc": loc}, normal(Y, loc - rate, scale), prior


def _decentred():
    mu, tau = 0.4, 0.8
    a, b = np.array([0.1, -0.5, 0.9]), np.array([1.0, 0.2, -0.3])
    mean = (mu + tau * a) + (mu + 2.0 * b)
    prior = normal(mu) + stats.halfnorm.logpdf(tau) + normal(a) + normal(b)
    params = {"mu": mu, "tau": tau, "a_decentered": a, "b_base": b}
    return params, normal(Y, mean[GROUP], 0.5), prior


def _circular():
    angle = 4.0 - 2 * np.pi
    likelihood = stats.vonmises.logpdf(Y, 3.0, loc=angle).sum()
    return {"mu_unwrapped": 4.0}, likelihood, stats.vonmises.logpdf(angle, 2.0, loc=0.5)


def _scaled_and_masked():
    w = np.array([0.3, -0.7])
    return {"w": w}, 2.5 * normal(Y[:5], X[:5] @ w, 0.5), normal(w)


def _partly_observed():
    mu, missing = 0.4, np.linspace(-1.0, 1.0, 8)
    params = {"mu": mu, "y_unobserved": missing}
    return params, normal(Y[:6], mu), normal(mu) + normal(missing[6:], mu)


def _with_factor():
    mu = 0.8
    return {"mu": mu}, normal(Y, mu) - abs(mu - 0.3), normal(mu)


def _scoped():
    mu, s = 0.4, 0.8
    likelihood = normal(Y, mu) + normal(Y, mu + X[:, 0], s)
    return {"left/mu": mu, "right/s": s}, likelihood, normal(mu) + stats.halfnorm.logpdf(s)


WRITTEN_OUT = {
    "ridge": _ridge,
    "positive": _positive,
    "decentred": _decentred,
    "circular": _circular,
    "scaled_and_masked": _scaled_and_masked,
    "partly_observed": _partly_observed,
    "with_factor": _with_factor,
    "scoped": _scoped,
}


def _subsampled() -> Parts:
    case = CASES["subsampled"]

    @jax.jit
    def batch():
        model = handlers.seed(case.model, 0)
        return handlers.trace(model).get_trace(*case.args)["data"]["value"]

    rows = np.asarray(batch())  # only the rows are taken from the model
    w = np.array([0.3, -0.7])
    likelihood = len(Y) / len(rows) * normal(Y[rows], X[rows] @ w, 0.5)
    return Parts(handlers.seed(case.model, 0), case.args, {"w": w}, likelihood, normal(w))


def _chain() -> Parts:
    x, v, y = np.array([0.5, 0.7, -0.2]), np.array([0.6, 1.1, 0.9]), Y[:3]
    prior = normal(x, 0.9 * np.array([0.0, *x[:-1]])) + stats.halfnorm.logpdf(v).sum()
    return Parts(chain, (y,), {"x": x, "v": v}, normal(y, x, v), prior)


NAMES = [*WRITTEN_OUT, "subsampled", "chain"]


def parts(name: str) -> Parts:
    """Return one of the models of `NAMES`, at one value of its latents."""
    if name == "subsampled":
        return _subsampled()
    if name == "chain":
        return _chain()
    case = CASES[name]
    return Parts(case.model, (*case.args, *case.kwargs.values()), *WRITTEN_OUT[name]())
