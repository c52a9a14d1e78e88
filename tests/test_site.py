"""The documentation's machinery: turns, the cache, the reference, links, notebooks and figures."""

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


turns, links = extension("turns"), extension("links")
plain, cells = extension("plain"), extension("cells")


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


GLOSSARY = "**member**\n\nA fit.\n\n**key**\n\nA\nkey.\n"


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
        ("```{toctree}\n:hidden:\n\nfirst\n```\nText.", "Text."),
        ("```{image} a.png\n:alt: A line.\n```", "*A line.*"),
        ("```{glossary}\nmember\n    A fit.\n\nkey\n    A\n    key.\n```", GLOSSARY),
        ("```{eval-rst}\n.. autosummary::\n   :nosignatures:\n\n   f\n   g\n```", "- `f`\n- `g`"),
        ("::::{grid} 1 2\n:gutter: 3\n:::{grid-item}\nText.\n:::\n::::\n", "Text.\n"),
    ],
)
def test_notebooks_say_what_pages_say(text: str, expected: str):
    assert plain.plain_markdown(text, "tutorials/first", {"modes": "Modes"}) == expected


def is_executed(page: str) -> bool:
    return (DOCS / page).read_text().startswith("---\nfile_format: mystnb\n")


PAGES = sorted(
    path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts
)


@pytest.mark.parametrize("page", [page for page in PAGES if not is_executed(page)])
def test_pages_that_are_not_executed_have_notebooks(page: str):
    titles = {name.removesuffix(".md"): "Title" for name in PAGES}
    kinds, sources = zip(*cells.cells_of_page(DOCS / page, page.removesuffix(".md")), strict=True)
    assert ("code" in kinds) == (page.removesuffix(".md") in cells.RUNNING_PAGES)
    text = "\n".join(
        plain.plain_markdown(source, page.removesuffix(".md"), titles)
        for kind, source in zip(kinds, sources, strict=True)
        if kind == "markdown"
    )
    assert text.startswith("# ")
    assert not re.search(r"^(:{3,}|`{3,}\{)", text, re.MULTILINE)  # syntax of MyST
    for kind, source in zip(kinds, sources, strict=True):
        if kind == "code":
            compile(source, page, "exec")


def test_notebooks_have_code_where_the_tests_run_it():
    tested = (Path(__file__).parent / "test_readme.py").read_text()
    assert set(re.findall(r"docs/(\w+)\.md", tested)) == cells.RUNNING_PAGES


# Their figures have no alternative text yet.
FIGURE = re.compile(r"\bplt\.(figure|subplots)\(|\b(az|plotting)\.plot_\w+\(")
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [*filter(is_executed, PAGES)])
def test_figures_have_an_alternative_text(page: str):
    for cell in filter(FIGURE.search, CELL.findall((DOCS / page).read_text())):
        text = re.match(
            r"---\n(?:tags:.*\n)?mystnb:\n  image:\n    alt: >-\n((?: {6}.+\n)+)---\n", cell
        )
        assert text is not None, cell
        assert text[1].endswith(".\n")


def test_a_new_alternative_text_does_not_execute_a_page(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat")
    for module in ("jupyter_cache", "myst_nb"):
        pytest.importorskip(module)
    cache = extension("page_cache").PageCache(str(tmp_path))

    def notebook(code: str, text: str, tags: tuple[str, ...] = ()) -> object:
        metadata = {"mystnb": {"image": {"alt": text}}, "tags": list(tags)}
        cell = nbformat.v4.new_code_cell(code, metadata=metadata)
        return nbformat.v4.new_notebook(cells=[cell])

    def key(*arguments: object) -> str:
        return cache.create_hashed_notebook(notebook(*arguments))[1]

    assert key("plot()", "A line.") == key("plot()", "A straight line.")
    assert key("plot()", "A line.") != key("plot(x)", "A line.")
    assert key("plot()", "A line.") != key("plot()", "A line.", ("skip-execution",))
