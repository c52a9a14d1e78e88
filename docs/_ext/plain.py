"""Markdown that every notebook viewer shows, made from MyST."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping


def plain_markdown(text: str, page: str, titles: Mapping[str, str]) -> str:
    """Replace MyST's own syntax and links to other pages by Markdown that all notebooks show."""

    def title_of(target: str) -> str:
        other = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        return titles.get(other.removesuffix(".md").lstrip("/"), target)

    def linked(match: re.Match[str]) -> str:
        return match["text"] or title_of(match["target"] or page)

    def role(match: re.Match[str]) -> str:
        name, content = match["role"].rpartition(":")[2], match["content"]
        words = re.sub(r"\s*<[^>]*>$", "", content)
        if name == "math":
            return f"${content}$"
        if name == "doc" and words == content:
            return title_of(content)
        return words if name in {"doc", "ref", "term"} else f"`{words.lstrip('~!')}`"

    def directive(match: re.Match[str]) -> str:
        return f"**{match['title'] or match['kind'].capitalize()}**\n\n"

    def glossary(match: re.Match[str]) -> str:
        terms = re.sub(r"^(\S.*)$", r"**\1**\n", match["terms"], flags=re.MULTILINE)
        return re.sub(r"^    ", "", terms, flags=re.MULTILINE)

    def names(match: re.Match[str]) -> str:
        return "\n".join(f"- `{name}`" for name in re.findall(r"^   (\w+)$", match["names"], re.M))

    rules = [
        (r"^\([\w-]+\)=\n", ""),
        (r"^`{3}\{toctree\}\n(?:.*\n)*?`{3}$\n?", ""),
        (r"^`{3}\{image\}.*\n:alt: (?P<alt>.*)\n`{3}$", r"*\g<alt>*"),
        (r"^`{3}\{glossary\}\n(?P<terms>(?:.*\n)*?)`{3}$", glossary),
        (r"^`{3}\{eval-rst\}\n(?P<names>(?:.*\n)*?)`{3}$", names),
        (r"^:{3,}\{grid(?:-item)?\}.*\n(?:^:[\w-]+:.*\n)*", ""),
        (r"^:{3,}\{(?P<kind>[\w-]+)\}[ ]*(?P<title>.*)\n(?:^:[\w-]+:.*\n)*", directive),
        (r"^:{3,}[ ]*$\n?", ""),
        (r"^(`{3,})\{code-block\}[ ]*", r"\1"),
        (r"\[(?P<text>[^\]]*)\]\((?P<target>[\w/.-]*\.md)?(?:#[\w-]*)?\)", linked),
        (r"(?<!`)\{(?P<role>[\w:-]+)\}`(?P<content>[^`]+)`", role),
    ]
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text
