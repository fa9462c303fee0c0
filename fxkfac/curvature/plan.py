"""Uses -> blocks and their terms: which uses of which parameters share a Kronecker product.

- Uses of one weight in the same orientation are one term: their rows are put together.
- Uses in different orientations, or of different parts, are terms of a sum, never one of them.
- A bias all of whose uses share the rows of one term joins it: W̃ = (W b), x̃ = (x 1).
- Any other bias is a term of its own, whose block is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import networkx as nx
import torch
from torch import Tensor

from fxkfac.errors import MergeError
from fxkfac.graph.form import OneHot
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import normal_weight
from fxkfac.linalg import checksum

Scales = tuple[float, ...]  # of the rest of x̃ = (x, scales), one for each bias that has joined


@dataclass(frozen=True)
class Column:
    """A bias that is one more column of x̃, with the bias use of every weight use of the term.

    Attributes:
        bias: A use of the bias, for its parameters and the places of its entries.
        uses: For each weight use of the term, the bias use that shares its rows, or `None`: there
            the input of this column is zero.
    """

    bias: Use
    uses: tuple[Use | None, ...]


class Identity(NamedTuple):
    """Which entries of which parameters a term is of.

    Attributes:
        parameters: Their names, weights first.
        is_bias: Whether it is a bias by itself.
        shape: Of (group, in, out), with the biases that have joined.
        entries: A digest of which entry of the block is where in it.
    """

    parameters: tuple[str, ...]
    is_bias: bool
    shape: tuple[int, ...]
    entries: str


@dataclass(frozen=True)
class TermPlan:
    """Uses whose rows make one Kronecker product.

    Attributes:
        uses: The uses of the weight; or of the bias, for a bias by itself.
        columns: The biases that have joined.
    """

    uses: tuple[Use, ...]
    columns: tuple[Column, ...] = ()

    @property
    def is_bias(self) -> bool:
        """Whether this is a bias by itself, whose input is the constant one."""
        return self.uses[0].is_bias

    @cached_property
    def counts_only(self) -> bool:
        """Whether all rows of A are one-hot, so that it is a diagonal of counts."""
        return not self.columns and all(isinstance(u.form.prepare, OneHot) for u in self.uses)

    @cached_property
    def scales(self) -> tuple[Scales, ...]:
        """For every use, what the biases that have joined are multiplied by at its rows."""
        return tuple(self._scales(place) for place in range(len(self.uses)))

    def _scales(self, place: int) -> Scales:
        biases = [c.uses[place] for c in self.columns]
        return tuple(u.join.scale if u and u.join else 0.0 for u in biases)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters in the term, weights first."""
        names = [p for u in self.uses for p in u.parameters]
        return tuple(dict.fromkeys(names + [p for c in self.columns for p in c.bias.parameters]))

    def touched(self) -> Tensor:
        """Numbers of the entries that a bias by itself holds, along its own parameters."""
        return torch.cat([normal_weight(u).flatten() for u in self.uses]).unique()

    def entries(self, offsets: dict[str, int]) -> Tensor:
        """Numbers of the term's entries in its block, in the order (group, in, out).

        Args:
            offsets: Where each parameter begins among the block's parameters, in rvec order.
        """
        use = self.uses[0]
        if self.is_bias:
            return _in_block(use, self.touched(), offsets).view(1, 1, -1)
        weight = _in_block(use, normal_weight(use), offsets)
        biases = [_in_block(c.bias, _join(c.bias), offsets) for c in self.columns]
        return torch.cat([weight, *(b.unsqueeze(1) for b in biases)], dim=1)

    def identity(self, offsets: dict[str, int]) -> Identity:
        """Which entries of its block it is of."""
        entries = self.entries(offsets)
        return Identity(self.parameters, self.is_bias, tuple(entries.shape), checksum(entries))


def _join(bias: Use) -> Tensor:
    assert bias.join is not None
    return bias.join.entries


def _in_block(use: Use, numbers: Tensor, offsets: dict[str, int]) -> Tensor:
    """Numbers along the use's own parameters -> numbers along the block's parameters."""
    sizes = [torch.Size(shape).numel() for shape in use.view.shapes]
    table = [
        offsets[p] + torch.arange(n, device=numbers.device)
        for p, n in zip(use.parameters, sizes, strict=True)
    ]
    return torch.cat(table)[numbers]


@dataclass(frozen=True)
class BlockPlan:
    """The parameters of one block and its terms, whose sum is the block.

    Attributes:
        name: Name of the weight, or of the bias for a bias by itself.
        parameters: What the block covers, in the order of its dense form.
        shapes: The parameters' shapes.
        terms: The terms.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    terms: tuple[TermPlan, ...]

    @property
    def offsets(self) -> dict[str, int]:
        """Where each parameter begins in the block."""
        starts, total = {}, 0
        for name, shape in zip(self.parameters, self.shapes, strict=True):
            starts[name] = total
            total += torch.Size(shape).numel()
        return starts

    @cached_property
    def identities(self) -> tuple[Identity, ...]:
        """Those of all terms: equal where the sums of two graphs are sums of the same terms."""
        return tuple(term.identity(self.offsets) for term in self.terms)

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def require_same_terms(mine: Iterable[BlockPlan], others: Iterable[BlockPlan]) -> None:
    """Raise `MergeError` unless the sums of two graphs are sums of the same terms."""
    here, there = ({plan.name: plan for plan in plans} for plans in (mine, others))
    if differ := [n for n in {**here, **there} if not _same_terms(here.get(n), there.get(n))]:
        raise MergeError(
            f"these factors and the others come from graphs that use {differ[:4]} in other ways "
            "(other entries, as of a table of positions, another orientation, or not at all), as "
            "control flow that depends on shapes may make them; expected the same uses. Compute "
            "factors for inputs of one shape at a time, or trace with "
            f"structure={{{differ[0]!r}: 'diagonal'}}, which adds up for all."
        )


def _same_terms(mine: BlockPlan | None, other: BlockPlan | None) -> bool:
    if mine is other:  # of one graph, as nearly always: entries are looked at for others alone
        return True
    return mine is not None and other is not None and mine.identities == other.identities


def plan_blocks(
    uses: tuple[Use, ...], separate_weight_and_bias: bool, exact: frozenset[str] = frozenset()
) -> tuple[BlockPlan, ...]:
    """Group uses into terms, and terms that touch the same parameters into blocks.

    Uses of the parameters in `exact`, which have no Kronecker factors, are left out.
    """
    factored = [u for u in uses if not exact & set(u.parameters)]
    terms = [TermPlan(tuple(same)) for same in _by_place(u for u in factored if not u.is_bias)]
    biases = _by_place(u for u in factored if u.is_bias)
    alone: list[Use] = []
    for same in biases:
        others = [u for other in biases if other is not same for u in other]
        k = None if separate_weight_and_bias else _joined_term(same, others, terms, uses)
        if k is None:
            alone += same
        else:
            terms[k] = replace(terms[k], columns=(*terms[k].columns, _column(same, terms[k], uses)))
    terms += [TermPlan(tuple(same)) for same in _by_parameters(alone)]
    return tuple(_block(group) for group in _connected(terms))


def _joined_term(
    same: list[Use], others: list[Use], terms: list[TermPlan], uses: Sequence[Use]
) -> int | None:
    """The term that a bias joins: all of its uses share rows with it, and no other use has them."""
    joins = [u.join for u in same if u.join is not None]
    if len(joins) < len(same) or any(not j.entries.equal(joins[0].entries) for j in joins):
        return None
    if any(_overlap(same[0], other) for other in others):
        return None
    weights = {id(uses[j.weight]) for j in joins}
    for k, term in enumerate(terms):
        if weights <= {id(u) for u in term.uses}:
            return k
    return None


def _overlap(a: Use, b: Use) -> bool:
    """Whether two biases hold an entry in common."""
    common = set(a.parameters) & set(b.parameters)
    return bool(common) and (
        a.parameters != b.parameters or bool(torch.isin(normal_weight(a), normal_weight(b)).any())
    )


def _column(same: list[Use], term: TermPlan, uses: Sequence[Use]) -> Column:
    at = {id(uses[u.join.weight]): u for u in same if u.join is not None}
    return Column(same[0], tuple(at.get(id(u)) for u in term.uses))


def _by_place(weights: Iterable[Use]) -> list[list[Use]]:
    """Uses whose entries (group, in, out) are the same ones in the same places."""
    groups: list[list[Use]] = []
    for use in weights:
        for group in groups:
            if _same_place(group[0], use):
                group.append(use)
                break
        else:
            groups.append([use])
    return groups


def _same_place(a: Use, b: Use) -> bool:
    if a.parameters != b.parameters:
        return False
    if (a.view.chain, a.view.narrowed, a.form.weight) == (
        b.view.chain,
        b.view.narrowed,
        b.form.weight,
    ):
        return a.form.normal_weight == b.form.normal_weight
    return torch.equal(normal_weight(a), normal_weight(b))


def _by_parameters(biases: Iterable[Use]) -> list[list[Use]]:
    groups: dict[tuple[str, ...], list[Use]] = {}
    for use in biases:
        groups.setdefault(use.parameters, []).append(use)
    return list(groups.values())


def _connected(terms: list[TermPlan]) -> list[list[TermPlan]]:
    """Terms that touch a common parameter belong to one block."""
    graph = nx.Graph()
    for k, term in enumerate(terms):
        graph.add_node(k)
        graph.add_edges_from((k, name) for name in term.parameters)
    parts = [
        sorted(n for n in part if isinstance(n, int)) for part in nx.connected_components(graph)
    ]
    return [[terms[k] for k in part] for part in parts]


def _block(terms: list[TermPlan]) -> BlockPlan:
    shapes: dict[str, tuple[int, ...]] = {}
    for term in terms:
        for use in [*term.uses, *(c.bias for c in term.columns)]:
            shapes |= dict(zip(use.parameters, use.view.shapes, strict=True))
    return BlockPlan(next(iter(shapes)), tuple(shapes), tuple(shapes.values()), tuple(terms))
