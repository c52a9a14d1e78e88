"""The README's code runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.promotes_ranks
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    namespace = {"__name__": "__main__"}
    with jax.enable_x64(False):
        for block in blocks:
            above = text[: block.start(1)].count("\n")  # so that errors point at the README's line
            exec(compile("\n" * above + block[1], str(README), "exec"), namespace)
