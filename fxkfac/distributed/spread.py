"""Matrices that every rank holds -> a function of each, computed on one rank and sent to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxkfac.distributed.flat import flat
from fxkfac.distributed.workers import Workers, failure_of
from fxkfac.errors import MergeError, OptionError
from fxkfac.isolation import full_precision
from fxkfac.linalg.operators.symmetric import require_finite

Matrices = Any  # tensors (.., d, d) by name, or in a list
Result = Any  # a tensor, or a tuple of tensors
Items = list[tuple[Any, Tensor]]


def eigh(matrices: Matrices, group: Any = None) -> Any:
    """Eigenvalues and eigenvectors of symmetric matrices, each computed on one rank.

    Args:
        matrices: Tensors (.., d, d), by name or in a list; the same on every rank. Of each, the
            lower triangle is read.
        group: A group of `torch.distributed`; all ranks by default.

    Returns:
        What is as of `torch.linalg.eigh` in the place of each matrix, its eigenvalues (.., d) in
        ascending order, and its eigenvectors (.., d, d), one a column; the same on every rank, bit
        for bit.

    Raises:
        OptionError: A tensor is no square matrix.
        NonFiniteError: One holds NaN or Inf, on the rank that it is computed on.
        MergeError, RankError: As `spread` does.
    """
    return _spread(_eigh, matrices, group, _require_square)


def _eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(M)
    eigenvalues, Q = torch.linalg.eigh(M)
    return eigenvalues, Q


def spread(function: Callable[[Tensor], Result], matrices: Matrices, group: Any = None) -> Any:
    """A function of each matrix, computed on one rank: all ranks together do each one once.

    Args:
        function: Turns a tensor into a tensor, or a tuple of tensors. What it costs is taken to
            grow as d³, as eigenvalues, inverses and Cholesky factors do.
        matrices: Tensors (.., d, d) of one device, by name or in a list; the same on every rank.
        group: A group of `torch.distributed`; all ranks by default.

    Returns:
        The results in the place of the matrices, in a dict or a list, contiguous, without gradient,
        and the same on every rank, bit for bit.

    Raises:
        MergeError: Ranks hold matrices of other names, shapes or dtypes; on every rank.
        RankError: `function` failed on another rank, and with what; or there is no process group.
        Exception: What `function` raised, on the rank where it did.
    """
    return _spread(function, matrices, group, lambda items: None)


def assignment(costs: Sequence[int], workers: int) -> list[int]:
    """Which worker does what: the longest first, to whom has the least to do (Graham 1969).

    Args:
        costs: Of each task. Equal ones are taken in their order.
        workers: How many there are. Of those with equally little to do, the first is taken.

    Returns:
        For each task, its worker. All are done after at most 4/3 of the shortest time.
    """
    load, owners = [0] * workers, [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = min(range(workers), key=load.__getitem__)
        load[owners[k]] += costs[k]
    return owners


@torch.no_grad()
@full_precision()
def _spread(
    function: Callable[[Tensor], Result],
    matrices: Matrices,
    group: Any,
    require: Callable[[Items], None],
) -> Any:
    workers, named = Workers.of(group), isinstance(matrices, Mapping)
    items: Items = list(matrices.items() if named else enumerate(matrices))
    device = items[0][1].device if items else torch.device("cpu")
    _require_same(workers, items, device)
    require(items)
    owners = assignment([_cost(M) for _, M in items], len(workers.ranks))
    mine = _computed(
        function, [x for x, o in zip(items, owners, strict=True) if o == workers.place]
    )
    done = workers.gather(_Done.of(mine), device)
    workers.require_all([d.failure for d in done], mine if isinstance(mine, Exception) else None)
    assert not isinstance(mine, Exception)
    sent = [iter(_sent(workers, place, d.results, mine, device)) for place, d in enumerate(done)]
    found = [next(sent[owner]) for owner in owners]
    return {key: r for (key, _), r in zip(items, found, strict=True)} if named else found


def _require_square(items: Items) -> None:
    for key, M in items:
        if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
            raise OptionError(
                f"matrices[{key!r}] has shape {tuple(M.shape)}; expected (.., d, d). The A of an "
                "embedding is a diagonal, whose eigenvalues are its entries: leave it out."
            )


def _require_same(workers: Workers, items: Items, device: torch.device) -> None:
    heard = workers.gather([(key, tuple(M.shape), M.dtype) for key, M in items], device)
    others = [place for place, said in enumerate(heard) if said != heard[0]]
    if others:
        pairs = zip_longest(heard[others[0]], heard[0])
        there, here = next(pair for pair in pairs if pair[0] != pair[1])
        raise MergeError(
            f"{workers.name(others)} differ from {workers.name([0])} in the matrices: "
            f"{workers.name(others[:1])} has {there} in the place of {here}; expected the same "
            "names, shapes and dtypes in one order on all ranks."
        )


def _cost(M: Tensor) -> int:
    """d³ for each matrix (.., d, d)."""
    return M.numel() * M.shape[-1] if M.ndim else 1


@dataclass(frozen=True)
class _Made:
    """What one result is: shapes and dtypes of its tensors, and whether it is a tuple."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_tuple: bool

    @staticmethod
    def of(result: Result) -> _Made:
        tensors = _tensors(result)
        shapes, dtypes = (tuple(t.shape) for t in tensors), (t.dtype for t in tensors)
        return _Made(tuple(shapes), tuple(dtypes), not isinstance(result, Tensor))


@dataclass(frozen=True)
class _Done:
    """What a rank has done: its results, or what it has failed with."""

    failure: str | None
    results: list[_Made]

    @staticmethod
    def of(results: list[Result] | Exception) -> _Done:
        if isinstance(results, Exception):
            said = [failure_of(results) or "", *getattr(results, "__notes__", ())]
            return _Done(" ".join(said), [])
        return _Done(None, [_Made.of(r) for r in results])


def _computed(function: Callable[[Tensor], Result], items: Items) -> list[Result] | Exception:
    """Results, or the error of the first that has none; raised when all ranks know of it."""
    results = []
    for key, M in items:
        try:
            results.append(function(M))
            if not all(isinstance(t, Tensor) for t in _tensors(results[-1])):
                raise OptionError("the function returns something else than tensors.")
        except Exception as error:
            error.add_note(f"For matrices[{key!r}], of shape {tuple(M.shape)}.")
            return error
    return results


def _sent(
    workers: Workers,
    place: int,
    made: Sequence[_Made],
    mine: Sequence[Result],
    device: torch.device,
) -> list[Result]:
    """One rank's results, in one flat buffer for every dtype; that rank reads them back, too.

    For its own tensors may be laid out in another way, and what follows would round differently.
    """
    shapes = [pair for m in made for pair in zip(m.shapes, m.dtypes, strict=True)]
    buffers, room = flat(shapes, device)
    if place == workers.place:
        for t, view in zip((t for result in mine for t in _tensors(result)), room, strict=True):
            view.copy_(t)
    for buffer in buffers:
        dist.broadcast(buffer, src=workers.ranks[place], group=workers.group)
    views = iter(room)
    results = [tuple(islice(views, len(m.shapes))) for m in made]
    return [r if m.is_tuple else r[0] for m, r in zip(made, results, strict=True)]


def _tensors(result: Result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
