"""Sums of products as one operation each: a graph that is recorded has these, and compiled code
calls them, in the place of the many steps that they are made of.

Beside a sum there is the width of the blocks on its diagonal that came whole, which depends on what
was summed, and how.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxkfac.linalg.gram import Gram, add_gram, in_front
from fxkfac.linalg.patches import add_patch_gram
from fxkfac.linalg.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class OpaqueSum(NamedTuple):
    """A sum that one operation of a graph has taken.

    Attributes:
        total: As a `Gram` has it, in front of a border that holds anything.
        whole: The `Gram.whole` of it.
    """

    total: Float[Tensor, "group wider wider"]
    whole: Int[Tensor, ""]


def opaque_gram(x: Float[Tensor, "group *rows d"], border: int) -> OpaqueSum:
    """Σ_rows x xᵀ for every group, with room for so many further rows and columns."""
    return OpaqueSum(*torch.ops.fxkfac.gram(x, border))


def opaque_patch_gram(
    image: Float[Tensor, "batch channels *space"], windows: Windows, border: int
) -> OpaqueSum:
    """The same for the patches of an image."""
    found = torch.ops.fxkfac.patch_gram(image, windows.numbers(), windows.groups, border)
    return OpaqueSum(*found)


torch.library.define("fxkfac::gram", "(Tensor x, int border) -> (Tensor, Tensor)")
torch.library.define(
    "fxkfac::patch_gram",
    "(Tensor image, int[] windows, int groups, int border) -> (Tensor, Tensor)",
)


@torch.library.register_fake("fxkfac::gram")
def _gram_shape(x: Tensor, border: int) -> tuple[Tensor, Tensor]:
    return _room(x, x.shape[0], x.shape[-1] + border), x.new_empty((), dtype=torch.int64)


@torch.library.impl("fxkfac::gram", "cpu")
def _gram(x: Tensor, border: int) -> tuple[Tensor, Tensor]:
    total, _ = _gram_shape(x, border)
    gram = Gram(in_front(total, border))
    add_gram(gram, x)
    return _summed(total, gram)


@torch.library.register_fake("fxkfac::patch_gram")
def _patch_gram_shape(
    image: Tensor, windows: list[int], groups: int, border: int
) -> tuple[Tensor, Tensor]:
    kernel = Windows.of(windows, image.ndim - 2, groups).kernel
    d = image.shape[1] // groups * prod(kernel)
    return _room(image, groups, d + border), image.new_empty((), dtype=torch.int64)


@torch.library.impl("fxkfac::patch_gram", "cpu")
def _patch_gram(
    image: Tensor, windows: list[int], groups: int, border: int
) -> tuple[Tensor, Tensor]:
    total, _ = _patch_gram_shape(image, windows, groups, border)
    gram = Gram(in_front(total, border))
    add_patch_gram(gram, image, Windows.of(windows, image.ndim - 2, groups))
    return _summed(total, gram)


def _room(x: Tensor, groups: int, d: int) -> Tensor:
    return x.new_empty(groups, d, d)


def _summed(total: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
    if gram.is_empty:  # there were no rows
        gram.matrix()
    return total, torch.tensor(gram.whole, device="cpu")
