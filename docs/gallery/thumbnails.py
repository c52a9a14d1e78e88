"""Run pages of the gallery and keep the last figure of each as a small picture for its card.

`python docs/gallery/thumbnails.py mixture horseshoe` runs the code cells of `mixture.md` and
`horseshoe.md` and writes `thumbnails/mixture.png` and `thumbnails/horseshoe.png`.
"""

import argparse
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # has to come before the pages import pyplot

import matplotlib.pyplot as plt
from PIL import Image

GALLERY = Path(__file__).parent
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Tags and alternative texts at the top of a cell are for Sphinx.
OPTIONS = re.compile(r"\A---\n(?:.*\n)*?---\n|^:\w+:.*\n", re.MULTILINE)
WIDTH, HEIGHT = 320, 200  # pixels of a thumbnail
INCHES = 4.8, 3.0  # narrower than figures of the pages, so that text stays readable
COLOURS = 64, 32, 16, 8  # the first palette that makes the file small enough is used
MAX_BYTES = 15_000


def last_figure(page: Path) -> plt.Figure:
    """Run the code cells of a page in order and return the figure that was made last."""
    plt.close("all")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CELL.findall(page.read_text(encoding="utf-8")), 1):
        exec(compile(OPTIONS.sub("", cell), f"{page.name}, cell {number}", "exec"), names)
    if not plt.get_fignums():
        raise SystemExit(f"{page} makes no figure: a card of the gallery needs one.")
    return plt.figure(plt.get_fignums()[-1])


def thumbnail(figure: plt.Figure) -> bytes:
    """Return a figure as a PNG of WIDTH x HEIGHT pixels with a palette of a few colours."""
    figure.set_size_inches(INCHES)
    figure.set_layout_engine("constrained")
    large = io.BytesIO()
    figure.savefig(large, dpi=2 * WIDTH / INCHES[0], facecolor="white")
    picture = Image.open(large).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    for colours in COLOURS:
        small = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        if small.tell() <= MAX_BYTES:
            return small.getvalue()
    raise SystemExit(f"a thumbnail of {small.tell()} bytes, more than {MAX_BYTES}: draw less.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", metavar="PAGE", help="the name of a page, without .md")
    for name in parser.parse_args().pages:
        name = Path(name).stem
        png = thumbnail(last_figure(GALLERY / f"{name}.md"))
        target = GALLERY / "thumbnails" / f"{name}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(png)
        print(f"{target}: {len(png)} bytes")


if __name__ == "__main__":
    main()
