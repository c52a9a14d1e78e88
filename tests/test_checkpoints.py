"""A run that is stopped and continued ends with the same numbers as an uninterrupted run."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from killed_run import STEPS, Y, fit
from numpy.testing import assert_array_equal

from numpyro_ensemble import Checkpoint, EnsembleResult

SCRIPT = Path(__file__).with_name("killed_run.py")
SHORT = 100


def same(one, other):
    trees = ((r.params, r.losses, r.state.optim_state, r.state.rng_key) for r in (one, other))
    leaves = (jax.tree.leaves(tree) for tree in trees)
    for a, b in zip(*leaves, strict=True):
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole():
    """A run that is never stopped."""
    return fit(steps=SHORT)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of the checkpoints of the same run, which was stopped at step 60."""
    path = tmp_path_factory.mktemp("stopped") / "kept"
    fit(Checkpoint(path, every=20), steps=SHORT, callback=lambda step, *_: step >= 60)
    return path


@pytest.fixture
def half(tmp_path, stopped):
    """A copy of the stopped run's checkpoints."""
    shutil.copytree(stopped, tmp_path / "kept")
    return Checkpoint(tmp_path / "kept", every=20)


def kept(checkpoint):
    """Return the steps of the checkpoints in the directory."""
    return sorted(int(p.name) for p in Path(checkpoint.directory).iterdir() if p.name.isdigit())


def test_a_run_goes_on(half, whole):
    assert kept(half) == [40, 60]
    seen = []
    result = fit(half, steps=SHORT, callback=lambda step, *_: seen.append(step))
    assert seen[0] == 65 and seen[-1] == SHORT
    same(result, whole)
    assert_array_equal(result.stopped, whole.stopped)
    assert result.completed_steps == whole.completed_steps == SHORT
    assert kept(half) == [80, 100]
    same(fit(half, steps=SHORT), whole)  # nothing is left to do
    with pytest.raises(ValueError, match="has taken 100 steps already: num_steps takes that many"):
        fit(half, steps=50)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": Y + 1}, "argument 'y' was float64"),
        ({"batch_size": 8}, "setting 'batch_size' was 16, and is 8"),
        (
            {"data": Y[:39]},
            r"site 'rows' was plate of shape \(40,\), and is plate of shape \(39,\)",
        ),
        pytest.param(
            {"scale": 1.5},
            r"the loss of step 1 was .*: a number in the model",
            marks=pytest.mark.long,
        ),
        ({"rate": 0.021}, r"the loss of step 2 was .*: a number in the model"),
        ({"init_params": {"a_auto_loc": np.zeros(())}}, "setting 'init_params' was none"),
    ],
)
def test_checkpoints_of_another_run_are_refused(half, changed, said):
    with pytest.raises(ValueError, match=f"are of another run: .*{said}"):
        fit(half, steps=SHORT, **changed)
    assert kept(half) == [40, 60]


def flip(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content), 7):  # every seventh byte
        content[place] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        pytest.param(lambda path: os.truncate(path, 9), marks=pytest.mark.long),
        pytest.param(os.unlink, marks=pytest.mark.long),
    ],
)
def test_what_is_damaged_is_left_out(half, whole, damage):
    newest = Path(half.directory) / "60"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(largest)
    with pytest.warns(UserWarning, match="checkpoint of step 60 in .* is damaged"):
        result = fit(half, steps=SHORT)
    same(result, whole)


def test_nothing_whole_means_from_the_start(half, whole):
    for step in (40, 60):
        for path in (Path(half.directory) / str(step)).rglob("*"):
            if path.is_file():
                os.truncate(path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fit(half, steps=SHORT), whole)


def test_one_run_at_a_time(half):
    said = []

    def another(step, *_):
        with pytest.raises(ValueError, match="another run uses .*kept for its checkpoints") as got:
            fit(half, steps=SHORT)
        said.append(got)
        return True

    fit(half, steps=SHORT, callback=another)
    assert len(said) == 1
    fit(half, steps=SHORT)  # the lock is released


FULL = """
import os, shutil, sys, warnings
from pathlib import Path
from killed_run import fit
from numpyro_ensemble import Checkpoint

folder = sys.argv[1]

def block(step, *_):
    if step == 5:  # a file stands where the directory was
        shutil.rmtree(folder)
        Path(folder).write_text("full")

for on_error in ("warn", "raise"):
    Path(folder).unlink(missing_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = fit(Checkpoint(folder, every=20, on_error=on_error), steps=100, callback=block)
            said = [str(w.message) for w in caught if "written" in str(w.message)]
            print(result.completed_steps, *said, flush=True)
        except OSError as error:
            print("OSError", error, flush=True)
os._exit(0)  # Orbax would wait for what cannot come
"""


@pytest.mark.long
def test_a_directory_that_is_full(tmp_path):
    """The runs are in a separate process, because Orbax's threads wait for the failed write."""
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPT.parents[1]}{os.pathsep}{SCRIPT.parent}"}
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "kept")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    warned, raised = run.stdout.splitlines()
    which = rf"the (last checkpoint|checkpoint of step \d+) in {tmp_path / 'kept'}"
    for line, begins in ((warned, "100"), (raised, "OSError")):
        assert re.match(f"{begins} {which} could not be written: ", line), run.stderr


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_returns_what_there_is(whole):
    def interrupt(step, *_):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match="interrupted: 40 of 100 steps were taken"):
        result = fit(steps=SHORT, callback=interrupt)
    assert result.completed_steps == 40
    assert_array_equal(result.losses[:, :40], whole.losses[:, :40])
    assert np.isnan(result.losses[:, 40:]).all()
    assert np.asarray(result.finite).all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same(fit(steps=SHORT), whole)


def started(*arguments):
    # NumPyro's ELBO adds its terms in the order of a set of names, which depends on the hash seed
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    process.communicate(timeout=600)
    assert process.returncode == 0


@pytest.mark.long
def test_sigterm_writes_a_checkpoint_first(tmp_path):
    process = started(tmp_path / "kept", 10_000, tmp_path / "result")
    process.stdout.readline()  # the first steps are done
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    (step,) = kept(Checkpoint(tmp_path / "kept"))
    assert 0 < step < STEPS
    assert not (tmp_path / "result").exists()


@pytest.mark.long
def test_kill_9_at_any_moment(tmp_path):
    """A run that is killed repeatedly ends with the same bits, and loses two intervals at most."""
    rng, every, kills = random.Random(0), 40, int(os.environ.get("KILLS", "8"))
    finish(started("", every, tmp_path / "whole"))
    kept_in, pace = Checkpoint(tmp_path / "kept"), None
    while kills:
        before = max(kept(kept_in), default=0) if pace else 0
        process = started(kept_in.directory, every, tmp_path / "result")
        begin, line = time.monotonic(), process.stdout.readline()
        if pace is None:
            begin, line = time.monotonic(), process.stdout.readline()
            pace = time.monotonic() - begin
        time.sleep(rng.uniform(0, 2 * pace))
        process.kill()
        process.communicate()
        if not line:  # the run had ended, because all its members had stopped
            shutil.rmtree(kept_in.directory)
            pace = None
            continue
        kills -= 1
        assert int(line) > before
        assert max(kept(kept_in), default=0) >= int(line) - 2 * every
    finish(started(tmp_path / "kept", every, tmp_path / "result"))
    same(*(EnsembleResult.load(tmp_path / name) for name in ("result", "whole")))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="every"):
        Checkpoint(tmp_path, every=0)
    with pytest.raises(ValueError, match='on_error takes "warn" or "raise"'):
        Checkpoint(tmp_path, on_error="ignore")
    with pytest.raises(TypeError, match="checkpoint takes a Checkpoint, got 'here'"):
        fit("here", steps=SHORT)
    with pytest.raises(ValueError, match="checkpoint needs the host, which jit"):
        jax.jit(lambda y: fit(Checkpoint(tmp_path), data=y, steps=SHORT).losses)(Y)
