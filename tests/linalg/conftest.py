"""With kernels of our own, and without."""

import pytest

from fxkfac.linalg import tiles


@pytest.fixture(params=[True, False], ids=["kernel", "no kernel"])
def kernel(request, monkeypatch):
    """As with a compiler that has vectors, and with one that has none."""
    if not request.param:
        monkeypatch.setattr(tiles, "kernel_of", lambda dtype: None)
