"""Several losses on the same parameters -> the sum of their curvatures, block by block.

The terms of a loss, such as the interior and the boundary of a physics-informed net, are programs
of their own. The curvature of their sum is the sum of theirs: a sum of Kronecker products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import Tensor

from fxkfac.curvature.blocks import Block, Dense, Diagonal
from fxkfac.curvature.curvature import AnyBlock, Curvature, OfBlocks
from fxkfac.errors import MergeError, UnknownParameter
from fxkfac.functional import unknown


def sum_of(*parts: Curvature) -> Total:
    """The curvature of the sum of several losses on the same parameters.

    Args:
        parts: The factors of each loss. A parameter may be in one of them or in several.

    Returns:
        A mapping from the name of a weight to its block, a `Block` of all terms where there are
        several; and no copy of what the parts hold.

    Raises:
        MergeError: A parameter has another shape, or an exact block, which is not zero, here and
            factors there.
    """
    if not parts:
        raise MergeError("there is nothing to sum; expected the factors of at least one loss.")
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        if not isinstance(part, Curvature):
            raise MergeError(
                f"a part is of type {type(part).__name__}; expected factors, one after the other: "
                "sum_of(first, second)."
            )
        for name, shape in part.shapes.items():
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise MergeError(
                    f"{name!r} has shape {tuple(shape)} in one of the parts and {shapes[name]} in "
                    "another; expected factors of the same parameters."
                )
    blocks = [block for part in parts for block in part.values()]
    summed = [_sum([blocks[k] for k in group], shapes) for group in _connected(blocks)]
    return Total(shapes, parts, {block.params[0]: block for block in summed})


@dataclass(frozen=True)
class Total(OfBlocks):
    """The sum of several curvatures: a mapping from the name of a weight to its block."""

    parameters: Mapping[str, tuple[int, ...]]
    parts: Sequence[Curvature] = field(repr=False)
    blocks: Mapping[str, AnyBlock] = field(repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that have a block, and their shapes."""
        return self.parameters

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of all."""
        return self.parts[0].like

    def canonical(self, name: str) -> str:
        """The name of a tied parameter that the blocks know it by."""
        known: str | None = None
        for part in self.parts:
            with suppress(UnknownParameter):
                if (known := part.canonical(name)) in self.shapes:
                    return known
        if known is None:
            raise unknown(name, self.shapes)
        return known


def _connected(blocks: Sequence[AnyBlock]) -> list[list[int]]:
    """Blocks that have a parameter in common belong to one."""
    graph = nx.Graph()
    for k, block in enumerate(blocks):
        graph.add_node(k)
        graph.add_edges_from((k, name) for name in block.params)
    groups = nx.connected_components(graph)
    return sorted(sorted(n for n in group if isinstance(n, int)) for group in groups)


def _sum(blocks: Sequence[AnyBlock], shapes: Mapping[str, tuple[int, ...]]) -> AnyBlock:
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if isinstance(first, Diagonal) and all(isinstance(b, Diagonal) for b in blocks):
        parts = [b.diagonal for b in blocks if isinstance(b, Diagonal)]
        return replace(first, diagonal=torch.stack(parts).sum(0))
    if all(isinstance(b, Dense | Diagonal) for b in blocks):
        return Dense(first.params, first.shapes, torch.stack([b.dense() for b in blocks]).sum(0))
    if any(_is_zero(b) for b in blocks):  # of a loss that does not use the parameter
        return _sum([b for b in blocks if not _is_zero(b)], shapes)
    params = tuple(dict.fromkeys(name for b in blocks for name in b.params))
    if not all(isinstance(b, Block) for b in blocks):
        raise MergeError(
            f"{', '.join(params)} have Kronecker factors in one of the parts and an exact or "
            "corrected block in another; expected one structure. Name it in `structure` when "
            "tracing, or sum the factors of fxkfac.kfac."
        )
    offsets, start = {}, 0
    for name in params:
        offsets[name] = start
        start += torch.Size(shapes[name]).numel()
    terms = [replace(t, offsets=offsets) for b in blocks if isinstance(b, Block) for t in b.terms]
    return Block(params, tuple(shapes[name] for name in params), tuple(terms))


def _is_zero(block: AnyBlock) -> bool:
    return isinstance(block, Diagonal) and not block.diagonal.any()
