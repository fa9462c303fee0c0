"""Sums of products as one operation each: a graph that is recorded has these, and compiled code
calls them, in the place of the many steps that they are made of.

They give whole matrices, scaled, which costs nothing while numbers are at hand.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.gram import Gram, in_front, new_total
from fxkfac.linalg.patches import add_patch_gram
from fxkfac.linalg.products import add_gram
from fxkfac.linalg.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float


def opaque_gram(
    x: Float[Tensor, "group *rows d"], border: int, scale: float
) -> tuple[Float[Tensor, "group wider wider"], Float[Tensor, "group d"] | None]:
    """scale · Σ_rows x xᵀ for every group, in front of so many rows and columns of anything.

    If there are any, it comes with Σ_rows x, of which they will be made.
    """
    total, sums = torch.ops.fxkfac.gram(x, border, scale)
    return total, sums if border else None


def opaque_patch_gram(
    image: Float[Tensor, "batch channels *space"], windows: Windows, border: int, scale: float
) -> Float[Tensor, "group wider wider"]:
    """The same for the patches of an image."""
    of = windows.numbers(), windows.groups
    total: Tensor = torch.ops.fxkfac.patch_gram(image, *of, border, scale)
    return total


torch.library.define("fxkfac::gram", "(Tensor x, int border, float scale) -> (Tensor, Tensor)")
torch.library.define(
    "fxkfac::patch_gram",
    "(Tensor image, int[] windows, int groups, int border, float scale) -> Tensor",
)


@torch.library.register_fake("fxkfac::gram")
def _gram_shape(x: Tensor, border: int, scale: float) -> tuple[Tensor, Tensor]:
    group, d = x.shape[0], x.shape[-1]
    return _room(x, group, d + border), x.new_empty(group, d if border else 0)


@torch.library.impl("fxkfac::gram", "cpu")
def _gram(x: Tensor, border: int, scale: float) -> tuple[Tensor, Tensor]:
    total = _room(x, x.shape[0], x.shape[-1] + border)
    gram = Gram(in_front(total, border), scale=scale)
    sums = add_gram(gram, x, summed=border > 0)
    gram.matrix(scale)
    return total, x.new_empty(x.shape[0], 0) if sums is None else sums


@torch.library.register_fake("fxkfac::patch_gram")
def _patch_gram_shape(
    image: Tensor, windows: list[int], groups: int, border: int, scale: float
) -> Tensor:
    kernel = Windows.of(windows, image.ndim - 2, groups).kernel
    return _room(image, groups, image.shape[1] // groups * prod(kernel) + border)


@torch.library.impl("fxkfac::patch_gram", "cpu")
def _patch_gram(
    image: Tensor, windows: list[int], groups: int, border: int, scale: float
) -> Tensor:
    total = _patch_gram_shape(image, windows, groups, border, scale)
    gram = Gram(in_front(total, border), scale=scale)
    add_patch_gram(gram, image, Windows.of(windows, image.ndim - 2, groups))
    gram.matrix(scale)
    return total


def _room(x: Tensor, groups: int, d: int) -> Tensor:
    return new_total(x, groups, d, x.dtype)
