"""The pure step of ChEES agrees with BlackJAX's own adaptation, given the same chains and keys."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blackjax.mcmc import dynamic_hmc

from numpyro_ensemble.mcmc.chees_scheme import Scheme, chees_start, chees_step, first_metric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.trajectories import halton

NUM_CHAINS, NUM_STEPS = 8, 30
ALL = jnp.ones(NUM_CHAINS, bool)
SCALES = jnp.array([0.3, 2.0])


def log_density(z):
    """A correlated Gaussian in three dimensions, which are in two leaves."""
    b = z["b"] / SCALES
    return -0.5 * (z["a"] - b[0]) ** 2 - 0.5 * (b**2).sum()


def of_row(row):
    """The same density at the row of one chain."""
    return log_density({"a": row[0], "b": row[1:]})


def in_rows(z):
    return jnp.concatenate([z["a"][:, None], z["b"]], axis=1)


def ours(key, start, scheme):
    """Run the pure step with the keys that BlackJAX splits from its one key."""
    start = in_rows(start)
    init = jax.vmap(lambda z: dynamic_hmc.init(z, of_row, 0))(start)
    chains = init._replace(random_generator_arg=jnp.zeros((), int))
    step_size = jnp.asarray(0.1)
    progress = Progress.start(NUM_STEPS, NUM_CHAINS)
    metric = first_metric(start, ALL, scheme)
    adaptation = chees_start(metric, step_size, step_size, progress, scheme)

    def step(carry, key):
        chains, adaptation, _ = chees_step(
            jax.random.split(key, NUM_CHAINS), *carry, of_row, scheme
        )
        return (chains, adaptation), adaptation.trajectory_length[0]

    return jax.lax.scan(step, (chains, adaptation), jax.random.split(key, NUM_STEPS))


@pytest.mark.promotes_ranks  # BlackJAX does
def test_the_step_is_blackjax(key):
    start_key, key = jax.random.split(key)
    start = {
        "a": jax.random.normal(start_key, (NUM_CHAINS,)),
        "b": jax.random.normal(key, (NUM_CHAINS, 2)) * SCALES,
    }
    scheme = Scheme(0.05, 0.651, momentum=0.9, memory=0.999, plain=True)

    def theirs(key, start):
        adaptation = blackjax.chees_adaptation(log_density, NUM_CHAINS)
        optim = optax.adam(0.05)
        (states, parameters), _ = adaptation.run(key, start, 0.1, optim, NUM_STEPS)
        return states, parameters["step_size"], parameters["integration_steps_params"][0]

    (states, step_size, most), ((chains, adaptation), _) = jax.jit(
        lambda *inputs: (theirs(*inputs), ours(*inputs, scheme))
    )(key, start)
    np.testing.assert_allclose(chains.position, in_rows(states.position), rtol=1e-6)
    np.testing.assert_allclose(adaptation.step_size, step_size, rtol=1e-6)
    ratio = adaptation.trajectory_length / adaptation.step_size
    np.testing.assert_allclose(ratio, most, rtol=1e-6)
    assert chains.random_generator_arg == states.random_generator_arg[0] == NUM_STEPS
    # BlackJAX's Halton sequence depends on the length of the run; ours does not
    index = jnp.arange(2000)
    own = jax.vmap(lambda i: dynamic_hmc.halton_sequence(i, 11))(index)
    np.testing.assert_array_equal(jax.vmap(halton)(index), own)


@pytest.mark.long
def test_lengths_grow_from_short_ones(key):
    """BlackJAX's lengths stay near the first, because each step starts from their average."""
    near = 0.1 * jax.random.normal(key, (NUM_CHAINS, 3))
    start = {"a": near[:, 0], "b": near[:, 1:]}
    lengths = [
        jax.jit(lambda key, scheme=scheme: ours(key, start, scheme)[1])(key)
        for scheme in (Scheme(0.1, plain=True), Scheme(0.1))
    ]
    plain, default = (float(length[-1] / length[0]) for length in lengths)
    assert default > 2.0 * plain


def with_a_trap(row):
    """A standard normal; at (0, 10) the gradient is 0, and every move loses up to 30."""
    trapped = -30.0 * jax.lax.stop_gradient(
        jnp.minimum(jnp.abs(row - jnp.array([0.0, 10.0])).sum(), 1)
    )
    return jnp.where(row[1] > 8.0, trapped, -0.5 * (row**2).sum())


@pytest.mark.parametrize(
    ("plain", "tiny"), [(False, False), pytest.param(True, True, marks=pytest.mark.long)]
)
@pytest.mark.promotes_ranks  # BlackJAX does
def test_a_chain_that_accepts_nothing_makes_no_steps_tiny(key, plain, tiny):
    rows = jax.random.normal(key, (64, 2)).at[0].set(jnp.array([0.0, 10.0]))
    scheme = Scheme(plain=plain)

    def step(carry, key):
        chains, adaptation, _ = chees_step(jax.random.split(key, 64), *carry, with_a_trap, scheme)
        return (chains, adaptation), None

    @jax.jit
    def run(rows):
        chains = jax.vmap(lambda row: dynamic_hmc.init(row, with_a_trap, 0))(rows)
        chains = chains._replace(random_generator_arg=jnp.zeros((), int))
        first, progress = jnp.asarray(0.5), Progress.start(200, 64)
        metric = first_metric(rows, jnp.ones(64, bool), scheme)
        adaptation = chees_start(metric, first, first, progress, scheme)
        return jax.lax.scan(step, (chains, adaptation), jax.random.split(key, 200))[0]

    chains, adaptation = run(rows)
    assert abs(chains.position[0, 1] - 10.0) < 0.5  # the chain stays trapped
    assert (adaptation.step_size[0] < 0.05) == tiny
    assert tiny or adaptation.step_size[0] > 0.3
