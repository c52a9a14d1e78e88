"""Configuration of the documentation: code is executed, and nothing may warn."""

from collections import _tuplegetter
from importlib.metadata import version as installed

project = "numpyro_ensemble"
author = "The numpyro_ensemble developers"
copyright = author
version = release = installed(project)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # docstrings write code in single backticks
napoleon_use_ivar = True


def setup(app):
    """Leave out the fields of named tuples one by one: the class's docstring describes them."""
    app.connect("autodoc-skip-member", lambda *event: isinstance(event[3], _tuplegetter) or None)
