"""What is drawn -> one HTML file by itself, in which one can move, search and click.

The page has a layout of its own (layout.js), so that it needs no `dot` and has no limit: a row for
each node in the order in which the graph runs, and a lane for each value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import networkx as nx

from fxkfac.graph.drawing import labels
from fxkfac.graph.drawing.boxes import Box, Scope, boxes, names_around, plain_scopes, scopes
from fxkfac.graph.drawing.colour import Scale, number_text
from fxkfac.graph.drawing.details import Details
from fxkfac.graph.drawing.picture import counts_text

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

PALETTE = {
    "ink": labels.INK, "slate": labels.SLATE, "line": labels.LINE, "paper": labels.PAPER,
    "blue": labels.BLUE, "pale-blue": labels.PALE_BLUE, "red": labels.RED,
    "pale-red": labels.PALE_RED, "violet": labels.VIOLET, "quiet": labels.QUIET,
}  # fmt: skip


def page(program: Program, network: nx.MultiDiGraph, scale: Scale | None, details: Details) -> str:
    """The page.

    Args:
        program: What `fxkfac.trace` returned.
        network: What `drawn` returned.
        scale: The numbers that colours stand for.
        details: What `details_of` returned.
    """
    content = json.dumps(page_data(program, network, scale, details), allow_nan=False)
    palette = "".join(f"--{name}: {colour}; " for name, colour in PALETTE.items())
    parts = {
        "title": escape(str(network.graph["model"])),
        "style": f":root {{ {palette}}}\n{_file('page.css')}",
        "layout": _file("layout.js"),
        "script": _file("page.js"),
        "panel": _file("panel.js"),
        "data": content.replace("<", "\\u003c"),  # no name of the user's may end the script
    }
    text = _file("page.html")
    for name, part in parts.items():
        before, after = text.split(f"{{{{{name}}}}}")
        text = before + part + after
    return text


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def page_data(
    program: Program, network: nx.MultiDiGraph, scale: Scale | None, details: Details
) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    places = scopes(network)
    plain = plain_scopes(network, places)
    tree = boxes(program, network, places, plain)
    chains = {key: chain for box, chain in _walk(tree, ()) for key in box.nodes}
    order = {key: k for k, key in enumerate(network)}
    keys = nx.lexicographical_topological_sort(network, key=order.__getitem__)
    parameters = {
        key: _parameter(network, key, names_around(network, places[key], plain), details)
        for key, kind in network.nodes(data="kind")
        if kind == "parameter"
    }
    shown = [key for key in keys if key not in parameters]
    edges = [(u, v, e["gradient"]) for u, v, e in network.edges(data=True) if e["kind"] == "data"]
    return {
        "model": network.graph["model"],
        "counts": counts_text(program),
        "boxes": {
            _id(box): {
                "name": box.name, "remark": box.remark, "count": box.count,
                "around": len(chain) > 1, "inner": [_id(b) for b in _shown_inside(box)],
            }
            for box, chain in _walk(tree, ())
            if not box.plain
        },
        "nodes": [_node(network, key, chains.get(key, ()), parameters) for key in shown]
        + _unused(parameters, _id(tree)),
        "parameters": parameters,
        "edges": edges,
        "scale": _scale(scale, bool(network.graph["repeats"])),
    }  # fmt: skip


def _walk(box: Box, around: tuple[str, ...]) -> Iterator[tuple[Box, tuple[str, ...]]]:
    """Every box, with the chain of those that are shown around it, and itself."""
    chain = around if box.plain else (*around, _id(box))
    yield box, chain
    for inner in box.inner:
        yield from _walk(inner, chain)


def _id(box: Box) -> str:
    return "box " + ".".join(box.scope)


def _shown_inside(box: Box) -> list[Box]:
    return [inner for inner in box.inner if not inner.plain]


def _node(
    network: nx.MultiDiGraph, key: str, chain: tuple[str, ...], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    node = network.nodes[key]
    entering = list(network.in_edges(key, data=True))
    own = list(dict.fromkeys(u for u, *_ in entering if u in parameters))
    factors = dict.fromkeys(
        tuple(labels.factor_text(e["group"], e[which]) for which in "AB")
        for *_, e in entering
        if "A" in e
    )
    said = ("module", "source", "code", "x", "y", "batch", "joins", "reason", "tap", "shape")
    title = node["ops"] if node["kind"] == "quiet" else node.get("op", node["name"])
    names = [name for parameter in own for name in network.nodes[parameter]["names"]]
    text = [key, title, *names, *(str(node.get(what, "")) for what in ("module", "source", "code"))]
    return {
        "key": key,
        "kind": node["kind"],
        "boxes": chain,
        "title": title,
        "parameters": own,
        "factors": list(factors),
        "text": " ".join(text).lower(),
        "tapped": node["tapped"] if node.get("tapped", key) != key else "",
        **{what: node.get(what, "") for what in said},
    }


def _unused(parameters: Mapping[str, Any], box: str) -> list[dict[str, Any]]:
    """A row for the parameters that enter no op."""
    keys = [key for key, parameter in parameters.items() if not parameter["uses"]]
    names = " ".join(parameters[key]["name"] for key in keys).lower()
    row = {"key": "no use", "kind": "quiet", "boxes": [box], "title": "no use", "text": names}
    blank = dict.fromkeys(("module", "source", "code", "x", "y", "batch", "joins", "reason"), "")
    row |= {**blank, "parameters": keys, "factors": [], "tap": "", "shape": "", "tapped": ""}
    return [row] if keys else []


def _parameter(
    network: nx.MultiDiGraph, key: str, around: Scope, details: Details
) -> dict[str, Any]:
    node = network.nodes[key]
    uses = [
        {"node": v, "view": edge["view"], "orientation": edge.get("orientation", "")}
        for _, v, edge in network.out_edges(key, data=True)
    ]
    said = ("shape", "numel", "status", "structure", "reason", "value", "fill", "ink")
    return {
        "name": labels.name_inside(node["names"], ()),
        "label": labels.name_inside(node["names"], around),
        "border": labels.color_of(node),
        "uses": uses,
        "details": [
            {"name": name, "facts": details[name]} for name in node["names"] if name in details
        ],
        **{what: node[what] for what in said},
    }


def _scale(scale: Scale | None, folded: bool) -> dict[str, Any] | None:
    if scale is None:
        return None
    low, high = (number_text([end]) for end in scale.ends)
    text = labels.scale_text(scale, folded)
    return {"name": scale.name, "text": text, "low": low, "high": high, "steps": scale.steps(9)}
