"""Operators made of factors of a Kronecker shape: arrays (group, in, out)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from fxkfac.errors import ParameterError
from fxkfac.linalg.operators.base import Operator, require_alike, require_same_shape

if TYPE_CHECKING:
    from jaxtyping import Float


@final
@dataclass(frozen=True)
class Kronecker(Operator):
    """A ⊗ B for every group: X -> A X B on arrays (group, in, out).

    Attributes:
        A: (group, in, in), or its diagonal (group, in), which is never written out. With one group
            it is the same for all groups of B.
        B: (group, out, out); with one group the same for all groups of A.
        A_least, B_least: What is known to be below all eigenvalues of each, as damping that was
            added to them, (group,); it holds where rounding hides it.
    """

    A: Float[Tensor, "group d_in d_in"] | Float[Tensor, "group d_in"]
    B: Float[Tensor, "group d_out d_out"]
    A_least: Float[Tensor, " group"] | None = None
    B_least: Float[Tensor, " group"] | None = None

    def __post_init__(self) -> None:
        A, B = self.A, self.B
        square = A.ndim == 2 or (A.ndim == 3 and A.shape[1] == A.shape[2])
        if not square or B.ndim != 3 or B.shape[1] != B.shape[2]:
            raise ParameterError(
                f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; expected "
                "(group, in, in), or (group, in) for a diagonal, and (group, out, out)."
            )
        if len(A) != len(B) and 1 not in (len(A), len(B)):
            raise ParameterError(f"A has {len(A)} groups and B {len(B)}; expected as many, or one.")
        require_alike(A, B)

    @property
    def shape(self) -> torch.Size:
        """(group, in, out)."""
        groups = len(self.B) if len(self.A) == 1 else len(self.A)
        return torch.Size((groups, self.A.shape[1], self.B.shape[1]))

    @property
    def like(self) -> Tensor:
        """B."""
        return self.B

    @property
    def least(self) -> tuple[Float[Tensor, " group"], Float[Tensor, " group"]]:
        """What all eigenvalues of A and of B are no smaller than; zero where nothing is known."""
        A, B = self.A_least, self.B_least
        return (
            self.A.new_zeros(len(self.A)) if A is None else A,
            self.B.new_zeros(len(self.B)) if B is None else B,
        )


@final
@dataclass(frozen=True)
class Eigenbasis(Operator):
    """(Q_A ⊗ Q_B) diag(eigenvalues) (Q_A ⊗ Q_B)ᵀ with orthogonal Q, on arrays (group, in, out).

    Every function of a Kronecker product is one, with damping or without; and so is EKFAC, whose
    eigenvalues are no products (George et al. 2018).

    Attributes:
        Q_A: (group, in, in), columns are eigenvectors; `None` for the identity.
        Q_B: (group, out, out); `None` for the identity.
        eigenvalues: (group, in, out).
    """

    Q_A: Float[Tensor, "group d_in d_in"] | None
    Q_B: Float[Tensor, "group d_out d_out"] | None
    eigenvalues: Float[Tensor, "group d_in d_out"]

    def __post_init__(self) -> None:
        _require_basis(self.Q_A, self.Q_B, self.eigenvalues)

    @property
    def shape(self) -> torch.Size:
        """(group, in, out)."""
        return self.eigenvalues.shape

    @property
    def like(self) -> Tensor:
        """The eigenvalues."""
        return self.eigenvalues


@final
@dataclass(frozen=True)
class Congruence(Operator):
    """(U ⊗ V) diag(values) (U ⊗ V)ᵀ with any regular U and V: the inverse of a Kronecker sum."""

    U: Float[Tensor, "group d_in d_in"] | None
    V: Float[Tensor, "group d_out d_out"]
    values: Float[Tensor, "group d_in d_out"]

    def __post_init__(self) -> None:
        _require_basis(self.U, self.V, self.values)

    @property
    def shape(self) -> torch.Size:
        """(group, in, out)."""
        return self.values.shape

    @property
    def like(self) -> Tensor:
        """The values."""
        return self.values


@final
@dataclass(frozen=True)
class Factor(Operator):
    """(U ⊗ V) diag(scale), for once not symmetric: a Cholesky factor, a root, or eigenvectors.

    Attributes:
        U: (group, in, in); `None` for the identity.
        V: (group, out, out); `None` for the identity.
        scale: (group, in, out).
        transposed: Whether this is diag(scale) (U ⊗ V)ᵀ instead.
    """

    U: Float[Tensor, "group d_in d_in"] | None
    V: Float[Tensor, "group d_out d_out"] | None
    scale: Float[Tensor, "group d_in d_out"]
    transposed: bool = False

    def __post_init__(self) -> None:
        _require_basis(self.U, self.V, self.scale)

    @property
    def shape(self) -> torch.Size:
        """(group, in, out)."""
        return self.scale.shape

    @property
    def like(self) -> Tensor:
        """The scale."""
        return self.scale


@final
@dataclass(frozen=True)
class KroneckerSum(Operator):
    """A₁ ⊗ B₁ + A₂ ⊗ B₂, whose inverse is known without writing it out."""

    first: Kronecker
    second: Kronecker

    def __post_init__(self) -> None:
        require_same_shape((self.first, self.second))

    @property
    def shape(self) -> torch.Size:
        """(group, in, out)."""
        return self.first.shape

    @property
    def like(self) -> Tensor:
        """B of the first."""
        return self.first.like


def _require_basis(U: Tensor | None, V: Tensor | None, values: Tensor) -> None:
    """Two factors of a basis, and one number for every pair of their columns."""
    ok = values.ndim == 3
    for factor, size in ((U, values.shape[-2:-1]), (V, values.shape[-1:])):
        if factor is not None:
            ok = ok and factor.shape[1:] == size * 2 and len(factor) in (1, len(values))
            require_alike(factor, values)
    if not ok:
        shapes = [None if t is None else tuple(t.shape) for t in (U, V, values)]
        raise ParameterError(
            f"the bases and the values have shapes {shapes}; expected (group, in, in) or None, "
            "(group, out, out) or None, and (group, in, out)."
        )
