"""The cache of the pages' outputs, and each page as a notebook, with outputs where it has code."""

from __future__ import annotations

import posixpath
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from cells import cells_of_page
from page_cache import get_cache
from plain import plain_markdown
from sphinx.application import Sphinx

# The header of all pages, and the full header, which has as many lines.
HEADER = "kernelspec:\n  name: python3\n---\n"
FULL_HEADER = "kernelspec:\n  {name: python3, display_name: Python 3, language: python}\n---\n"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
KEPT_CACHES = 4  # caches of earlier states of the package are kept, so that branches can be changed


def prepare_cache(app: Sphinx) -> None:
    """Make the cache before several processes read pages, and drop the oldest caches."""
    if app.config.nb_execution_mode == "cache":
        folder = Path(app.config.nb_execution_cache_path)
        assert get_cache(folder).db is not None  # created here, not by two processes at once
        folder.touch()
        by_age = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-KEPT_CACHES]:
            shutil.rmtree(old)


def name_language(app: Sphinx, page: str, source: list[str]) -> None:
    """Name the language of the code, which is otherwise known only after execution."""
    source[0] = source[0].replace(HEADER, FULL_HEADER, 1)


def link(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a page's template the address of its notebook."""
    if _has_notebook(app, page):
        context["notebook"] = posixpath.basename(page) + ".ipynb"


def write(app: Sphinx, exception: Exception | None) -> None:
    """Write the notebooks beside the pages; pages that were not executed get no outputs."""
    if exception is not None or app.builder.name != "html":
        return
    titles = {page: title.astext() for page, title in app.env.titles.items()}
    cache = get_cache(app.config.nb_execution_cache_path)
    for page in filter(lambda page: _has_notebook(app, page), app.env.found_docs):
        notebook = _executed(app, page, cache) if _has_code(app, page) else _unexecuted(app, page)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = plain_markdown(cell.source, page, titles).strip("\n")
        notebook.cells = [cell for cell in notebook.cells if cell.source]
        nbformat.write(notebook, Path(app.outdir, f"{page}.ipynb"))


def _executed(app: Sphinx, page: str, cache: Any) -> nbformat.NotebookNode:
    """Return the notebook that MyST-NB read, with the outputs of the cache where it has them."""
    source = Path(app.env.mystnb_config.output_folder, f"{page}.ipynb")
    notebook = nbformat.read(source, as_version=4)
    with suppress(KeyError):
        _, notebook = cache.merge_match_into_notebook(notebook)
    for key in ("file_format", "source_map"):
        notebook.metadata.pop(key, None)
    return notebook


def _unexecuted(app: Sphinx, page: str) -> nbformat.NotebookNode:
    """Return the notebook of a page whose code, if any, is not executed."""
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [
        # a random identifier would change the file in each build
        new[kind](source, id=f"cell-{place}")
        for place, (kind, source) in enumerate(cells_of_page(Path(app.env.doc2path(page)), page))
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def _has_notebook(app: Sphinx, page: str) -> bool:
    """Return whether a page is written by hand: those of the reference's names are generated."""
    return page in app.env.found_docs and not page.startswith("api/")


def _has_code(app: Sphinx, page: str) -> bool:
    return "kernelspec" in app.env.metadata.get(page, {})


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the hooks."""
    app.connect("builder-inited", prepare_cache)
    app.connect("source-read", name_language)
    app.connect("html-page-context", link)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
