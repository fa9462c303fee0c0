"""Blocks -> a report of them, a row for each. Eigenvalues are those of the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fxkfac.curvature.blocks import Block, Dense, Diagonal, Kronecker, OfParameters
from fxkfac.curvature.eigen import EigenBlock, EigenTerm
from fxkfac.curvature.report import Part, Report, Row
from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.linalg import operators
from fxkfac.linalg.operators import Operator, Summary
from fxkfac.linalg.operators.summary import Summaries, joined


def report_of(
    blocks: Sequence[OfParameters], n: int | None, counted: Sequence[Sequence[int]]
) -> Report:
    """Blocks as a table.

    Args:
        blocks: The blocks; no parameter is in two of them.
        n: Number of data seen.
        counted: For every block, the numbers of rows of its terms; empty where not known.
    """
    summaries = Summaries()
    bare = [_row(b, rows, summaries) for b, rows in zip(blocks, counted, strict=True)]
    total = _total(bare, _bytes([t for b in blocks for t in _held(b)]))
    return Report(n, tuple(_shared(row, total) for row in bare), _shared(total, total))


def _row(block: OfParameters, rows: Sequence[int], summaries: Summaries) -> Row:
    spectrum, trace, note = _spectrum(block, summaries)
    terms: Sequence[Kronecker | EigenTerm] = ()
    if isinstance(block, Block | EigenBlock):
        terms = block.terms
    counts: Sequence[int | None] = rows or [None] * len(terms)
    parts = tuple(_part(t, count, summaries) for t, count in zip(terms, counts, strict=True))
    kind, memory = _kind(block), _bytes(_held(block))
    return Row(block.params, kind, parts, block.numel, spectrum, trace, None, memory, note)


def _spectrum(
    block: OfParameters, summaries: Summaries
) -> tuple[Summary | None, float | None, str]:
    """What is told of the eigenvalues, the trace, and why one of them is unknown."""
    try:
        found = summaries.of(block.operator)
    except NonFiniteError:
        return None, None, "a factor or entry is NaN or Inf; leave out the batch that it comes from"
    except OptionError as error:  # not semi-definite, or too large
        trace = float(operators.trace(block.operator))
        return None, trace if math.isfinite(trace) else None, str(error)
    return found, found.trace, "" if found.numel else "the parameters have no entries"


def _part(term: Kronecker | EigenTerm, rows: int | None, summaries: Summaries) -> Part:
    if isinstance(term, EigenTerm):
        sizes = term.eigenvalues.shape[-2:-1] if term.Q_A is None else term.Q_A.shape
        return Part(tuple(sizes), tuple(term.Q_B.shape), rows, None, None)
    of_A, of_B = (_condition(side, summaries) for side in term.sides)
    return Part(tuple(term.A.shape), tuple(term.B.shape), rows, of_A, of_B)


def _condition(operator: Operator, summaries: Summaries) -> float | None:
    try:
        return summaries.of(operator).condition if operator.numel else None
    except (NonFiniteError, OptionError):
        return None


def _kind(block: OfParameters) -> str:
    match block:
        case Block():
            return "kronecker" if len(block.terms) == 1 else "kronecker sum"
        case EigenBlock():
            return "eigenbasis"
        case Diagonal() if block.numel and bool((block.diagonal == 1).all()):
            return "identity"
        case _:
            return "dense" if isinstance(block, Dense) else "diagonal"


def _held(block: OfParameters) -> list[Tensor]:
    """The tensors that a block consists of."""
    match block:
        case Block():
            return [t for term in block.terms for t in (term.A, term.B)]
        case EigenBlock():
            parts = [(term.Q_A, term.Q_B, term.eigenvalues) for term in block.terms]
            return [t for part in parts for t in part if t is not None]
        case Diagonal():
            return [block.diagonal]
        case Dense():
            return [block.matrix]
        case _:
            return []


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of all of them; those at one address count once."""
    return sum({(t.data_ptr(), t.device, t.nbytes): t.nbytes for t in tensors}.values())


def _total(rows: Sequence[Row], memory: int) -> Row:
    spectra = [row.spectrum for row in rows if row.spectrum]
    traces = [row.trace for row in rows if row.trace is not None]
    return Row(
        tuple(name for row in rows for name in row.params),
        "all",
        (),
        sum(row.numel for row in rows),
        joined(spectra) if len(spectra) == len(rows) else None,
        sum(traces, 0.0) if len(traces) == len(rows) else None,
        None,
        memory,
    )


def _shared(row: Row, total: Row) -> Row:
    """The same row with its share in the trace of all."""
    if row.trace is None or not total.trace:
        return row
    return replace(row, share=row.trace / total.trace)
