"""What the nodes of a drawing look like: palette, labels of parameters and ops, legend.

Input: nodes of `folded(to_networkx(program))`. Output: attributes in the language of graphviz.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import networkx as nx

# Dark and light of each hue differ in lightness too, so that the picture prints in grey.
INK, SLATE, LINE, PAPER = "#1F2933", "#55606E", "#C5CCD6", "#FFFFFF"
BLUE, PALE_BLUE = "#1D4E89", "#DCE9F7"  # linear ops, and A, which comes from their inputs
RED, PALE_RED = "#C2410C", "#FDE6D5"  # the gradient, and B, which comes from it
GOLD, PALE_GOLD = "#8F5F00", "#FBEDBB"  # parameters
VIOLET, PALE_VIOLET = "#86198F", "#F5E1F7"  # parameters without rule, and the ops they enter
QUIET = "#E6EAEF"
GAP = "&#8194;"  # an en space: renderers of SVG drop plain spaces at the beginning of a text
NESTING = ("#FAFBFC", "#F3F5F8", "#ECEFF3")  # modules inside modules

STATUS = {
    "covered": (GOLD, PALE_GOLD),
    "unsupported": (VIOLET, PALE_VIOLET),
    "unused": (SLATE, PAPER),
}
STRUCTURES = {
    "diagonal": "exact diagonal",
    "dense": "exact block",
    "identity": "identity",
    "derived": "derived",
    "skip": "left out",
    "error": "no rule",
}
SMALL = "8.5"

Row = tuple[str, str, str, str]  # left and right cell, and their colours
Node = dict[str, Any]


def nesting(depth: int) -> str:
    """The fill of a module inside `depth` others."""
    return NESTING[min(depth, len(NESTING) - 1)]


def look(node: Node, entering: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The look of a node that is no parameter, given the edges that enter it."""
    if node["kind"] == "op":
        return _op(node, entering)
    looks = {"quiet": _quiet, "unsupported": _unsupported}
    return looks.get(node["kind"], _end)(node)


def _end(node: Node) -> dict[str, str]:
    """The input or the prediction."""
    shape = {"label": f"<{_lines(node['name'], node['shape'])}>", "style": "rounded", "color": INK}
    if node["kind"] == "prediction":
        shape |= {"style": "rounded,filled", "fillcolor": INK, "fontcolor": PAPER}
    return shape


def _quiet(node: Node) -> dict[str, str]:
    """A chain of ops without parameters, by their names."""
    names = node["ops"].replace("native_", "")
    lines = [_small(line, SLATE) for line in wrap(names, 34, break_long_words=False)]
    fill = {"style": "rounded,filled", "color": QUIET, "fillcolor": QUIET, "height": "0.2"}
    return {"label": f"<{'<BR/>'.join(lines)}>", "margin": "0.1,0.04", **fill}


def _op(node: Node, entering: Iterable[dict[str, Any]]) -> dict[str, str]:
    """A linear op. Left what comes in, and A; right what goes out, and B."""
    y = f"<I>y</I>{GAP}{node['y']}"
    factors = dict.fromkeys((e["group"], e["A"], e["B"]) for e in entering if "A" in e)
    if not factors:
        return _table(node, BLUE, [(f"bias of {escape(node['joins'])}", y, PAPER, PAPER)])
    if node["tapped"] != node["name"]:
        y += _small(f"  at {node['tapped']}", SLATE)
    rows = [(f"<I>x</I>{GAP}{node['x']}", y, PAPER, PAPER)]
    for group, a, b in factors:
        many = f"{group} × " if group > 1 else ""
        rows.append(
            (
                f"<B>A</B>{GAP}{many}{a}",
                f"<B>B</B>{GAP}{many}{b}",
                PALE_BLUE,
                PALE_RED,
            )
        )
    return _table(node, BLUE, rows)


def _unsupported(node: Node) -> dict[str, str]:
    """An op that a parameter enters without normal form."""
    y = f"<I>y</I>{GAP}{node['shape']}" if node["shape"] else ""
    return _table(node, VIOLET, [("no tap here", y, PAPER, PAPER)])


def _table(node: Node, color: str, rows: list[Row]) -> dict[str, str]:
    head = f"<B>{escape(node['op'])}</B>{GAP}{_small(node['source'], '#DCE3EC')}"
    body = "".join(f"<TR>{_cell(a, c)}{_cell(b, d)}</TR>" for a, b, c, d in rows)
    label = (
        f'<<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="4" COLOR="{color}" '
        f'BGCOLOR="{PAPER}"><TR><TD COLSPAN="2" BGCOLOR="{color}" ALIGN="LEFT">'
        f'<FONT COLOR="{PAPER}">{head}</FONT></TD></TR>{body}</TABLE>>'
    )
    return {"shape": "plain", "label": label}


def _cell(text: str, color: str) -> str:
    return f'<TD BGCOLOR="{color}" ALIGN="LEFT">{text}</TD>'


def stack_look(
    network: nx.MultiDiGraph, keys: Iterable[str], prefix: str, beside: bool = True
) -> dict[str, str]:
    """Parameters as boxes; each is a port that has its key as name.

    Args:
        network: What is drawn.
        keys: The parameters.
        prefix: Path of the module around them, which their names need not repeat.
        beside: They stand beside an op, one under the other, and with the text of the edge that
            leads there. Otherwise they are four in a row.
    """
    cells = [_parameter_cell(network, key, prefix, beside) for key in keys]
    width = 1 if beside else 4
    lines = ("".join(cells[k : k + width]) for k in range(0, len(cells), width))
    rows = "".join(f"<TR>{line}</TR>" for line in lines)
    table = f'<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="3" CELLPADDING="4">{rows}</TABLE>'
    return {"shape": "plain", "label": f"<{table}>"}


def _parameter_cell(network: nx.MultiDiGraph, key: str, prefix: str, beside: bool) -> str:
    node = network.nodes[key]
    color, fill = STATUS[node["status"]]
    style = "" if node["status"] == "covered" else 'STYLE="dashed"'
    remark = STRUCTURES.get(node["structure"], "no use" if node["status"] == "unused" else "")
    uses = list(network.out_edges(key, keys=True))
    axes = {axes_text(network.edges[use]) for use in uses}
    shape = "  ".join([node["shape"], *(axes if len(axes) == 1 else ())])
    name = node["name"].removeprefix(prefix)
    box = f'PORT="{key}" BGCOLOR="{fill}" COLOR="{color}" {style}'
    text = use_text(network, *uses[0]) if beside else ""
    label = f'<TD PORT="{key}_text" BORDER="0" CELLPADDING="1">{_small(text, color)}</TD>'
    return f"<TD {box}>{_lines(name, shape, remark)}</TD>{label if text else ''}"


def color_of(parameter: Node) -> str:
    """The colour of a parameter's border and edges."""
    return STATUS[parameter["status"]][0]


def use_text(network: nx.MultiDiGraph, parameter: str, op: str, place: int) -> str:
    """What stands on an edge: the view, and the orientation where uses differ in it."""
    edge = network.edges[parameter, op, place]
    axes = {axes_text(other) for *_, other in network.out_edges(parameter, data=True)}
    return "  ".join(filter(None, (edge.get("view"), axes_text(edge) if len(axes) > 1 else "")))


def axes_text(edge: dict[str, Any]) -> str:
    """What the axes of the stored parameter are for one use; empty for a bias."""
    axes = edge.get("orientation", "")
    return f"({axes})" if " " in axes else ""


def _small(text: str, color: str) -> str:
    return f'<FONT POINT-SIZE="{SMALL}" COLOR="{color}">{escape(text)}</FONT>' if text else ""


def _lines(name: str, *more: str) -> str:
    rest = "".join(f'<BR/><FONT POINT-SIZE="9">{escape(text)}</FONT>' for text in more if text)
    return escape(name) + rest


def title(name: str, remark: str, lines: int = 1) -> str:
    """The label of a module or function, in one or two lines."""
    between = "  " if lines == 1 else '<BR ALIGN="LEFT"/>'
    return f"<<B>{escape(name)}</B>{between}{_small(remark, SLATE)}{between if lines > 1 else ''}>"


def edge_text(text: str, color: str) -> dict[str, str]:
    """A text on an edge."""
    size = {"width": "0", "height": "0", "margin": "0.04,0.02"}
    return {"label": f"<{_small(text, color)}>", "peripheries": "0", **size}


def legend(network: nx.MultiDiGraph) -> str:
    """What the colours, arrows and letters mean; only of what occurs."""
    nodes = [node for _, node in network.nodes(data=True)]
    shown = {node["kind"] for node in nodes} | {node.get("status") for node in nodes}
    columns = ([entry for when, entry in column if when in shown] for column in LEGEND)
    lines = zip_longest(*columns, fillvalue="<TD></TD><TD></TD>")
    rows = "".join(f"<TR>{''.join(line)}</TR>" for line in lines)
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="1">{rows}</TABLE>>'


def _entry(sign: str, text: str, color: str = PAPER, border: str = PAPER, ink: str = INK) -> str:
    sign = f'<FONT POINT-SIZE="{SMALL}" COLOR="{ink}"><B>{sign}</B></FONT>' if sign else ""
    box = f'WIDTH="24" HEIGHT="13" BGCOLOR="{color}" BORDER="1" COLOR="{border}"'
    return f'<TD {box}>{sign}</TD><TD ALIGN="LEFT">{_small(text, SLATE)}</TD>'


LEGEND = (
    (
        ("covered", _entry("", "parameter, (o i) where it is (out, in)", PALE_GOLD, GOLD)),
        ("unsupported", _entry("", "parameter or op without rule", PALE_VIOLET, VIOLET)),
        ("unused", _entry("", "parameter without use", PAPER, SLATE)),
        ("op", _entry("", "linear op with a tap", BLUE, BLUE)),
        ("quiet", _entry("", "ops without parameters", QUIET, QUIET)),
    ),
    (
        ("op", _entry("A", "factor from the inputs x", PALE_BLUE, PALE_BLUE)),
        ("op", _entry("B", "factor from the gradients at y", PALE_RED, PALE_RED)),
        ("prediction", _entry("→", "data, N of them", ink=SLATE)),
        ("op", _entry("←--", "backpropagated vectors", ink=RED)),
    ),
)
