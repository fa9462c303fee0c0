"""The gallery: every example, what it says of itself, and the pictures that it makes.

Run by itself it names the examples that make pictures, which `make gallery` runs again.

An example is a file in examples/ that begins with a docstring. A picture is an example's where its
name is in the example's text, and its alternative text is that of the page that shows it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from links import LINK, ROOT

PICTURES = ROOT / "docs" / "pictures"
INTRODUCTION = """# Gallery

What the examples make, on real data, most in about a minute or less on two cores, training in
several. `make gallery` runs those with pictures again.
"""


def examples() -> list[Path]:
    """The examples, by name; those of a folder have a page of their own."""
    return sorted((ROOT / "examples").glob("*.py"))


def says(example: Path) -> tuple[str, str]:
    """The title of an example, and what it says of itself after that."""
    title, _, rest = (ast.get_docstring(ast.parse(example.read_text())) or "").partition("\n\n")
    return title.replace("\n", " ").rstrip("."), rest


def alternative_texts() -> dict[str, str]:
    """For every picture that a page shows, what it shows."""
    found: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for picture, text, target, _ in LINK.findall(page.read_text()):
            if picture and "pictures/" in target:
                found.setdefault(Path(target).name, text)
    return found


def pictures_of(example: Path) -> list[str]:
    """Names of the pictures that an example makes, as it names them one after the other."""
    text = example.read_text()
    names = [path.name for path in PICTURES.iterdir()]
    at = {name: re.search(rf"\b{re.escape(name)}\b", text) for name in names}
    return [name for _, name in sorted((m.start(), name) for name, m in at.items() if m)]


def entry(example: Path, shown: dict[str, str]) -> str:
    """An example's part of the gallery."""
    path = example.relative_to(ROOT)
    title, rest = says(example)
    pictures = [f"![{shown[name]}](pictures/{name})" for name in pictures_of(example)]
    return "\n\n".join([f"## {title}", *pictures, rest, f"[`{path}`](../{path})"])


def gallery_page() -> str:
    """docs/gallery.md, which is there while the site is built: one picture, several, none."""
    shown = alternative_texts()
    ordered = sorted(examples(), key=lambda example: len(pictures_of(example)) or 99)
    return "\n\n".join([INTRODUCTION.rstrip(), *(entry(e, shown) for e in ordered)]) + "\n"


if __name__ == "__main__":
    print(*(example.relative_to(ROOT) for example in examples() if pictures_of(example)))
