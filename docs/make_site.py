"""Build the documentation site: `python docs/make_site.py` writes site/, and fails at any warning.

The pages in docs/ are laid out anew for Sphinx, with what is made for the site alone: the home page
from README.md, the changes, the gallery, the code that pages link to, and on the API's pages the
directives of autodoc.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from functools import reduce
from typing import Any

from gallery import gallery_page
from links import ROOT, ROOT_PAGES, SOURCES, for_site, in_site, links_of

import fxkfac
import fxkfac.distributed
import fxkfac.plots

DOCS, PAGES, SITE = ROOT / "docs", ROOT / "build" / "pages", ROOT / "site"
CLAIM = re.compile(r"`(\w+\.py):(\w+)`")  # a function of examples/paper
DIRECTIVE = re.compile(r"^::: (fxkfac\.\S+)$", flags=re.M)

# Pages by their part of the navigation, in order; what is in none of them is a topic.
NAVIGATION = {
    "Begin": ["tour", "mathematics", "paper", "gallery", "limits"],
    "How do I": [
        "how_to/functional",
        "how_to/hugging_face",
        "how_to/pinn",
        "how_to/loss",
        "how_to/rule",
        "distributed",
        "how_to/memory",
        "how_to/from_curvlinops",
        "how_to/from_kfac_jax",
        "how_to/from_kronfluence",
    ],
    "Topics": [
        "operators",
        "corrections",
        "persistence",
        "optimizer",
        "laplace",
        "influence",
        "reports",
        "command_line",
    ],
    "API": [
        "api/index",
        "api/programs",
        "api/factors",
        "api/corrections",
        "api/likelihoods",
        "api/operators",
        "api/optim",
        "api/persistence",
        "api/distributed",
        "api/laplace",
        "api/influence",
        "api/reports",
        "api/plots",
        "api/taylor",
        "api/exact",
        "api/rules",
        "api/errors",
    ],
    "Design": [
        "design",
        "rules",
        "zoo",
        "benchmarks/benchmarks",
        "benchmarks/gpu/benchmarks",
        "speed",
        "changes",
    ],
}


def navigation(pages: set[str]) -> str:
    """The parts of the navigation. A page that none of them names is a topic."""
    named = {name for names in NAVIGATION.values() for name in names}
    parts = {**NAVIGATION, "Topics": [*NAVIGATION["Topics"], *sorted(pages - named)]}
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])
        for caption, names in parts.items()
    ]
    return "\n\n".join(["", *trees, ""])


def found(name: str) -> Any:
    """What a public name stands for."""
    return reduce(getattr, name.split(".")[1:], fxkfac)


def directive(name: str) -> str:
    """The directive that documents a public name."""
    what = found(name)
    if inspect.isclass(what):
        kind = "autoexception" if issubclass(what, Exception) else "autoclass"
    else:
        kind = "autofunction" if callable(what) else "py:data"
    return f"```{{eval-rst}}\n.. {kind}:: {name}\n```"


def with_directives(markdown: str) -> str:
    """A page on which `::: name` stands for what documents the name."""
    return DIRECTIVE.sub(lambda match: directive(match[1]), markdown)


def code_page(path: str) -> str:
    """A page of code, with an anchor for each line."""
    text = (ROOT / path).read_text()
    return f"---\norphan: true\n---\n\n# {path}\n\n`````{{code-lines}}\n{text}`````\n"


def pages() -> dict[str, str]:
    """The pages of the site by their paths, links as they are in the repository."""
    texts = {p.relative_to(DOCS).as_posix(): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
    texts |= {page: (ROOT / path).read_text() for path, page in ROOT_PAGES.items()}
    texts["paper.md"] = CLAIM.sub(r'[`\1:\2`](\1 "\2: def \2")', texts["paper.md"])
    return texts | {"gallery.md": gallery_page()}


def code_of(texts: dict[str, str]) -> list[str]:
    """The files of code that pages link to."""
    targets = {in_site(link) for name, text in texts.items() for link in links_of(text, name)}
    code = [t for t in targets if t.startswith(f"{SOURCES}/")]
    return sorted(t.removeprefix(f"{SOURCES}/").removesuffix(".md") for t in code)


def lay_out() -> None:
    """Write what Sphinx reads."""
    shutil.rmtree(PAGES, ignore_errors=True)
    texts = pages()
    made = {name: with_directives(for_site(text, name)) for name, text in texts.items()}
    made["index.md"] += navigation({name.removesuffix(".md") for name in texts} - {"index"})
    made |= {f"{SOURCES}/{path}.md": code_page(path) for path in code_of(texts)}
    for name, text in made.items():
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_text(text)
    for folder in ("pictures", "benchmarks"):
        hidden = shutil.ignore_patterns("*.md", "*.json")
        shutil.copytree(DOCS / folder, PAGES / folder, ignore=hidden, dirs_exist_ok=True)


def main() -> int:
    """Lay the pages out and build them."""
    from sphinx.cmd.build import main as sphinx

    lay_out()
    shutil.rmtree(SITE, ignore_errors=True)
    return sphinx(["-q", "-W", "--keep-going", "-E", "-c", str(DOCS), str(PAGES), str(SITE)])


if __name__ == "__main__":
    sys.exit(main())
