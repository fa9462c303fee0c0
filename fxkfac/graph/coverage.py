"""Who got what: the structure of every parameter's block, in parameters and in per cent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxkfac.graph.structure import Choice
from fxkfac.graph.table import columns


@dataclass(frozen=True)
class Row:
    """One parameter: its name, its number of entries, its block's structure and the reason."""

    parameter: str
    numel: int
    structure: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """One row for every selected parameter; `print` shows them with their shares."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def shares(self) -> dict[str, float]:
        """For every structure that occurs, its share of all entries, between 0 and 1."""
        total = sum(row.numel for row in self.rows) or 1
        found: dict[str, float] = {}
        for row in self.rows:
            found[row.structure] = found.get(row.structure, 0.0) + row.numel / total
        return found

    def __str__(self) -> str:
        total = sum(row.numel for row in self.rows) or 1
        lines = [
            (row.parameter, f"{row.numel:,}", f"{row.numel / total:.1%}", row.structure, row.reason)
            for row in self.rows
        ]
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in self.shares().items())
        header = ("parameter", "entries", "share", "structure", "reason")
        return "\n".join([*columns([header, *lines]), f"in all: {shares}"])


def coverage(chosen: Mapping[str, Choice], sizes: Mapping[str, int]) -> Coverage:
    """Put choices and sizes together."""
    return Coverage(
        tuple(Row(name, sizes[name], c.structure, c.reason) for name, c in chosen.items())
    )
