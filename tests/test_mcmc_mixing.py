"""Runs whose chains do not move, or do not mix, end with a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz import rhat as arviz_rhat
from numpyro.infer import MCMC

from numpyro_ensemble.mcmc import MAMS, MEADS, ChEES
from numpyro_ensemble.mcmc.diagnostics import limit_alone, robust_rhat, split_rhat, within_rhat
from numpyro_ensemble.mcmc.mixing import Advice, check_mixing

CHAINS = 64


def sampler(kernel, draws=20, warmup=10, **options):
    options = {"progress_bar": False} | options
    return MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=CHAINS,
        chain_method="vectorized",
        **options,
    )


def model(wall):
    """Latents in no alphabetical order, with a wall: the density beyond it is NaN."""
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.deterministic("none", jnp.zeros(()))
    numpyro.factor("wall", jnp.where(jnp.abs(a) < wall, 0.0, jnp.nan) * a)


def start(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "a": jax.random.normal(keys[0], (CHAINS,)),
        "b": jax.random.normal(keys[1], (CHAINS, 2)),
    }


@pytest.mark.long
def test_chains_that_cannot_move_are_told_of():
    """After warm-up a wall comes so near that no chain can move."""
    mcmc = sampler(ChEES(model), progress_bar=False)
    mcmc.warmup(jax.random.key(0), jnp.inf, init_params=start())
    still = "64 of 64 chains of ChEES did not move in 20 draws: 0, 1, .*R-hat is up"
    with pytest.warns(UserWarning, match=still) as caught:
        mcmc.run(jax.random.key(0), 1e-6, extra_fields=("iterations_since_move", "frozen"))
    said = str(caught[0].message)
    assert "double precision" in said and "start='pathfinder'" in said
    since = mcmc.get_extra_fields(group_by_chain=True)["iterations_since_move"]
    assert (jnp.diff(since, axis=1) == 1).all() and since.max() >= 20
    assert mcmc.get_extra_fields(group_by_chain=True)["frozen"][:, 10:].all()


@pytest.mark.long
@pytest.mark.parametrize("kernel", [ChEES, MEADS, MAMS])
def test_runs_report_how_they_mixed(kernel):
    """In one compiled loop, mixed draws cause no warning, and chains that cannot move do."""
    mcmc = sampler(kernel(model), warmup=100, jit_model_args=True)
    fields = ("iterations_since_move", "frozen")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc.warmup(jax.random.key(0), jnp.inf, init_params=start())
        mcmc.run(jax.random.key(1), jnp.inf, extra_fields=fields)
    since = mcmc.get_extra_fields(group_by_chain=True)["iterations_since_move"]
    assert since.shape == (CHAINS, 20) and since.max() < 15
    assert not mcmc.get_extra_fields()["frozen"][:10].any()
    still = rf"64 of 64 chains of {kernel.__name__} did not move in 20 draws: 0, 1, .*R-hat is up"
    with pytest.warns(UserWarning, match=still) as caught:
        mcmc.run(jax.random.key(0), 1e-6, extra_fields=(*fields, "~z.b"))
    said = str(caught[0].message)
    assert caught[0].filename == __file__ and "double precision" in said
    assert "start='pathfinder'" in said and "nuts" not in said and "more warm-up" not in said
    assert type(mcmc.get_samples()) is dict and set(mcmc.get_samples()) == {"a", "none"}
    since = mcmc.get_extra_fields(group_by_chain=True)["iterations_since_move"]
    assert (jnp.diff(since, axis=1) == 1).all() and since.max() >= 20
    assert mcmc.get_extra_fields(group_by_chain=True)["frozen"][:, 10:].all()


def draws_of(num_draws=40, shift=0.0):
    """Return draws of chains, every second of which is moved by `shift`."""
    rng = np.random.default_rng(0)
    far = shift * (np.arange(8) % 2)[:, None, None]
    return {
        "zeta": rng.normal(size=(8, num_draws)),
        "at": rng.normal(size=(8, num_draws, 3)) + far * np.array([0.0, 0.0, 1.0]),
        "corner": np.ones((8, num_draws, 2, 2)),  # constant, as an entry of a Cholesky factor
        "empty": np.zeros((8, num_draws, 0)),
        "not_a_latent": np.arange(8.0)[:, None] * np.ones(num_draws),
    }


ADVICE = Advice("MEADS", ("zeta", "at", "corner", "empty"), "this", "that")


def test_split_rhat_is_that_of_arviz():
    draws = draws_of(shift=1.0)
    for name in ("zeta", "at"):
        columns = draws[name].reshape(8, 40, -1)
        expected = [arviz_rhat(column, method="split") for column in np.moveaxis(columns, 2, 0)]
        np.testing.assert_allclose(split_rhat(columns), expected, rtol=1e-10)


def test_robust_rhat_is_near_to_the_rank_normalised_one():
    """Shifted chains are found despite heavy tails, and wider chains despite equal locations."""
    rng = np.random.default_rng(1)
    normal = rng.normal(size=(8, 200, 1))
    apart, wider = normal.copy(), normal.copy()
    apart[:2] += 1.5
    wider[:2] *= 3.0
    heavy = rng.standard_cauchy(size=(8, 200, 1))
    heavy_apart = heavy.copy()
    heavy_apart[:2] += 3.0
    for draws, mixed in ((normal, True), (heavy, True), (apart, False), (wider, False)):
        expected = float(arviz_rhat(draws[..., 0], method="rank"))
        assert (expected < 1.03) == mixed
        np.testing.assert_allclose(robust_rhat(draws)[0] - 1, expected - 1, rtol=0.35, atol=0.01)
    assert robust_rhat(heavy_apart)[0] > 1.05 > 1.02 > split_rhat(heavy_apart)[0]
    assert robust_rhat(wider)[0] > 1.1 > 1.02 > split_rhat(wider)[0]


def test_chains_that_do_not_mix_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_mixing(draws_of(), ADVICE)
        check_mixing(draws_of(num_draws=8, shift=3.0), ADVICE)  # too few draws to judge
        check_mixing({name: 0.0 * x for name, x in draws_of().items()}, ADVICE)  # never collected
    with pytest.warns(
        UserWarning, match=r"up to \d\.\d+, at 'at'\[2\], .* for 1 of 8 .* Try, in this order: this"
    ):
        check_mixing(draws_of(shift=3.0), ADVICE)
    one = draws_of()
    one["zeta"][3] = one["zeta"][3, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_mixing(one, ADVICE)  # chain 3 moves at the other sites
    one["at"][3] = one["at"][3, 0]
    with pytest.warns(
        UserWarning, match="1 of 8 chains of MEADS did not move in 40 .* order: that"
    ):
        check_mixing(one, ADVICE)
    one["at"][5] = one["at"][5, 0] + 1e-3 * one["at"][5]
    one["zeta"][5] = one["zeta"][5, 0] + 1e-3 * one["zeta"][5]
    with pytest.warns(UserWarning, match="2 of 8 chains of MEADS hardly moved in 40 draws: 3, 5"):
        check_mixing(one, ADVICE)


ALONE = Advice("MCLMC", ("zeta", "at"), "this", "that", alone=True)


def modes(num_draws=60):
    """Return draws of chains in three modes, with widths from 1e-4 to 1."""
    rng = np.random.default_rng(2)
    widths = np.geomspace(1e-4, 1.0, 6)[:, None, None, None]
    centres = 10.0 * (np.arange(6) % 3)[:, None]
    return {
        "zeta": rng.normal(size=(6, num_draws)) + centres,
        "at": rng.normal(size=(6, num_draws, 2, 2)) * widths,
    }


def test_chains_in_modes_of_their_own_are_judged_alone():
    with pytest.warns(UserWarning, match="have not mixed"):
        check_mixing(modes(), ALONE._replace(alone=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_mixing(modes(), ALONE)
        check_mixing({name: 0.0 * x for name, x in modes().items()}, ALONE)  # never collected
        few = modes(19)
        few["zeta"][2] += np.arange(19.0)
        check_mixing(few, ALONE)  # too few draws to judge
    second = np.arange(60) >= 30
    draws = modes()
    draws["zeta"][2] += np.linspace(0.0, 6.0, 60)
    draws["at"][4, second] += 9.0
    said = r"2 of 6 chains of MCLMC.*judged alone.*settled: 2, 4\. .*'at'.* of chain 4.*order: this"
    with pytest.warns(UserWarning, match=said):
        check_mixing(draws, ALONE)
    draws = modes()
    draws["at"][5, second, 1, 0] *= 1000.0  # its width changes a thousandfold
    with pytest.warns(
        UserWarning, match=r"settled: 5\. .*at 'at'\[1, 0\] of chain 5.* for 1 of 30"
    ):
        check_mixing(draws, ALONE)
    for x in draws.values():
        x[3] = x[3, 0]
    said = r"1 of 6 chains of MCLMC did not move in 60 draws: 3\. .*after warm-up\. .*order: that"
    with pytest.warns(UserWarning, match=said):
        check_mixing(draws, ALONE)


def test_good_chains_alone_are_seldom_told_of():
    rng = np.random.default_rng(3)
    normal = [rng.normal(size=(8, n, 30)) for n in (20, 40, 200) for _ in range(30)]
    heavy = [rng.standard_cauchy(size=(8, n, 30)) for n in (20, 40, 200) for _ in range(30)]
    for runs in (normal, heavy):
        told = [within_rhat(x).max() > limit_alone(8 * 30, x.shape[1] // 2) for x in runs]
        assert np.mean(told) <= 0.04  # 0.01 is expected
        assert all(within_rhat(x).max() > 1.05 for x in runs[:30])  # a limit of 1.05 would warn


def test_blocks_of_values_are_named_right(monkeypatch):
    monkeypatch.setattr("numpyro_ensemble.mcmc.mixing._BLOCK", 8 * 40)  # one value at a time
    test_chains_that_do_not_mix_are_named()


@pytest.mark.long
def test_draws_of_a_potential_are_checked():
    def far_apart(z):  # two modes that no chain leaves
        return 0.5 * ((jnp.abs(z[0]) - 10.0) ** 2 + z[1] ** 2)

    signs = jnp.where(jnp.arange(CHAINS) % 2 == 0, -10.0, 10.0)
    near = jax.random.normal(jax.random.key(0), (CHAINS, 2)).at[:, 0].add(signs)
    mcmc = sampler(ChEES(potential_fn=far_apart), warmup=50)
    with pytest.warns(UserWarning, match=r"have not mixed.*at 'the position'\[0\]"):
        mcmc.run(jax.random.key(0), init_params=near)
    assert mcmc.get_samples(group_by_chain=True).shape == (CHAINS, 20, 2)
