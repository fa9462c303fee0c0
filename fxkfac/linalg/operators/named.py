"""An operator over named parameters: tensors by name come in, tensors by name go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor

from fxkfac.errors import ParameterError, UnknownParameter
from fxkfac.linalg.operators.base import Operator, require_operator

F = TypeVar("F", bound=Callable[..., Any])


@final
@dataclass(frozen=True)
class Named(Operator):
    """An operator on the concatenated rvec of tensors, which are given and returned by name.

    Tensors may have axes before those of their shape: a batch, the same for all. They are computed
    with in the operator's dtype, and returned in their own.

    Attributes:
        operator: What acts on the concatenated vector.
        shapes: The tensors' names and shapes, in their order.
    """

    operator: Operator
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        found, expected = sum(self.sizes), tuple(self.operator.shape)
        if (found,) != expected:
            raise ParameterError(
                f"the parameters have {found} entries, and the operator acts on arrays {expected}; "
                "expected one vector of all entries."
            )

    @property
    def sizes(self) -> list[int]:
        """The number of entries of every tensor."""
        return [torch.Size(shape).numel() for shape in self.shapes.values()]

    @property
    def shape(self) -> torch.Size:
        """(numel,)."""
        return self.operator.shape

    @property
    def like(self) -> Tensor:
        """That of the operator."""
        return self.operator.like

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name as vectors (*batch, numel), in the operator's dtype.

        Args:
            tensors: One of shape (*batch, *shape) for each of `shapes`.

        Raises:
            UnknownParameter: A name is missing, or is not among the operator's.
            ParameterError: They are no mapping, or one of them is no floating tensor, or has
                another shape.
        """
        if not isinstance(tensors, Mapping):
            raise ParameterError(
                f"the tensors are of type {type(tensors).__name__}; expected a mapping from the "
                f"names {list(self.shapes)[:4]} to tensors."
            )
        if set(tensors) != set(self.shapes):
            missing = [name for name in self.shapes if name not in tensors]
            unknown = [name for name in tensors if name not in self.shapes]
            raise UnknownParameter(
                f"names {missing} are missing and {unknown} unknown; expected a tensor for each of "
                f"{list(self.shapes)}."
            )
        batches = {self._batch(name, tensors[name]) for name in self.shapes}
        if len(batches) > 1:
            raise ParameterError(f"tensors have batches {sorted(batches)}; expected one for all.")
        (batch,) = batches
        flat = [
            tensors[name].reshape(*batch, n)
            for name, n in zip(self.shapes, self.sizes, strict=True)
        ]
        return torch.cat([t.to(self.dtype) for t in flat], dim=-1)

    def _batch(self, name: str, t: Tensor) -> tuple[int, ...]:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            found = t.dtype if isinstance(t, Tensor) else f"of type {type(t).__name__}"
            raise ParameterError(f"{name!r} is {found}; expected a floating tensor.")
        shape = tuple(self.shapes[name])
        before = t.ndim - len(shape)
        if before < 0 or tuple(t.shape[before:]) != shape:
            raise ParameterError(
                f"{name!r} has shape {tuple(t.shape)}; expected {shape}, after a batch's axes."
            )
        return tuple(t.shape[:before])

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors (*batch, numel) as tensors by name, (*batch, *shape): views."""
        parts = vectors.split(self.sizes, dim=-1)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape((*part.shape[:-1], *shape)) for (name, shape), part in pairs}


def public(function: F) -> F:
    """A function of an operator, at its border.

    That of an operator over names is that of the one inside, over the same names. And the caller's
    autocast is for the model: here it is off.
    """

    @wraps(function)
    def wrapped(operator: Operator, *arguments: Any) -> Any:
        require_operator(operator)
        with own_dtype(operator):
            if not isinstance(operator, Named):
                return function(operator, *arguments)
            inner = [_inside(operator, a) for a in arguments]
            found = function(operator.operator, *inner)
        return replace(operator, operator=found) if isinstance(found, Operator) else found

    return cast(F, wrapped)


def own_dtype(operator: Operator) -> AbstractContextManager[Any]:
    """Products in the operator's own dtype, also where the caller has autocast on."""
    kind = operator.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _inside(operator: Named, argument: Any) -> Any:
    if not isinstance(argument, Named):
        return argument
    if list(argument.shapes.items()) != list(operator.shapes.items()):
        raise ParameterError(
            f"one operator is over {list(operator.shapes)}, the other over "
            f"{list(argument.shapes)}; expected the same parameters in the same order."
        )
    return argument.operator
