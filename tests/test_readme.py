"""The code blocks of pages run in order, as a reader would run them."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        pytest.param("docs/coming_from.md", marks=pytest.mark.long),
        pytest.param("docs/faq.md", marks=pytest.mark.long),
    ],
)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    namespace = {"__name__": "__main__"}
    with jax.enable_x64(False):
        for block in blocks:
            above = text[: block.start(1)].count("\n")  # so that errors point at the page's line
            exec(compile("\n" * above + block[1], page, "exec"), namespace)
