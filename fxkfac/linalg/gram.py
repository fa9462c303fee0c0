"""Sums of products of rows with themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def add_gram(
    total: Float[Tensor, "group d d"] | None, x: Float[Tensor, "group *rows d"]
) -> Float[Tensor, "group d d"]:
    """Add Σ_rows x xᵀ to `total`, in place."""
    rows = x.flatten(1, -2)
    product = rows.mT @ rows
    return product if total is None else total.add_(product)
