"""Ops that do two things with a parameter -> the same ops apart, so that each has a rule.

A norm normalises, then scales and shifts: as `norm(x) · w + b` the scale is a product and the
shift an addition, whichever norm it was. A parameter that meets data in `cat`, `where` or the mask
of an attention is an addition to zeros, whose output has the gradient of every datum.

Requires: a rebuilt graph. Result: the same function, with more and simpler nodes. Each file below
holds one family.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from fxkfac.graph.decompositions import elementwise, joins, look_ups, norms, products
from fxkfac.graph.decompositions.rewriter import DECOMPOSITIONS, Rewriter
from fxkfac.graph.dependence import depend_on

__all__ = ["DECOMPOSITIONS", "decompose", "elementwise", "joins", "look_ups", "norms", "products"]


def decompose(graph: Graph, selected: Sequence[Node], inputs: Sequence[Node]) -> None:
    """Rewrite in place every node of an op in `DECOMPOSITIONS` that a selected parameter enters.

    Args:
        graph: The graph.
        selected: The placeholders of the parameters whose curvature is asked for. What frozen ones
            enter stays whole, which is faster and keeps less.
        inputs: The placeholders of the data.
    """
    own = depend_on(graph, selected) - depend_on(graph, inputs)
    for node in list(graph.nodes):
        rewrite = DECOMPOSITIONS.get(node.target)
        if rewrite is None or own.isdisjoint(node.all_input_nodes):
            continue
        with graph.inserting_before(node):
            result = rewrite(Rewriter(graph, node, own))
        if result is not None:
            if "val" in node.meta:  # what comes behind it may be taken apart by what it is
                result.meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    for node in list(graph.nodes):
        norms.fix_statistics(node)
    graph.lint()
