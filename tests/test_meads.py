"""The pure step of MEADS against BlackJAX's own adaptation, from the same chains and keys."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc import ghmc

from numpyro_ensemble.mcmc.meads_scheme import Scheme, meads_start, meads_step
from numpyro_ensemble.mcmc.progress import Progress

NUM_CHAINS, NUM_STEPS = 12, 21
SCALES = jnp.array([0.3, 2.0])


def log_density(z):
    """A correlated Gaussian of three dimensions in two leaves."""
    b = z["b"] / SCALES
    return -0.5 * (z["a"] - b[0]) ** 2 - 0.5 * (b**2).sum()


def of_row(row):
    """Return the log density of one chain's row."""
    return log_density({"a": row[0], "b": row[1:]})


def in_rows(z):
    return jnp.concatenate([z["a"][:, None], z["b"]], axis=1)


def positions(key):
    key_a, key_b = jax.random.split(key)
    b = jax.random.normal(key_b, (NUM_CHAINS, 2)) * SCALES[None]
    return {"a": jax.random.normal(key_a, (NUM_CHAINS,)), "b": b}


def ours(key, start, scheme):
    """Run the pure step with the keys that BlackJAX splits from its one key."""
    init_key, adapt_key = jax.random.split(key)
    chains = jax.vmap(lambda z, k: ghmc.init(z, of_row, k))(
        in_rows(start), jax.random.split(init_key, NUM_CHAINS)
    )
    progress = Progress.start(NUM_STEPS, NUM_CHAINS)
    adaptation = meads_start(
        in_rows(start), chains.logdensity, chains.logdensity_grad, progress, scheme
    )

    def step(carry, key):
        keys = jax.random.split(key, NUM_CHAINS + 1)
        chains, adaptation, *_ = meads_step(keys[None, :-1], keys[-1], *carry, of_row, scheme)
        return (chains, adaptation), None

    keys = jax.random.split(adapt_key, NUM_STEPS)
    return jax.lax.scan(step, (chains, adaptation), keys)[0]


def theirs(key, start, scheme):
    adaptation = blackjax.meads_adaptation(
        log_density,
        NUM_CHAINS,
        num_folds=scheme.num_folds,
        step_size_multiplier=scheme.step_size_multiplier,
        damping_slowdown=scheme.damping_slowdown,
        low_rank_rank=None if scheme.metric == "diagonal" else scheme.metric,
        low_rank_window_fraction=scheme.window_fraction,
    )
    (states, parameters), _ = adaptation.run(key, start, NUM_STEPS)
    return states, parameters


@pytest.mark.promotes_ranks  # BlackJAX promotes
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(Scheme(4, 0.4, 2.0, plain=True), id="folds"),
        pytest.param(
            Scheme(1, metric=2, window_fraction=0.2, plain=True), id="rank", marks=pytest.mark.long
        ),
    ],
)
def test_the_step_is_blackjax(key, scheme):
    start = positions(jax.random.fold_in(key, 1))
    (states, expected), (chains, adaptation) = jax.jit(
        lambda *inputs: (theirs(*inputs, scheme), ours(*inputs, scheme))
    )(key, start)
    assert adaptation.progress.remaining[0] == 0
    # chains keep their positions in the array; slots map them to BlackJAX's positions
    order = jnp.argsort(adaptation.slot)
    np.testing.assert_allclose(chains.position[order], in_rows(states.position), rtol=1e-6)
    assert np.allclose(adaptation.slot, np.arange(NUM_CHAINS)) == (scheme.num_folds == 1)
    found = {
        "step_size": adaptation.step_size,
        "alpha": adaptation.damping,
        "delta": adaptation.drift,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    metric = expected["momentum_inverse_scale"]
    if scheme.metric == "diagonal":
        scale = np.concatenate([np.atleast_1d(metric["a"]), metric["b"]])
        np.testing.assert_allclose(adaptation.scale[0], scale, rtol=1e-6)
    else:
        ours_, low = adaptation.metric.inverse_mass, adaptation.metric
        np.testing.assert_allclose(ours_.lam, metric.lam, rtol=1e-6)
        np.testing.assert_allclose(ours_.sigma, metric.sigma, rtol=1e-6)
        np.testing.assert_allclose(abs(ours_.U.T @ metric.U), np.eye(2), atol=1e-6)
        assert low.number[0] == NUM_CHAINS * (NUM_STEPS - 4)  # counted from a fifth of warm-up on


@pytest.mark.long
def test_draws_are_made_with_averages_over_the_last_half(key):
    scheme = Scheme(4)
    chains = jax.vmap(lambda z, k: ghmc.init(z, of_row, k))(
        in_rows(positions(key)), jax.random.split(key, NUM_CHAINS)
    )
    progress = Progress.start(NUM_STEPS, NUM_CHAINS)
    adaptation = meads_start(
        chains.position, chains.logdensity, chains.logdensity_grad, progress, scheme
    )

    def step(carry, key):
        keys = jax.random.split(key, NUM_CHAINS + 1)
        chains, adaptation, *_ = meads_step(keys[None, :-1], keys[-1], *carry, of_row, scheme)
        return (chains, adaptation), adaptation

    _, after = jax.jit(lambda keys: jax.lax.scan(step, (chains, adaptation), keys))(
        jax.random.split(key, NUM_STEPS)
    )
    first, number = NUM_STEPS // 2, NUM_STEPS - NUM_STEPS // 2
    # without the last, which sets the final values
    late = jax.tree.map(lambda x: x[first:-1], after)
    before, last = (jax.tree.map(lambda x, i=i: x[i], after) for i in (-2, -1))
    np.testing.assert_allclose(before.sums.curvature, (late.step_size**-2).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(before.sums.scale, late.scale.sum(axis=0), rtol=1e-5)
    step_size = (last.sums.curvature.mean() / number) ** -0.5
    np.testing.assert_allclose(last.step_size, step_size, rtol=1e-5)
    np.testing.assert_allclose(last.scale[0], last.sums.scale.mean(axis=0) / number, rtol=1e-5)
    damping = 1 - np.exp(-2 * step_size * last.sums.gamma.mean() / number)
    np.testing.assert_allclose(last.damping, damping, rtol=1e-5)


@pytest.mark.long
def test_steps_are_shrunk_until_enough_is_accepted(key):
    def normal(row):
        return -0.5 * (row**2).sum()

    keys = jax.random.split(key, 64)
    rows = jax.random.normal(key, (64, 50))
    start = jax.jit(jax.vmap(lambda row, k: ghmc.init(row, normal, k)))(rows, keys)

    @partial(jax.jit, static_argnums=0)
    def accepted(scheme):
        progress = Progress.start(200, 64)
        adaptation = meads_start(rows, start.logdensity, start.logdensity_grad, progress, scheme)

        def step(carry, key):
            keys = jax.random.split(key, 65)
            *carry, _, outcome = meads_step(keys[None, :-1], keys[-1], *carry, normal, scheme)
            return tuple(carry), outcome.accept_prob.mean()

        return jax.lax.scan(step, (start, adaptation), jax.random.split(key, 260))[1][200:].mean()

    assert 0.88 < accepted(Scheme(step_size_multiplier=1.0)) < 0.95
    assert accepted(Scheme(step_size_multiplier=1.0, plain=True)) < 0.8
