"""Which pages a build executes, and which results of earlier builds it reuses."""

from __future__ import annotations

import ast
import glob
import hashlib
import zlib
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

TURNS = 4


def turn_of(page: str) -> int:
    """Return the turn, 0 to 3, that executes a page; it depends on the page's path in `docs`."""
    return zlib.crc32(page.encode()) % TURNS


def pages_left_out(docs: Path, turn: str | None) -> list[str]:
    """Return patterns of the pages that are rendered without execution; none where turn is None."""
    if turn is None or turn == "":
        return []
    if turn not in map(str, range(TURNS)):
        raise ValueError(f"DOCS_TURN={turn}: it is a number from 0 to {TURNS - 1}.")
    pages = sorted(path for path in docs.rglob("*.md") if not _is_hidden(path.relative_to(docs)))
    return [
        glob.escape(path.as_posix())  # the whole path: a name alone would match in every folder
        for path in pages
        if turn_of(path.relative_to(docs).as_posix()) != int(turn)
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith("_") for part in path.parts)


def fingerprint(sources: Iterable[Path]) -> str:
    """Return a hash of what pages run: Python files, and the versions of all installed packages.

    Comments, docstrings and layout do not count.
    """
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.name}\n{_code(path)}\n".encode())
    versions = sorted({f"{item.name} {item.version}" for item in distributions()})
    digest.update("\n".join(versions).encode())
    return digest.hexdigest()[:16]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)
