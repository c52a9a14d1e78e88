"""Data, plates, masks, means and inputs of calls of `Pathwise`."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gp_truth import inputs
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module
from numpyro.handlers import mask, reparam, seed, trace

from numpyro_ensemble import reweight
from numpyro_ensemble.gp import RBF, GaussianProcess, Pathwise, Periodic, WhitenReparam, draw_paths

X, X_NEW = inputs(12, 1, width=5.0), np.linspace(0.0, 6.0, 7)[:, None]
Y = np.sin(X[:, 0])
SCALES = {"lengthscale": np.array([0.8, 1.2])}
OPTIONS = {"num_features": 64}


def scale():
    return numpyro.sample("lengthscale", dist.LogNormal(0.0, 0.5))


def observed(X, y=None):
    numpyro.sample("y", GaussianProcess(RBF(1.0, scale()), X, 0.1), obs=y)


def plated(X, y=None):
    """Three latent processes, observed with noise."""
    kernel = RBF(1.0, scale())
    with numpyro.plate("task", 3):
        f = numpyro.sample("f", GaussianProcess(kernel, X))
    numpyro.sample("y", dist.Normal(f, 0.1).to_event(2), obs=y)


@pytest.mark.long
def test_whitened_processes_in_a_plate_are_evaluated(key):
    z = np.random.default_rng(0).normal(size=(2, 3, 12))
    whitened = reparam(plated, config={"f": WhitenReparam()})
    y = np.tile(Y, (3, 1))
    ours = Pathwise(whitened, SCALES | {"f_base": z}, X, y, num_paths=2, **OPTIONS)
    values = []
    for lengthscale, each in zip(SCALES["lengthscale"], z, strict=True):
        L = GaussianProcess(RBF(1.0, lengthscale), X).scale_tril()
        values.append(each @ L.T)
    plain = Pathwise(plated, SCALES | {"f": np.stack(values)}, X, y, num_paths=2, **OPTIONS)
    assert ours(key, X_NEW)["f"].shape == (4, 3, 7)
    for name, moments in plain.moments(X_NEW).items():
        assert_allclose(ours.moments(X_NEW)[name].mean, moments.mean, atol=1e-3)


def test_a_process_in_a_plate_of_its_data_is_refused():
    def counted(X, y):
        with numpyro.plate("data", len(X)):
            numpyro.sample("y", GaussianProcess(RBF(), X, 0.1), obs=y)

    with (
        pytest.warns(UserWarning, match="12 copies of a Gaussian process at as many inputs"),
        pytest.raises(ValueError, match="one event: sample the process outside"),
    ):
        numpyro.infer.util.log_density(counted, (X, Y), {}, {})
    copies = GaussianProcess(RBF(), X, 0.1).expand([3])
    one = GaussianProcess(RBF(), X, 0.1).log_prob(Y)
    assert_allclose(copies.log_prob(np.stack([Y, Y, 0 * Y]))[:2], one, rtol=1e-5)
    assert copies.log_prob(copies.sample(jax.random.key(0), (5,))).shape == (5, 3)


@pytest.mark.long
def test_processes_in_several_plates_are_refused_and_told_of_as_in_one():
    """A process in two plates is expanded twice."""

    def nested(y, *sizes):
        with contextlib.ExitStack() as stack:
            for i, size in enumerate(sizes):
                stack.enter_context(numpyro.plate(f"plate_{i}", size))
            numpyro.sample("y", GaussianProcess(RBF(), X, 0.1), obs=y)

    density = numpyro.infer.util.log_density
    one = GaussianProcess(RBF(), X, 0.1).log_prob(Y)
    whole, _ = density(nested, (np.tile(Y, (2, 3, 1)), 3, 2), {}, {})
    assert_allclose(whole, 6 * one, rtol=1e-5)
    for y in (Y, np.stack([Y, Y, Y])):  # each would count six times, or twice
        with pytest.raises(ValueError, match=r"\(2, 3\) copies of a .* values \(2, 3, 12\), got"):
            density(nested, (y, 3, 2), {}, {})
    with pytest.warns(UserWarning, match="12 copies of a Gaussian process at as many inputs"):
        density(nested, (np.tile(Y, (2, 12, 1)), 12, 2), {}, {})
    seen = np.arange(12) < 9
    masked = GaussianProcess(RBF(), X, 0.1).expand([3]).expand([2, 3]).mask(seen)
    assert_allclose(
        masked.log_prob(np.tile(Y, (2, 3, 1))),
        np.full((2, 3), GaussianProcess(RBF(), X[seen], 0.1).log_prob(Y[seen])),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="Cannot broadcast"):
        GaussianProcess(RBF(), X, 0.1).expand([2, 1]).expand([3, 3])


@pytest.mark.long
def test_the_mean_is_that_of_the_call(key):
    def treated(X, dose, y=None):
        process = GaussianProcess(RBF(1.0, scale()), X, 0.01, lambda X: 2.0 * dose)
        numpyro.sample("y", process, obs=y)

    dose = np.ones(12)
    pathwise = Pathwise(treated, SCALES, X, dose, Y, num_paths=2, **OPTIONS)
    for dosed in (dose, 3.0 * dose):
        out, without = (pathwise(key, X, d)["y_f"] for d in (dosed, 0.0 * dose))
        assert_allclose(out - without, np.broadcast_to(2.0 * dosed, out.shape), rtol=1e-4)
    assert_allclose(pathwise.moments(X, dose)["y_f"].mean, Y, atol=0.2)
    assert_allclose(pathwise.moments(X, 3.0 * dose)["y_f"].mean, Y + 4.0, atol=0.2)
    assert pathwise(key, X_NEW, np.ones(7))["y_f"].shape == (4, 7)  # another number of inputs


@pytest.mark.parametrize("how", ["mask", "reweight"])
def test_data_that_do_not_count_do_not_condition(key, how):
    wrapped = mask(observed, mask=False) if how == "mask" else reweight(observed, likelihood=0.0)
    moments = Pathwise(wrapped, SCALES, X, Y, **OPTIONS).moments(X_NEW)["y_f"]
    assert_allclose(moments.mean, 0.0, atol=1e-6)
    assert_allclose(moments.variance, 1.0, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:12 copies of a Gaussian process")
def test_masks_of_copies_are_refused_and_those_of_observations_kept(key):
    y = np.tile(Y, (12, 1))  # as many copies as observations
    seen = np.arange(12) < 9

    def model(X, y=None):
        process = GaussianProcess(RBF(1.0, scale()), X, 0.01)
        with mask(mask=seen), numpyro.plate("task", 12):
            numpyro.sample("y", process, obs=y)

    moments = Pathwise(model, SCALES, X, y, **OPTIONS).moments(X_NEW)["y_f"]
    kept = GaussianProcess(RBF(1.0, 0.8), X[seen], 0.01).predict(Y[seen], X_NEW)[0]
    other = GaussianProcess(RBF(1.0, 1.2), X[seen], 0.01).predict(Y[seen], X_NEW)[0]
    assert_allclose(moments.mean, np.tile((kept + other) / 2, (12, 1)), atol=1e-2)

    def masked(X, y=None):
        process = GaussianProcess(RBF(1.0, scale()), X, 0.01)
        with numpyro.plate("task", 3), mask(mask=np.array([True, True, False])):
            numpyro.sample("y", process, obs=y)

    with pytest.raises(ValueError, match=r"has a mask \(3,\) of its copies"):
        Pathwise(masked, SCALES, X, y[:3], **OPTIONS)


def test_processes_at_sites_are_read_by_an_index(key):
    def areal(sites, index, y=None):
        f = numpyro.sample("f", GaussianProcess(RBF(1.0, scale()), sites))
        numpyro.sample("y", dist.Normal(f[index], 0.1).to_event(1), obs=y)

    samples = SCALES | {"f": np.stack([Y, 2 * Y])}
    pathwise = Pathwise(areal, samples, X, np.array([0, 3, 5]), Y[:3], **OPTIONS)
    out = pathwise(key, X, np.array([1, 1, 2, 7, 11]))
    assert out["y"].shape == (2, 5)
    assert_allclose(out["f"], samples["f"], atol=0.05)


@pytest.mark.long
def test_parameters_of_networks_and_of_members(key):
    net = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(3))

    def model(X, y=None):
        w = numpyro.param("w", 1.0)
        network = eqx_module("net", net)
        warped = RBF(1.0, scale()).warp(lambda X: w * jax.vmap(network)(X))
        numpyro.sample("y", GaussianProcess(warped, X, 0.01), obs=y)

    fitted = seed(model, key)
    with trace() as sites:
        fitted(X, Y)
    params = {k: v["value"] for k, v in sites.items() if v["type"] == "param"}
    samples = {"lengthscale": np.array([0.8, 0.9, 1.0, 1.1])}
    shared = Pathwise(model, samples, X, Y, params=params, **OPTIONS)
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    each = Pathwise(model, samples, X, Y, params=members, **OPTIONS)
    ours, theirs = each(key, X_NEW)["y_f"], shared(key, X_NEW)["y_f"]
    assert_allclose(ours[:2], theirs[:2], rtol=1e-4)  # the draws of the first member
    assert (abs(ours[2:] - theirs[2:]) > 1e-3).any()


@pytest.mark.long
def test_other_inputs_have_other_noise(key):
    pathwise = Pathwise(observed, SCALES, X, Y, num_paths=2, **OPTIONS)
    noise = []
    for inputs_ in (X_NEW, X_NEW, X_NEW + 0.5):
        out = pathwise(key, inputs_)
        noise.append(out["y"] - out["y_f"])
    assert_array_equal(noise[0], noise[1])
    assert (abs(noise[0] - noise[2]) > 1e-3).mean() > 0.9


def test_noise_belongs_to_inputs_so_that_chunks_agree(key):
    """In a plate, each copy has independent noise, and so has each repeated input."""

    def model(X, y=None):
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
        gp = GaussianProcess(RBF(1.0, width), X, 0.1)
        with numpyro.plate("unit", 1), numpyro.plate("board", 2):
            numpyro.sample("b", gp, obs=y)

    samples = {"width": np.array([0.8, 1.2])}
    pathwise = Pathwise(model, samples, X, np.stack([Y, -Y])[:, None], num_paths=150, **OPTIONS)
    places = np.linspace(0.0, 6.0, 21)[:, None]

    def call(X):
        out = pathwise(key, X)
        return np.asarray(out["b"]), np.asarray(out["b"] - out["b_f"])

    whole, noise = call(places[:14])
    shifted, _ = call(places[7:][::-1])  # seven of the same inputs, reversed
    assert_allclose(shifted[..., 7:], whole[..., :6:-1], rtol=1e-6, atol=1e-6)
    # noise of other inputs, copies and paths is independent: 14 * 2 columns, 300 rows
    flat = noise.reshape(300, -1)
    assert_allclose(flat.var(axis=0) / 0.1, 1.0, atol=5 * np.sqrt(2 / 300))
    assert abs(np.corrcoef(flat.T) - np.eye(28)).max() < 5 / np.sqrt(300)
    _, repeated = call(np.repeat(places[:7], 2, axis=0))
    assert_allclose(repeated[..., ::2], noise[..., :7], atol=1e-6)
    of_pairs = np.corrcoef(repeated[..., ::2].ravel(), repeated[..., 1::2].ravel())[0, 1]
    assert abs(of_pairs) < 5 / np.sqrt(300 * 14)


def test_latents_inside_a_scan_are_asked_for():
    def model(X, y=None):
        def step(carry, _):
            carry = carry + numpyro.sample("step", dist.Normal(0.0, 1.0))
            return carry, carry

        shift, _ = scan(step, 0.0, None, length=2)
        numpyro.sample("y", GaussianProcess(RBF(1.0, scale()), X, 0.1, shift), obs=y)

    with pytest.raises(ValueError, match=r"\['step'\] are neither observed nor among"):
        Pathwise(model, SCALES, X, Y, **OPTIONS)
    Pathwise(model, SCALES | {"step": np.zeros((2, 2))}, X, Y, **OPTIONS)


@pytest.mark.long
def test_paths_share_the_bases_evenly(key):
    paths = draw_paths(key, RBF(), X, Y, noise=0.1, num_paths=9, num_bases=4, num_features=8)
    each = paths.weights.shape[1]
    assert np.bincount(np.asarray(paths.order) // each, minlength=4).tolist() == [3, 2, 2, 2]
    assert len(set(np.asarray(paths[:4].order) // paths[:4].weights.shape[1])) == 4

    options = {"num_paths": 6, "num_bases": 4, **OPTIONS}
    pathwise = Pathwise(observed, SCALES, X, Y, **options)
    drawn = pathwise.draw(key)["y"]
    assert_allclose(pathwise(key, X_NEW)["y_f"], drawn(X_NEW), atol=2e-3)
    order = np.asarray(drawn.order) // drawn.weights.shape[2]
    assert (np.sort(order, axis=1) == [0, 0, 1, 1, 2, 3]).all()


def test_options_that_are_the_models_keywords_too_are_refused():
    def model(X, y=None, solver="exact"):
        numpyro.sample("y", GaussianProcess(RBF(1.0, scale()), X, 0.1), obs=y)

    with pytest.raises(ValueError, match="'solver' is both an option of Pathwise and a keyword"):
        Pathwise(model, SCALES, X, Y, solver="cg")


@pytest.mark.long
def test_some_paths_are_taken_inside_jit(key):
    paths = draw_paths(key, RBF(), X, Y, noise=0.1, num_paths=4, num_features=8)
    inside = jax.jit(lambda paths, x: paths[:2](x))(paths, X_NEW)
    assert_allclose(inside, paths(X_NEW)[:2], atol=1e-4)


@pytest.mark.long
def test_kernels_of_many_columns(key):
    many = np.random.default_rng(0).normal(size=(5, 11))
    apart = many[:, None] - many[None]
    expected = np.exp(-0.5 * (apart**2).sum(axis=-1) / 9.0)
    assert_allclose(RBF(1.0, 3.0)(many), expected, rtol=1e-4)
    waves = np.exp(-2.0 * (np.sin(np.pi * apart / 4.0) ** 2).sum(axis=-1) / 25.0)
    assert_allclose(Periodic(1.0, 5.0, 4.0)(many), waves, rtol=1e-4)
    assert_allclose(sum([RBF(), RBF()])(many), 2 * RBF()(many))
