"""The user's data as an iterator over (inputs, targets)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fxkfac.errors import DataError, FxkfacError, NoDataError
from fxkfac.ranges import require_flag

Data = Any  # one (inputs, targets) pair, or an iterable of such pairs


def batches(data: Data, progress: bool = False) -> Iterator[tuple[Any, Tensor]]:
    """Iterate over (inputs, targets), from one pair or from an iterable of pairs.

    Raises:
        DataError: A batch is not a pair whose second part is a tensor.
        NoDataError: There is no batch.
        OptionError: `progress` is neither true nor false.
    """
    source: Iterable[Any] = [data] if _is_pair(data) or _is_meant_for_one(data) else data
    if not isinstance(source, Iterable):
        raise DataError(
            f"data is of type {type(data).__name__}; expected one (inputs, targets) pair or an "
            "iterable of such pairs, as a DataLoader is."
        )
    empty = True
    for batch in _with_progress(source) if require_flag("progress", progress) else source:
        found = pair(batch)
        empty = False
        yield found
    if empty:
        raise NoDataError("the data hold no batch; expected at least one. An iterator used up?")


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets. Raises `DataError` where a batch is something else."""
    if not _is_pair(batch):
        of_two = isinstance(batch, tuple | list) and len(batch) == 2
        found = f"has targets of type {type(batch[1]).__name__}" if of_two else "is no pair"
        raise DataError(
            f"a batch is of type {type(batch).__name__}, which {found}; expected a pair (inputs, "
            "targets) whose targets are a tensor."
        )
    return batch[0], batch[1]


def number_of_batches(data: Data) -> int | None:
    """How many there are; `None` where that shows only at their end."""
    if _is_pair(data):
        return 1
    try:
        return len(data)
    except TypeError:  # an iterator, or a loader of an iterable data set
        return None


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)


def _is_meant_for_one(data: Any) -> bool:
    """Whether it is a tensor, or a pair that lacks targets: its first part is no batch."""
    if isinstance(data, Tensor):
        return True
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | Mapping)


def _with_progress(source: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise FxkfacError("progress=True needs tqdm; run `pip install tqdm`.") from error
    return tqdm(source, desc="curvature", unit="batch")
