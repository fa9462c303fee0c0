"""The terms of a block, and where their entries are -> one operator over its vector.

Terms that have no entry in common are blocks of a block diagonal operator. Two Kronecker products
that lie alike are a Kronecker sum. Others that lie over each other are a sum, which has products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import Tensor

from fxkfac.linalg import operators
from fxkfac.linalg.operators import BlockDiagonal, Eigenbasis, Kronecker, Operator, Placed

if TYPE_CHECKING:
    from jaxtyping import Int

Product = Kronecker | Eigenbasis
Term = tuple[Product, Tensor]  # on (group, in, out), and the numbers of its entries


def laid_out(terms: Sequence[Term], numel: int) -> Operator:
    """The sum of terms as an operator on vectors (numel,).

    Args:
        terms: Kronecker products, or diagonals in an eigenbasis; and for each one the numbers of
            its entries, (group, in, out).
        numel: The length of the vector; it is zero where no term has an entry.
    """
    groups = overlapping([entries for _, entries in terms], numel)
    return side_by_side([_one_part([terms[k] for k in group]) for group in groups], numel)


def side_by_side(parts: Sequence[tuple[Operator, Tensor]], numel: int) -> Operator:
    """Operators that have no entry in common, as one on vectors (numel,)."""
    if len(parts) == 1:
        operator, entries = parts[0]
        return Placed(operator, entries, (numel,))
    entries = torch.cat([e.flatten() for _, e in parts])
    return Placed(BlockDiagonal(tuple(operator for operator, _ in parts)), entries, (numel,))


def overlapping(entries: Sequence[Tensor], numel: int) -> list[list[int]]:
    """Terms that have an entry in common, directly or through others, belong together."""
    if len(entries) == 1:
        return [[0]]
    masks = []
    for own in entries:
        mask = torch.zeros(numel, dtype=torch.bool, device=own.device)
        mask[own.flatten()] = True
        masks.append(mask)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(entries)))
    for k, mine in enumerate(masks):
        graph.add_edges_from((k, j) for j in range(k) if bool((mine & masks[j]).any()))
    return sorted(sorted(int(k) for k in part) for part in nx.connected_components(graph))


def _one_part(terms: Sequence[Term]) -> tuple[Operator, Int[Tensor, "*shape"]]:
    """Terms that lie over each other as one operator, and the numbers of its entries."""
    ordered = sorted(terms, key=lambda term: not _has_diagonal(term[0]))
    entries = ordered[0][1]
    alike = [turned(operator, own, entries) for operator, own in ordered]
    fitting = [operator for operator in alike if operator is not None]
    if len(fitting) == len(terms):
        return operators.add(*fitting), entries
    union = torch.cat([own.flatten() for _, own in terms]).unique()
    placed = [Placed(op, torch.searchsorted(union, own), (len(union),)) for op, own in terms]
    return operators.add(*placed), union


def _has_diagonal(operator: Product) -> bool:
    """Whether a factor is a diagonal, which is written out where its term is turned."""
    return isinstance(operator, Kronecker) and operator.A.ndim == 2


def turned(operator: Product, own: Tensor, entries: Tensor) -> Product | None:
    """A term whose entries lie as others do; `None` where they do not, turned or not."""
    is_turned = lies_turned(own, entries)
    if not is_turned:
        return None if is_turned is None else operator
    if isinstance(operator, Eigenbasis):
        return Eigenbasis(operator.Q_B, operator.Q_A, operator.eigenvalues.mT)
    # No diagonal is larger than the other's B, unless that one has a diagonal, too.
    A = torch.diag_embed(operator.A) if operator.A.ndim == 2 else operator.A
    return Kronecker(operator.B, A)


def lies_turned(own: Tensor, entries: Tensor) -> bool | None:
    """Whether entries lie as others do only if turned; `None` where they do not even then."""
    if own.equal(entries):
        return False
    return True if own.mT.equal(entries) else None
