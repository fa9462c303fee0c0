"""Kronecker products of two symmetric factors, one for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def kronecker_dense(
    A: Float[Tensor, "group d_in d_in"], B: Float[Tensor, "group d_out d_out"]
) -> Float[Tensor, "group d_in_d_out d_in_d_out"]:
    """A ⊗ B for every group: the matrix that acts on the rvec of an (in, out) matrix."""
    product = A[:, :, None, :, None] * B[:, None, :, None, :]  # group in out in out
    return product.flatten(3, 4).flatten(1, 2)
