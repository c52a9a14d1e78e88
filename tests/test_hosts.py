"""One script in several processes on the loopback address, each with two devices."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
START = """
import sys
import jax

what, directory, port, number, process = sys.argv[1:]
jax.distributed.initialize(
    f"127.0.0.1:{port}", int(number), int(process), heartbeat_timeout_seconds=20
)
from host_runs import main  # JAX wants to know of the other processes before anything else

main(what, directory)
"""


class Cluster:
    """Processes that run `host_runs.main` together."""

    def __init__(self, what, number, directory):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
        # NumPyro's ELBO adds its terms in the order of a set, on which processes must agree
        paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
        environment |= {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-c", START, what, str(directory), str(port), str(number)]
        self.outputs = [directory / f"output {process}" for process in range(number)]
        self.errors = [directory / f"errors {process}" for process in range(number)]
        self.processes = []
        for process in range(number):
            with self.outputs[process].open("w") as out, self.errors[process].open("w") as errors:
                arguments = [*command, str(process)]
                started = subprocess.Popen(arguments, env=environment, stdout=out, stderr=errors)
            self.processes.append(started)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def found(self):
        """Wait for all processes, and return the dict that each has printed."""
        for process, errors in zip(self.processes, self.errors, strict=True):
            assert process.wait(600) == 0, errors.read_text()[-3000:]
        return [json.loads(output.read_text().splitlines()[-1]) for output in self.outputs]

    def wait_for(self, line):
        """Wait until the first process has printed this line."""
        begin = time.monotonic()
        while line not in self.outputs[0].read_text().splitlines():
            assert time.monotonic() - begin < 300, self.errors[0].read_text()[-3000:]
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.05)


def check(found):
    distances = {k: v for one in found for k, v in one.items() if k.startswith("apart")}
    assert distances and max(distances.values()) < 1e-8, distances


@pytest.mark.long
def test_two_processes(tmp_path):
    with Cluster("fits", 2, tmp_path) as cluster:
        found = cluster.found()
    check(found)
    assert [one["local"] for one in found] == [True, True]
    assert [one["left spread"] for one in found] == [True, True]
    assert [one["bar"] for one in found] == [True, False]


@pytest.mark.long
@pytest.mark.parametrize("number", [2, 4])
def test_everything_on_hosts(tmp_path, number):
    with Cluster("steps,chains" + ",predictions" * (number == 2), number, tmp_path) as cluster:
        check(cluster.found())


@pytest.mark.long
def test_processes_agree(tmp_path):
    """Every process names what differs between processes, and all end when one ends the run."""
    with Cluster("agreed", 2, tmp_path) as cluster:
        found = cluster.found()
    check(found)
    between = "differs between processes 0 and 1: pass the same data"
    said = {
        "data": f"argument 'y' {between}",
        "keys": f"setting 'rng_key' {between}",
        "names": "their names differ",
        "chains": f"argument 'x' {between}",
        "draws": f"sample 'a' {between}",
        "alone": "checkpoint= needs a mesh with devices of all 2 processes",
        "store": "a store is written by one process, and mesh has devices of several",
    }
    for one in found:
        for label, text in said.items():
            assert text in one[f"said, {label}"], label
        assert one["ended by one"] == 20
        assert one["warned"] == ["the checkpoint of step 20 in /"]


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 3])
def test_one_of_four_is_killed(tmp_path, killed):
    """The other three end with an error within a minute; three new ones continue the run."""
    with Cluster("kept", 4, tmp_path) as four:
        four.wait_for("step 100")
        four.processes[killed].kill()
        begin = time.monotonic()
        codes = [process.wait(120) for i, process in enumerate(four.processes) if i != killed]
        assert time.monotonic() - begin < 60
        assert 0 not in codes
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "kept").rename(again / "kept")
    with Cluster("kept", 3, again) as three:
        check(three.found())
    lines = three.outputs[0].read_text().splitlines()
    said = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    assert 60 <= said[0] - 20 <= 140 and said[-1] == 400, said
