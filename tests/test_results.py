"""Results of a fit: members that ended well, their order, and single members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.infer.svi import SVIRunResult, SVIState
from zoo import X, Y, map_on_ridge

from numpyro_ensemble import EnsembleResult
from numpyro_ensemble.results import name_members

NAN, INF = float("nan"), float("inf")


def result(losses, params=None, mutable_state=None):
    """Build a result by hand, with a parameter that differs between its members."""
    losses = jnp.asarray(losses)
    size = losses.shape[0]
    members = jnp.arange(1.0, size + 1.0)
    params = {"w": jnp.stack([members, -members], 1), **(params or {})}
    optim_state = (jnp.full(size, 7), params["w"])
    keys = jax.random.split(jax.random.key(0), size)
    return EnsembleResult(params, SVIState(optim_state, mutable_state, keys), losses)


@pytest.mark.core
def test_finite_members_end_with_a_finite_loss():
    ended = {
        "well": ([3.0, 2.0, 1.0, 0.5], True),
        "early": ([3.0, 2.0, NAN, NAN], True),
        "at once": ([3.0, NAN, NAN, NAN], True),
        "after a stumble": ([3.0, NAN, INF, 0.5], True),
        "never": ([NAN, NAN, NAN, NAN], False),
        "at infinity": ([3.0, 2.0, 1.0, INF], False),
        "at infinity, early": ([3.0, 2.0, -INF, NAN], False),
    }
    losses, expected = zip(*ended.values(), strict=True)
    assert list(result(losses).finite) == list(expected)
    # by the last column alone, every early stop would count as a failure
    assert list(np.isfinite(losses)[:, -1]) != list(expected)


@pytest.mark.core
def test_finite_members_have_finite_parameters_and_state():
    losses = np.ones((4, 2))
    matrix = jnp.ones((4, 2, 2)).at[1, 0, 1].set(NAN)
    assert list(result(losses, {"m": matrix}).finite) == [True, False, True, True]
    assert list(result(losses, {"net": {"m": matrix}}).finite) == [True, False, True, True]
    state = {"mean": jnp.ones((4, 3)).at[2, 0].set(INF)}
    assert list(result(losses, {"m": matrix}, state).finite) == [True, False, False, True]


def test_what_is_shared_says_nothing_of_a_member():
    shared = {"size": jnp.asarray(3), "table": jnp.arange(15).reshape(5, 3), "act": jnp.tanh}
    ours = result([[2.0], [NAN], [1.0], [3.0]], shared)
    assert list(ours.finite) == [True, False, True, True]
    assert list(ours.ranking()) == [2, 0, 3]
    assert ours.member(2).params["act"] is jnp.tanh
    assert ours.member(2).params["size"] == 3
    assert_array_equal(ours.member(2).params["table"], shared["table"])


def test_members_are_ranked_by_their_last_finite_losses():
    steps = np.arange(150)
    late = np.where(steps < 50, 50.0, 1.0)  # the mean of its last 100 is the lowest
    early = np.where(steps < 100, 2.0, NAN)
    spoilt = np.where(steps < 50, -50.0, 3.0)  # the mean of all its losses would be the lowest
    failed = np.full(150, -9.0)
    failed[-1] = INF
    stumbled = np.full(150, 2.5)
    stumbled[60] = INF
    ours = result([spoilt, failed, early, late, stumbled])
    assert list(ours.ranking()) == [3, 2, 4, 0]
    assert list(ours.finite) == [True, False, True, True, True]
    naive = np.argsort(np.nanmean(ours.losses, axis=1))
    assert naive[0] == 0


def test_ties_keep_the_members_order():
    assert list(result(np.ones((3, 2))).ranking()) == [0, 1, 2]


def test_best_and_member_are_single_fits():
    ours = result([[3.0, 2.0], [1.0, NAN], [NAN, NAN]], mutable_state={"n": jnp.arange(3.0)})
    best = ours.best()
    assert isinstance(best, SVIRunResult)
    assert_array_equal(best.params["w"], [2.0, -2.0])
    assert_array_equal(best.losses, [1.0, NAN])
    assert best.state.optim_state[0] == 7
    assert best.state.mutable_state["n"] == 1.0
    key = jax.random.key_data(best.state.rng_key)
    assert_array_equal(key, jax.random.key_data(jax.random.split(jax.random.key(0), 3)[1]))
    assert_array_equal(ours.best(1).params["w"], [1.0, -1.0])
    assert_array_equal(ours.member(-1).params["w"], [3.0, -3.0])
    assert_array_equal(ours.member(0).losses, [3.0, 2.0])
    for rank in (2, -1):
        with pytest.raises(ValueError, match=f"^rank .* got {rank}; 2 of 3 members are finite"):
            ours.best(rank)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"^index takes -3 to 2, got {index}"):
            ours.member(index)


def test_no_member_is_best_where_none_is_finite():
    ours = result([[NAN], [INF]])
    assert len(ours.ranking()) == 0
    with pytest.raises(ValueError, match="0 of 2 members are finite"):
        ours.best()


def test_it_unpacks_as_svis_result_does():
    ours = result(np.ones((2, 3)))
    params, state, losses = ours
    assert (params, state, losses) == (ours.params, ours.state, ours.losses)
    assert EnsembleResult._fields == SVIRunResult._fields
    assert ours.ensemble_size == 2


@pytest.mark.leaks
def test_it_is_a_pytree():
    ours = result([[3.0, 2.0], [1.0, NAN]])
    doubled = jax.tree.map(lambda leaf: leaf * 2, (ours.params, ours.losses))
    assert_array_equal(doubled[0]["w"], 2.0 * ours.params["w"])
    reversed_ = jax.tree.map(lambda leaf: leaf[::-1], ours)
    assert isinstance(reversed_, EnsembleResult)
    assert_array_equal(reversed_.member(0).params["w"], ours.member(1).params["w"])
    one = jax.vmap(lambda member: member.params["w"].sum() + member.losses[0])(ours)
    assert_array_equal(one, [3.0, 1.0])


@pytest.mark.core
@pytest.mark.leaks
def test_it_works_under_jit():
    ours = result([[3.0, 2.0], [1.0, NAN], [1.0, INF]])

    @jax.jit
    def inside(outcome):
        return outcome, outcome.finite, outcome.member(1)

    same, finite, member = inside(ours)
    assert list(finite) == [True, True, False]
    assert_array_equal(same.losses, ours.losses)
    assert_array_equal(member.params["w"], ours.member(1).params["w"])
    assert_array_equal(jax.jit(lambda o: o.finite)(same), ours.finite)


def test_a_run_returns_one(key):
    runner = map_on_ridge()
    ours = runner.run(key, 4, X, Y, progress_bar=False)
    params, state, losses = ours
    assert losses.shape == (2, 4)
    assert ours.finite.shape == (2,) and ours.finite.all()
    assert sorted(ours.ranking()) == [0, 1]
    best = ours.best()
    assert_allclose(best.losses.mean(), losses.mean(1).min())
    assert best.params["w"].shape == (2,)
    assert best.state.optim_state[0].shape == ()
    again = runner.run(key, 4, X, Y, init_state=state, progress_bar=False)
    assert (again.losses[:, -1] < losses[:, 0]).all()


def test_members_are_named_shortly():
    assert name_members([False, True, False, True]) == "1, 3"
    assert name_members(np.ones(13, bool)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"
    assert name_members(np.ones(3, bool), limit=2) == "0, 1 and 1 more"
    assert name_members([False]) == ""
