"""The operations in the place of products: as PyTorch asks of them, and with the same sums."""

from __future__ import annotations

import pytest
import torch
from drawn import rand
from linalg.grams import patch_gram_of
from torch import Tensor

from fxkfac.linalg import Gram, Windows, in_front, opaque_gram, opaque_patch_gram

ASKED = ("test_schema", "test_faketensor")

ROWS = {
    "groups and a border": (rand(3, 40, 7), 2),
    "strips": (rand(1, 600, 200), 1),
    "two axes of rows": (rand(2, 5, 8, 6).transpose(1, 2), 1),
    "no rows": (rand(1, 0, 7), 1),
    "one column": (rand(1, 9, 1), 0),
}

ONES, NONE = (1, 1), ((0, 0), (0, 0))
IMAGES = {
    "one dimension, groups": (rand(2, 4, 9), Windows((3,), (1,), ((1, 1),), (1,), groups=2), 0),
    "stride and dilation": (
        rand(3, 2, 7, 8),
        Windows((3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2)),
        1,
    ),
    "fewer places": (rand(2, 3, 6, 6), Windows((3, 3), ONES, NONE, ONES, 1, (2, 3)), 1),
    "moved images": (rand(2, 24, 8, 8), Windows((3, 3), ONES, ((1, 1), (1, 1)), ONES), 1),
    "no images": (rand(0, 3, 6, 6), Windows((3, 3), ONES, NONE, ONES), 0),
}


def matrix(total: Tensor, whole: Tensor, border: int) -> Tensor:
    return Gram(in_front(total, border), is_empty=False, whole=int(whole)).matrix()


@pytest.mark.parametrize(("x", "border"), ROWS.values(), ids=ROWS)
def test_rows(x: Tensor, border: int) -> None:
    torch.library.opcheck(torch.ops.fxkfac.gram.default, (x, border), test_utils=ASKED)
    rows = x.flatten(1, -2)
    torch.testing.assert_close(matrix(*opaque_gram(x, border), border), rows.mT @ rows)


@pytest.mark.parametrize(("image", "windows", "border"), IMAGES.values(), ids=IMAGES)
def test_patches(image: Tensor, windows: Windows, border: int) -> None:
    numbers = windows.numbers()
    assert Windows.of(numbers, image.ndim - 2, windows.groups) == windows
    arguments = (image, numbers, windows.groups, border)
    torch.library.opcheck(torch.ops.fxkfac.patch_gram.default, arguments, test_utils=ASKED)
    found = opaque_patch_gram(image, windows, border)
    torch.testing.assert_close(matrix(*found, border), patch_gram_of(image, windows))
