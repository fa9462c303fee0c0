"""Symmetric matrices as rectangles of half of the size."""

import pytest
import torch
from zoo import rand

from fxkfac.linalg.triangle import pack_symmetric, packed_shape, unpack_symmetric


@pytest.mark.parametrize("d", range(10))
@pytest.mark.parametrize("batch", [(), (3,)])
def test_half_comes_back_as_the_whole(d, batch):
    M = rand(*batch, d, d)
    packed = torch.full((*batch, *packed_shape(d)), torch.nan, dtype=M.dtype)
    assert packed[(0,) * len(batch)].numel() == d * (d + 1) // 2  # and none to spare
    M = M + M.mT
    pack_symmetric(M, packed)
    assert torch.equal(unpack_symmetric(packed), M)


def test_what_is_symmetric_to_rounding_becomes_symmetric():
    M = torch.eye(5) + 1e-7 * torch.rand(5, 5)
    packed = torch.empty(packed_shape(5))
    pack_symmetric(M, packed)
    found = unpack_symmetric(packed)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, M)
