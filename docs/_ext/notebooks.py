"""Each executed page as a notebook, linked from the page."""
from __future__ import annotations


def setup(app):
    return {"parallel_read_safe": True, "parallel_write_safe": True}
