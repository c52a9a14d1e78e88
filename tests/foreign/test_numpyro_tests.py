"""NumPyro's own tests of `SVI` and of autoguides, with an ensemble of one member in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import folder

pytestmark = pytest.mark.foreign
HERE = Path(__file__).parent


# A plate of two sizes is a ValueError that names both sites, where NumPyro has an AssertionError.
OTHERWISE = ["-k", "not test_plate_inconsistent"]


@pytest.mark.parametrize("name", ["test_svi", "test_autoguide"])
def test_they_pass_with_one_member(name):
    root = folder()
    if isinstance(root, str):
        pytest.skip(root)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "one_member", "-W", "ignore"]
    paths = os.pathsep.join(map(str, (HERE, HERE.parents[1])))
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    run = subprocess.run(
        [*command, f"infer/{name}.py", *OTHERWISE],
        cwd=root / "test",  # imports the installed NumPyro, not the checkout's
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
