"""What `fxkfac` has by name is imported when it is first asked for, and otherwise as anywhere."""

from __future__ import annotations

import pytest

import fxkfac
from fxkfac import front


def test_all_names_are_there():
    assert fxkfac.__all__ == front.__all__
    assert all(getattr(fxkfac, name) is getattr(front, name) for name in front.__all__)
    assert set(front.__all__) <= set(dir(fxkfac))


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="'fxkfac' has no attribute 'nothing'"):
        _ = fxkfac.nothing
