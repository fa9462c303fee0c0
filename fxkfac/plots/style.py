"""What all pictures have in common: axes of their own, little ink, colours that all can tell apart.

The colours are Okabe and Ito's; what differs in colour differs in its marker or line, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fxkfac.errors import FxkfacError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8F98"
COLOURS = (BLUE, ORANGE, GREEN, BLACK)
MARKERS = ("o", "s", "^", "D")


def axes_or_new(ax: Axes | None, width: float = 6.0, height: float = 4.0) -> Axes:
    """The caller's axes, or those of a new figure, which no state of pyplot knows.

    Raises:
        FxkfacError: Matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxkfacError(
            "fxkfac.plots needs Matplotlib, which is not installed; install it by "
            "`pip install matplotlib`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def quiet(ax: Axes, grid: Literal["x", "y", "both"]) -> None:
    """No box around the plot, and a light grid along one axis or both."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#DADDE2", linewidth=0.6)
    ax.set_axisbelow(True)


def by_layer(ax: Axes, names: Sequence[str]) -> range:
    """One line for every name, the first on top; where they are."""
    places = range(len(names))
    ax.set_yticks(places, labels=[plain(name) for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)
    quiet(ax, "x")
    return places


def plain(name: str) -> str:
    """A name whose dollars Matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def size_for(names: Sequence[str]) -> tuple[float, float]:
    """Inches for so many lines, with names so long beside the plot."""
    longest = max(map(len, names))
    return 6.0 + 0.085 * max(longest - 24, 0), 1.0 + 0.32 * max(len(names), 2)
