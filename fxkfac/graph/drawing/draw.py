"""Program -> a file: a picture, its source, or a page."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graphviz
import networkx as nx

from fxkfac.errors import FxkfacError, OptionError
from fxkfac.graph.drawing.colour import scale_of
from fxkfac.graph.drawing.details import details_of
from fxkfac.graph.drawing.drawn import drawn
from fxkfac.graph.drawing.page import page
from fxkfac.graph.drawing.picture import dot_source
from fxkfac.ranges import require_flag

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

FORMATS = (".svg", ".png", ".pdf", ".gv", ".html")
# Levels that edges cross, all together: what `dot` takes its time for, about a minute for so many.
LIMIT = 20_000


def draw(
    program: Program,
    path: str | os.PathLike[str],
    *,
    fold: bool = False,
    colour: Mapping[str, float] | None = None,
    colour_name: str = "value",
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Draw the program.

    Args:
        program: What `fxkfac.trace` returned.
        path: Where to write. Its ending says the format: .svg, .png, .pdf, .gv for the source of
            these, or .html for a page by itself, in which one can search and click.
        fold: Draw layers that repeat once, with their count.
        colour: A finite number for each parameter that is to be coloured, on a scale from pale
            (the smallest) to dark (the largest); logarithmic if positive and over more than two
            decades. Parameters that are not named stay white; those from which a weight is
            computed have the number of that weight.
        colour_name: What these numbers are, for the legend.
        details: What the page shows of a parameter beside its shapes: names with numbers, texts,
            or sequences of numbers, which are drawn as a curve, as `fxkfac.spectra` gives them.

    Returns:
        The path that was written. Where `dot` is missing this is the source, `<path>.gv`.

    Raises:
        OptionError: Another ending; details in a picture; more than `dot` lays out in a minute; or
            an argument is not what it should be.
        UnknownParameter: A name in `colour` or `details` is not among the parameters, nor among
            the weights that are computed from them.
        NonFiniteError: A number in `colour` is NaN or infinite.
        FxkfacError: The file cannot be written.
    """
    name = os.fspath(path)
    ending = Path(name).suffix.lower()
    _require_format(name, ending, details)
    scale = scale_of(program, colour, colour_name) if colour is not None else None
    said = details_of(program, details or {})
    network = drawn(program, require_flag("fold", fold), scale)
    if ending == ".html":
        return _write(name, page(program, network, scale, said).encode())
    # Only pixels need a resolution; graphviz clips an SVG that has one.
    resolution = {"dpi": "144"} if ending == ".png" else {}
    source = dot_source(program, network, scale, **resolution)
    if ending == ".gv":
        return _write(name, source.encode())
    _require_size(network, name, fold)
    return _render(name, source)


def _require_format(path: str, ending: str, details: Mapping[str, Any] | None) -> None:
    if ending not in FORMATS:
        raise OptionError(
            f"path={path!r} ends in {ending!r}; expected one of {', '.join(FORMATS)}. "
            "The ending says the format."
        )
    if details is not None and ending != ".html":
        raise OptionError(
            f"details are what a page shows of a parameter, but path={path!r} ends in {ending!r}; "
            "expected '.html'. Draw a page, or leave details out."
        )


def _require_size(network: nx.MultiDiGraph, path: str, fold: bool) -> None:
    crossed = _levels_crossed(network)
    if crossed <= LIMIT:
        return
    remedy = "Write" if fold else "Draw layers that repeat once (fold=True), or write"
    raise OptionError(
        f"the drawing {path!r} would have {len(network)} nodes, and edges that cross {crossed} "
        f"levels in all; expected at most {LIMIT}, for which `dot` takes a minute. {remedy} a "
        "page (.html), which has a layout of its own, or the source (.gv), or take "
        "to_networkx()."
    )


def _levels_crossed(network: nx.MultiDiGraph) -> int:
    """Over how many levels edges lead, all together; those with a gradient are drawn twice."""
    levels = enumerate(nx.topological_generations(network))
    level = {key: k for k, keys in levels for key in keys}
    for key, kind in network.nodes(data="kind"):
        if kind == "parameter":  # it stands beside its first op
            level[key] = min((level[op] for op in network.successors(key)), default=0)
    edges = network.edges(data="gradient")
    return sum((level[v] - level[u]) * (2 if passes else 1) for u, v, passes in edges)


def _render(path: str, source: str) -> str:
    ending = Path(path).suffix.lower()[1:]
    try:
        rendered = graphviz.Source(source).pipe(format=ending, quiet=True)
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError) as error:
        written = _write(f"{path}.gv", source.encode())
        warnings.warn(_how_to_render(error, written, path, ending), stacklevel=4)
        return written
    return _write(path, rendered)


def _how_to_render(error: Exception, source: str, path: str, ending: str) -> str:
    missing = isinstance(error, graphviz.ExecutableNotFound)
    why = "the program `dot` was not found" if missing else f"`dot` failed ({error})"
    return (
        f"{why}: the drawing's source was written to {source} instead. Install graphviz (apt "
        "install graphviz, brew install graphviz, conda install graphviz, or "
        f"https://graphviz.org/download) and run `dot -T{ending} {source} -o {path}`."
    )


def _write(path: str, content: bytes) -> str:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise FxkfacError(
            f"cannot write the drawing to {path!r}: {error.strerror}. Make the folder, or choose "
            "a path that you may write to."
        ) from error
    return path
