"""Symmetric matrices as rectangles of half of the size."""

import pytest
import torch
from zoo import rand

from fxkfac.linalg.triangle import pack_symmetric, packed_shape, unpack_symmetric


@pytest.mark.parametrize("d", range(10))
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_lower_triangle_comes_back_as_the_whole(d, batch):
    M = rand(*batch, d, d)
    packed = torch.full((*batch, *packed_shape(d)), torch.nan, dtype=M.dtype)
    assert packed[(0,) * len(batch)].numel() == d * (d + 1) // 2  # and none to spare
    above = torch.full_like(M, torch.nan).triu(1)
    pack_symmetric(M.tril() + above, packed)
    assert torch.equal(unpack_symmetric(packed), M.tril() + M.tril(-1).mT)
