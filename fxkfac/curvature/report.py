"""What blocks are, in numbers: sizes, condition, rank, trace and its shares, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxkfac.graph.table import columns
from fxkfac.linalg.operators import Summary

HEADER = (
    *("block", "kind", "A", "B", "rows", "cond A", "cond B"),
    *("entries", "rank", "eff. rank", "largest", "cond", "trace", "share", "memory"),
)
UNKNOWN = "–"


@dataclass(frozen=True)
class Part:
    """One Kronecker product of a block.

    Attributes:
        A, B: Shapes of the factors, or of the bases that have taken their place.
        rows: How many rows B was averaged over, in all groups together; `None` where blocks do
            not say, as in a sum of several losses.
        condition_A, condition_B: Their condition numbers, of several groups as one block diagonal
            matrix; ∞ where singular up to rounding. `None` for bases, and where a factor is not
            finite or not positive semi-definite.
    """

    A: tuple[int, ...]
    B: tuple[int, ...]
    rows: int | None
    condition_A: float | None  # noqa: N815 - the field's name
    condition_B: float | None  # noqa: N815 - the field's name


@dataclass(frozen=True)
class Row:
    """One block, or all of them together.

    Attributes:
        params: Names of the parameters.
        kind: `"kronecker"`, `"kronecker sum"` (overlapping, or parts side by side),
            `"eigenbasis"` (EKFAC), `"diagonal"`, `"identity"`, `"dense"`; `"all"` for the total.
        parts: Its Kronecker products; none for an exact block.
        numel: Number of entries of the parameters: the block is numel × numel.
        spectrum: What is told of its eigenvalues; `None` where they are unknown.
        trace: Their sum; `None` where it is not finite.
        share: The part of it in the trace of all; `None` where that is zero or unknown.
        memory: Bytes of the tensors that it holds. What several blocks hold in common, as equal
            inputs have one A, is in the total once.
        note: Why something is unknown; empty where nothing is.
    """

    params: tuple[str, ...]
    kind: str
    parts: tuple[Part, ...]
    numel: int
    spectrum: Summary | None
    trace: float | None
    share: float | None
    memory: int
    note: str = ""

    @property
    def condition(self) -> float | None:
        """The largest eigenvalue over the smallest; ∞ where singular; `None` where unknown."""
        return self.spectrum.condition if self.spectrum and self.numel else None

    def as_dict(self) -> dict[str, Any]:
        """The row in plain data; see `Report.as_dict`."""
        s = self.spectrum
        return {
            "params": list(self.params),
            "kind": self.kind,
            "entries": self.numel,
            "rank": s.rank if s else None,
            "effective_rank": s.effective_rank if s else None,
            "largest": s.largest if s else None,
            "smallest": s.smallest if s else None,
            "condition": _plain(self.condition),
            "trace": self.trace,
            "share": self.share,
            "memory": self.memory,
            "note": self.note,
            "parts": [
                {
                    "A": list(p.A),
                    "B": list(p.B),
                    "rows": p.rows,
                    "condition_A": _plain(p.condition_A),
                    "condition_B": _plain(p.condition_B),
                }
                for p in self.parts
            ],
        }


@dataclass(frozen=True)
class Report:
    """A row for every block, and one for all of them; `print` shows the table.

    Attributes:
        n: Number of data seen; `None` where blocks do not say.
        rows: One for every block, in their order.
        total: All blocks along one diagonal.
    """

    n: int | None
    rows: tuple[Row, ...]
    total: Row

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The same in lists, dicts, numbers and text, as JSON has them.

        JSON has no ∞: the condition number of a singular matrix is the text `"inf"`, and what is
        unknown is `None`.
        """
        rows = [row.as_dict() for row in self.rows]
        return {"n": self.n, "rows": rows, "total": self.total.as_dict()}

    def __str__(self) -> str:
        over = f", over {self.n:,} data" if self.n is not None else ""
        lines = [line for row in (*self.rows, self.total) for line in _lines(row)]
        notes = [f"{_name(row)}: {row.note}" for row in self.rows if row.note]
        title = f"{_some(len(self.total.params), 'parameter')} in {_some(len(self.rows), 'block')}"
        return "\n".join([title + over, *columns([HEADER, *lines]), *notes])


# --- as text ---


def _lines(row: Row) -> list[tuple[str, ...]]:
    """One line for every Kronecker product, the first of which is the block's."""
    parts = [_part_cells(part) for part in row.parts] or [("",) * 5]
    s = row.spectrum
    numbers = (
        f"{row.numel:,}",
        f"{s.rank:,}" if s else UNKNOWN,
        f"{s.effective_rank:.1f}" if s else UNKNOWN,
        f"{s.largest:.2e}" if s else UNKNOWN,
        _ratio(row.condition),
        UNKNOWN if row.trace is None else f"{row.trace:.2e}",
        UNKNOWN if row.share is None else f"{row.share:.1%}",
        readable(row.memory),
    )
    first = (_name(row), "" if row.kind == "all" else row.kind, *parts[0], *numbers)
    return [first, *(("", "", *part, *[""] * len(numbers)) for part in parts[1:])]


def _part_cells(part: Part) -> tuple[str, ...]:
    return (
        "×".join(map(str, part.A)),
        "×".join(map(str, part.B)),
        UNKNOWN if part.rows is None else f"{part.rows:,}",
        _ratio(part.condition_A),
        _ratio(part.condition_B),
    )


def _name(row: Row) -> str:
    return "all" if row.kind == "all" else block_name(row.params)


def block_name(params: Sequence[str]) -> str:
    """What a block is called where it is shown: what is in one module has its path once."""
    first, *others = params
    path = first.rpartition(".")[0] + "."
    short = (p if "." in p.removeprefix(path) else p.removeprefix(path) for p in others)
    return " + ".join([first, *short])


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _ratio(condition: float | None) -> str:
    if condition is None:
        return UNKNOWN
    return "∞" if condition == float("inf") else f"{condition:.1e}"


def _plain(condition: float | None) -> float | str | None:
    return "inf" if condition == float("inf") else condition


def readable(memory: int) -> str:
    """Bytes in the largest unit of which there is at least one: 1,536 is `1.5 KiB`."""
    size, units = float(memory), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
