"""Operators by their entries, and those that are put together of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from fxkfac.errors import ParameterError
from fxkfac.linalg.operators.base import Operator, require_alike, require_same_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@final
@dataclass(frozen=True)
class Diagonal(Operator):
    """diag(rvec(values)), on arrays of the values' own shape."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.values.shape

    @property
    def like(self) -> Tensor:
        """The values."""
        return self.values


@final
@dataclass(frozen=True)
class Dense(Operator):
    """A symmetric matrix as it is, on vectors."""

    matrix: Float[Tensor, "numel numel"]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ParameterError(
                f"the matrix has shape {tuple(self.matrix.shape)}; expected (numel, numel)."
            )

    @property
    def shape(self) -> torch.Size:
        """(numel,)."""
        return self.matrix.shape[:1]

    @property
    def like(self) -> Tensor:
        """The matrix."""
        return self.matrix


@final
@dataclass(frozen=True)
class BlockDiagonal(Operator):
    """Blocks along the diagonal, on the vector of their concatenated rvecs.

    Attributes:
        blocks: The blocks.
        names: What errors call each of them; nothing where it is empty.
    """

    blocks: tuple[Operator, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks or len(self.names) not in (0, len(self.blocks)):
            raise ParameterError(
                f"there are {len(self.blocks)} blocks and {len(self.names)} names; expected at "
                "least one block, and as many names or none."
            )
        require_alike(*(block.like for block in self.blocks))

    @property
    def shape(self) -> torch.Size:
        """(numel,)."""
        return torch.Size((sum(block.numel for block in self.blocks),))

    @property
    def like(self) -> Tensor:
        """That of the first block."""
        return self.blocks[0].like


@final
@dataclass(frozen=True)
class Placed(Operator):
    """An operator whose entries lie somewhere in a larger array, and zero elsewhere: P C Pᵀ.

    Attributes:
        operator: C.
        entries: For every entry of an array that C acts on, its number in the rvec of the larger
            array. One that comes twice is read for both, and has the sum of both.
        into: The shape of the larger array.
    """

    operator: Operator
    entries: Int[Tensor, "*shape"]
    into: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.entries.shape != self.operator.shape:
            raise ParameterError(
                f"the entries have shape {tuple(self.entries.shape)}; expected that of the "
                f"operator, {tuple(self.operator.shape)}."
            )

    @property
    def shape(self) -> torch.Size:
        """That of the larger array."""
        return torch.Size(self.into)

    @property
    def like(self) -> Tensor:
        """That of the operator."""
        return self.operator.like

    @cached_property
    def counts(self) -> Int[Tensor, " numel"]:
        """How often every entry of the larger array comes."""
        return torch.bincount(self.entries.flatten(), minlength=self.numel)

    @cached_property
    def repeats(self) -> bool:
        """Whether an entry comes more than once."""
        return bool((self.counts > 1).any())

    @property
    def is_permutation(self) -> bool:
        """Whether every entry comes once: then functions of C are moved likewise."""
        return self.numel == self.entries.numel() and not self.repeats


@final
@dataclass(frozen=True)
class Sum(Operator):
    """A sum of operators, of which nothing is known but its terms."""

    terms: tuple[Operator, ...]

    def __post_init__(self) -> None:
        require_same_shape(self.terms)

    @property
    def shape(self) -> torch.Size:
        """That of every term."""
        return self.terms[0].shape

    @property
    def like(self) -> Tensor:
        """That of the first term."""
        return self.terms[0].like


def identity(shape: Sequence[int], like: Tensor, scale: float | Tensor = 1.0) -> Diagonal:
    """scale · I on arrays of a shape.

    Its diagonal is one number in memory.

    Args:
        shape: The arrays' shape.
        like: A tensor of the dtype and on the device that the operator is to have.
        scale: A number, or a tensor of no axes.
    """
    number = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    return Diagonal(number.expand(tuple(shape)))
