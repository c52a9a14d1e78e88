"""Functions of processes with weighted sites follow the weighted density, or raise an error."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import posterior
from numpy.testing import assert_allclose
from numpyro.handlers import mask, reparam, scale, scope
from test_gp_updates import NOISE, PLACES, SAMPLES, X, Y, Z, accepts, titsias

from numpyro_ensemble import reweight
from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    GaussianProcess,
    Pathwise,
    WhitenReparam,
    sparse_gp,
)

SMALL = {"num_features": 64}
KERNELS = [RBF(a, w) for a, w in zip(SAMPLES["amplitude"][:, 0], SAMPLES["width"], strict=True)]
WEIGHTS = (0.5, 4.0, 1e-9, 0)


def kernel():
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    amplitude = numpyro.sample("amplitude", dist.LogNormal(0.0, 0.5).expand([1]).to_event(1))
    return RBF(amplitude[0], width)


def observed(X, y=None):
    numpyro.sample("c", GaussianProcess(kernel(), X, NOISE), obs=y)


def collapsed(X, y=None):
    numpyro.sample("c", CollapsedSparseGP(kernel(), X, Z, NOISE, jitter=1e-6), obs=y)


def by_argument(X, y=None, weight=1.0):
    reweight(observed, likelihood=weight)(X, y)


def in_plates(X, y=None):
    """A subsampled plate draws two of three copies; the scale of the plate is not a weight."""
    gp = GaussianProcess(kernel(), X, NOISE)
    board = numpyro.plate("board", 3, subsample_size=2, dim=-1)
    with numpyro.plate("unit", 1, dim=-2), board:
        numpyro.sample("c", gp, obs=y)


def dense(kernel, weight, at=PLACES):
    if weight == 0:
        return np.zeros(len(at)), np.asarray(kernel.diag(at))
    mean, covariance = posterior(kernel, X, Y, at, NOISE / weight)
    return mean, np.diag(covariance)


def sparse_truth(kernel, weight):
    if weight == 0:
        return dense(kernel, 0)
    mean, covariance = titsias(kernel, noise=NOISE / weight)
    n = len(PLACES)
    return mean[:n], np.diag(covariance)[:n]


def mixture(truth, weight):
    """Return mean and variance over the two draws of the hyperparameters."""
    means, variances = zip(*(truth(kernel, weight) for kernel in KERNELS), strict=True)
    return np.mean(means, axis=0), np.mean(variances, axis=0) + np.var(means, axis=0)


@pytest.mark.parametrize(("model", "truth"), [(observed, dense), (collapsed, sparse_truth)])
def test_the_noise_of_observations_is_divided_by_their_weight(model, truth):
    untempered = mixture(truth, 1.0)
    for weight in WEIGHTS:
        pathwise = Pathwise(reweight(model, likelihood=weight), SAMPLES, X, Y, **SMALL)
        moments = pathwise.moments(PLACES)["c_f"]
        assert_allclose(moments, mixture(truth, weight), rtol=1e-5, atol=1e-6)
        assert abs(moments[0] - untempered[0]).max() > 0.05  # a lost weight would be seen


@pytest.mark.long
def test_weights_of_other_handlers_and_of_arguments():
    for weight in (0.5, 1.0, 0.0):  # arguments are traced
        pathwise = Pathwise(by_argument, SAMPLES, X, Y, np.array(weight), **SMALL)
        moments = pathwise.moments(PLACES)["c_f"]
        assert_allclose(moments, mixture(dense, weight), rtol=1e-5, atol=1e-6)
    both = Pathwise(scale(reweight(observed, likelihood=0.5), scale=0.5), SAMPLES, X, Y, **SMALL)
    assert_allclose(both.moments(PLACES)["c_f"], mixture(dense, 0.25), rtol=1e-5, atol=1e-6)
    for model, weight in ((in_plates, 1.0), (scale(scope(in_plates, "s"), scale=4.0), 4.0)):
        name = "c" if weight == 1 else "s/c"
        samples = {name.replace("c", k): v for k, v in SAMPLES.items()}
        pathwise = Pathwise(model, samples, X, np.stack([Y, Y])[None], **SMALL)
        moments = pathwise.moments(PLACES)[f"{name}_f"]
        expected = np.broadcast_to(np.array(mixture(dense, weight))[:, None, None], (2, 1, 2, 5))
        assert_allclose(moments, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_drawn_functions_follow_the_weights_too(key):
    half = reweight(observed, likelihood=0.5)
    options = {"num_paths": 512, "num_bases": 16, "num_features": 256}
    drawn = Pathwise(half, SAMPLES, X, Y, **options).draw(key)["c"]
    for values, kernel in zip(np.split(np.asarray(drawn(PLACES)), 2), KERNELS, strict=True):
        assert accepts(values, *dense(kernel, 0.5))
        assert not accepts(values, *dense(kernel, 1.0))  # as without the weight
    with pytest.raises(ValueError, match="noise of the new values is not known"):
        drawn.update(PLACES, np.zeros(5))


# Latent processes --------------------------------------------------------------------------------


def latent(X, y=None, noise=0.0):
    u = numpyro.sample("u", GaussianProcess(kernel(), X, noise, jitter=1e-6))
    numpyro.sample("b", dist.Poisson(jnp.exp(u)).to_event(1), obs=y)


def inducing(X, y=None):
    m, _ = sparse_gp("u", kernel(), X, Z, whiten=False, jitter=1e-6)
    numpyro.sample("b", dist.Poisson(jnp.exp(m)).to_event(1), obs=y)


def latent_truth(kernel, weight, points=X, values=Y):
    """A normal density to the power `weight` is that of the covariance divided by `weight`."""
    mean, covariance = posterior(kernel, points, values, PLACES, 1e-6)
    return mean, np.diag(covariance) / weight


@pytest.mark.long
def test_a_weighted_prior_divides_the_kernel_of_a_latent_process():
    whitened = reparam(latent, config={"u": WhitenReparam()})
    factors = [np.linalg.cholesky(np.asarray(k(X)) + 1e-6 * np.eye(12)) for k in KERNELS]
    base = np.stack([np.linalg.solve(L, Y) for L in factors])
    counts = np.ones(12, int)
    for model, name, values in ((latent, "u", np.stack([Y, Y])), (whitened, "u_base", base)):
        for weight in (0.25, 1.0):
            samples = SAMPLES | {name: values}
            pathwise = Pathwise(reweight(model, prior=weight), samples, X, counts, **SMALL)
            moments = pathwise.moments(PLACES)["u"]
            assert_allclose(moments, mixture(latent_truth, weight), rtol=1e-4, atol=1e-6)
    # the weight is on the prior of the inducing values; the process given these is unchanged
    u = np.cos(Z[:, 0])
    samples = SAMPLES | {"u_u": np.stack([u, u])}
    pathwise = Pathwise(reweight(inducing, prior=0.25), samples, X, counts, **SMALL)
    truth = mixture(lambda kernel, _: latent_truth(kernel, 1.0, Z, u), 1.0)
    assert_allclose(pathwise.moments(PLACES)["u"], truth, rtol=1e-4, atol=1e-6)


def exact(X, y=None):
    numpyro.sample("c", GaussianProcess(kernel(), X), obs=y)


def two_copies(X, y=None):
    gp = GaussianProcess(kernel(), X, NOISE)
    with numpyro.plate("board", 2), scale(scale=np.array([1.0, 2.0])):
        numpyro.sample("c", gp, obs=y)


def partly_masked(X, y=None):
    gp = GaussianProcess(kernel(), X)
    with mask(mask=X[:, 0] > 1):
        u = numpyro.sample("u", gp)
    numpyro.sample("b", dist.Poisson(jnp.exp(u)).to_event(1), obs=y)


LATENT = SAMPLES | {"u": np.stack([Y, Y])}


@pytest.mark.parametrize(
    ("model", "samples", "y", "message"),
    [
        (reweight(exact, likelihood=0.5), SAMPLES, Y, "'c' has .* weight 0.5, and no noise"),
        (two_copies, SAMPLES, np.stack([Y, Y]), r"'c' has a weight of shape \(2,\)"),
        (reweight(latent, prior=0), LATENT, np.ones(12, int), "prior of .* 'u' is masked or"),
        (partly_masked, LATENT, np.ones(12, int), "prior of .* 'u' is masked"),
        (
            scale(partial(latent, noise=0.1), scale=0.5),
            LATENT,
            np.ones(12, int),
            "prior of the latent process 'u' has a weight.*put the noise into the likelihood",
        ),
    ],
)
def test_weights_without_a_meaning_are_refused(model, samples, y, message):
    with pytest.raises(ValueError, match=message):
        Pathwise(model, samples, X, y, **SMALL)
