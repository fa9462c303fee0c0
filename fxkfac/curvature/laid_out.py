"""The Kronecker products of a block, and where their entries are -> one operator over its vector.

Products of parts that have no entry in common are blocks of a block diagonal operator. Two that lie
alike are a Kronecker sum. Others that lie over each other are a sum that only has products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import Tensor

from fxkfac.linalg import operators
from fxkfac.linalg.operators import BlockDiagonal, Kronecker, Operator, Placed

if TYPE_CHECKING:
    from jaxtyping import Int

Term = tuple[Kronecker, Tensor]  # a product (group, in, out) and the numbers of its entries


def laid_out(terms: Sequence[Term], numel: int) -> Operator:
    """The sum of Kronecker products as an operator on vectors (numel,).

    Args:
        terms: Products, and for each one the numbers of its entries, (group, in, out).
        numel: The length of the vector; it is zero where no term has an entry.
    """
    groups = _overlapping(terms, numel)
    return side_by_side([_one_part([terms[k] for k in group]) for group in groups], numel)


def side_by_side(parts: Sequence[tuple[Operator, Tensor]], numel: int) -> Operator:
    """Operators that have no entry in common, as one on vectors (numel,)."""
    if len(parts) == 1:
        operator, entries = parts[0]
        return Placed(operator, entries, (numel,))
    entries = torch.cat([e.flatten() for _, e in parts])
    return Placed(BlockDiagonal(tuple(operator for operator, _ in parts)), entries, (numel,))


def _overlapping(terms: Sequence[Term], numel: int) -> list[list[int]]:
    """Terms that have an entry in common, directly or through others, belong together."""
    if len(terms) == 1:
        return [[0]]
    masks = []
    for _, entries in terms:
        mask = torch.zeros(numel, dtype=torch.bool, device=entries.device)
        mask[entries.flatten()] = True
        masks.append(mask)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(terms)))
    for k, mine in enumerate(masks):
        graph.add_edges_from((k, j) for j in range(k) if bool((mine & masks[j]).any()))
    return sorted(sorted(int(k) for k in part) for part in nx.connected_components(graph))


def _one_part(terms: Sequence[Term]) -> tuple[Operator, Int[Tensor, "*shape"]]:
    """Terms that lie over each other as one operator, and the numbers of its entries."""
    ordered = sorted(terms, key=lambda term: term[0].A.ndim)  # those with diagonals first
    entries = ordered[0][1]
    alike = [turned(operator, own, entries) for operator, own in ordered]
    fitting = [operator for operator in alike if operator is not None]
    if len(fitting) == len(terms):
        return operators.add(*fitting), entries
    union = torch.cat([own.flatten() for _, own in terms]).unique()
    placed = [Placed(op, torch.searchsorted(union, own), (len(union),)) for op, own in terms]
    return operators.add(*placed), union


def turned(operator: Kronecker, own: Tensor, entries: Tensor) -> Kronecker | None:
    """A product whose entries lie as others do; `None` where they do not, turned or not."""
    if own.equal(entries):
        return operator
    if not own.mT.equal(entries):  # the weight is not used the other way round either
        return None
    # No diagonal is larger than the other's B, unless that one has a diagonal, too.
    A = torch.diag_embed(operator.A) if operator.A.ndim == 2 else operator.A
    return Kronecker(operator.B, A)
