"""Packed sequences, captured as padded ones.

How many rows a packed sequence has at a step, Python reads out of the lengths, so that a graph of
it would hold for one batch alone. While `packing` is on, the padded rows stand in the place of the
packed ones, and the lengths are data like others. Whatever else meets a packed sequence is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import modules
from torch.nn.utils import rnn
from torch.overrides import TorchFunctionMode

from fxkfac.graph.front_ends.recurrence import CELLS, run, weights_of
from fxkfac.graph.real import CheckedLengths
from fxkfac.graph.source import caller

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

PACK, PACK_LIST = rnn.pack_padded_sequence.__code__, rnn.pack_sequence.__code__
FILES = (rnn.__file__, modules.rnn.__file__)

OUTSIDE = "do that before they are packed, or after pad_packed_sequence"
AS_TENSOR = "pass them padded, with their lengths as a tensor, to pack_padded_sequence"
WHOLE = "pack the sequences of all data outside of it"
NO_DROPOUT = "call model.eval() before tracing, or have a module for each layer"


def _refuse(what: str, remedy: str, frame: FrameType | None) -> NoReturn:
    raise RuntimeError(f"{what} at {caller(frame)}: {remedy}")


class _Stand:
    """Stands in a `PackedSequence` for a tensor of which nobody may ask more than is here."""

    what = "what a packed sequence holds"

    def __getattr__(self, name: str) -> NoReturn:
        at = caller(sys._getframe(1))
        raise AttributeError(f"{self.what}, read by {name}, at {at}: {OUTSIDE}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(f"{cls.what}, read by {func.__name__},", OUTSIDE, sys._getframe(1))


@dataclass(frozen=True)
class PackedRows(_Stand):
    """The data of a packed sequence: the rows of the padded one, (steps, batch, d)."""

    padded: Tensor
    what = "the data of a packed sequence"

    @property
    def dtype(self) -> torch.dtype:
        """Their dtype."""
        return self.padded.dtype

    @property
    def device(self) -> torch.device:
        """Their device."""
        return self.padded.device


@dataclass(frozen=True)
class PackedSizes(_Stand):
    """The batch sizes of a packed sequence: the lengths instead, and which steps are real."""

    lengths: Int[Tensor, " batch"]
    real: Bool[Tensor, "steps batch"]
    what = "the batch sizes of a packed sequence"
    device = torch.device("cpu")

    def __getitem__(self, step: int) -> Any:
        if step != 0:
            _refuse(f"{self.what}, read at a step,", OUTSIDE, sys._getframe(1))
        return self.real.shape[1]  # all sequences have a first step

    def size(self, axis: int) -> int:
        """The number of steps of the longest: none that is known. See `_pad`."""
        return 0


class AsGiven(_Stand):
    """The order of the sequences in a packed one. Padded ones need not be sorted."""

    what = "the order of packed sequences"
    device = torch.device("cpu")

    def to(self, *_: Any) -> AsGiven:
        """The same; as is its inverse, which is asked for by `scatter_`."""
        return self

    cpu = scatter_ = to

    def numel(self) -> int:
        """Nothing that anyone scatters."""
        return 0


class _Packing(TorchFunctionMode):
    """Do with padded rows what the model does with packed ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, frame = getattr(func, "__name__", ""), sys._getframe(1)
        if frame.f_code in (PACK, PACK_LIST) and func is torch.as_tensor:
            _refuse("packed sequences whose lengths are a list,", AS_TENSOR, frame)
        if frame.f_code is PACK and func is torch.sort:
            return args[0], AsGiven()
        if frame.f_code.co_filename in FILES and args and isinstance(args[-1], AsGiven):
            return args[0]  # a tensor in this order, or the order's own inverse
        if name == "_pack_padded_sequence":
            return _pack(frame, *args)
        if name == "_pad_packed_sequence" and isinstance(args[0], PackedRows):
            return _pad(*args)
        if name in CELLS and isinstance(args[0], PackedRows):
            return _recur(name, frame, *args)
        return func(*args, **(kwargs or {}))


def _pack(
    frame: FrameType, x: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[PackedRows, PackedSizes]:
    if torch._C._are_functorch_transforms_active():
        _refuse("packed sequences inside of a transform such as vmap,", WHOLE, frame)
    x = x.transpose(0, 1) if batch_first else x
    steps = int(x.shape[0])
    lengths = CheckedLengths.apply(lengths, steps, False)
    real = _is_real(lengths, steps, x.device)
    x = _filled(x, real, 0.0)  # whatever stands in the padding
    return PackedRows(x), PackedSizes(lengths, real)


def _is_real(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """Which steps are real, (steps, batch)."""
    return torch.arange(steps, device=device).unsqueeze(-1) < lengths.to(device)


def _filled(x: Tensor, real: Tensor, value: float) -> Tensor:
    return torch.where(real.view(*real.shape, *[1] * (x.ndim - 2)), x, value)


def _pad(data: PackedRows, sizes: PackedSizes, batch_first: bool, value: float, total: int) -> Any:
    """The padded rows. Without a total length, which is 0 here, the longest sequence gives it."""
    x, steps = data.padded, data.padded.shape[0]
    wanted = int(total) or steps
    lengths = CheckedLengths.apply(sizes.lengths, wanted, not total)
    if wanted > steps:
        x = F.pad(x, (*[0, 0] * (x.ndim - 1), 0, wanted - steps))
    x = _filled(x[:wanted], _is_real(lengths, wanted, x.device), value)
    return (x.transpose(0, 1) if batch_first else x), lengths


def _recur(
    name: str,
    frame: FrameType,
    data: PackedRows,
    sizes: PackedSizes,
    initial: Any,
    flat: list[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Any, ...]:
    """All layers of a recurrent module, as `torch._VF` calls them."""
    if dropout and training and layers > 1:
        _refuse(
            "dropout between the layers of packed sequences, drawn for their real steps alone,",
            NO_DROPOUT,
            frame,
        )
    directions = layers * (2 if bidirectional else 1)
    weights = list(weights_of(flat, directions, biased))
    states = tuple(initial) if name == "lstm" else (initial,)
    y, last = run(CELLS[name], data.padded, sizes.real, states, weights, bidirectional)
    return PackedRows(y), *last


@contextmanager
def packing() -> Iterator[None]:
    """Let a front end record packed sequences as padded ones."""
    with _Packing(), _unchecked(nn.RNNBase), _unchecked(nn.LSTM):
        yield


@contextmanager
def _unchecked(kind: type[nn.RNNBase]) -> Iterator[None]:
    """Without its checks of shapes, which read the number of packed sequences as an int.

    The model's own run makes them.
    """
    check: Callable[..., None] = kind.check_forward_args

    def for_tensors(self: nn.RNNBase, input: Any, hidden: Any, batch_sizes: Any) -> None:
        if not isinstance(batch_sizes, PackedSizes):
            check(self, input, hidden, batch_sizes)

    kind.check_forward_args = for_tensors  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.check_forward_args = check  # type: ignore[method-assign]
