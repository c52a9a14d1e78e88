"""Each message that the page of errors quotes is a message of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VALUE = "\0"  # stands for a value in the text of a message


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield every string of a module, with `VALUE` in the place of formatted values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else VALUE for p in node.values)
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quotes(page: str) -> list[str]:
    """Return the messages that a page quotes, each from a block of text."""
    blocks = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [" ".join(block.split()) for block in blocks]


SOURCES = [ast.parse(p.read_text()) for p in sorted((ROOT / "numpyro_ensemble").rglob("*.py"))]
MESSAGES = "\n".join(" ".join(text.split()) for tree in SOURCES for text in texts(tree))


def is_a_message(quote: str) -> bool:
    """Return whether the sources have a message with these words; `...` stands for any values."""
    words = [re.escape(part.strip()) for part in quote.split("...")]
    return re.search(r"[^\n]*".join(words), MESSAGES) is not None


@pytest.mark.parametrize("quote", quotes((ROOT / "docs" / "faq.md").read_text()))
def test_a_quoted_message_is_in_the_package(quote: str):
    assert is_a_message(quote), quote


def test_other_words_are_no_message():
    assert is_a_message("num_warmup=0 leaves ... unadapted.")
    assert not is_a_message("num_warmup=0 makes ... unadapted.")
