"""Check the links of a built site: `python links.py FOLDER` finds links to missing targets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and the targets of its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Read one tag."""
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            # icons refer to parts of a page
            elif name in {"href", "src"} and value and tag != "use":
                self.targets.append(value)


def dead_links(site: Path) -> Iterator[tuple[str, str]]:
    """Yield the page and the target of each link to a page, file or anchor that does not exist."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            other = other / "index.html" if other.is_dir() else other
            place = unquote(parts.fragment)
            if other not in pages:
                is_there = other.exists()
            else:
                is_there = not place or place in pages[other].anchors
            if not is_there:
                yield str(path.relative_to(site)), target


def main(site: Path) -> int:
    """Print dead links; return 1 where there is one, and 0 otherwise."""
    dead = list(dead_links(site.resolve()))
    for page, target in dead:
        print(f"{page}: there is nothing at {target}", file=sys.stderr)
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
