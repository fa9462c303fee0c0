"""Program -> what is drawn of its network, with all that the drawing says of a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from fxkfac.graph.drawing import labels
from fxkfac.graph.drawing.boxes import set_paths
from fxkfac.graph.drawing.colour import Scale, ink_on, number_text
from fxkfac.graph.drawing.fold import drop_layout, fold_quiet, relevant
from fxkfac.graph.drawing.repeats import repeats_once
from fxkfac.graph.network import to_networkx

if TYPE_CHECKING:
    from fxkfac.graph.program import Program


def drawn(program: Program, fold: bool = False, scale: Scale | None = None) -> nx.MultiDiGraph:
    """The network as it is drawn.

    Args:
        program: What `fxkfac.trace` returned.
        fold: Draw layers that repeat once, see `repeats_once`, and no ops that only reshape.
        scale: Numbers of parameters that are shown as colours.

    Returns:
        `to_networkx(program)`, folded, in which ops have a `path`, and parameters have `names`
        (those of all parameters that they stand for), a `value` and the colours `fill` and `ink`.
    """
    network = relevant(to_networkx(program))
    set_paths(network, program)
    network.graph |= {"fold": fold, "repeats": {}}
    for _, node in network.nodes(data=True):
        node["repeats"] = ()
        if node["kind"] == "parameter":
            node["names"] = (node["name"],)
    if fold:
        network = repeats_once(network)
        drop_layout(network)
    fold_quiet(network)
    for _, node in network.nodes(data=True):
        if node["kind"] == "parameter":
            node |= _colours(node, scale)
    return network


def _colours(parameter: labels.Node, scale: Scale | None) -> dict[str, str]:
    values = scale.of(parameter["names"]) if scale is not None else []
    if scale is not None and values:  # what stands for several is as bad as the worst
        fill = scale.fill(max(values))
        return {"value": number_text(values), "fill": fill, "ink": ink_on(fill)}
    pale = labels.PARAMETERS[labels.sort_of(parameter)][1]
    return {"value": "", "fill": labels.PAPER if scale is not None else pale, "ink": labels.INK}
