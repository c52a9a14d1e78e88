"""Configuration of the documentation: code is executed, and nothing may warn."""

import os
import sys
from collections import _tuplegetter
from importlib.metadata import version as installed
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS / "_ext"))

import turns  # noqa: E402

project = "numpyro_ensemble"
author = "The numpyro_ensemble developers"
copyright = author
version = release = installed(project)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "cards",
    "notebooks",
    "references",
]
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build", "_ext", "_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]

# A page is executed again when its code, the package's code or an installed version changes.
nb_execution_mode = "cache"
sources = sorted([*ROOT.glob("numpyro_ensemble/**/*.py"), *ROOT.glob("examples/*.py")])
nb_execution_cache_path = str(ROOT / ".cache" / "jupyter" / turns.fingerprint(sources))
nb_execution_excludepatterns = turns.pages_left_out(DOCS, os.environ.get("DOCS_TURN"))
nb_execution_raise_on_error = nb_execution_show_tb = True
nb_execution_timeout = 600
# NumPyro's progress bars warn that IPython's widgets are missing; pages do not need them.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code-or-link"  # docstrings write code in single backticks
napoleon_use_ivar = True

hidden_members = {
    # of runners, handlers and results: members that the engine calls
    *("check", "check_model", "check_run", "check_size", "checked_setting", "distilled_guide"),
    *("fresh_guide", "in_function_space", "is_off", "kind", "member_params", "mixes_gradients"),
    *("outputs", "places", "process_message", "program", "tree_flatten", "tree_unflatten"),
    *("use", "weight_at", "weighted_model"),
    # of processes and kernels
    *("arg_constraints", "support", "pytree_data_fields", "pytree_aux_fields", "is_spectral"),
    *("mapped", "at_once", "inputs"),
}
# names that differ from `Modes` and `Khat` in case only, which some file systems ignore
autosummary_filename_map = {
    "numpyro_ensemble.modes": "numpyro_ensemble.modes-function",
    "numpyro_ensemble.scoring.khat": "numpyro_ensemble.scoring.khat-function",
}
autosummary_context = {"hidden_members": sorted(hidden_members)}

# Inventories of the few names that pages link to are in the repository: no build needs a network.
addresses = {
    "arviz": "https://python.arviz.org/en/v0.23.0/",
    "blackjax": "https://blackjax-devs.github.io/blackjax/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "numpyro": "https://num.pyro.ai/en/stable/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "optimistix": "https://docs.kidger.site/optimistix/",
    "python": "https://docs.python.org/3/",
    "xarray": "https://docs.xarray.dev/en/stable/",
}
intersphinx_mapping = {
    name: (address, f"inventories/{name}.inv") for name, address in addresses.items()
}


def setup(app):
    """Hide the single fields of named tuples: the class's docstring describes them."""
    app.connect("autodoc-skip-member", lambda *event: isinstance(event[3], _tuplegetter) or None)
