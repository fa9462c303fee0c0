"""Sums of products from whatever memory held before."""

from __future__ import annotations

from math import nan, prod

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.graph.form import Patches
from fxkfac.graph.uses.normal import unfold
from fxkfac.linalg import Gram, Windows, add_gram, add_patch_gram

F32 = torch.float32


def empty(group: int, d: int, like: Tensor) -> Gram:
    """An empty one whose memory shows in every result that reads it, in float32 or better."""
    return Gram(like.new_full((group, d, d), nan, dtype=torch.promote_types(like.dtype, F32)))


def gram_of(*parts: Tensor) -> Tensor:
    """Σ x xᵀ of all rows."""
    gram = empty(len(parts[0]), parts[0].shape[-1], parts[0])
    for x in parts:
        add_gram(gram, x)
    return gram.matrix()


def patch_gram_of(image: Tensor, windows: Windows, times: int = 1) -> Tensor:
    """Σ patch patchᵀ of an image, that often."""
    d = image.shape[1] // windows.groups * prod(windows.kernel)
    gram = empty(windows.groups, d, image)
    for _ in range(times):
        add_patch_gram(gram, image, windows)
    return gram.matrix()


def rows(image: Tensor, windows: Windows) -> Tensor:
    """All patches, (group, batch, place, channel · kernel)."""
    form = Patches(windows.kernel, windows.stride, windows.padding, windows.dilation)
    x = unfold(image, form)
    for k, places in enumerate(windows.places or ()):
        x = x.narrow(2 + k, 0, places)
    p, k = (" ".join(f"{a}{i}" for i in range(len(windows.kernel))) for a in "pk")
    return rearrange(x, f"n (g i) {p} {k} -> g n ({p}) (i {k})", g=windows.groups)
