"""An update of paths agrees with the joint posterior by dense algebra, or raises an error."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import gram, inputs
from numpy.testing import assert_allclose
from scipy.stats import norm

from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    GaussianProcess,
    Pathwise,
    draw_paths,
    sparse_gp,
)

X, Z = inputs(12, 1, width=5.0), np.linspace(0.2, 4.8, 8)[:, None]
Y = np.sin(X[:, 0])
NOISE, KERNEL = 0.25, RBF(1.2, 0.8)
AT, NEW = np.array([[2.5], [5.6]]), np.array([3.0, -1.0])  # new observations
PLACES = np.array([[0.4], [1.9], [2.5], [3.1], [5.4]])
OPTIONS = {"num_paths": 1024, "num_bases": 16, "num_features": 256}


def titsias(kernel, y=Y, noise=NOISE):
    """Return mean and covariance at `PLACES` and `AT`, given data through inducing points."""
    P = np.concatenate([PLACES, AT])
    K_ZZ, K_ZX, K_ZP, K_PP = (gram(kernel, *a) for a in ((Z,), (Z, X), (Z, P), (P,)))
    K_ZZ = K_ZZ + 1e-6 * np.eye(len(Z))
    S = np.linalg.inv(K_ZZ + K_ZX @ K_ZX.T / noise)
    mean = K_ZP.T @ S @ K_ZX @ y / noise
    return mean, K_PP - K_ZP.T @ (np.linalg.inv(K_ZZ) - S) @ K_ZP


def given(mean, covariance, noise=NOISE, values=NEW):
    """Return mean and variance at `PLACES`, given values at the inputs that follow them."""
    n = len(PLACES)
    gain = np.linalg.solve(covariance[n:, n:] + noise * np.eye(len(values)), covariance[n:, :n]).T
    mean = mean[:n] + gain @ (values - mean[n:])
    return mean, np.diag(covariance[:n, :n] - gain @ covariance[n:, :n])


def accepts(draws, mean, variance):
    """Return whether draws have this mean and variance, within standard errors."""
    draws, number = np.asarray(draws, float), len(draws)
    z_mean = (draws.mean(axis=0) - mean) / np.sqrt(variance / number)
    z_variance = (((draws - mean) ** 2).mean(axis=0) / variance - 1) * np.sqrt(number / 2)
    z = np.concatenate([z_mean, z_variance])
    return bool(abs(z).max() < norm.isf(0.001 / 2 / len(z)))  # Bonferroni


@pytest.mark.long
@pytest.mark.core
def test_updates_of_collapsed_paths_move_the_inducing_values(key):
    gp = CollapsedSparseGP(KERNEL, X, Z, NOISE, jitter=1e-6)
    paths = gp.draw_paths(key, Y, **OPTIONS)
    n, before = len(PLACES), titsias(KERNEL)
    truth = given(*before)
    drawn = np.asarray(paths(PLACES))
    assert accepts(drawn, before[0][:n], np.diag(before[1])[:n])
    updated = np.asarray(paths.update(AT[1:], NEW[1:]).update(AT[:1], NEW[:1])(PLACES))
    assert accepts(updated, *truth)
    # wrong answers: no update, unchanged inducing values, and the variance before the update
    assert not accepts(drawn, *truth)
    stay = replace(paths, whitened=jnp.zeros((len(Z), len(Z))))
    assert not accepts(stay.update(AT[1:], NEW[1:]).update(AT[:1], NEW[:1])(PLACES), *truth)
    wide = truth[0] + (updated - truth[0]) * np.sqrt(np.diag(before[1])[:n] / truth[1])
    assert not accepts(wide, *truth)


@pytest.mark.long
def test_latent_values_of_a_known_covariance_move_too(key):
    """The known covariance is the posterior's, in closed form, or a singular one."""
    K_ZZ, K_ZX = gram(KERNEL, Z) + 1e-6 * np.eye(len(Z)), gram(KERNEL, Z, X)
    S = K_ZZ @ np.linalg.solve(K_ZZ + K_ZX @ K_ZX.T / NOISE, K_ZZ)
    m = K_ZZ @ np.linalg.solve(K_ZZ + K_ZX @ K_ZX.T / NOISE, K_ZX @ Y) / NOISE
    paths = draw_paths(key, KERNEL, Z, m, covariance=S, jitter=1e-6, **OPTIONS)
    truth = given(*titsias(KERNEL))
    assert accepts(paths.update(AT, NEW, noise=NOISE)(PLACES), *truth)
    assert not accepts(paths(PLACES), *truth)
    one = draw_paths(key, KERNEL, Z, m, covariance=0.0 * S, jitter=1e-6, **OPTIONS)
    assert np.isfinite(one.update(AT, NEW, noise=NOISE)(PLACES)).all()
    with pytest.raises(ValueError, match=r"noise of the new values is not known.*noise="):
        paths.update(AT, NEW)
    for wrong, message in (
        ({"covariance": S[:3]}, r"covariance takes shape \(8, 8\) and values, the mean, \(8,\)"),
        ({"covariance": S, "noise": 0.1}, "latent values, which have no noise and no mask"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_paths(key, KERNEL, Z, m, **wrong)


# In models ---------------------------------------------------------------------------------------


def tasks(X, y=None):
    """Two processes in nested plates, each with two draws of the hyperparameters."""
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("amplitude", dist.LogNormal(0.0, 0.5).expand([1]).to_event(1))
    gp = CollapsedSparseGP(RBF(scale[0], width), X, Z, NOISE, jitter=1e-6)
    with numpyro.plate("unit", 1), numpyro.plate("board", 2):
        numpyro.sample("a_task", gp, obs=y)


SAMPLES = {"width": np.array([0.8, 1.5]), "amplitude": np.array([[1.2], [0.7]])}


@pytest.mark.long
def test_updates_of_each_draw_and_of_each_copy_in_a_plate(key):
    y = np.stack([Y, 1.0 - Y])
    new = np.stack([NEW, NEW + 1.0])
    options = {"num_paths": 512, "num_bases": 16, "num_features": 256}
    paths = Pathwise(tasks, SAMPLES, X, y[:, None], **options).draw(key)["a_task"]
    drawn = np.asarray(paths.update(AT, new)(PLACES)).reshape(2, 512, 2, len(PLACES))
    for s, copy in np.ndindex(2, 2):
        kernel = RBF(SAMPLES["amplitude"][s, 0], SAMPLES["width"][s])
        truth = given(*titsias(kernel, y[copy]), values=new[copy])
        assert accepts(drawn[s, :, copy], *truth)
        # wrong answers: the other copy's new values, and the other draw
        assert not accepts(drawn[s, :, 1 - copy], *truth)
        assert not accepts(drawn[1 - s, :, copy], *truth)
    second = paths[1:8:2].update(AT, new[1])  # one of the processes alone
    assert_allclose(second(PLACES), drawn[0, :4, 1], rtol=1e-6)
    some = (np.array(3), np.arange(4), np.arange(0, 6, 2), np.arange(1, 4))
    assert [paths._copies_among(places) for places in some] == [1, 2, 1, 3]
    message = r"values take shape \(2, 2\) or \(2048, 2\), got \(2,\): .* each process of the 2, or"
    with pytest.raises(ValueError, match=message):
        paths.update(AT, NEW)


def three(X, y=None, c=None):
    """A latent process, a sparse one, and one that is observed without noise."""
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    u = numpyro.sample("u", GaussianProcess(RBF(1.2, width), X))
    m, _ = sparse_gp("k", RBF(1.2, width), X, Z)
    numpyro.sample("c", GaussianProcess(RBF(1.2, width), X), obs=c)
    numpyro.sample("b", dist.Poisson(jnp.exp(u + m)).to_event(1), obs=y)


@pytest.mark.long
def test_updates_that_would_not_condition_are_refused(key):
    samples = {
        "width": SAMPLES["width"],
        "u": np.stack([Y, Y]),
        "k_u_base": np.zeros((2, len(Z))),
    }
    options = {"num_paths": 2, "num_features": 64}
    paths = Pathwise(three, samples, X, np.ones(12, int), Y, **options).draw(key)
    for name in ("u", "k"):
        with pytest.raises(ValueError, match="latent or inducing values.*CollapsedSparseGP"):
            paths[name].update(AT, NEW, noise=NOISE)
    # data without noise are known exactly: these paths can be updated
    assert_allclose(paths["c"].update(AT, NEW)(AT), np.tile(NEW, (4, 1)), atol=1e-2)
    drawn = np.random.default_rng(0).normal(size=(2, 8))
    with pytest.raises(ValueError, match="covariance is not known"):
        draw_paths(key, KERNEL, Z, drawn, **options).update(AT, NEW, noise=NOISE)
