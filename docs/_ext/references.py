"""Links from code in docstrings and from types in signatures, here and to other projects."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.typing
import numpy.typing
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autosummary.generate import find_autosummary_in_files
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

PACKAGE = "numpyro_ensemble"
NAMESPACES = ("", ".scoring", ".calibration", ".plotting", ".mcmc", ".mcmc.starts", ".gp")
SHORT = {"az": "arviz", "dist": "numpyro.distributions", "jnp": "jax.numpy", "np": "numpy"}
TYPES = {
    stringify_annotation(module.ArrayLike, "smart"): f"~{module.__name__}.ArrayLike"
    for module in (jax.typing, numpy.typing)
}


def drop_old_pages(app: Sphinx) -> None:
    """Remove the pages of names that the reference no longer lists."""
    entries = find_autosummary_in_files([str(Path(app.srcdir, "reference.md"))])
    files = app.config.autosummary_filename_map
    kept = {files.get(entry.name, entry.name) for entry in entries}
    for path in Path(app.srcdir, "api").glob("*.rst"):
        if path.stem not in kept:
            path.unlink()


class CodeRole(SphinxRole):
    """Code in single backticks, which is a link where it names a documented object."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return a reference for a name, and a code literal for everything else."""
        if re.fullmatch(r"[A-Za-z_][\w.]*\w", self.text):
            role = self.env.domains.python_domain.role("obj")
            assert role is not None
            return role("py:obj", self.rawtext, self.text, self.lineno, self.inliner, {}, [])
        return [nodes.literal(self.rawtext, self.text)], []


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Node | None:
    """Link a name that lacks its module, or that has the module of its definition."""
    if node.get("refdomain") != "py":
        return None
    head, _, rest = node["reftarget"].partition(".")
    target = f"{SHORT.get(head, head)}.{rest}" if rest else head
    here = [item for item in _documented(env) if _means(target, item[0], item[2])]
    if len(here) == 1:
        _, _, _, page, anchor, _ = here[0]
        return make_refnode(app.builder, node["refdoc"], page, anchor, contnode)
    for inventory in InventoryAdapter(env).named_inventory.values():
        for kind, items in inventory.items():
            for name, item in items.items():
                if _means(target, name, kind.removeprefix("py:")):
                    title = f"{name} ({item.project_name})"
                    return nodes.reference(
                        "", "", contnode, internal=False, refuri=item.uri, reftitle=title
                    )
    return None


def _documented(env: BuildEnvironment) -> Iterator[tuple[str, str, str, str, str, int]]:
    """Yield the objects of the reference; an object with several names comes once."""
    return (item for item in env.domains.python_domain.get_objects() if item[5] != -1)


def _means(target: str, name: str, kind: str) -> bool:
    """Return whether the name in the text means the object of this full name and kind."""
    if target == name:
        return True
    written, full = target.split("."), name.split(".")
    if written[-1] != full[-1]:
        return False
    if len(written) > 1:  # the module may be another of the same project
        return written[0] == full[0] or name.endswith(f".{target}")
    is_type = any(letter.isupper() for letter in target)
    return is_type or ("_" in target and kind == "function")


def name_public_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Replace base classes that have no page by those of their own bases that have one."""
    spaces = [importlib.import_module(PACKAGE + suffix) for suffix in NAMESPACES]

    def public(classes: Any) -> Iterator[Any]:
        for base in classes:
            is_ours = base.__module__.startswith(PACKAGE)
            if is_ours and not any(base in vars(space).values() for space in spaces):
                yield from public(base.__bases__)
            elif base is not object:
                yield base

    bases[:] = list(dict.fromkeys(public(obj.__bases__))) or [object]


def shorten(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Remove "Bases: object", and write `ArrayLike` where autodoc writes its parts."""
    for paragraph in list(content.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
    for types in app.env.current_document.autodoc_annotations.values():
        for name, text in types.items():
            for parts, short in TYPES.items():
                text = text.replace(parts, short)
            types[name] = text


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role and the hooks."""
    app.add_role("code-or-link", CodeRole())
    app.connect("builder-inited", drop_old_pages, priority=100)  # before autosummary adds pages
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-bases", name_public_bases)
    app.connect("object-description-transform", shorten, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
