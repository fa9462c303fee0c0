"""The site: its links lead somewhere, and every public name, page, example and picture is on it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fxkfac
import fxkfac.distributed
import fxkfac.graph
import fxkfac.plots

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import gallery  # noqa: E402
import links  # noqa: E402
import make_site  # noqa: E402

PAGES = make_site.pages()
MODULES = {
    "fxkfac": fxkfac,
    "fxkfac.distributed": fxkfac.distributed,
    "fxkfac.graph": fxkfac.graph,
    "fxkfac.plots": fxkfac.plots,
} | {
    f"fxkfac.{name}": getattr(fxkfac, name)
    for name in fxkfac.__all__
    if inspect.ismodule(getattr(fxkfac, name))
}


def names_of(module: ModuleType) -> list[str]:
    """What a module says is public; without `__all__`, what it defines."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


# By identity: what two modules have is that of the later one, as errors are.
PUBLIC = list(
    {
        id(getattr(module, name)): f"{path}.{name}"
        for path, module in MODULES.items()
        for name in names_of(module)
    }.values()
)


def callables() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, and their public methods."""
    for name in PUBLIC:
        what = make_site.found(name)
        if callable(what):
            yield name, what
        if inspect.isclass(what) and not issubclass(what, Exception):
            for method, value in vars(what).items():
                if inspect.isfunction(value) and not method.startswith("_"):
                    yield f"{name}.{method}", value


CALLABLES = dict(callables())


# --- links ---


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_lines_and_headings(page: str) -> None:
    for link in links.links_of(PAGES[page], page):
        assert link.line is None or link.line > 0
        target = links.in_site(link)
        if link.anchor:
            headings = re.findall(r"^#+ (.*)$", PAGES[target], flags=re.M)
            assert link.anchor in [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings
            ]
        if link.is_picture:
            assert link.text, f"{page}: {link.target} has no alternative text"


def test_every_equation_is_linked_to_the_line_that_computes_it() -> None:
    text = PAGES["mathematics.md"]
    blocks = re.findall(r"\n\n((?:    .*\n)+)\n(.*)", text)
    assert len(blocks) >= 6
    for equation, after in blocks:
        assert re.search(r'\.py "[^"]+"\)', after), equation
    for row in re.findall(r"^\| `(?:\w+Loss|[a-z0-9-]+)` \| .*$", text, flags=re.M):
        assert '.py "' in row, row


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("gramm: x", "0 of 'gramm'"),
        ("Gram.matrix: no such text", "0 lines of"),
        ("Gram.matrix: self", "lines of"),
        ("Gram.matrix", "lines of"),
    ],
)
def test_a_reference_to_no_line_is_an_error(title: str, found: str) -> None:
    with pytest.raises(links.BrokenLink, match=found):
        links.line_of("fxkfac/linalg/gram.py", title)


def test_a_reference_is_the_line_wherever_it_moves(monkeypatch, tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n\n\nclass C:\n    def f(self):\n        return x\n")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert links.line_of("a.py", "C.f: return x") == 6
    link = '[what](../a.py "C.f: return x") and [all](../a.py)'
    assert links.for_site(link, "tour.md") == (
        '<a class="code" href="source/a.py.html#line-6">what</a> and [all](source/a.py.md)'
    )
    assert links.for_site(f"```python\n{link}\n```", "tour.md") == f"```python\n{link}\n```"
    with pytest.raises(links.BrokenLink, match=r"there is no b\.py"):
        links.for_site("[what](../b.py)", "tour.md")


# --- what is on the site ---


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    api = [text for page, text in PAGES.items() if page.startswith("api/")]
    on_pages = [name for text in api for name in make_site.DIRECTIVE.findall(text)]
    missing = sorted(set(PUBLIC) - set(on_pages))
    assert not missing, f"write `::: name` for {missing} on a page in docs/api"
    assert sorted(on_pages) == sorted(PUBLIC)


def test_every_page_is_in_the_navigation() -> None:
    names = {page.removesuffix(".md") for page in PAGES} - {"index"}
    listed = [line for line in make_site.navigation(names).splitlines() if line in names]
    assert sorted(listed) == sorted(names)
    assert set().union(*make_site.NAVIGATION.values()) <= names


def test_every_example_and_picture_is_in_the_gallery() -> None:
    text = gallery.gallery_page()
    for example in gallery.examples():
        assert f"(../{example.relative_to(ROOT)})" in text
    shown = gallery.alternative_texts()
    assert {path.name for path in gallery.PICTURES.iterdir()} == set(shown)


# --- docstrings ---


def sections(docstring: str) -> dict[str, list[str]]:
    """The names in every section of a docstring: of arguments, of errors."""
    found: dict[str, list[str]] = {}
    for title, body in re.findall(r"^(Args|Raises):\n((?:    .*\n|\n)*)", f"{docstring}\n", re.M):
        entries = re.findall(r"^    (\S[^:\n]*):", body, flags=re.M)
        found[title] = [name.strip(" *") for entry in entries for name in entry.split(",")]
    return found


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_name_the_arguments_and_errors_that_there_are(name: str) -> None:
    what = CALLABLES[name]
    docstring = inspect.getdoc(what)
    assert docstring
    said = sections(docstring)
    if "Args" in said:
        parameters = inspect.signature(what).parameters
        assert sorted(said["Args"]) == sorted(p for p in parameters if p != "self")
    for error in said.get("Raises", []):
        assert hasattr(fxkfac.errors, error) or error in ("Exception", "ValueError")
