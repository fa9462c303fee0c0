"""What the nodes of a drawing look like: palette, labels of parameters and ops, legend.

Input: nodes of `drawn(program)`. Output: attributes in the language of graphviz.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import networkx as nx

from fxkfac.graph.drawing.colour import Scale, number_text

# Dark and light of each hue differ in lightness too, so that the picture prints in grey.
INK, SLATE, LINE, PAPER = "#1F2933", "#55606E", "#C5CCD6", "#FFFFFF"
BLUE, PALE_BLUE = "#1D4E89", "#DCE9F7"  # linear ops, and A, which comes from their inputs
RED, PALE_RED = "#C2410C", "#FDE6D5"  # the gradient, and B, which comes from it
GOLD, PALE_GOLD = "#8F5F00", "#FBEDBB"  # parameters
GREEN, PALE_GREEN = "#2B6B4F", "#DDF0E4"  # parameters with exact blocks, or none
VIOLET, PALE_VIOLET = "#86198F", "#F5E1F7"  # parameters without rule, and the ops they enter
QUIET = "#E6EAEF"
GAP = "&#8194;"  # an en space: renderers of SVG drop plain spaces at the beginning of a text
NESTING = ("#FAFBFC", "#F3F5F8", "#ECEFF3")  # modules inside modules

PARAMETERS = {
    "factors": (GOLD, PALE_GOLD),
    "other": (GREEN, PALE_GREEN),
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

Cell = tuple[str, str, str]  # a sign, its text, and their colour
Row = tuple[Cell, ...]
BLANK: Cell = ("", "", PAPER)
Node = dict[str, Any]


def nesting(depth: int) -> str:
    """The fill of a module inside `depth` others."""
    return NESTING[min(depth, len(NESTING) - 1)]


def look(node: Node, entering: Iterable[dict[str, Any]], flat: bool) -> dict[str, str]:
    """The look of a node that is no parameter, given the edges that enter it; `flat` is low."""
    if node["kind"] == "op":
        return _op(node, entering, flat)
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
    fill = {"style": "rounded,filled", "color": LINE, "fillcolor": QUIET, "height": "0.2"}
    return {"label": f"<{'<BR/>'.join(lines)}>", "margin": "0.1,0.04", **fill}


def _op(node: Node, entering: Iterable[dict[str, Any]], flat: bool) -> dict[str, str]:
    """A linear op. Left what comes in, and A; right what goes out, and B; or all in one line.

    A and B are those that its block has: the exact diagonal of a scale has none.
    """
    y = ("<I>y</I>", node["y"], PAPER)
    factors = dict.fromkeys((e["group"], e["A"], e["B"]) for e in entering if "A" in e)
    if not factors and node["joins"]:
        return _table(node, BLUE, [((f"bias of {escape(node['joins'])}", "", PAPER), y)])
    if node["tapped"] != node["name"]:
        y = (y[0], y[1] + GAP + _small(f"at {node['tapped']}", SLATE), PAPER)
    rows: list[Row] = [(("<I>x</I>", node["x"], PAPER), y)]
    for group, *sizes in factors:
        a, b = (factor_text(group, size) for size in sizes)
        rows.append((("<B>A</B>", a, PALE_BLUE), ("<B>B</B>", b, PALE_RED)))
    if flat and factors:
        rows = [rows[0] + rows[1], *((BLANK, BLANK, *row) for row in rows[2:])]
    return _table(node, BLUE, rows)


def factor_text(group: int, size: str) -> str:
    """The size of a factor, and how many there are of it."""
    return f"{group} × {size}" if group > 1 else size


def _unsupported(node: Node) -> dict[str, str]:
    """An op that a parameter enters without normal form."""
    y = ("<I>y</I>" if node["shape"] else "", node["shape"], PAPER)
    return _table(node, VIOLET, [(("no tap here", "", PAPER), y)])


def _table(node: Node, color: str, rows: list[Row]) -> dict[str, str]:
    head = f"<B>{escape(node['op'])}</B>{GAP}{_small(node['source'], '#DCE3EC')}"
    body = "".join(f"<TR>{''.join(_cells(*cell) for cell in row)}</TR>" for row in rows)
    label = (
        f'<<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="4" COLOR="{color}" '
        f'BGCOLOR="{PAPER}"><TR><TD COLSPAN="{2 * len(rows[0])}" BGCOLOR="{color}" ALIGN="LEFT">'
        f'<FONT COLOR="{PAPER}">{head}</FONT></TD></TR>{body}</TABLE>>'
    )
    return {"shape": "plain", "label": label}


def _cells(sign: str, text: str, color: str) -> str:
    """The sign in a cell of its own: renderers differ in what they make of spaces after it."""
    if not text:
        return f'<TD COLSPAN="2" BGCOLOR="{color}" ALIGN="LEFT">{sign}</TD>'
    return f'<TD BGCOLOR="{color}">{sign}</TD><TD BGCOLOR="{color}" ALIGN="LEFT">{text}</TD>'


def stack_look(
    network: nx.MultiDiGraph, keys: Iterable[str], around: Sequence[str], beside: bool = True
) -> dict[str, str]:
    """Parameters as boxes; each is a port that has its key as name.

    Args:
        network: What is drawn.
        keys: The parameters.
        around: Path of the module around them, which their names need not repeat.
        beside: They stand beside an op, one under the other, and with the text of the edge that
            leads there. Otherwise they are four in a row.
    """
    cells = [_parameter_cell(network, key, around, beside) for key in keys]
    width = 1 if beside else 4
    lines = ("".join(cells[k : k + width]) for k in range(0, len(cells), width))
    rows = "".join(f"<TR>{line}</TR>" for line in lines)
    table = f'<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="3" CELLPADDING="4">{rows}</TABLE>'
    return {"shape": "plain", "label": f"<{table}>"}


def _parameter_cell(network: nx.MultiDiGraph, key: str, around: Sequence[str], beside: bool) -> str:
    node = network.nodes[key]
    color = color_of(node)
    style = "" if node["status"] == "covered" else 'STYLE="dashed"'
    remark = remark_of(node)
    uses = list(network.out_edges(key, keys=True))
    axes = {axes_text(network.edges[use]) for use in uses}
    shape = "  ".join([node["shape"], *(axes if len(axes) == 1 else ())])
    box = f'PORT="{key}" BGCOLOR="{node["fill"]}" COLOR="{color}" {style}'
    text = use_text(network, *uses[0]) if beside else ""
    label = f'<TD PORT="{key}_text" BORDER="0" CELLPADDING="1">{_small(text, color)}</TD>'
    name, more = name_inside(node["names"], around), [shape, remark, node["value"]]
    lines = _line(name, *more) if network.graph["fold"] else _lines(name, *more)
    ink = f'<FONT COLOR="{node["ink"]}">{lines}</FONT>'
    return f"<TD {box}>{ink}</TD>{label if text else ''}"


def remark_of(parameter: Node) -> str:
    """What is said of a parameter whose block is no Kronecker product."""
    return (
        "no use" if parameter["status"] == "unused" else STRUCTURES.get(parameter["structure"], "")
    )


def name_inside(names: Sequence[str], around: Sequence[str]) -> str:
    """The name of a parameter inside a module; of several, with the range of what differs."""
    parts = [name.split(".") for name in names]
    depth = len(around) if parts[0][: len(around)] == list(around) else 0
    ranges = ((ends[0], ends[-1]) for ends in zip(*(p[depth:] for p in parts), strict=True))
    return ".".join(first if first == last else f"{first}…{last}" for first, last in ranges)


def color_of(parameter: Node) -> str:
    """The colour of a parameter's border and edges."""
    return PARAMETERS[sort_of(parameter)][0]


def sort_of(parameter: Node) -> str:
    """Which of `PARAMETERS` a parameter is."""
    if parameter["status"] != "covered":
        return str(parameter["status"])
    return "factors" if parameter["structure"] == "kronecker" else "other"


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
    return "<BR/>".join([escape(name), *(_small_of(text) for text in more if text)])


def _small_of(text: str) -> str:
    return f'<FONT POINT-SIZE="9">{escape(text)}</FONT>'


def _line(name: str, *more: str) -> str:
    return "  ".join([escape(name), *(_small_of(text) for text in more if text)])


def title(name: str, remark: str, count: int = 1, lines: int = 1) -> str:
    """The label of a module or function, in one or two lines."""
    between = GAP if lines == 1 else '<BR ALIGN="LEFT"/>'
    times = f'<FONT POINT-SIZE="13"><B>{count} ×</B></FONT>{GAP if name else ""}' * (count > 1)
    head = f"{times}<B>{escape(name)}</B>" if name else times
    return f"<{head}{between}{_small(remark, SLATE)}{between if lines > 1 else ''}>"


def edge_text(text: str, color: str) -> dict[str, str]:
    """A text on an edge."""
    size = {"width": "0", "height": "0", "margin": "0.04,0.02"}
    return {"label": f"<{_small(text, color)}>", "peripheries": "0", **size}


def legend(network: nx.MultiDiGraph, scale: Scale | None = None) -> str:
    """What the colours, arrows and letters mean; only of what occurs."""
    nodes = [node for _, node in network.nodes(data=True)]
    shown = {node["kind"] for node in nodes}
    shown |= {sort_of(node) for node in nodes if node["kind"] == "parameter"}
    shown |= {"repeats"} if network.graph["repeats"] else set()
    columns = [[entry for when, entry in column if when in shown] for column in LEGEND]
    if network.graph["fold"]:
        columns = [
            part for c in columns for part in (c[: (len(c) + 1) // 2], c[(len(c) + 1) // 2 :])
        ]
    lines = zip_longest(*columns, fillvalue="<TD></TD><TD></TD>")
    rows = "".join(f"<TR>{''.join(line)}</TR>" for line in lines)
    if scale is not None:  # what a parameter is, its border says
        for _, pale in PARAMETERS.values():
            rows = rows.replace(pale, PAPER)
        rows += _ramp(scale, "repeats" in shown, 2 * len(columns))
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="1">{rows}</TABLE>>'


def _ramp(scale: Scale, folded: bool, span: int) -> str:
    """The colours of a scale, with its ends, under `span` cells."""
    low, high = (number_text([end]) for end in scale.ends)
    steps = scale.steps(9) if low != high else [scale.fill(scale.ends[0])]
    boxes = "".join(f'<TD BGCOLOR="{fill}" WIDTH="16" HEIGHT="13"></TD>' for fill in steps)
    ends = [f"<TD>{_small(text, INK)}</TD>" for text in (low, high)]
    row = f"{ends[0]}{boxes}{ends[1]}" if low != high else f"{boxes}{ends[1]}"
    table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0"><TR>{row}</TR></TABLE>'
    text = _small(scale_text(scale, folded), SLATE)
    return f'<TR><TD COLSPAN="{span}">{table}</TD></TR><TR><TD COLSPAN="{span}">{text}</TD></TR>'


def scale_text(scale: Scale, folded: bool) -> str:
    """What a scale's colours mean."""
    how = ["logarithmic"] * scale.logarithmic + ["of repeated layers the largest"] * folded
    return ", ".join([f"colour of a parameter: {scale.name}", *how])


def _entry(sign: str, text: str, color: str = PAPER, border: str = PAPER, ink: str = INK) -> str:
    sign = f'<FONT POINT-SIZE="{SMALL}" COLOR="{ink}"><B>{sign}</B></FONT>' if sign else ""
    box = f'WIDTH="24" HEIGHT="13" BGCOLOR="{color}" BORDER="1" COLOR="{border}"'
    return f'<TD {box}>{sign}</TD><TD ALIGN="LEFT">{_small(text, SLATE)}</TD>'


LEGEND = (
    (
        ("factors", _entry("", "parameter, (o i) where it is (out, in)", PALE_GOLD, GOLD)),
        ("other", _entry("", "parameter without factors", PALE_GREEN, GREEN)),
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
        ("repeats", _entry("12 ×", "equal layers in a row; the first is shown", ink=INK)),
    ),
)
