"""Several latent processes: in plates, mixed, and in likelihoods of more than one latent."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from gp_truth import inputs, within
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.stats import norm

from numpyro_ensemble import EnsembleVI
from numpyro_ensemble.gp import (
    RBF,
    Coregion,
    ExpectedLikelihood,
    GaussianProcess,
    Pathwise,
    WhitenReparam,
    multi_output,
    numbered_inputs,
    sparse_gp,
)
from numpyro_ensemble.gp.likelihood import quadrature

KERNEL = RBF(1.3, 0.8)
X, Z, X_NEW = inputs(9, 1), np.linspace(0.0, 3.0, 4)[:, None], inputs(5, 1, seed=1)
U = np.random.default_rng(2).normal(size=(3, 4))
NEAR = within({"rtol": 1e-6, "atol": 1e-8}, {"rtol": 1e-3, "atol": 1e-4})


def shared_by_three(X, mixing, y=None, whiten=True):
    """Three processes, and two outputs that are mixtures of these."""
    with numpyro.plate("latent", 3):
        m, v = sparse_gp("g", KERNEL, X, Z, whiten, mean_fn=0.2)
    m, v = mixing @ m, mixing**2 @ v
    numpyro.deterministic("f", m)
    with numpyro.plate("outputs", 2, dim=-2), numpyro.plate("rows", len(X)):
        numpyro.sample("y", ExpectedLikelihood(lambda f: dist.Normal(f, 0.1), m, v), obs=y)


MIXING = np.array([[1.0, 0.5, 0.0], [-0.3, 0.0, 2.0]])
ROWS = np.sin(X[:, 0])[None, :] * np.array([[1.0], [-1.0]])


@pytest.mark.core
@pytest.mark.parametrize("whiten", [True, False])
def test_processes_in_a_plate_are_those_of_separate_calls(whiten, key):
    name = "g_u_base" if whiten else "g_u"
    given = handlers.substitute(handlers.seed(shared_by_three, key), {name: jnp.asarray(U)})
    with handlers.block(), handlers.trace() as trace:
        given(X, MIXING, ROWS, whiten)
    base = GaussianProcess(KERNEL, Z, mean_fn=0.2)
    values = U @ np.asarray(base.scale_tril()).T + 0.2 if whiten else U
    each = [base.predict(u, X) for u in values]
    f = MIXING @ np.stack([mean for mean, _ in each])
    assert_allclose(trace["f"]["value"], f, **NEAR)
    spread = MIXING**2 @ np.stack([variance for _, variance in each])
    expected = norm.logpdf(ROWS, f, 0.1) - 0.5 * spread / 0.01
    assert_allclose(trace["y"]["fn"].log_prob(ROWS), expected, **NEAR)


@pytest.mark.parametrize("whiten", [True, pytest.param(False, marks=pytest.mark.long)])
def test_functions_of_processes_in_a_plate(whiten, key):
    samples = {"g_u_base" if whiten else "g_u": np.stack([U, -U])}
    pathwise = Pathwise(shared_by_three, samples, X, MIXING, ROWS, whiten)
    base = GaussianProcess(KERNEL, Z, mean_fn=0.2)
    factor = np.asarray(base.scale_tril())
    values = [u @ factor.T + 0.2 if whiten else u for u in (U, -U)]
    mean, variance = pathwise.moments(X_NEW, MIXING, None, whiten)["g"]
    each = np.array([[base.predict(u, X_NEW)[0] for u in of_draw] for of_draw in values])
    assert_allclose(mean, each.mean(axis=0), **NEAR)
    left = base.predict(values[0][0], X_NEW)[1]
    assert_allclose(variance, left[None] + each.var(axis=0), **NEAR)
    functions = pathwise(key, X_NEW, MIXING, None, whiten)
    assert functions["g"].shape == (2, 3, 5)
    assert_allclose(functions["f"], np.einsum("pq,sqn->spn", MIXING, functions["g"]), **NEAR)
    at_points = pathwise(key, Z, MIXING, None, whiten)["g"]
    assert_allclose(at_points, values, atol=within(1e-3, 5e-2))


@pytest.mark.long
def test_other_numbers_of_copies_are_refused(key):
    with pytest.raises(ValueError, match=r"\(4,\) copies in this call, and had \(3,\)"):
        Pathwise(in_plate_of(3), {"g_u_base": U[None]}, X)(key, X_NEW, 4)


def in_plate_of(number):
    def model(X, number=number):
        with numpyro.plate("latent", number):
            sparse_gp("g", KERNEL, X, Z)

    return model


# Likelihoods ----------------------------------------------------------------------------------


M, V = np.array([[0.3, -1.0, 2.0], [0.1, 0.5, -0.7]]), np.array([[0.5, 1.0, 0.1], [0.2, 0.3, 0.4]])


@pytest.mark.core
def test_a_noise_that_is_a_process_too():
    y = np.array([0.5, -2.0, 1.0])
    expected = ExpectedLikelihood(lambda f: dist.Normal(f[0], jnp.exp(f[1])), M, V)
    squares = ((y - M[0]) ** 2 + V[0]) * np.exp(-2.0 * M[1] + 2.0 * V[1])
    exact = -0.5 * np.log(2 * np.pi) - M[1] - 0.5 * squares
    assert_allclose(expected.log_prob(y), exact, rtol=within(1e-6, 1e-4))
    assert abs(dist.Normal(M[0], np.exp(M[1])).log_prob(y) - exact).max() > 0.3  # not at the mean
    assert_allclose(expected.mean, M[0], rtol=1e-5)
    slope = jax.grad(lambda v: ExpectedLikelihood(expected.likelihood, M, v).log_prob(y).sum())(V)
    assert_allclose(slope[0], -0.5 * np.exp(-2.0 * M[1] + 2.0 * V[1]), rtol=within(1e-5, 1e-3))


@pytest.mark.parametrize("classes", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 6))])
def test_softmax_of_several_processes(classes, key):
    """Expected terms agree with 200,000 draws; the likelihood at the mean does not."""
    rng = np.random.default_rng(classes)
    m, v = rng.normal(size=(classes, 2)), rng.uniform(0.2, 1.0, (classes, 2))
    y = np.array([0, classes - 1])
    expected = ExpectedLikelihood(lambda f: dist.Categorical(logits=f.T), m, v)
    draws = m.T + np.sqrt(v).T * rng.normal(size=(200_000, 2, classes))
    terms = draws[:, [0, 1], y] - np.log(np.exp(draws).sum(axis=2))
    error = terms.std(axis=0) / np.sqrt(200_000)
    assert (abs(expected.log_prob(y) - terms.mean(axis=0)) < 4 * error + 1e-3).all()
    assert (abs(expected.likelihood(m).log_prob(y) - terms.mean(axis=0)) > 0.02).all()
    assert expected.sample(key, (7, 2)).shape == (7, 2, 2)
    shares = np.asarray(expected.sample(key, (4000,)) == 0).mean(axis=0)
    exact = (np.exp(draws[:, :, 0]) / np.exp(draws).sum(axis=2)).mean(axis=0)
    assert (abs(shares - exact) < 4 * 0.5 / np.sqrt(4000)).all()


@pytest.mark.parametrize("dim", range(1, 9))
def test_quadrature_has_the_moments_of_normals(dim):
    points, weights = quadrature(dim)
    assert points.shape == (len(weights), dim)
    assert len(weights) <= 1024
    assert_allclose(weights.sum(), 1.0)
    assert_allclose(weights @ points, np.zeros(dim), atol=1e-12)
    assert_allclose(weights @ points**2, np.ones(dim), rtol=1e-9)


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_counts_of_classes_are_one_event(key):
    m, v = np.zeros((3, 2)), np.full((3, 2), 0.1)
    counts = ExpectedLikelihood(lambda f: dist.Multinomial(10, logits=f.T), m, v)
    assert (counts.batch_shape, counts.event_shape) == ((2,), (3,))
    assert counts.log_prob(counts.sample(key)).shape == (2,)


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (lambda f: dist.Normal(f[0, :2], 1.0), (3, 4)),
        (lambda f: dist.Categorical(logits=f), (3, 4)),
        (lambda f: dist.Normal(f, 1.0).to_event(1), (4,)),
    ],
)
def test_likelihoods_of_other_shapes_are_refused(likelihood, shape):
    with pytest.raises(ValueError, match=r"must have batch shape .* its batch shape is"):
        ExpectedLikelihood(likelihood, np.ones(shape), np.ones(shape))


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_plate_of_the_data_is_told(key):
    def plated(size):
        with numpyro.plate("data", 9, subsample_size=size) as rows:
            sparse_gp("f", KERNEL, X[rows], Z)

    with pytest.warns(UserWarning, match="9 copies of a Gaussian process at as many inputs"):
        handlers.seed(plated, key)(9)
    with pytest.raises(ValueError, match=r"sparse_gp\('f'\) stands inside the plate of its data"):
        handlers.seed(plated, key)(3)


def test_as_many_processes_as_inducing_points_are_no_mistake(key):
    def four():
        with numpyro.plate("latent", 4):
            return sparse_gp("f", KERNEL, X, Z, whiten=False)[0]

    assert handlers.seed(four, key)().shape == (4, 9)


@pytest.mark.long
def test_whitening_inside_a_plate(key):
    def model(X, y=None):
        with numpyro.plate("p", 2), handlers.reparam(config={"f": WhitenReparam()}):
            f = numpyro.sample("f", GaussianProcess(KERNEL, X))
        numpyro.sample("y", dist.Normal(f, 0.1).to_event(2), obs=y)

    z = np.random.default_rng(0).normal(size=(3, 2, 4))
    pathwise = Pathwise(model, {"f_base": z}, Z, np.zeros((2, 4)))
    factor = np.asarray(GaussianProcess(KERNEL, Z).scale_tril())
    assert_allclose(
        pathwise.moments(Z[1:])["f"].mean, (z @ factor.T)[..., 1:].mean(axis=0), atol=1e-3
    )


def test_as_many_latents_as_values_are_told_apart():
    m, v = np.zeros((3, 3)), np.ones((3, 3))
    ExpectedLikelihood(lambda f: dist.Categorical(logits=f.T), m, v)
    with pytest.raises(ValueError, match=r"first axis of f, so that a softmax has logits=f\.T"):
        ExpectedLikelihood(lambda f: dist.Categorical(logits=f), m, v)
    offset = np.arange(3.0)  # one entry for each value
    ExpectedLikelihood(lambda f: dist.Normal(f[0] + offset, jnp.exp(f[1])), m, v)


# Outputs observed at different places ---------------------------------------------------------


@pytest.mark.core
def test_several_outputs_at_places_of_their_own(key):
    W, kappa = np.array([[1.0], [-0.5], [0.2]]), np.array([0.0, 0.1, 0.3])
    places = numbered_inputs(X[:4], X[4:6], X[6:])
    assert_allclose(places[:, 1], [0, 0, 0, 0, 1, 1, 2, 2, 2])
    kernel = multi_output(KERNEL, W, kappa)
    by_columns = RBF(1.3, 0.8, active_dims=0) * Coregion(W, kappa)
    assert_allclose(kernel(places), by_columns(places), **NEAR)

    def model(places, y=None):
        noise = numpyro.sample("noise", dist.HalfNormal(0.1))
        numpyro.sample("y", GaussianProcess(multi_output(KERNEL, W, kappa), places, noise), obs=y)

    y = np.sin(np.asarray(places[:, 0]))
    pathwise = Pathwise(model, {"noise": np.array([0.01, 0.02])}, places, y)
    new = numbered_inputs(X_NEW, X_NEW[:0], X_NEW[:2])
    exact = [GaussianProcess(by_columns, places, n).predict(y, new)[0] for n in (0.01, 0.02)]
    assert_allclose(pathwise.moments(new)["y_f"].mean, np.mean(exact, axis=0), **NEAR)
    assert pathwise(key, new)["y"].shape == (2, 7)
    with pytest.raises(ValueError, match="the outputs' numbers, 0 to 2; got 3.0 in row 0"):
        kernel.check_inputs(jnp.asarray(places).at[0, 1].set(3.0))


# Whole models ---------------------------------------------------------------------------------


def fitted(model, guide, key, *args, **kwargs):
    """Return draws of the member with the lower loss: a member may explain all as noise."""
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 600))
    vi = EnsembleVI(model, guide, optim, Trace_ELBO(), ensemble_size=2)
    result = vi.run(key, 600, *args, progress_bar=False, **kwargs)
    draws = vi.sample_posterior(key, result, *args, num_samples=60, group_by_member=True)
    best = np.asarray(result.losses)[:, -100:].mean(axis=1).argmin()
    return {name: values[best] for name, values in draws.items()}


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_a_noise_that_grows_is_recovered(key):
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(0.0, 3.0, 200))[:, None]
    noise = 0.05 + 0.2 * X[:, 0]
    y = np.sin(2.0 * X[:, 0]) + noise * rng.normal(size=200)
    points = np.linspace(0.0, 3.0, 8)[:, None]

    def model(X, y=None):
        f, f_v = sparse_gp("f", RBF(1.0, 0.8), X, points)
        s, s_v = sparse_gp("log_noise", RBF(1.0, 1.5), X, points, mean_fn=-1.5)
        with numpyro.plate("data", len(X)):
            likelihood = ExpectedLikelihood(
                lambda f: dist.Normal(f[0], jnp.exp(f[1])), jnp.stack([f, s]), jnp.stack([f_v, s_v])
            )
            numpyro.sample("y", likelihood, obs=y)

    samples = fitted(model, AutoMultivariateNormal(model), key, X, y)
    new = np.array([[0.3], [1.5], [2.7]])
    found = np.asarray(Pathwise(model, samples, X, y)(key, new)["log_noise"])
    truth = np.log(0.05 + 0.2 * new[:, 0])
    assert (abs(found.mean(axis=0) - truth) < 0.35).all()
    assert abs(np.log(noise.mean()) - truth).max() > 0.5  # a constant noise is wrong
    assert (found.std(axis=0) < 0.4).all()


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_three_classes_are_calibrated(key):
    rng = np.random.default_rng(1)
    X = rng.uniform(0.0, 3.0, (900, 1))
    truth = np.stack([np.zeros(900), np.sin(2.0 * X[:, 0]), 2.0 * np.cos(2.0 * X[:, 0])])
    shares = np.exp(truth) / np.exp(truth).sum(axis=0)
    y = (rng.uniform(size=900)[None] > shares.cumsum(axis=0)).sum(axis=0)
    points = np.linspace(0.0, 3.0, 8)[:, None]

    def model(X, y=None):
        with numpyro.plate("class", 3):
            m, v = sparse_gp("f", RBF(2.0, 0.8), X, points)
        with numpyro.plate("data", len(X)):
            likelihood = ExpectedLikelihood(lambda f: dist.Categorical(logits=f.T), m, v)
            numpyro.sample("y", likelihood, obs=y)

    fit, test = slice(0, 600), slice(600, 900)
    samples = fitted(model, AutoNormal(model), key, X[fit], y[fit], batch_size=150)
    f = np.asarray(Pathwise(model, samples, X[fit], y[fit])(key, X[test])["f"])
    probability = (np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)).mean(axis=0)
    assert abs(probability - shares[:, test]).mean() < 0.05
    sure = probability.max(axis=0)
    right = probability.argmax(axis=0) == y[test]
    error = np.sqrt((sure * (1 - sure)).mean() / 300)
    assert abs(right.mean() - sure.mean()) < 3 * error
    one_hot = np.eye(3)[y[test]].T
    assert ((probability - one_hot) ** 2).sum(axis=0).mean() < 0.9 * (1 - 1 / 3)
