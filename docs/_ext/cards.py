"""Cards in the text builder, as a title and a sentence."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def simplify(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Keep the title and the text of each card, with a blank line between them.

    Pictures and links of cards have no text of their own, and run into the next card's title.
    """
    if app.builder.format != "text":
        return
    for part in list(doctree.findall(nodes.Element)):
        component = part.get("design_component")
        if component == "card":
            for child in [child for child in part if child.get("design_component") != "card-body"]:
                part.remove(child)
        elif component == "card-title":
            part.replace_self(nodes.paragraph("", "", nodes.strong("", part.astext())))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the hook."""
    app.connect("doctree-resolved", simplify)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
