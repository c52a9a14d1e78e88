"""A cache that finds the outputs of a page by its code."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jupyter_cache
import myst_nb.core.execute.cache
from jupyter_cache.cache.main import JupyterCacheBase
from nbformat import NotebookNode


class PageCache(JupyterCacheBase):
    """Outputs of pages, which the alternative text of a figure does not change.

    By default all metadata of cells are part of the key, so that a changed word in an alternative
    text would execute the page again. Tags can change what is executed, so they stay in the key.
    """

    def create_hashed_notebook(
        self,
        nb: NotebookNode,
        nb_metadata: Iterable[str] | None = ("kernelspec",),
        cell_metadata: Iterable[str] | None = ("tags",),
    ) -> tuple[NotebookNode, str]:
        """Return the notebook that is stored, and its key."""
        return super().create_hashed_notebook(nb, nb_metadata, cell_metadata)

    def merge_match_into_notebook(
        self,
        nb: NotebookNode,
        nb_meta: Iterable[str] | None = ("kernelspec", "language_info", "widgets"),
        cell_meta: Iterable[str] | None = (),
    ) -> tuple[int, NotebookNode]:
        """Return a notebook with the outputs of the cache and the metadata of the page."""
        return super().merge_match_into_notebook(nb, nb_meta, cell_meta)


get_cache = partial(jupyter_cache.get_cache, cache_cls=PageCache)
# MyST-NB has no setting for the class of its cache.
assert hasattr(myst_nb.core.execute.cache, "get_cache")
myst_nb.core.execute.cache.get_cache = get_cache
