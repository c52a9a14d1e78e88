"""What importing the package does and does not do, and which module may import which."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "numpyro_ensemble"
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))

# A module may import those on the lines above its own. The folder `mcmc` stands on the lines up to
# `programs` and on itself, `gp` on those up to `draws`, for functions are mapped over draws too.
LAYERS = [
    {"handlers"},
    {"tracing"},
    {"density"},
    {"primitives"},
    {"results", "fingerprints", "batching", "optimisers"},
    {"arguments", "keywords"},
    {"programs", "setup"},
    {"training", "guides", "starts"},
    {"draws"},
    {"options", "preflight", "point_guide"},
    {"member"},
    {"fit_programs"},
    {"program_cache"},
    {"engine", "member_guides"},
    {"map", "vi"},
    {"given", "collect"},
    {"predictive"},
    {"arviz"},
    {"scoring"},
    {"plotting"},
]
FOLDERS = {"mcmc": 7, "gp": 9}  # how many of the lines

HEAVY = {  # imported by these modules alone, and only when needed
    "blackjax": {"mcmc"},
    "arviz": {"arviz", "scoring"},
    "matplotlib": {"plotting"},
}


def part(path: Path) -> str:
    """Give the module, or the folder, of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Give the full name of everything a file imports when it runs, at its top or in a function."""
    here = [PACKAGE, *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []  # names for the type checker alone
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = [*base, *filter(None, [node.module])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def allowed(name: str) -> set[str]:
    """Give the parts of the package that a part may import."""
    if name in FOLDERS:
        return set().union({name}, *LAYERS[: FOLDERS[name]])
    level = next(i for i, layer in enumerate(LAYERS) if name in layer)
    return set().union({name}, *LAYERS[:level])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    name = part(path)
    names = [module.split(".") for module in imported(path)]
    inside = {module[1] for module in names if module[0] == PACKAGE and len(module) > 1}
    if name != "__init__":
        assert name in set(FOLDERS).union(*LAYERS), f"give {name} its place in LAYERS"
        assert inside <= allowed(name)
    heavy = {module[0] for module in names} & HEAVY.keys()
    assert not [package for package in heavy if name not in HEAVY[package]]


def test_the_import_is_light():
    script = f"""
import sys, warnings
warnings.simplefilter("error")
import {PACKAGE}
import jax
assert not jax.live_arrays(), jax.live_arrays()
assert not jax.config.jax_enable_x64
heavy = {set(HEAVY)} & sys.modules.keys()
assert not heavy, heavy
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
