"""Blocks -> their parts: terms that lie over each other, and how each of them lies.

    C ≈ Σ_k P_k C_k P_kᵀ        G = Σ_k P_k G_k

A weight in two orientations has a term for each, over the same entries; one of them is turned. A
bias that has joined a term is its alone, as further rows of G. So P_k moves entries about, and what
one term has in common with another is what they hold of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fxkfac.curvature.laid_out import lies_turned, overlapping
from fxkfac.curvature.plan import BlockPlan, TermPlan
from fxkfac.errors import UnsupportedUse
from fxkfac.linalg.rows import Formed, Rows

Side = TypeVar("Side", Tensor, Tensor | None)
Place = tuple[str, int]  # the name of a block, and which of its terms

# Layout ops by which an entry of a parameter may come to stand in two places of one operand.
REPEATING = {"expand", "repeat", "cat", "stack", "as_strided"}


@dataclass(frozen=True)
class Lying:
    """How a term lies beside the others of its part.

    Attributes:
        turned: Whether its weight is turned beside the first one's.
        columns: How many biases have joined it: the last ones along its in axis.
    """

    turned: bool = False
    columns: int = 0

    def weight(self, t: Tensor, axis: int = -2) -> Tensor:
        """What belongs to the weight alone, of a tensor with one in axis."""
        return t.narrow(axis, 0, t.shape[axis] - self.columns)


Overlap = Mapping[Place, Lying]  # nearly always of one term


def parts_of(plan: BlockPlan) -> Iterator[Overlap]:
    """The parts of a block, which have no entry in common.

    Raises:
        UnsupportedUse: Terms have entries in common, and do not lie alike.
    """
    if len(plan.terms) == 1 and not may_repeat(plan.terms[0]):
        yield {(plan.name, 0): Lying()}
        return
    entries = [term.entries(plan.offsets) for term in plan.terms]
    for terms in overlapping(entries, plan.numel):
        yield _part(plan, terms, [entries[k] for k in terms])


def may_repeat(term: TermPlan) -> bool:
    """Whether an entry may come twice: by a layout op, or in a weight and in a bias of it."""
    biases = [column.bias for column in term.columns]
    names = [name for use in (term.uses[0], *biases) for name in use.parameters]
    steps = {step for use in (*term.uses, *biases) for step in use.view.steps}
    return bool(steps & REPEATING) or len(set(names)) < len(names)


def _part(plan: BlockPlan, terms: list[int], entries: list[Tensor]) -> Overlap:
    columns = [len(plan.terms[k].columns) for k in terms]
    weights = [Lying(columns=c).weight(e) for c, e in zip(columns, entries, strict=True)]
    ways = [lies_turned(weight, weights[0]) for weight in weights]
    # Biases are nobody else's, and no entry comes twice, if this is all that there is.
    expected = weights[0].numel() + sum(
        e.numel() - w.numel() for e, w in zip(entries, weights, strict=True)
    )
    numel = len(torch.cat([e.flatten() for e in entries]).unique())
    mixed = len({plan.terms[k].is_bias for k in terms}) > 1
    if None in ways or mixed or numel < expected:
        raise _unlike(plan, terms)
    return {
        (plan.name, k): Lying(bool(turned), c)
        for k, turned, c in zip(terms, ways, columns, strict=True)
    }


def _unlike(plan: BlockPlan, terms: list[int]) -> UnsupportedUse:
    uses = [use for k in terms for use in plan.terms[k].uses]
    listed = "; ".join(f"{u.op} ({u.source})" if u.source else u.op for u in uses)
    return UnsupportedUse(
        f"{', '.join(plan.parameters)}: the same entries are used in different parts, or come "
        f"several times, by {listed}. So the block is a sum of Kronecker products that overlap in "
        "some of their entries; expected such as have all entries in common, in either "
        f"orientation, or none. Trace with structure={{{plan.name!r}: 'diagonal'}}, which is "
        "exact, or keep the sum that kfac gives."
    )


def over(part: Overlap, mine: Place, theirs: Place, A: Side, B: Side) -> tuple[Side, Side]:
    """The sides of another term, of what it has of the weight, in the layout of this one."""
    return (A, B) if part[mine].turned == part[theirs].turned else (B, A)


def summed_rows(part: Overlap, rows: Mapping[Place, Rows]) -> Mapping[Place, Rows]:
    """Rows of terms -> for every term of the part, the gradient of all of them, as it lies there.

    One term by itself keeps its rows. One without rows has a gradient of zero.
    """
    if len(part) == 1:
        return rows
    own = {place: r.formed() for place, r in rows.items()}
    weights = [_turned(part[p].weight(G, 2), part[p].turned) for p, G in own.items()]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    return {
        place: Formed(_with_columns(_turned(total, at.turned), at.columns, own.get(place)))
        for place, at in part.items()
    }


def _turned(G: Tensor, turned: bool) -> Tensor:
    """Gradients (group, n, in, c, out), with in and out changed if so."""
    return G.transpose(2, 4) if turned else G


def _with_columns(weight: Tensor, columns: int, own: Tensor | None) -> Tensor:
    """The rows of G that are the weight's, and those of the biases."""
    if not columns:
        return weight
    group, n, d_in, c, d_out = weight.shape
    if own is None:
        biases = weight.new_zeros(group, n, columns, c, d_out)
    else:
        biases = own.narrow(2, d_in, columns).expand(group, -1, -1, -1, -1)
    return torch.cat([weight, biases], 2)
