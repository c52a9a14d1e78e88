"""The loop: batches, early stopping, stable updates, callbacks, the progress bar."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import AutoDelta
from numpyro.primitives import mutable
from zoo import X, Y, jit_once, map_on_ridge, ridge

from numpyro_ensemble import EarlyStopping, EnsembleMAP, log_joint

W = {"w": np.array([0.5, -0.2])}


def quiet(runner, key, num_steps, *args, **kwargs):
    return runner.run(key, num_steps, *args, progress_bar=False, **kwargs)


def negative_log_joint(w, x, y):
    return -sum(log_joint(ridge)({"w": w}, x, y))


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "shared"),
    [
        pytest.param(2, True, marks=pytest.mark.long),
        pytest.param(2, False, marks=pytest.mark.long),
        pytest.param(3, True, marks=pytest.mark.long),
        (3, False),  # leaves a ragged batch of 2 rows
    ],
)
def test_the_weighted_mean_gradient_of_an_epoch_is_the_full_gradient(batch_size, shared, key):
    rate, states = 1e-8, []
    runner = EnsembleMAP(ridge, numpyro.optim.SGD(rate), ensemble_size=2)
    steps = -(-len(Y) // batch_size)
    starts = {"w": np.stack([W["w"], W["w"] + 0.1])}
    result = quiet(
        runner, key, steps, X, Y, batch_size=batch_size, shared_batches=shared,
        init_params=starts, chunk_size=1,
        callback=lambda step, state, losses: states.append(runner.get_params(state)["w"]),
    )  # fmt: skip
    path = np.stack([starts["w"], *states])
    gradients = (path[:-1] - path[1:]) / rate
    sizes = np.full(steps, batch_size)
    sizes[-1] = len(Y) - batch_size * (steps - 1)
    mean = np.einsum("s,sed->ed", sizes / len(Y), gradients)
    full = jax.vmap(jax.grad(negative_log_joint), in_axes=(0, None, None))(starts["w"], X, Y)
    assert_allclose(mean, full, rtol=1e-4)
    mean_loss = result.losses @ (sizes / len(Y))
    full_loss = [negative_log_joint(w, X, Y) for w in starts["w"]]
    assert_allclose(mean_loss, full_loss, rtol=1e-4)
    full = np.asarray(full)[None]
    assert np.abs(gradients - full).max() > 1.0  # single batches have other gradients
    assert batch_size == 2 or np.abs(gradients.mean(0) - full).max() > 0.1


def recording(seen):
    def model(rows, y):
        jax.debug.callback(lambda r: seen.append(np.asarray(r)), rows)
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model


def test_epochs_are_whole_without_replacement_and_reshuffled(key):
    seen = []
    runner = EnsembleMAP(recording(seen), numpyro.optim.SGD(1e-3), ensemble_size=1)
    rows = np.arange(8)
    quiet(runner, key, 1, rows, Y, batch_size=3)
    jax.effects_barrier()
    seen.clear()
    quiet(runner, key, 9, rows, Y, batch_size=3)
    jax.effects_barrier()
    # the last three batches are for the gradient at the end
    batches = [b.ravel() for b in seen][-12:-3]
    assert [len(b) for b in batches] == [3, 3, 2] * 3
    epochs = [np.concatenate(batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert_array_equal(np.sort(epoch), rows)
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.core
@pytest.mark.parametrize("shared", [True, False])
def test_halves_equal_the_whole_with_batches(shared, key):
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=2)
    options = {"batch_size": 3, "shared_batches": shared}
    whole = quiet(runner, key, 8, X, Y, **options)
    first = quiet(runner, key, 4, X, Y, **options)
    second = quiet(runner, key, 4, X, Y, init_state=first.state, **options)
    assert_array_equal(jnp.concatenate([first.losses, second.losses], 1), whole.losses)
    assert_array_equal(second.params["w"], whole.params["w"])
    other = quiet(runner, jax.random.key(9), 4, X, Y, init_state=first.state, **options)
    # the order of batches depends on the key
    assert np.abs(other.losses - second.losses).max() > 1e-3


def test_a_member_with_its_own_batches_is_a_single_run(key):
    options = {"batch_size": 3, "shared_batches": False}
    every = quiet(
        EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=3), key, 7, X, Y, **options
    )
    keys = jax.random.split(key, 3)
    alone = quiet(
        EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=1), keys[1:2], 7, X, Y, **options
    )
    assert_allclose(every.losses[1], alone.losses[0], rtol=1e-12)


def test_batch_args_name_what_is_batched(key):
    def model(w_scale, x, extra, y):
        w = numpyro.sample("w", dist.Normal(0, w_scale).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(x["x"] @ w + extra.sum(), 0.5), obs=y)

    runner = EnsembleMAP(model, numpyro.optim.SGD(1e-9), ensemble_size=2)
    args = (np.ones(2), {"x": X}, np.zeros(3), Y)
    with pytest.raises(ValueError, match="one leading length.*w_scale.*2.*batch_args"):
        quiet(runner, key, 1, *args, batch_size=4)
    by_name = quiet(runner, key, 2, *args, batch_size=4, batch_args=["x", "y"])
    by_place = quiet(runner, key, 2, *args, batch_size=4, batch_args=[1, "y"])
    assert_array_equal(by_name.losses, by_place.losses)
    full = quiet(runner, key, 1, *args)
    assert_allclose(by_name.losses.mean(1), full.losses[:, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="batch_args names 'z'.*extra"):
        quiet(runner, key, 1, *args, batch_size=4, batch_args=["z"])
    with pytest.raises(ValueError, match="batch_args was given without batch_size"):
        quiet(runner, key, 1, *args, batch_args=["x"])


def test_more_than_all_rows_is_all_rows(key):
    runner = map_on_ridge()
    with pytest.warns(UserWarning, match="batch_size=9 is more than the 8 rows"):
        clamped = quiet(runner, key, 3, X, Y, batch_size=9)
    assert_allclose(clamped.losses, quiet(runner, key, 3, X, Y).losses, rtol=1e-12)


def row_latents(x, y):
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def row_param(x, y):
    z = numpyro.param("z", jnp.zeros(len(y)))
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(z + mu, 1.0), obs=y)


def fixed_plate(x, y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", 8):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fixed_offset(x, y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu + np.zeros(8), 1.0), obs=y)


def second_data_set(x, y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    numpyro.sample("total", dist.Normal(mu, 1.0), obs=0.3)


def penalised(x, y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("penalty", -jnp.abs(mu))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "batch_size", "message"),
    [
        (row_latents, 4, r"shape of latent site 'z' from \(8,\) to \(4,\).*subsample_size"),
        (row_param, 4, r"shape of param site 'z' from \(8,\) to \(4,\).*subsample_size"),
        (fixed_plate, 1, "plate 'data' around observed site 'y' keeps its size 8.*subsample_size"),
        (fixed_plate, 4, "plate 'data' around observed site 'y' keeps its size 8.*subsample_size"),
        (fixed_offset, 4, "fails on a batch of batch_size=4 rows.*subsample_size"),
        (second_data_set, 4, "observed site 'total' keeps its shape.*subsample_size"),
        (penalised, 4, "factor 'penalty' was not said to be.*prior_sites= or likelihood_sites="),
    ],
)
def test_a_model_that_does_not_follow_its_batches_is_refused(
    model, batch_size, message, key, compile_count
):
    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    jax.random.split(key, 2)
    with compile_count() as count, pytest.raises(ValueError, match=message):
        quiet(runner, key, 1, X, Y, batch_size=batch_size)
    assert count.count == 0, count.names


def test_a_list_of_data_is_not_cut(key):
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=2)
    with pytest.raises(ValueError, match=r"'y' has a list as its data.*numpy\.asarray"):
        quiet(runner, key, 1, X, list(Y), batch_size=4)


@pytest.mark.parametrize(("where", "times"), [("prior_sites", 1.0), ("likelihood_sites", 4.0)])
def test_a_declared_factor_is_rescaled_or_not(where, times, key):
    options = {where: ["penalty"], "ensemble_size": 2}
    runner = EnsembleMAP(penalised, numpyro.optim.SGD(1e-12), **options)
    start = {"mu": 0.5}
    y = np.full(8, 0.3)
    loss = quiet(runner, key, 1, X, y, batch_size=2, init_params={"mu": [0.5, 0.5 + 1e-9]}).losses
    data = dist.Normal(start["mu"], 1.0).log_prob(y).sum()
    expected = -(data + dist.Normal(0, 1).log_prob(0.5) - times * 0.5)
    assert_allclose(loss[:, 0], expected, rtol=1e-6)


def test_a_model_that_rescales_itself_is_refused(key):
    def by_plate(x, y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", 8, subsample_size=len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def by_scale(x, y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", len(y)), handlers.scale(scale=8 / len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    for model in (by_plate, by_scale):
        runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
        with pytest.raises(ValueError, match="'y' is scaled by 1 with all.*by 4.*rescales itself"):
            quiet(runner, key, 1, X, Y, batch_size=2)


@pytest.mark.long
def test_halves_equal_the_whole_with_batches_and_failed_steps(key):
    runner = EnsembleMAP(
        flaky, numpyro.optim.Adam(0.1), ensemble_size=2, likelihood_sites=["failure"]
    )
    options = {"batch_size": 3, "stable_update": True}
    whole = quiet(runner, key, 10, Y, **options)
    assert np.isnan(whole.losses).any()
    first = quiet(runner, key, 5, Y, **options)
    second = quiet(runner, key, 5, Y, init_state=first.state, **options)
    assert_array_equal(jnp.concatenate([first.losses, second.losses], 1), whole.losses)


# Stopping -----------------------------------------------------------------------------------------


def stops(losses, patience, min_delta, window):
    """Return the number of steps after which the rule stops, computed in plain Python."""
    best, stale = np.inf, 0
    for end in range(window, len(losses) + 1, window):
        mean = np.mean(losses[end - window : end])
        if mean < best - min_delta:
            best, stale = mean, 0
        else:
            stale += 1
        if stale >= patience:
            return end
    return len(losses)


@cache
def fast():
    return EnsembleMAP(ridge, numpyro.optim.Adam(0.2), ensemble_size=3)


@pytest.mark.core
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_early_stopping_freezes_each_member_at_its_own_step(chunk_size, key):
    runner = fast()
    rule = EarlyStopping(patience=2, min_delta=0.5, window=5)
    starts = {"w": np.array([[1.0, -1.0], [4.0, 4.0], [9.0, -6.0]])}
    free = quiet(runner, key, 400, X, Y, init_params=starts)
    result = quiet(
        runner, key, 400, X, Y, init_params=starts, early_stopping=rule, chunk_size=chunk_size
    )
    expected = [stops(row, 2, 0.5, 5) for row in np.asarray(free.losses)]
    assert len(set(expected)) == 3 and max(expected) < 400
    assert_array_equal((~np.isnan(result.losses)).sum(1), expected)
    assert result.losses.shape == (3, 400)
    assert result.finite.all()
    for e, steps in enumerate(expected):
        assert_allclose(result.losses[e, :steps], free.losses[e, :steps], rtol=1e-6)
        until = quiet(runner, key, steps, X, Y, init_params=starts)
        assert_allclose(result.params["w"][e], until.params["w"][e], rtol=1e-5)
    assert_array_equal(result.state.optim_state[0], expected)


@cache
def standing_still():
    return EnsembleMAP(ridge, numpyro.optim.SGD(1e-12), ensemble_size=2)


def test_the_run_ends_soon_after_all_have_stopped(key):
    steps = []
    runner = standing_still()
    rule = EarlyStopping(patience=1, window=4, min_delta=1e-6)
    quiet(
        runner, key, 1000, X, Y, early_stopping=rule, chunk_size=10,
        callback=lambda step, state, losses: steps.append(step),
    )  # fmt: skip
    assert steps == []  # all have stopped in the first chunk: nothing is left to report


def test_counters_of_early_stopping_restart_with_init_state(key):
    runner = standing_still()
    rule = EarlyStopping(patience=3, window=2, min_delta=1e-6)
    first = quiet(runner, key, 4, X, Y, early_stopping=rule)
    assert not np.isnan(first.losses).any()
    second = quiet(runner, key, 12, X, Y, early_stopping=rule, init_state=first.state)
    assert_array_equal((~np.isnan(second.losses)).sum(1), [8, 8])  # 1 window sets the best, 3 fail


def test_min_steps_holds_stopping_back(key):
    runner = standing_still()
    rule = EarlyStopping(patience=1, window=2, min_delta=1e-6, min_steps=9)
    result = quiet(runner, key, 20, X, Y, early_stopping=rule)
    assert_array_equal((~np.isnan(result.losses)).sum(1), [10, 10])


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (EarlyStopping(patience=0), ValueError, "patience must be at least 1, got 0"),
        (EarlyStopping(window=0), ValueError, "window must be at least 1"),
        (EarlyStopping(min_delta=-1.0), ValueError, "min_delta must be at least 0"),
        (EarlyStopping(min_delta=np.nan), TypeError, "min_delta takes a number"),
        (5, TypeError, "early_stopping takes an EarlyStopping, got 5"),
    ],
)
def test_bad_stopping_rules_are_refused(rule, error, message, key):
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=2)
    with pytest.raises(error, match=message):
        quiet(runner, key, 1, X, Y, early_stopping=rule)


# Failures -----------------------------------------------------------------------------------------


def flaky(y):
    """A model whose loss is NaN at random steps."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    noise = numpyro.prng_key()
    chance = 0.0 if noise is None else jax.random.uniform(noise)
    numpyro.factor("failure", jnp.where(chance > 0.6, jnp.nan, 0.0) * mu)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_stable_update_skips_failed_steps_as_svi_does(key):
    runner = EnsembleMAP(flaky, numpyro.optim.Adam(0.1), ensemble_size=2)
    result = quiet(runner, key, 20, Y, stable_update=True)
    svi = SVI(
        flaky,
        AutoDelta(flaky, init_loc_fn=init_to_uniform),
        numpyro.optim.Adam(0.1),
        Trace_ELBO(),
    )
    single = jit_once(lambda k: svi.run(k, 20, Y, stable_update=True, progress_bar=False))
    for e, member_key in enumerate(jax.random.split(key, 2)):
        alone = single(member_key)
        assert 0 < np.isnan(alone.losses).sum() < 20
        assert_allclose(result.losses[e], alone.losses, rtol=1e-8)
        assert_allclose(result.params["mu"][e], alone.params["mu_auto_loc"], rtol=1e-8)
    assert result.finite.all()
    with pytest.warns(UserWarning) as caught:
        failed = quiet(runner, key, 20, Y)
    messages = [str(warning.message) for warning in caught]  # each member is named once
    assert "1 of 2 members start where the loss is not finite: 0." in messages[0]
    assert "1 of 2 members ended with values that are not finite: 1. See" in messages[1]
    assert not failed.finite.any()


def counting(y):
    """A model with a mutable number that is NaN at random steps, while the loss is finite."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    held = mutable("held", {"value": jnp.zeros(())})
    noise = numpyro.prng_key()
    chance = 0.0 if noise is None else jax.random.uniform(noise)
    fails = (chance > 0.6) & (held["value"] > 0.5)  # not at the start
    held["value"] = jnp.where(fails, jnp.nan, held["value"] + 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.long
def test_stable_update_keeps_mutable_state_good(key):
    runner = EnsembleMAP(counting, numpyro.optim.Adam(0.1), ensemble_size=2)
    result = quiet(runner, key, 20, Y, stable_update=True)
    value = result.state.mutable_state["held"]["value"]
    good = (~np.isnan(result.losses)).sum(1)
    assert (good < 20).all()
    assert np.isfinite(value).all() and (value >= good).all() and (value <= good + 1).all()
    assert_array_equal(result.state.optim_state[0], good)


def test_a_failed_loss_shows_though_the_parameters_are_finite(key):
    def model():
        mu = numpyro.sample("mu", dist.Normal(3.0, 1.0))
        failed = jnp.where(mu > 1.5, jnp.nan, 0.0)
        numpyro.factor("f", jax.lax.stop_gradient(failed))

    runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=2)
    starts = {"mu": np.array([0.0, -30.0])}
    with pytest.warns(UserWarning, match="1 of 2 members ended .*: 0"):
        result = quiet(runner, key, 40, init_params=starts)
    assert np.isfinite(result.params["mu"]).all()
    assert list(result.finite) == [False, True]
    assert list(result.ranking()) == [1]


def test_all_failed_starts_are_an_error_and_some_a_warning(key):
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=3)
    starts = np.zeros((3, 2))
    starts[[0, 2]] = np.inf, np.nan
    with pytest.warns(UserWarning) as caught:
        result = quiet(runner, key, 3, X, Y, init_params={"w": starts})
    messages = [str(w.message) for w in caught]
    assert any("2 of 3 members start where the loss is not finite: 0, 2" in m for m in messages)
    assert list(result.finite) == [False, True, False]
    with pytest.raises(ValueError, match="All 3 members start .* not finite.*init_params"):
        quiet(runner, key, 3, X, Y, init_params={"w": starts * np.nan})


# Callbacks, progress ------------------------------------------------------------------------------


def test_a_callback_sees_each_chunk_and_may_end_the_run(key):
    runner = map_on_ridge()
    seen = []

    def callback(step, state, losses):
        seen.append((step, losses.shape, runner.get_params(state)["w"]))
        return step >= 6

    result = quiet(runner, key, 20, X, Y, callback=callback, chunk_size=3)
    assert [(step, shape) for step, shape, _ in seen] == [(3, (2, 3)), (6, (2, 3))]
    assert result.losses.shape == (2, 20)
    assert_array_equal((~np.isnan(result.losses)).sum(1), [6, 6])
    assert_array_equal(seen[-1][2], result.params["w"])
    assert result.finite.all()
    with pytest.raises(ValueError, match="callback needs the host, which jit"):
        jax.jit(lambda k: runner.run(k, 2, X, Y, callback=callback))(key)
    with pytest.raises(TypeError, match="callback takes a callable, got 3"):
        quiet(runner, key, 2, X, Y, callback=3)


def test_the_progress_bar_shows_mean_best_and_worst(key, capsys):
    runner = map_on_ridge()
    result = runner.run(key, 40, X, Y)
    shown = capsys.readouterr().err
    last = np.asarray(result.losses)[:, -2:].mean(1)
    assert f"mean {last.mean():.4f}, best {last.min():.4f}, worst {last.max():.4f}" in shown
    assert "40/40" in shown
    quiet(runner, key, 40, X, Y)
    assert capsys.readouterr().err == ""


# Member arguments, optimisers ---------------------------------------------------------------------


@pytest.mark.long
def test_members_may_be_fitted_to_different_data(key):
    ys = np.stack([Y, Y + 1.0, Y * 2.0])
    runner = EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=3)
    result = quiet(runner, key, 30, X, ys, member_args=["y"])
    for e in range(3):
        alone = quiet(
            EnsembleMAP(ridge, numpyro.optim.Adam(0.1), ensemble_size=1),
            jax.random.split(key, 3)[e : e + 1], 30, X, ys[e],
        )  # fmt: skip
        assert_allclose(result.losses[e], alone.losses[0], rtol=1e-9)
    with pytest.raises(ValueError, match=r"member_args names 'y' of shape \(2, 8\).*size=3"):
        quiet(runner, key, 3, X, ys[:2], member_args="y")


@pytest.mark.parametrize(
    "optim",
    [
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)),
        ),
        pytest.param(
            numpyro.optim.ClippedAdam(optax.cosine_decay_schedule(0.1, 20)), marks=pytest.mark.long
        ),
        pytest.param(jax.example_libraries.optimizers.adam(0.1), marks=pytest.mark.long),
    ],
    ids=["optax chain", "numpyro schedule", "example library"],
)
def test_optimisers_run_as_in_svi(optim, key):
    result = quiet(EnsembleMAP(ridge, optim, ensemble_size=2), key, 10, X, Y)
    svi = SVI(ridge, AutoDelta(ridge, init_loc_fn=init_to_uniform), optim, Trace_ELBO())
    single = jax.jit(lambda k: svi.run(k, 10, X, Y, progress_bar=False))
    alone = single(jax.random.split(key, 2)[1])
    assert_allclose(result.losses[1], alone.losses, rtol=1e-9)
    assert_allclose(result.params["w"][1], alone.params["w_auto_loc"], rtol=1e-9)
