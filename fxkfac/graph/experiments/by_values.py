"""Graphs in which the values of the data say where each datum is: rows are chosen, sorted, routed.

What the experiment finds on the example holds for it alone: a mask that keeps two rows of every
datum may keep one and three of later ones. So for such a graph it is made again for every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from fxkfac.graph.dependence import depend_on
from fxkfac.graph.experiments.locate import Located, locate
from fxkfac.graph.experiments.verify import run_graph
from fxkfac.graph.overloads import arguments
from fxkfac.graph.signature import Signature
from fxkfac.graph.tap import without_dropout
from fxkfac.graph.tapped import Tapped

aten = torch.ops.aten

SORTS = {aten.sort.default, aten.sort.stable, aten.topk.default, aten.kthvalue.default}
MOVED = ("self", "source", "src", "values", "weight")  # operands that hold what is chosen


def is_by_values(graph: Graph, inputs: Sequence[Node]) -> bool:
    """Whether values of the data may choose rows along an axis that grows with their number.

    Args:
        graph: A captured graph.
        inputs: The placeholders of the data.
    """
    dependent = depend_on(graph, inputs)
    sizes_are_known = any(_symbols(n) for n in inputs)
    for node in graph.nodes:
        if node not in dependent or not isinstance(node.target, OpOverload):
            continue
        if has_size_of_values(node):
            return True
        for moved, axis in _chosen_along(node, dependent):
            if not sizes_are_known or _grows(moved, axis):
                return True
    return False


def _symbols(node: Node) -> set[Any]:
    value = node.meta.get("val")
    return set(free_symbols(value)) if isinstance(value, Tensor) else set()


def has_size_of_values(node: Node) -> bool:
    """Whether the number of rows depends on values: a single one looks the same in any order."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))


def _grows(node: Node, axis: int) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not -value.ndim <= axis < value.ndim:
        return True
    return not isinstance(value.shape[axis], int)


def _chosen_along(node: Node, dependent: set[Node]) -> Iterator[tuple[Node, int]]:
    """The tensors of data out of which an op takes, or into which it puts, what values say."""
    named = arguments(node)
    axis = named.get("dim", 0)
    if node.target in SORTS:
        yield named["self"], axis
        return
    index = named.get("index", named.get("indices"))
    if node.target is aten.masked_scatter.default:
        index = named["mask"]
    if isinstance(index, list | tuple):
        axes = [k for k, i in enumerate(index) if i in dependent]
    else:
        axes = [axis] if index in dependent else []
    moved = (named[name] for name in MOVED if named.get(name) in dependent)
    yield from ((t, k) for t in moved for k in axes)


def located_again(
    tapped: Tapped, signature: Signature, state: Mapping[str, Tensor], tensors: list[Tensor]
) -> Tapped:
    """The tapped graph with the layouts that explain the experiment on these data.

    What was found before is kept where it explains them, too.
    """
    quiet = tapped.once("quiet", lambda: without_dropout(tapped.module))
    found = locate(
        lambda data, taps: run_graph(tapped.captured, quiet, state, data, taps),
        signature.permute,
        tensors,
        # Turned about, rows are at the same places only if each datum has as many of them.
        torch.arange(signature.batch_size(tensors), device="cpu").flip(0),
        tapped.uses,
        torch.Generator().manual_seed(0),
        tapped.captured.lowest,
        longer=None,
        known=tapped.prediction,
    )
    layout = found.prediction, found.uses
    if layout == (tapped.prediction, tuple(use.batch for use in tapped.uses)):
        return tapped
    return tapped.once(layout, lambda: _laid_out(tapped, found))


def _laid_out(tapped: Tapped, found: Located) -> Tapped:
    uses = tuple(replace(u, batch=b) for u, b in zip(tapped.uses, found.uses, strict=True))
    return replace(tapped, uses=uses, prediction=found.prediction, memo={})
