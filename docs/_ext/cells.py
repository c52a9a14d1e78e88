"""The cells of a page that is not executed: its text, and its code where the tests run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Pages whose blocks of code run from top to bottom, which `tests/test_readme.py` checks. The blocks
# of other pages need names that the reader has, so they stay text.
RUNNING_PAGES = frozenset({"coming_from", "faq"})

PYTHON = re.compile(r"^```python\n(?P<code>.*?)^```$\n?", re.DOTALL | re.MULTILINE)
INCLUDE = re.compile(r"^```\{include\} (?P<path>\S+)\n(?:^:[\w-]+:.*\n)*^```$", re.MULTILINE)


def cells_of_page(path: Path, page: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the source of each cell; the text is still MyST."""
    text = INCLUDE.sub(lambda match: _read(path.parent / match["path"]), _read(path))
    end = 0
    for match in PYTHON.finditer(text) if page in RUNNING_PAGES else ():
        yield "markdown", text[end : match.start()]
        yield "code", match["code"].rstrip("\n")
        end = match.end()
    yield "markdown", text[end:]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
