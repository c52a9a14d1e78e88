"""Effects of importing the package, and the imports that each module may have."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "numpyro_ensemble"
ROOT = Path(importlib.util.find_spec(PACKAGE).origin).parent  # found without importing the package
FILES = sorted(ROOT.rglob("*.py"))

# A module may import those on the lines above its own. The folders `mcmc` and `gp` may import the
# lines up to `streaming` and themselves; neither may import the other.
LAYERS = [
    {"handlers", "_compat"},
    {"calls.tracing", "enumeration"},
    {"density"},
    {"primitives"},
    {"calls.arrays", "calls.marks", "fit.minimisers"},
    {"calls.opening"},
    {"calls.identity"},
    {"calls.arguments", "calls.keywords"},
    {"calls.executables", "hosts"},
    {"sharding"},
    {"calls.programs", "fit.state"},
    {"storage"},
    {"checkpoint", "interrupts", "results"},
    {"mapping"},
    {"streaming"},
    {"pathfinder"},
    {"fit.line_searches"},
    {"fit.batches", "fit.optimisers", "fit.repulsion", "fit.starts", "fit.stopping", "fit.sums"},
    {"fit.setup", "fit.loop", "fit.forces"},
    {"fit.guides", "fit.options"},
    {"fit.slots"},
    {"fit.problem", "fit.point_guide", "fit.draws"},
    {"fit.checks", "fit.member", "fit.member_guides", "fit.noise"},
    {"fit.programs"},
    {"fit.call"},
    {"fit.cache", "fit.curvature", "fit.resuming"},
    {"fit.run"},
    {"fit.ensemble"},
    {"map", "vi", "predict.chains"},
    {"predict.checks", "predict.given", "predict.collect", "predict.program"},
    {"predict.assembly", "predict.blocks", "predict.densities"},
    {"predict.density_blocks", "predict.stored"},
    {"predict.predictive", "predict.streamed"},
    {"predict.arviz"},
    {"calibration"},
    {"scoring"},
    {"laplace_modes"},
    {"plotting"},
]
# folders that are one layer as a whole
WHOLE = {"calibration", "gp", "mcmc", "scoring", "streaming"}
SIDES = {"mcmc", "gp"}
ON_SIDES = {"pathfinder": {"mcmc"}}  # modules that may also import a folder

HEAVY = {  # only these modules import them, and only when needed
    "blackjax": {"mcmc"},
    "optimistix": {"fit.minimisers", "gp"},
    "equinox": {"fit.minimisers"},
    "arviz": {"predict.assembly", "scoring"},
    "matplotlib": {"plotting"},
    "orbax": {"checkpoint"},
    "zarr": {"streaming"},
}


def part(names: tuple[str, ...]) -> str:
    """Return the module of a path within the package, or the folder where it is one layer."""
    return names[0] if names[0] in WHOLE else ".".join(names[:2])


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of everything a file imports, also for the type checker alone."""
    here = [PACKAGE, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            is_folder = (ROOT.parent / module.replace(".", "/")).is_dir()
            yield from (f"{module}.{a.name}" if is_folder else module for a in node.names)


def allowed(name: str) -> set[str]:
    """Return the parts of the package that a part may import."""
    if name in SIDES:
        below = next(i for i, layer in enumerate(LAYERS) if "streaming" in layer) + 1
    else:
        below = next(i for i, layer in enumerate(LAYERS) if name in layer)
    return set().union({name}, ON_SIDES.get(name, ()), *LAYERS[:below])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    name = part(path.relative_to(ROOT).with_suffix("").parts)
    names = [tuple(module.split(".")) for module in imported(path)]
    if path.name != "__init__.py" or name in WHOLE:
        assert name in SIDES.union(*LAYERS), f"give {name} its place in LAYERS"
        inside = {part(module[1:]) for module in names if module[0] == PACKAGE and module[1:]}
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
