"""Chains that are stopped and continued have the draws of uninterrupted chains, bit for bit.

`MCMC.run` makes the same draws in another program, so they agree to rounding.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from copy import copy
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from killed_chains import KERNELS, Y, chains, model
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.infer import HMC, MCMC, NUTS

from numpyro_ensemble import Checkpoint
from numpyro_ensemble.mcmc import ChEES, run_checkpointed
from numpyro_ensemble.storage import without_key

SCRIPT = Path(__file__).with_name("killed_chains.py")


@pytest.fixture(autouse=True)
def _few_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few and short chains do not mix
        yield


def same(one, other, rtol=0.0):
    for a, b in zip(outcome(one), outcome(other), strict=True):
        assert_allclose(a, b, rtol=rtol, atol=rtol)


def outcome(mcmc):
    extra = mcmc.get_extra_fields(group_by_chain=True)
    leaves = jax.tree.leaves((mcmc.get_samples(group_by_chain=True), extra, mcmc.last_state))
    return [without_key(leaf)[0] for leaf in leaves]


def kept(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_the_draws_are_those_of_one_run(tmp_path, name):
    """A run starts from no checkpoint, or from one in warm-up, at its end or among the draws."""
    fields = () if name in ("AIES", "Gibbs") else ("potential_energy",)
    whole = chains(name, thinning=2 if name == "one NUTS" else 1)
    whole.run(jax.random.key(0), Y, extra_fields=fields)
    mcmc = copy(whole)  # the copy shares the compiled programs
    checkpoint = Checkpoint(tmp_path, every=10, keep=9)

    def go_on():
        run_checkpointed(mcmc, checkpoint, jax.random.key(0), Y, extra_fields=fields)
        assert type(mcmc.get_samples()) is dict
        assert mcmc.post_warmup_state is None and mcmc.num_samples == mcmc.num_warmup + 11
        same(mcmc, never_stopped)

    never_stopped = mcmc
    go_on()
    same(mcmc, whole, 1e-9)
    never_stopped = copy(mcmc)
    ends = [10, 20, 30, 40, 50, 51]
    assert kept(tmp_path) == ([10, 20, 31, 41, 51] if name == "one NUTS" else ends)
    for last in (10,) if name == "MEADS" else (40, 20, 10):
        for step in kept(tmp_path):
            if step > last + 1:
                shutil.rmtree(tmp_path / str(step))
        go_on()
    if name != "MEADS":
        go_on()  # nothing is left to do


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Checkpoints of a run with one chain."""
    folder = tmp_path_factory.mktemp("half")
    run_checkpointed(chains("one NUTS"), Checkpoint(folder, every=40), jax.random.key(0), Y)
    return Checkpoint(folder, every=40)


@pytest.mark.parametrize(
    ("mcmc", "key", "args", "said"),
    [
        (chains("one NUTS"), 0, (Y + 1,), "argument 'y' was float64"),
        (chains("one NUTS"), 0, (Y, 2.0), "argument 'scale' was not there, and is 2.0"),
        (chains("one NUTS"), 1, (Y,), "setting 'rng_key' was"),
        (chains("one NUTS", thinning=5), 0, (Y,), "setting 'thinning' was 1, and is 5"),
        (chains("one NUTS", 21), 0, (Y,), "setting 'num_warmup' was 20, and is 21"),
        (
            MCMC(NUTS(model, max_tree_depth=4), num_warmup=20, num_samples=31),
            0, (Y,), "kernel 'max_tree_depth' was 3, and is 4",
        ),
        (
            MCMC(ChEES(model), num_warmup=20, num_samples=31),
            0, (Y,), "kernel '[a-z_]*' was",
        ),
    ],
    ids=["data", "default", "key", "thinning", "warmup", "depth", "kernel"],
)  # fmt: skip
def test_checkpoints_of_another_run_are_refused(half, mcmc, key, args, said):
    with pytest.raises(ValueError, match=f"are of another run: .*({said})"):
        run_checkpointed(mcmc, half, jax.random.key(key), *args)


@pytest.mark.parametrize(
    "other",
    [
        lambda m: HMC(m, num_steps=2, trajectory_length=None),
        pytest.param(lambda m: NUTS(m, max_tree_depth=3), marks=pytest.mark.long),
        pytest.param(lambda m: ChEES(m, start="init"), marks=pytest.mark.long),
    ],
    ids=["HMC", "NUTS", "ChEES"],
)
def test_another_number_in_the_model_is_found(tmp_path, other):
    """The number changes no name, no shape and no data, so the log density is compared."""
    kept = Checkpoint(tmp_path, every=5)

    def run(scale):
        def model(y):
            a = numpyro.sample("a", dist.Normal(0.0, scale).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(a.sum(), 1.0), obs=y)

        kernel = other(model)
        number = 8 if isinstance(kernel, ChEES) else 1
        mcmc = MCMC(
            kernel, num_warmup=10, num_samples=5, num_chains=number, chain_method="vectorized",
            progress_bar=False,
        )  # fmt: skip
        run_checkpointed(mcmc, kept, jax.random.key(0), 1.5)

    run(2.0)
    run(2.0)
    with pytest.raises(ValueError, match="are of another run: a potential energy was .* and is"):
        run(2.1)


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_what_there_is(tmp_path):
    """A potential energy that counts its evaluations sends the interrupt."""
    calls, presses = [], []

    def press(_):
        calls.append(1)
        if len(calls) in presses:
            os.kill(os.getpid(), signal.SIGINT)

    def potential(z):
        jax.debug.callback(press, z)
        return 0.5 * z @ z

    kernel = HMC(potential_fn=potential, step_size=0.5, num_steps=1, adapt_step_size=False)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=40, progress_bar=False)

    def run():
        checkpoint, start = Checkpoint(tmp_path, every=10), jax.numpy.zeros(2)
        run_checkpointed(mcmc, checkpoint, jax.random.key(0), init_params=start)
        return mcmc.get_samples()

    presses.append(6)
    with pytest.raises(KeyboardInterrupt, match="interrupted in warm-up, after 10 iterations"):
        run()
    presses[0] = len(calls) + 25
    with pytest.warns(UserWarning, match="interrupted: 40 of 60 iterations were made"):
        some = run()
    assert some.shape == (20, 2)
    whole = run()
    assert whole.shape == (40, 2)
    assert_array_equal(whole[:20], some)
    shutil.rmtree(tmp_path)
    assert_array_equal(run(), whole)


def test_what_is_no_run(tmp_path):
    mcmc, kept = chains("one NUTS"), Checkpoint(tmp_path)
    with pytest.raises(TypeError, match="mcmc takes a numpyro.infer.MCMC, got <numpyro"):
        run_checkpointed(mcmc.sampler, kept, jax.random.key(0), Y)
    with pytest.raises(TypeError, match="checkpoint takes a Checkpoint, got 'here'"):
        run_checkpointed(mcmc, "here", jax.random.key(0), Y)
    mcmc.post_warmup_state = ()
    with pytest.raises(ValueError, match="mcmc has a post_warmup_state"):
        run_checkpointed(mcmc, kept, jax.random.key(0), Y)


def fail_to_start(mcmc, folder):
    with pytest.raises(AssertionError):  # NumPyro's error: the start lacks a latent
        wrong = {"a": 1.0}
        kept = Checkpoint(folder, every=10)
        run_checkpointed(mcmc, kept, jax.random.key(0), Y[:, None, None], init_params=wrong)


def test_a_start_that_fails_leaves_no_trace(tmp_path):
    mcmc = chains("one NUTS", 11, 10, thinning=5)
    before = (mcmc.num_warmup, mcmc.num_samples, mcmc.thinning, mcmc.post_warmup_state)
    fail_to_start(mcmc, tmp_path)
    assert (mcmc.num_warmup, mcmc.num_samples, mcmc.thinning, mcmc.post_warmup_state) == before
    assert before == (11, 10, 5, None) and not kept(tmp_path)


@pytest.mark.long
def test_a_run_after_one_that_failed(tmp_path):
    """Warm-up ends with a piece that is shorter than the thinning."""
    mcmc = chains("one NUTS", 11, 10, thinning=5)
    fail_to_start(mcmc, tmp_path / "a")
    run_checkpointed(mcmc, Checkpoint(tmp_path / "b", every=10), jax.random.key(0), Y)
    draws = mcmc.get_samples()["a"]
    assert draws.shape == (2,) and mcmc.thinning == 5
    mcmc.run(jax.random.key(0), Y)
    assert_allclose(mcmc.get_samples()["a"], draws, rtol=1e-9)


@pytest.mark.long
def test_chains_that_did_not_mix_are_named_once(tmp_path):
    """Two modes are far apart: each piece alone would warn, but the run warns once."""
    kernel = ChEES(potential_fn=lambda z: -jax.numpy.logaddexp(-((z - 9) ** 2), -((z + 9) ** 2))[0])
    mcmc = MCMC(
        kernel, num_warmup=20, num_samples=40, num_chains=8, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    start = jax.numpy.linspace(-9.0, 9.0, 8)[:, None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = Checkpoint(tmp_path, every=20)
        run_checkpointed(mcmc, kept, jax.random.key(0), init_params=start)
    (said,) = caught  # no checkpoint warned, although the metric has an empty array
    assert "have not mixed" in str(said.message) and "'the position'[0]" in str(said.message)
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws.shape == (8, 40, 1)
    with pytest.warns(UserWarning, match="have not mixed"):
        run_checkpointed(mcmc, kept, jax.random.key(0), init_params=start)
    assert_array_equal(mcmc.get_samples(group_by_chain=True), draws)


def started(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return said


@pytest.mark.long
@pytest.mark.parametrize("name", ["MEADS", "NUTS"])
def test_kill_9_at_any_moment(tmp_path, name):
    """Chains that are killed repeatedly end with the same bits, and repeat two pieces at most."""
    rng, kills = random.Random(1), int(os.environ.get("KILLS", "4"))
    finish(started(name, tmp_path / "one", tmp_path / "one.npz"))
    folder = tmp_path / "kept"
    while kills:
        process = started(name, folder, tmp_path / "other.npz")
        process.stdout.readline()
        before = seen = max(kept(folder), default=0) if folder.exists() else 0
        begin, wait = time.monotonic(), rng.uniform(0, 2)
        while process.poll() is None and seen == before:  # until a piece has ended
            seen = max(kept(folder), default=0) if folder.exists() else 0
            time.sleep(0.01)
            assert time.monotonic() - begin < 300
        time.sleep(wait * 0.2)
        process.kill()
        process.communicate()
        if process.returncode == 0:  # the run had ended
            shutil.rmtree(folder)
            continue
        kills -= 1
        assert max(kept(folder)) >= seen
    before = max(kept(folder))
    lines = finish(started(name, folder, tmp_path / "other.npz")).splitlines()
    if before < 600:  # otherwise the run was killed at its very end
        assert int(lines[1].split()[1]) == before + 20, "it went on, and did not begin anew"
    one, other = (np.load(tmp_path / f"{which}.npz") for which in ("one", "other"))
    assert one.files == other.files
    for field in one.files:
        assert_array_equal(one[field], other[field])
