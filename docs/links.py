"""Links of a page -> where they lead: to a page, or to a line of code that is found by its name.

A link to a file of code may have a title that names a line of it:

    [R Σ x̃ x̃ᵀ](../fxkfac/curvature/accumulated.py "Accumulated.factors: .matrix(R)")

It stands for the one line of that function that holds the text. So it stays right while lines
move, and is an error once there is no such line.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = "source"  # where the pages of code are, one for each file that a page links to
# Files beside docs/ that are pages of the site, and what the pages are called there.
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "examples/paper/README.md": "paper.md",
}

FENCED = re.compile(r"^(```.*?^```)", flags=re.S | re.M)
LINK = re.compile(r'(!?)\[([^\]\[]*)\]\(([^)\s"]+)(?: "([^"]*)")?\)')


class BrokenLink(Exception):
    """A link leads nowhere."""


@dataclass(frozen=True)
class Link:
    """A link to something in this repository.

    Attributes:
        text: What is shown.
        target: The file, from the root of the repository.
        anchor: What follows `#`, or nothing.
        title: What names a line: `function: text`, or nothing.
        is_picture: Whether it is shown in its place.
    """

    text: str
    target: str
    anchor: str
    title: str
    is_picture: bool

    @property
    def line(self) -> int | None:
        """The line of code that it stands for; `None` for the whole file."""
        if not self.title or self.is_picture:
            return None
        return line_of(self.target, self.title)


def line_of(target: str, title: str) -> int:
    """The number of the one line of a function, method or class that holds a text.

    Args:
        target: The file, from the root of the repository.
        title: `name: text`, such as `Moment.matrix: c.outer(c)`.

    Raises:
        BrokenLink: There is no such name in the file, or not exactly one such line.
    """
    name, _, text = title.partition(": ")
    source = (ROOT / target).read_text()
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        inside = [n for n in getattr(node, "body", []) if getattr(n, "name", None) == part]
        if len(inside) != 1:
            raise BrokenLink(f"{target} has {len(inside)} of {name!r}; expected one.")
        node = inside[0]
    assert isinstance(node, ast.stmt)
    lines = source.splitlines()
    span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    found = [number for number in span if text in lines[number - 1]]
    if not text or len(found) != 1:
        raise BrokenLink(
            f"{target}: {len(found)} lines of {name!r} hold {text!r}; expected one. Name another "
            "part of the line that is meant."
        )
    return found[0]


def folder_of(page: str) -> str:
    """The folder that a page's links start from, from the root; pages are as in the site."""
    files = {made: file for file, made in ROOT_PAGES.items()}
    return posixpath.dirname(files.get(page, f"docs/{page}"))


def links_of(markdown: str, page: str) -> Iterator[Link]:
    """The links of a page to files of this repository, but for those inside code blocks."""
    for match in LINK.finditer(FENCED.sub("", markdown)):
        if (link := link_of(match, page)) is not None:
            yield link


def link_of(match: re.Match[str], page: str) -> Link | None:
    """What was matched as a link to a file; `None` where it leads out of the repository."""
    picture, text, target, title = match.groups()
    path, _, anchor = target.partition("#")
    if not path or "://" in path:
        return None
    file = posixpath.normpath(posixpath.join(folder_of(page), path))
    if not (ROOT / file).exists():
        raise BrokenLink(f"{page}: there is no {file}, to which {text!r} leads.")
    return Link(text, file, anchor, title or "", bool(picture))


def in_site(link: Link) -> str:
    """The page or picture of the site that a link leads to, from the root of the site."""
    if link.target in ROOT_PAGES:
        return ROOT_PAGES[link.target]
    if link.target.startswith("docs/") and not link.target.endswith(".py"):
        return link.target.removeprefix("docs/")
    return f"{SOURCES}/{link.target}.md"


def for_site(markdown: str, page: str) -> str:
    """A page of the repository as one of the site, with links that hold there.

    A link to a line is written out, since Sphinx knows nothing of the anchors of lines.
    """

    def moved(match: re.Match[str]) -> str:
        link = link_of(match, page)
        if link is None:
            return match[0]
        path = posixpath.relpath(in_site(link), posixpath.dirname(page) or ".")
        if link.line is not None:
            href = f"{path.removesuffix('.md')}.html#line-{link.line}"
            return f'<a class="code" href="{href}">{link.text}</a>'
        anchor = f"#{link.anchor}" if link.anchor else ""
        return f"{'!' * link.is_picture}[{link.text}]({path}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(p if p.startswith("```") else LINK.sub(moved, p) for p in parts)
