"""A user's file passes `mypy --strict`, and public signatures are fully annotated."""

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import numpyro_ensemble

HERE = Path(__file__).parent
PACKAGE = Path(numpyro_ensemble.__file__).parent
MODULES = ["numpyro_ensemble"] + [
    f"numpyro_ensemble.{name}"
    for name in ("calibration", "checkpoint", "gp", "mcmc", "mcmc.starts", "plotting", "scoring")
]


def strictly(path: Path, cache: Path) -> str:
    """Check a file as for a user who has the package installed, and return mypy's output."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--config-file=", "--cache-dir", str(cache), str(path)]
    here = {} if "site-packages" in PACKAGE.parts else {"MYPYPATH": str(PACKAGE.parent)}
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | here)
    return found.stdout + found.stderr


@pytest.mark.long
def test_a_users_file_is_strictly_typed(tmp_path):
    told = strictly(HERE / "typed_user.py", tmp_path)
    assert told.startswith("Success"), told
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import jax\n"
        "from numpyro_ensemble import EnsembleMAP\n\n\n"
        "def fit(runner: EnsembleMAP) -> int:\n"
        "    return runner.run(jax.random.key(0), '100', progress_bar=False)\n"
    )
    told = strictly(wrong, tmp_path)
    assert 'expected "int"' in told and 'got "EnsembleResult"' in told


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def functions_of(module: str) -> Iterator[tuple[str, Any]]:
    """Yield public functions and methods, and the constructors of classes, with their names."""
    public = importlib.import_module(module)
    for name in getattr(public, "__all__", dir(public)):
        value = getattr(public, name)
        if name.startswith("_") or not getattr(value, "__module__", "").startswith(PACKAGE.name):
            continue
        if inspect.isfunction(value):
            yield f"{module}.{name}", value
        members = vars(value).items() if inspect.isclass(value) else ()
        for member, method in members:
            method = getattr(method, "__func__", getattr(method, "fget", method))
            ours = getattr(method, "__module__", "") == value.__module__
            if inspect.isfunction(method) and ours and not member.startswith("_"):
                yield f"{module}.{name}.{member}", method


@pytest.mark.parametrize("module", MODULES)
def test_public_signatures_are_whole(module):
    bare = []
    for name, fn in functions_of(module):
        signature = inspect.signature(fn)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        if signature.return_annotation is inspect.Signature.empty:
            bare.append(f"{name}: what it returns")
        bare += [f"{name}: {p.name}" for p in parameters if p.annotation is p.empty]
    assert not bare


@pytest.mark.parametrize(
    ("name", "returned"),
    [("run", "EnsembleResult"), ("init", "SVIState"), ("evaluate", "jax.Array")],
)
def test_methods_that_check_keywords_keep_their_signatures(name, returned):
    method = getattr(numpyro_ensemble.EnsembleMAP, name)
    assert inspect.signature(method).return_annotation == returned
