"""The paper's claims hold on this library, and the table of them leaves nothing out."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAPER = Path(__file__).parent.parent / "examples" / "paper"
FILES = sorted(file for file in PAPER.glob("*.py") if file.name != "setting.py")
TABLE = (PAPER / "README.md").read_text()
# How many there are in the paper.
NUMBERED = {
    "Setup": 8,
    "Definition": 23,
    "Example": 16,
    "Snippet": 26,
    "Test": 2,
    "Figure": 10,
    "Equation": 4,
    "Caveat": 2,
}


def functions(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in named if not name.startswith("_")]


CLAIMS = [(file.name, name) for file in FILES for name in functions(file)]


@cache
def loaded(file: str) -> ModuleType:
    """A file as a module, which finds what it shares with the others beside it."""
    spec = spec_from_file_location(f"paper_{file[:-3]}", PAPER / file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(PAPER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PAPER))
    return module


@pytest.mark.parametrize(("file", "name"), CLAIMS, ids=[f"{f}:{n}" for f, n in CLAIMS])
def test_claim(file: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(loaded(file), name)()
    assert capsys.readouterr().out.startswith("  ")


def test_a_file_says_what_it_claims() -> None:
    command = [sys.executable, str(PAPER / "flattening.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split(":")[0] for line in done.stdout.splitlines() if re.match(r"\w+: ", line)]
    assert said == functions(PAPER / "flattening.py")


def test_the_table_names_every_claim() -> None:
    assert sorted(set(re.findall(r"`(\w+\.py):(\w+)`", TABLE))) == sorted(CLAIMS)


@pytest.mark.parametrize("kind", NUMBERED)
def test_the_table_has_all_that_is_numbered_in_the_paper(kind: str) -> None:
    cells = [line.split("|")[1] for line in TABLE.splitlines() if line.startswith("| ")]
    lists = re.findall(rf"\b{kind}s? ([\d, ]+)", "; ".join(cells))
    found = {int(number) for numbers in lists for number in re.findall(r"\d+", numbers)}
    assert found == set(range(1, NUMBERED[kind] + 1))


def test_the_table_names_what_the_library_has() -> None:
    names = set(re.findall(r"`(fxkfac(?:\.\w+)+)`", TABLE))
    assert names
    for name in names:
        assert resolve(name) is not None, name


def resolve(name: str) -> Any:
    """A module, or what is in one."""
    found: Any = importlib.import_module("fxkfac")
    path = "fxkfac"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_docstrings_and_table_name_the_same_items(file: Path) -> None:
    """What a function says it shows is what the table says."""
    module = loaded(file.name)
    for name in functions(file):
        rows = [line for line in TABLE.splitlines() if f"`{file.name}:{name}`" in line]
        in_table = items("; ".join(row.split("|")[1] for row in rows))
        assert items(getattr(module, name).__doc__) == in_table, name


def items(text: str) -> set[tuple[str, int]]:
    found = set()
    for kind in NUMBERED:
        for numbers in re.findall(rf"\b{kind}s? (\d+(?:(?:, | and | to )\d+)*)", text):
            found |= {(kind, int(number)) for number in re.findall(r"\d+", numbers)}
    return found
