"""Uses -> blocks and their terms: which uses of which parameters share a Kronecker product.

- Uses of one weight in the same orientation are one term: their rows are put together.
- Uses in different orientations, or of different parts, are terms of a sum, never one of them.
- A bias all of whose uses share the rows of one term joins it: W̃ = (W b), x̃ = (x 1).
- Any other bias is a term of its own, whose block is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import networkx as nx
import torch
from torch import Tensor

from fxkfac.graph.ir import Use
from fxkfac.graph.normal import normal_weight


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

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters in the term, weights first."""
        names = [p for u in self.uses for p in u.parameters]
        return tuple(dict.fromkeys(names + [p for c in self.columns for p in c.bias.parameters]))

    def entries(self, offsets: dict[str, int]) -> Tensor:
        """Numbers of the term's entries in its block, in the order (group, in, out).

        Args:
            offsets: Where each parameter begins among the block's parameters, in rvec order.
        """
        use = self.uses[0]
        if self.is_bias:
            local = torch.arange(use.view.numel)
            return _in_block(use, local, offsets).view(1, 1, -1)
        weight = _in_block(use, normal_weight(use), offsets)
        biases = [_in_block(c.bias, _join(c.bias), offsets) for c in self.columns]
        return torch.cat([weight, *(b.unsqueeze(1) for b in biases)], dim=1)


def _join(bias: Use) -> Tensor:
    assert bias.join is not None
    return bias.join.entries


def _in_block(use: Use, numbers: Tensor, offsets: dict[str, int]) -> Tensor:
    """Numbers along the use's own parameters -> numbers along the block's parameters."""
    sizes = [torch.Size(shape).numel() for shape in use.view.shapes]
    table = [torch.arange(n) + offsets[p] for p, n in zip(use.parameters, sizes, strict=True)]
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

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


@lru_cache(maxsize=32)  # the same for every batch that runs the same graph
def plan_blocks(uses: tuple[Use, ...], separate_weight_and_bias: bool) -> tuple[BlockPlan, ...]:
    """Group uses into terms, and terms that touch the same parameters into blocks."""
    weights = [u for u in uses if not u.is_bias]
    joining = {} if separate_weight_and_bias else _joining(uses)
    terms = [TermPlan(tuple(same), _columns(same, uses, joining)) for same in _by_place(weights)]
    joined = {p for term in terms for c in term.columns for p in c.bias.parameters}
    alone = [u for u in uses if u.is_bias and not joined & set(u.parameters)]
    terms += [TermPlan(tuple(same)) for same in _by_parameters(alone)]
    return tuple(_block(group) for group in _connected(terms))


def _joining(uses: Sequence[Use]) -> dict[tuple[str, ...], list[Use]]:
    """Biases all of whose uses share rows with a weight's: by parameters, their uses."""
    found: dict[tuple[str, ...], list[Use]] = {}
    touched: dict[str, set[tuple[str, ...]]] = {}
    for use in uses:
        for name in use.parameters:
            touched.setdefault(name, set()).add((*use.parameters, "" if use.join else "alone"))
        if use.join is not None:
            found.setdefault(use.parameters, []).append(use)
    return {
        names: same
        for names, same in found.items()
        if all(touched[n] == {(*names, "")} for n in names)
        and all(
            u.join and same[0].join and u.join.entries.equal(same[0].join.entries) for u in same
        )
    }


def _columns(
    same: list[Use], uses: Sequence[Use], joining: dict[tuple[str, ...], list[Use]]
) -> tuple[Column, ...]:
    """The biases that join a term: all of their weight uses are in it."""
    place = {id(uses[k]): k for k in range(len(uses))}
    here = [place[id(u)] for u in same]
    columns = []
    for biases in joining.values():
        at = {b.join.weight: b for b in biases if b.join is not None}
        if set(at) <= set(here):
            columns.append(Column(biases[0], tuple(at.get(k) for k in here)))
    return tuple(columns)


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
