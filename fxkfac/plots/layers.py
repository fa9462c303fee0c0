"""Pictures with one line for every layer: condition, trace, memory, errors of approximations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxkfac.comparison import METHODS, LayerErrors
from fxkfac.curvature.report import Report, Row, block_name, readable
from fxkfac.errors import OptionError
from fxkfac.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    ORANGE,
    axes_or_new,
    by_layer,
    size_for,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = {"A": (BLUE, "o"), "B": (ORANGE, "s"), "block": (BLACK, "D")}
INFINITE = float("inf")
SHIFT = 0.16  # between markers on the line of one layer, so that none hides another


def condition_numbers(report: Report, ax: Axes | None = None) -> Axes:
    """Condition numbers of A, of B and of the block, for every layer.

    What is singular is an empty marker at the right edge, at ∞; what is unknown is not drawn, and
    the layer's name says so.

    Raises:
        OptionError: The report has no blocks.
        FxkfacError: Matplotlib is not installed.
    """
    names = [
        block_name(row.params) + (" (unknown)" if row.condition is None else "")
        for row in _rows(report)
    ]
    ax = axes_or_new(ax, *size_for(names))
    points = {
        kind: [(c, y) for y, row in enumerate(report.rows) for c in _conditions(row, kind)]
        for kind in FACTORS
    }
    finite = [c for found in points.values() for c, _ in found if c < INFINITE]
    edge = 10 * max(finite, default=1.0)
    for k, (kind, (colour, marker)) in enumerate(FACTORS.items()):
        known = [(c, y + SHIFT * (k - 1)) for c, y in points[kind] if c < INFINITE]
        singular = [(edge, y + SHIFT * (k - 1)) for c, y in points[kind] if c == INFINITE]
        ax.plot(*_xy(known), marker, color=colour, label=kind, markersize=5)
        ax.plot(*_xy(singular), marker, color=colour, fillstyle="none", markersize=5)
    ax.set_xscale("log")
    if any(c == INFINITE for found in points.values() for c, _ in found):
        ax.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
        _end_at_infinity(ax, finite, edge)
    ax.set_xlabel("condition number")
    by_layer(ax, names)
    _legend(ax)
    return ax


def _end_at_infinity(ax: Axes, finite: Sequence[float], edge: float) -> None:
    """Powers of ten among the finite ones, and ∞ where a number would be the next tick."""
    first, last = (math.floor(math.log10(pick(finite, default=1.0))) for pick in (min, max))
    powers = range(first, last + 1, 1 + (last - first) // 8)
    ax.set_xticks([*(10.0**k for k in powers), edge], [*(f"$10^{{{k}}}$" for k in powers), "∞"])
    ax.minorticks_off()


def trace_shares(report: Report, ax: Axes | None = None) -> Axes:
    """Every layer's share of the trace, in per cent.

    Raises:
        OptionError: The report has no blocks, or the trace of all is zero or unknown.
        FxkfacError: Matplotlib is not installed.
    """
    shares = [row.share for row in _rows(report)]
    found = [100 * share for share in shares if share is not None]
    if len(found) < len(shares):
        raise OptionError(
            f"the trace of all blocks is {report.total.trace}, so that they have no shares in it; "
            "expected a positive number. `print(report)` says which block it comes from."
        )
    names = [block_name(row.params) for row in report.rows]
    ax = axes_or_new(ax, *size_for(names))
    bars = ax.barh(by_layer(ax, names), found, height=0.6, color=BLUE)
    ax.bar_label(bars, [f"{share:.1f} %" for share in found], padding=3, fontsize="small")
    ax.set_xlabel(f"share of the trace, {report.total.trace:.3g}, in per cent")
    ax.margins(x=0.15)
    return ax


def memory(report: Report, ax: Axes | None = None) -> Axes:
    """The bytes that every block holds. What several have in common is drawn for each.

    Raises:
        OptionError: The report has no blocks.
        FxkfacError: Matplotlib is not installed.
    """
    names = [block_name(row.params) for row in _rows(report)]
    ax = axes_or_new(ax, *size_for(names))
    found = [row.memory for row in report.rows]
    bars = ax.barh(by_layer(ax, names), found, height=0.6, color=BLUE)
    ax.bar_label(bars, [readable(size) for size in found], padding=3, fontsize="small")
    ax.set_xticks([])  # the bars have their sizes beside them
    ax.set_xlabel(f"memory; all together {readable(report.total.memory)}")
    ax.margins(x=0.15)
    return ax


def layer_errors(errors: LayerErrors, ax: Axes | None = None) -> Axes:
    """Relative errors of KFAC, EKFAC, KFOC and the exact diagonal, for every layer and for all.

    A layer whose exact block is zero has none, and its name says so.

    Raises:
        OptionError: There are no layers.
        FxkfacError: Matplotlib is not installed.
    """
    _require(errors, LayerErrors, "fxkfac.layer_errors")
    if not errors.rows:
        raise OptionError("there are no layers to draw; expected the errors of at least one.")
    rows = [*errors.rows, errors.total]
    names = [block_name(row.params) + ("" if row.norm else " (zero)") for row in errors.rows]
    ax = axes_or_new(ax, *size_for([*names, "all"]))
    for k, method in enumerate(METHODS):
        place = SHIFT * (k - 1.5)
        found = [(e, y + place) for y, r in enumerate(rows) if (e := r.errors[method]) is not None]
        ax.plot(*_xy(found), MARKERS[k], color=COLOURS[k], label=method, markersize=5)
    by_layer(ax, [*names, "all"])
    ax.axhline(len(names) - 0.5, color=GREY, linewidth=0.8)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"relative Frobenius error beside the exact block ({errors.fisher})")
    _legend(ax)
    return ax


def _require(what: Any, kind: type, made_by: str) -> None:
    """Raise `OptionError` unless it is of that kind: factors are easily passed in its place."""
    if not isinstance(what, kind):
        raise OptionError(
            f"a {type(what).__name__} has no such picture; expected a {kind.__name__}, which "
            f"{made_by}(..) returns."
        )


def _rows(report: Report) -> tuple[Row, ...]:
    _require(report, Report, "factors.report")
    if not report.rows:
        raise OptionError("the report has no blocks to draw; expected at least one.")
    return report.rows


def _conditions(row: Row, kind: str) -> list[float]:
    """Those that are known: of the block, or of one factor of every product."""
    found = [row.condition]
    if kind != "block":
        found = [p.condition_A if kind == "A" else p.condition_B for p in row.parts]
    return [c for c in found if c is not None]


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _legend(ax: Axes) -> None:
    """Above the plot, where it hides nothing."""
    ax.legend(
        frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2,
        handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip
