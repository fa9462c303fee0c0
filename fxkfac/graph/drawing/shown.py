"""A name of which something is said -> the parameters at which a drawing shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxkfac.graph.uses.derived import entering

if TYPE_CHECKING:
    from fxkfac.graph.program import Program


def shown_at(program: Program, name: str) -> tuple[str, ...]:
    """One parameter; for a weight that is computed from parameters, all of these.

    Args:
        program: What is drawn.
        name: Of a parameter, any of its names if it is tied, or of a derived weight.

    Raises:
        UnknownParameter: It is the name of neither.
    """
    tapped = program.tapped
    if name not in tapped.derived:
        return (program.model.resolve(name),)
    graph = tapped.captured.module.graph
    (weight,) = (node for node in graph.nodes if node.name == tapped.derived[name][0])
    placeholders = tapped.captured.placeholders().items()
    return entering(graph, weight, {n: p for n, p in placeholders if p in program.asked.derived})
