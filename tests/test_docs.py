"""What the README and the docs say is true: their code runs, and their tables are the code's."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest
from quick import quick

from fxkfac.graph.rules import RULES

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


@pytest.mark.parametrize("number", [0, 1])
def test_readme_code_runs_by_itself(number: int) -> None:
    blocks = code_blocks(ROOT / "README.md")
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    exec(compile(blocks[number], f"README.md, block {number}", "exec"), namespace)
    assert "factors" in namespace or "ggn" in namespace


# distributed.md is a script for several processes, and run as such by its own tests.
PAGES = {
    "tour": 9,
    "operators": 6,
    "corrections": 4,
    "drawing": 5,
    "persistence": 8,
    "influence": 3,
    "laplace": 3,
    "optimizer": 6,
    "reports": 6,
    "how_to/functional": 4,
    "how_to/hugging_face": 3,
    "how_to/pinn": 3,
    "how_to/loss": 6,
    "how_to/rule": 4,
    "how_to/memory": 5,
    "how_to/from_curvlinops": 4,
    "how_to/from_kfac_jax": 2,
    "how_to/from_kronfluence": 2,
}


@pytest.mark.parametrize("page", quick(PAGES, lambda page: page != "how_to/hugging_face"))
def test_pages_run_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = code_blocks(ROOT / "docs" / f"{page}.md")
    assert len(blocks) >= PAGES[page]
    namespace: dict[str, object] = {}
    rules = dict(RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}.md, block {number}", "exec"), namespace)
    for overload in RULES.keys() - rules.keys():  # a page may register some
        del RULES[overload]


def test_tables_are_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert TABLES["with_support"](readme) == readme
    assert TABLES["rules_page"]() == (ROOT / "docs" / "rules.md").read_text()


def test_every_page_with_code_is_run() -> None:
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    with_code = {p.removesuffix(".md") for p in pages if code_blocks(ROOT / "docs" / p)}
    assert with_code == {*PAGES, "distributed"}
