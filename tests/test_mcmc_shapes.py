"""Latents of every shape, with names in no order, under every many-chain kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions.transforms import OrderedTransform
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MAMS, MCLMC, MEADS, ChEES
from numpyro_ensemble.mcmc.positions import Coordinates

KERNELS = [MEADS, ChEES, MAMS, MCLMC]
CHAINS, DRAWS = 64, 40
TOTAL = 6.5  # the observed sum of two sites


def model(total):
    """Sites of ten shapes, with known means given the sum of two of them."""
    numpyro.sample("zeta", dist.Normal(0.0, 4.0))
    numpyro.sample("one", dist.Normal(1.0, 1.0).expand([1]))
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([3, 2]))
    numpyro.sample("alpha", dist.Normal(-2.0, 0.2).expand([3]).to_event(1))
    block = numpyro.sample("block", dist.Normal(0.0, 1.0).expand([2, 1, 3]).to_event(3))
    numpyro.sample("shares", dist.Dirichlet(jnp.array([[1.0, 2.0, 3.0], [4.0, 1.0, 1.0]])))
    numpyro.sample("factor", dist.LKJCholesky(3, 2.0))
    base = dist.Normal(0.0, 0.5).expand([3]).to_event(1)
    numpyro.sample("cuts", dist.TransformedDistribution(base, OrderedTransform()))
    numpyro.sample("empty", dist.Normal(0.0, 1.0).expand([0]))  # NumPyro has no empty plates
    numpyro.sample("total", dist.Normal(weights.sum() + block.sum(), 1.0), obs=total)


ORDER = ["zeta", "one", "weights", "alpha", "block", "shares", "factor", "cuts", "empty"]
SIZES = [1, 1, 6, 3, 6, 4, 3, 3, 0]
SHAPES = [(), (1,), (3, 2), (3,), (2, 1, 3), (2, 2), (3,), (3,), (0,)]  # unconstrained


def z_scores(draws, mean):
    """Return how many standard errors the means of draws `(C, N, ...)` are away from the truth."""
    draws = np.asarray(draws)
    error = draws.std(axis=(0, 1)) / np.sqrt(effective_sample_size(draws))
    return abs(draws.mean(axis=(0, 1)) - mean) / error


def near_the_prior(rng):
    """Return unconstrained starts: NumPyro's draws of shares and factors are slow to compile."""
    starts = {n: rng.normal(size=(CHAINS, *s)) for n, s in zip(ORDER, SHAPES, strict=True)}
    return starts | {"zeta": 4.0 * starts["zeta"], "alpha": -2.0 + 0.2 * starts["alpha"]}


@pytest.mark.promotes_ranks  # NumPyro's LKJCholesky and Dirichlet promote
@pytest.mark.parametrize(
    "kernel", [MEADS, *(pytest.param(kernel, marks=pytest.mark.long) for kernel in (ChEES, MAMS))]
)
def test_sites_of_every_shape(kernel):
    mcmc = MCMC(
        kernel(model),
        num_warmup=150,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    starts = jax.tree.map(jnp.asarray, near_the_prior(np.random.default_rng(0)))
    mcmc.run(jax.random.key(0), TOTAL, init_params=starts)
    draws = mcmc.get_samples(group_by_chain=True)
    shapes = {"zeta": (), "one": (1,), "weights": (3, 2), "block": (2, 1, 3), "empty": (0,)}
    for name, shape in shapes.items():
        assert draws[name].shape == (CHAINS, DRAWS, *shape), name
    each = TOTAL / 13.0  # each of twelve standard normals and the noise has this mean
    correlation = jnp.einsum("...ij,...kj->...ik", draws["factor"], draws["factor"])[..., 1, 0]
    steps = jnp.diff(draws["cuts"], axis=-1)
    expected = {
        "zeta": (draws["zeta"], 0.0),
        "one": (draws["one"], 1.0),
        "alpha": (draws["alpha"], -2.0),
        "weights": (draws["weights"], each),
        "block": (draws["block"], each),
        "shares": (draws["shares"], np.array([[1, 2, 3], [4, 1, 1]]) / 6.0),
        "correlation": (correlation, 0.0),
        "its square": (correlation**2, 1.0 / 6.0),  # 2 Beta(2.5, 2.5) - 1
        "lowest": (draws["cuts"][..., 0], 0.0),
        "steps": (steps, np.exp(0.125)),
    }
    for name, (values, mean) in expected.items():
        assert (z_scores(values, mean) < 4.5).all(), name
    # wrong means: the prior's, the mode of a lognormal, and an LKJ's of concentration 1
    assert (z_scores(draws["weights"], 0.0) > 6).all()
    assert (z_scores(steps, np.exp(-0.25)) > 6).all()
    assert z_scores(correlation**2, 1.0 / 4.0) > 6
    # coordinates have the model's order: the first is the widest, those of alpha the narrowest
    adapted = mcmc.last_state.adapt_state
    scale = adapted.scale[0] if kernel is MEADS else adapted.metric.sigma[0]
    assert scale.shape == (27,) and jnp.argmax(scale) == 0
    assert set(np.argsort(scale)[:3].tolist()) == {8, 9, 10}


def test_coordinates_follow_the_model():
    rng = np.random.default_rng(0)
    z = {name: rng.normal(size=(5, *s)) for name, s in zip(ORDER, SHAPES, strict=True)}
    coordinates = Coordinates(jax.tree.map(jnp.asarray, z), ORDER)  # sorts the keys
    rows = coordinates.rows(z)
    expected = np.concatenate([z[name].reshape(5, -1 if z[name].size else 0) for name in ORDER], 1)
    np.testing.assert_array_equal(rows, expected)
    assert coordinates.size == sum(SIZES) == 27
    named = [coordinates.site_of(i) for i in range(27)]
    assert named == np.repeat(ORDER, SIZES).tolist()
    for tree in (coordinates.tree(rows), jax.vmap(coordinates.tree)(rows)):
        jax.tree.map(np.testing.assert_array_equal, tree, z)
    one = Coordinates(jnp.ones((4, 2)))
    assert one.site_of(1) == "the position" and one.rows(None) is None is one.tree(None)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_of_empty_sites_is_refused(kernel):
    def empty():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([0]))

    with pytest.raises(ValueError, match=r"\['x'\] are all empty"):
        kernel(empty).init(jax.random.split(jax.random.key(0), CHAINS), 10)


def first_steps(kernel, shape):
    """Return a start around 10, and the first two states of warm-up as a function of an edge."""

    def normals(edge):
        z = numpyro.sample("z", dist.Normal(10.0, 1.0).expand(shape).to_event(len(shape)))
        beyond = jnp.where(jnp.max(z) > edge, jnp.nan, 0.0)  # its gradient is NaN too
        numpyro.factor("edge", beyond * z.sum())

    keys = jax.random.split(jax.random.key(0), CHAINS)
    near = jnp.linspace(9.0, 11.0, CHAINS).reshape(CHAINS, *(1,) * len(shape))
    start = jax.random.permutation(keys[0], near) * jnp.ones((CHAINS, *shape))
    start += 0.1 * jax.random.normal(keys[1], start.shape)
    # ChEES takes several leapfrog steps: after the first one beyond the edge, the others are NaN
    options = {MEADS: {}, MAMS: {"step_size": 0.02, "metric": "diagonal"}}
    sampler = kernel(normals, **options.get(kernel, {"step_size": 0.02}))
    state = sampler.init(keys, 50, {"z": start}, (np.inf,))

    @jax.jit
    def step(state, edge):
        return sampler.sample(state, (edge,), {})

    def run(edge):
        first = step(state, edge)
        return first, step(first, edge)

    return start, run


@pytest.mark.long
@pytest.mark.parametrize(
    ("kernel", "shape"), [(MEADS, ()), (ChEES, ()), (MAMS, ()), (ChEES, (2, 1)), (MAMS, (2, 1))]
)
def test_a_chain_that_diverges_takes_its_share_alone(kernel, shape):
    start, run = first_steps(kernel, shape)
    moved, usual = run(np.inf)
    furthest = np.sort(np.asarray(moved.z["z"]).reshape(CHAINS, -1).max(axis=1))
    edge = furthest[-2:].mean()  # one proposal is beyond the edge, but no start is
    assert edge > start.max()
    first, other = run(edge)
    assert first.diverging.sum() == 1 and jnp.isfinite(other.z["z"]).all()
    for name, ours, expected in zip(
        ("step size", "spread", "time scale"),
        *([adapted_numbers(kernel, state) for state in (other, usual)]),
        strict=True,
    ):
        # one chain of 64 may be three standard deviations away; a mean of 0 is 10 away
        np.testing.assert_allclose(ours, expected, rtol=0.35, err_msg=name)


def adapted_numbers(kernel, state):
    """Return step size, spread, and the number by which the time between draws is adapted."""
    adapted = state.adapt_state
    if kernel is MEADS:
        return adapted.step_size, adapted.scale, adapted.damping
    if kernel is MAMS:
        return adapted.step_size, adapted.metric.sigma**2, adapted.trajectory_length
    # the size of ChEES's gradients, kept by Adam
    gradient = jnp.sqrt(adapted.inner.optim_state[0].nu)
    return adapted.step_size, adapted.metric.sigma**2, gradient
