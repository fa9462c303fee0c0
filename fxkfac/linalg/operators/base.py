"""Symmetric positive semi-definite matrices that are not written out, each a small final class.

An operator acts on arrays of its `shape`, of whatever number of axes; its matrix, on their rvec.
What can be done with operators are functions: see the modules beside this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fxkfac.errors import ParameterError


class Operator(ABC):
    """What all operators have in common."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape of the arrays that it acts on."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of its dtype and device."""

    @property
    def numel(self) -> int:
        """The number of rows of its matrix."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors, and of what it acts on."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.like.device


def require_operator(operator: object) -> None:
    """Raise `ParameterError` for something else, such as a matrix."""
    if not isinstance(operator, Operator):
        raise ParameterError(
            f"an operator is of type {type(operator).__name__}; expected one of "
            "fxkfac.operators. Pass Dense(matrix) for a matrix."
        )


def require_alike(*tensors: Tensor) -> None:
    """Raise `ParameterError` unless tensors have one dtype and are on one device."""
    first = tensors[0]
    for t in tensors[1:]:
        if (t.dtype, t.device) != (first.dtype, first.device):
            raise ParameterError(
                f"one part is {first.dtype} on {first.device}, another {t.dtype} on {t.device}; "
                "expected one dtype and one device."
            )


def require_same_shape(operators: Sequence[Operator]) -> None:
    """Raise `ParameterError` unless operators act on arrays of one shape, dtype and device."""
    for operator in operators:
        require_operator(operator)
    shapes = [tuple(op.shape) for op in operators]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise ParameterError(f"the terms act on arrays {shapes}; expected one shape for all.")
    require_alike(*(op.like for op in operators))
