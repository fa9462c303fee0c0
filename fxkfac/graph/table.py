"""The printed program: one line per use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxkfac.graph.axes import axis_tokens, letters
from fxkfac.graph.form import ONLY
from fxkfac.graph.uses.ir import Source, Use
from fxkfac.graph.uses.normal import normal_weight

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

HEADER = ("parameter", "op", "view", "orientation", "x", "y", "batch axis", "source")


def program_table(program: Program) -> str:
    """Parameter, op, view, orientation, shapes, batch axis and source line of every use."""
    tapped = program.tapped
    lines = [headline(program), *columns([HEADER, *map(use_row, program.uses)])]
    what = {"skip": "left out", "identity": "identity instead"}
    choices = program.structures
    if unused := [name for name, c in choices.items() if c.is_free]:
        lines.append(f"no use (their curvature is zero): {', '.join(unused)}")
    for u in tapped.unsupported:
        kind = choices[u.parameters[0]].structure
        lines.append(f"{what.get(kind, f'exact {kind} instead')}: {u}")
    lines += [
        f"{c.structure}: {name}, {c.reason}"
        for name, c in choices.items()
        if c.structure != "kronecker" and name not in program.uncovered and not c.is_free
    ]
    lines += [f"refused by {name}: {reason}" for name, reason in tapped.refusals.items()]
    return "\n".join(lines)


def headline(program: Program) -> str:
    """How many parameters and uses there are, and what captured them."""
    tapped = program.tapped
    size = "any batch size" if tapped.dynamic else "traced anew for each batch size"
    return (
        f"{counted(len(program.parameters), len(program.uses))}, captured by "
        f"{tapped.captured.front_end}, {size}"
    )


def counted(parameters: int, uses: int) -> str:
    """So many parameters in so many uses."""
    return f"{parameters} parameter{'s' * (parameters != 1)} in {uses} use{'s' * (uses != 1)}"


def use_row(use: Use) -> tuple[str, ...]:
    """One use as the columns of `HEADER`."""
    return (
        " + ".join(use.parameters),
        use.op.removeprefix("aten."),
        " ".join(use.view.steps) or "–",
        orientation(use) + (" (joined)" if use.join else ""),
        "1" if use.is_bias else shape_text(use.x_shape, use.form.x, use),
        shape_text(use.y_shape, use.form.y, use),
        batch_text(use),
        where(use.source, use.module),
    )


def batch_text(use: Use) -> str:
    """Which axis of the output the data are on, and how they are laid out there."""
    if use.batch is None:
        return "unknown"
    if use.batch == ONLY:
        return "–"
    axis, routes = use.form.row_position[use.batch.axis], use.form.routes
    some = " where real" if routes and not routes.axis else ""
    return (str(axis) if str(use.batch) == "N" else f"{axis} ({use.batch})") + some


def shape_text(shape: Sequence[int], axes: str, use: Use) -> str:
    """A shape in which the batch axis is written as a multiple of N."""
    # The input's own axes come first; those that its preparation adds have no length here.
    tokens = axis_tokens(axes)[: len(shape)]
    batch = use.batch
    sizes = [
        str(batch) if batch and letters(token) == [batch.axis] else str(n)
        for token, n in zip(tokens, shape, strict=True)
    ]
    return "×".join(sizes) or "scalar"


def where(source: Source | None, module: str) -> str:
    """File name and line, or the module's path where no line of the user's led here."""
    return f"{Path(source.file).name}:{source.line}" if source else f"module {module or '(root)'}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, a rule under the first row."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "  ".join("─" * w for w in widths), *lines[1:]]


def orientation(use: Use) -> str:
    """What each axis of the stored parameter is: `o i` where it is stored as (out, in)."""
    if not use.view.steps or len(use.parameters) > 1:
        return use.form.orientation()
    entries = normal_weight(use)
    kinds = []
    stride = entries.new_tensor(use.view.numel)
    for size in use.view.shapes[0]:
        stride = stride // size
        place = entries // stride % size  # coordinate of every entry along this stored axis
        kinds.append([k for axis, k in enumerate("gio") if bool((place.diff(dim=axis) != 0).any())])
    return " ".join("·" if not k else k[0] if len(k) == 1 else f"({' '.join(k)})" for k in kinds)
