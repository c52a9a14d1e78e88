"""NumPyro's own examples, imported from a checkout that the user names.

`NUMPYRO_CHECKOUT` is the checkout's folder. Its version must be that of the installed NumPyro, or
the one in `NUMPYRO_CHECKOUT_VERSION`, so that a stale checkout is noticed.
"""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path

import jax
import numpyro


def folder() -> Path | str:
    """Return the checkout's folder, or the reason why there is none."""
    named = os.environ.get("NUMPYRO_CHECKOUT")
    if not named:
        return "NUMPYRO_CHECKOUT names no checkout of NumPyro"
    path = Path(named)
    version_file = path / "numpyro" / "version.py"
    if not (path / "examples").is_dir() or not version_file.is_file():
        return f"NUMPYRO_CHECKOUT={named} is no checkout of NumPyro"
    found = re.search(r'__version__ = "([^"]+)"', version_file.read_text())
    version = found.group(1) if found else "unknown"
    wanted = os.environ.get("NUMPYRO_CHECKOUT_VERSION", numpyro.__version__)
    if version != wanted:
        return (
            f"the checkout is of NumPyro {version}, not {wanted}: check out the tag {wanted}, or "
            f"accept it with NUMPYRO_CHECKOUT_VERSION={version}"
        )
    return path


@functools.cache
def example(name: str):
    """Import `examples/{name}.py` of the checkout; settings that it changes are put back."""
    root = folder()
    if isinstance(root, str):
        raise FileNotFoundError(root)
    os.environ.setdefault("MPLBACKEND", "Agg")
    alias = "numpyro_example_" + re.sub(r"\W", "_", name)
    spec = importlib.util.spec_from_file_location(alias, root / "examples" / f"{name}.py")
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    precision = jax.config.jax_enable_x64
    try:
        spec.loader.exec_module(module)
    finally:
        jax.config.update("jax_enable_x64", precision)
    return module
