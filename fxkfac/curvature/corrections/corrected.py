"""Blocks that further passes over the data have corrected: a curvature like the factors'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxkfac.curvature.curvature import AnyBlock, OfBlocks
from fxkfac.curvature.factors import Factors
from fxkfac.errors import OptionError
from fxkfac.linalg.orders import Order


@dataclass(frozen=True)
class Corrected(OfBlocks):
    """A mapping from the name of a weight to its block. `print` shows how each was computed.

    Attributes:
        factors: What was corrected.
        blocks: The blocks; exact ones are those of the factors.
        n: Number of data in each pass.
        count: What `reduction="mean"` divides by.
        orders: For every block, in which order the products of each of its terms were taken.
    """

    factors: Factors = field(repr=False)
    blocks: Mapping[str, AnyBlock] = field(repr=False)
    n: int
    count: float
    orders: Mapping[str, tuple[Order, ...]] = field(repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that have a block, and their shapes."""
        return self.factors.shapes

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of all."""
        return self.factors.like

    def canonical(self, name: str) -> str:
        """The name of a tied parameter that the blocks know it by."""
        return self.factors.canonical(name)

    @property
    def seen(self) -> tuple[int, Mapping[str, tuple[int, ...]]]:
        """Number of data of the factors, and for every block with some the rows of its terms."""
        return self.factors.seen

    def __str__(self) -> str:
        width = max((len(name) for name in self.blocks), default=0)
        rows = [
            f"{name:<{width}}  {order}"
            for name in self.blocks
            for order in self.orders.get(name, ("as it was",))
        ]
        title = "block" if not rows else f"{'block':<{width}}  order: multiply-adds for one datum"
        return "\n".join([title, *rows])


def uncorrected(curvature: Any) -> Factors:
    """The factors that say how a curvature was computed, and of how many data.

    Raises:
        OptionError: It is neither factors nor corrected ones, but a sum or an average of such.
    """
    if isinstance(curvature, Corrected):
        return curvature.factors
    if not isinstance(curvature, Factors):
        raise OptionError(
            f"factors is of type {type(curvature).__name__}; expected what fxkfac.kfac, "
            "fxkfac.ekfac or fxkfac.kfoc returns, which knows of what data it is. Compute the "
            "factors of all data by fxkfac.kfac."
        )
    return curvature
