"""What `fxkfac` has by name is imported when it is first asked for, and otherwise as anywhere."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import fxkfac
from fxkfac import front

ROOT = Path(__file__).parent.parent


def test_all_names_are_there():
    assert fxkfac.__all__ == front.__all__
    assert all(getattr(fxkfac, name) is getattr(front, name) for name in front.__all__)
    assert set(front.__all__) <= set(dir(fxkfac))


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="'fxkfac' has no attribute 'nothing'"):
        _ = fxkfac.nothing


def test_its_types_are_for_users_too():
    """Without the marker of PEP 561, in the package and in what is built of it, none are read."""
    (package,) = find_spec("fxkfac").submodule_search_locations
    assert (Path(package) / "py.typed").is_file()
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in built["package-data"]["fxkfac"]
