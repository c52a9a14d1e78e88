"""The documentation's machinery: turns, the cache's key, the reference, links and notebooks."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = "numpyro_ensemble"


def extension(name: str) -> SimpleNamespace:
    return SimpleNamespace(**run_path(str(DOCS / "_ext" / f"{name}.py")))


turns, links, plain = extension("turns"), extension("links"), extension("plain")


def test_each_page_is_executed_in_one_turn():
    pages = {str(path) for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    left_out = Counter(page for turn in "0123" for page in turns.pages_left_out(DOCS, turn))
    assert set(left_out) == pages
    assert set(left_out.values()) == {3}
    assert turns.pages_left_out(DOCS, None) == turns.pages_left_out(DOCS, "") == []


@pytest.mark.parametrize("turn", ["4", "-1", "two"])
def test_a_turn_that_is_not_there(turn: str):
    with pytest.raises(ValueError, match=f"DOCS_TURN={turn}: it is a number from 0 to 3"):
        turns.pages_left_out(DOCS, turn)


def test_a_turn_depends_on_a_page_alone(tmp_path: Path):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "_build").mkdir()
    for name in ("start.md", "gallery/start.md", "_build/start.md"):
        (tmp_path / name).touch()
    for turn in range(turns.TURNS):
        expected = [
            str(tmp_path / name)
            for name in ("gallery/start.md", "start.md")
            if turns.turn_of(name) != turn
        ]
        assert turns.pages_left_out(tmp_path, str(turn)) == expected


def test_what_makes_pages_run_again(tmp_path: Path):
    def key(text: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(text)
        return turns.fingerprint([path])

    code = key('def f(x):\n    """Double."""\n    return 2 * x\n')
    assert key('"""Of a module."""\n\n\ndef f(x):\n    return (2 * x)  # twice\n') == code
    assert key("def f(x):\n    return 3 * x\n") != code
    assert key("def f(x):\n    return '2 * x'\n") != code


def public_names() -> list[str]:
    names = []
    for suffix in ("", ".scoring", ".calibration", ".mcmc", ".mcmc.starts", ".gp", ".gp.kernels"):
        module = importlib.import_module(PACKAGE + suffix)
        names += [
            f"{PACKAGE}{suffix}.{name}"
            for name in module.__all__
            if not inspect.ismodule(getattr(module, name))
        ]
    plotting = importlib.import_module(f"{PACKAGE}.plotting")
    functions = inspect.getmembers(plotting, inspect.isfunction)
    names += [f"{PACKAGE}.plotting.{name}" for name, _ in functions if name.startswith("plot_")]
    return names


def test_the_reference_has_each_public_name_once():
    listed, module = [], ""
    for line in (DOCS / "reference.md").read_text().splitlines():
        if match := re.match(r"\.\. currentmodule:: (\S+)$", line):
            module = match[1]
        elif match := re.match(r"   (\w+)$", line):
            listed.append(f"{module}.{match[1]}")
    assert len(listed) == len(set(listed))
    names = set(public_names())
    # the reference lists kernels under `gp`
    twice = {name for name in names if name.replace(".kernels", "") in names - {name}}
    kernels = {name for name in twice if ".kernels." in name}
    assert set(listed) == names - kernels


@pytest.mark.parametrize("name", public_names())
def test_each_page_of_the_reference_has_an_example(name: str):
    """A record that a function returns may name, instead, the function whose example makes one."""
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own)
    text = inspect.getdoc(found) or ""
    if ">>> " not in text:
        maker = re.search(r"The example of `([\w.]+)` makes one\.", text)
        assert maker is not None
        place, _, function = f"{PACKAGE}.{maker[1]}".rpartition(".")
        text = inspect.getdoc(getattr(importlib.import_module(place), function)) or ""
    assert ">>> " in text


@pytest.mark.parametrize("path", sorted((DOCS / "inventories").iterdir()), ids=lambda p: p.stem)
def test_inventories_are_read_by_sphinx(path: Path):
    header, project, version, *lines = path.read_text().splitlines()
    assert header == "# Sphinx inventory version 1"
    assert project.startswith("# Project: ") and version == "# Version:"
    names = []
    for line in lines:
        name, kind, page = line.split(" ")
        assert kind in {"attribute", "class", "data", "exception", "function", "method"}
        assert page.endswith((".html", "/"))
        names.append(name)
    assert names == sorted(set(names))


def test_links_to_nothing_are_found(tmp_path: Path):
    (tmp_path / "api").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="api/f.html#f">f</a><a href="api/f.html#g">g</a><a href="https://x.org/y">x</a>'
        '<img src="plot.png"><a href="#here">here</a><p id="here"></p><a href="gone.html">gone</a>'
    )
    (tmp_path / "api" / "f.html").write_text('<dt id="f"></dt><a href="../index.html#there">up</a>')
    assert list(links.dead_links(tmp_path)) == [
        ("api/f.html", "../index.html#there"),
        ("index.html", "api/f.html#g"),
        ("index.html", "plot.png"),
        ("index.html", "gone.html"),
    ]
    assert links.main(tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(a-place)=\n## Title", "## Title"),
        ("See [](../modes.md) and [here](modes.md#x).", "See Modes and here."),
        (
            "[`Pathfinder`](../modes.md), [site](https://x.org)",
            "`Pathfinder`, [site](https://x.org)",
        ),
        ("[above](#a-place) `x[0](y)`", "above `x[0](y)`"),
        (":::{note}\nCareful.\n:::\n", "**Note**\n\nCareful.\n"),
        ("::::{tip} First\n:class: x\nText.\n::::", "**First**\n\nText.\n"),
        ("```{code-block} python\nx\n```", "```python\nx\n```"),
        ("{math}`x^2`, {py:class}`~a.B`, {doc}`/modes`", "$x^2$, `a.B`, Modes"),
        ("{term}`chains <chain>`, {py:func}`f <a.f>`", "chains, `f`"),
    ],
)
def test_notebooks_say_what_pages_say(text: str, expected: str):
    assert plain.plain_markdown(text, "tutorials/first", {"modes": "Modes"}) == expected
