"""The operations in the place of products: as PyTorch asks of them, and with the same sums."""

from __future__ import annotations

import pytest
import torch
from drawn import rand
from linalg.grams import patch_gram_of
from torch import Tensor

from fxkfac.linalg import Windows, in_front, opaque_gram, opaque_patch_gram

ASKED = ("test_schema", "test_faketensor")

ROWS = {
    "groups and a border": (rand(3, 40, 7), 2),
    "strips": (rand(1, 600, 200), 1),
    "two axes of rows": (rand(2, 5, 8, 6).transpose(1, 2), 1),
    "no rows": (rand(1, 0, 7), 1),
    "one column": (rand(1, 9, 1), 0),
    "one row": (rand(1, 1, 131), 1),
    "in parts": (rand(2, 3, 1000, 100), 1),
    "columns first": (rand(1, 97, 40, 3).movedim(1, 3), 0),
    "every other column": (rand(2, 50, 300)[..., ::2], 1),
    "entries that share memory": (rand(1, 30, 3).repeat_interleave(47, 2)[..., ::2], 0),
    "single precision": (rand(1, 300, 161).float(), 1),
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
    "strides, wide": (rand(3, 24, 9, 8), Windows((3, 2), (2, 3), ((1, 1), (0, 2)), (1, 2)), 1),
    "positions": (rand(2, 100, 5, 7), Windows(ONES, (2, 1), NONE, ONES), 0),
    "wide groups": (rand(2, 36, 7, 7), Windows((5, 5), (2, 2), NONE, ONES, 3), 1),
    "no images": (rand(0, 3, 6, 6), Windows((3, 3), ONES, NONE, ONES), 0),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("x", "border"), ROWS.values(), ids=ROWS)
def test_rows(x: Tensor, border: int) -> None:
    torch.library.opcheck(torch.ops.fxkfac.gram.default, (x, border, 0.5), test_utils=ASKED)
    rows = x.flatten(1, -2)
    total, sums = opaque_gram(x, border, 0.5)
    torch.testing.assert_close(in_front(total, border), 0.5 * rows.mT @ rows)
    assert (sums is None) == (border == 0)
    if sums is not None:
        torch.testing.assert_close(sums, rows.sum(1))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("image", "windows", "border"), IMAGES.values(), ids=IMAGES)
def test_patches(image: Tensor, windows: Windows, border: int) -> None:
    numbers = windows.numbers()
    assert Windows.of(numbers, image.ndim - 2, windows.groups) == windows
    arguments = (image, numbers, windows.groups, border, 0.5)
    torch.library.opcheck(torch.ops.fxkfac.patch_gram.default, arguments, test_utils=ASKED)
    found = in_front(opaque_patch_gram(image, windows, border, 0.5), border)
    torch.testing.assert_close(found, 0.5 * patch_gram_of(image, windows))
