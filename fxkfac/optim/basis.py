"""One block of the curvature in its own basis: rotate, divide by damped eigenvalues, rotate back.

    (A ⊗ B + λ I)⁻¹ vec G = vec Q_A ((Q_Aᵀ G Q_B) / (Λ_A Λ_B + λ)) Q_Bᵀ

The decomposition is what costs, and it holds for any damping. An exact block, diagonal or dense, is
a product with B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.blocks import Block, Diagonal
from fxkfac.curvature.curvature import AnyBlock
from fxkfac.curvature.laid_out import turned
from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.linalg.operators import BlockDiagonal, Damping, Kronecker, KroneckerSum, damped
from fxkfac.linalg.operators.pencil import pencil
from fxkfac.linalg.operators.spectra import of_blocks, written_out
from fxkfac.linalg.operators.symmetric import factor_eigh, symmetric_eigh
from fxkfac.precision import accurate

if TYPE_CHECKING:
    from jaxtyping import Float

Eigh = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Basis:
    """The basis of one block; a group axis of length one stands for all groups.

    Attributes:
        left: Q_A, of shape (group, in, in); `None` for the identity, where A is diagonal.
        right: Q_B, of shape (group, out, out); `None` where B = 1.
        inputs: The eigenvalues of A, (group, in).
        outputs: The eigenvalues of B, (group, out).
        split: Whether both factors are damped, (A + π√λ I) ⊗ (B + √λ/π I), rather than their
            product, A ⊗ B + λ I.
        damping: What is added in the place of λ; zero where λ is in the values already.
        values: In the place of the products of eigenvalues, (group, in, out): second moments of
            the gradient in this basis, or a damped sum of two products.
    """

    left: Tensor | None
    right: Tensor | None
    inputs: Tensor
    outputs: Tensor
    split: bool = False
    damping: float | None = None
    values: Tensor | None = None

    def rotated(self, G: Float[Tensor, "group d_in d_out"]) -> Float[Tensor, "group d_in d_out"]:
        """Q_Aᵀ G Q_B."""
        G = G if self.left is None else self.left.mT @ G
        return G if self.right is None else G @ self.right

    def eigenvalues(self) -> Float[Tensor, "group d_in d_out"]:
        """Λ_A Λ_B, or what is in their place."""
        if self.values is not None:
            return self.values
        return self.inputs.unsqueeze(-1) * self.outputs.unsqueeze(-2)

    def solve(
        self, G: Float[Tensor, "group d_in d_out"], damping: float
    ) -> Float[Tensor, "group d_in d_out"]:
        """What the block with λ on its eigenvalues makes G of, for a G in the block's order."""
        λ = damping if self.damping is None else self.damping
        scaled = self.rotated(G) / (self.eigenvalues() + λ)
        scaled = scaled if self.left is None else self.left @ scaled
        return scaled if self.right is None else scaled @ self.right.mT

    def inverses(self, damping: float) -> Inverses:
        """Those of both damped factors: they take half of the products that bases do.

        π² is the ratio of the mean eigenvalues (Martens & Grosse 2015, Section 6.3).
        """
        a, b = (λ.mean(-1, keepdim=True) for λ in (self.inputs, self.outputs))
        fits = (a > 0) & (b > 0)  # a factor that is zero has no size to speak of
        π = torch.where(fits, a.sqrt() / torch.where(fits, b, 1.0).sqrt(), 1.0)
        return Inverses(
            _inverse(self.left, self.inputs + π * damping**0.5),
            _inverse(self.right, self.outputs + damping**0.5 / π),
        )

    def observe(self, G: Float[Tensor, "group d_in d_out"], R: float, decay: float) -> Basis:
        """The second moments, one gradient later: (Q_Aᵀ G Q_B)² / R is averaged into them.

        With G = R Σ_n G_n, and gradients G_n of single data that are independent with mean zero,
        that is in expectation R Σ_n (Q_Aᵀ G_n Q_B)², the diagonal of the empirical Fisher.
        """
        squares = (self.rotated(G) / R**0.5).square()
        return replace(self, values=torch.lerp(self.eigenvalues(), squares, 1 - decay))

    def carried(self, before: Basis) -> Basis:
        """This basis with those of another one: the diagonal, here, of what they are there."""
        s = before.eigenvalues()
        if self.left is not None and before.left is not None:
            s = (self.left.mT @ before.left).square() @ s
        if self.right is not None and before.right is not None:
            s = s @ (before.right.mT @ self.right).square()
        return replace(self, values=s)


def require_squares(gradients: Mapping[str, Tensor], names: Iterable[str], R: float) -> None:
    """Raise `NonFiniteError` where gradients are too large for second moments, in any basis.

    No entry, however rotated, exceeds the norm, whose square is four times too large here: for
    roundings, and for entries that a block has twice.

    Args:
        gradients: By name.
        names: Whose gradients are averaged, if they have any.
        R: Of the batch that gradients are of.
    """
    held = {n: accurate(gradients[n]) for n in names if n in gradients}
    squares = {n: (2 / R**0.5 * g).square().sum() for n, g in held.items()}
    if not squares or torch.stack(list(squares.values())).sum().isfinite():
        return
    largest = max(squares, key=lambda n: squares[n].item())
    raise NonFiniteError(
        f"the gradient in {largest!r} has entries up to {held[largest].abs().max():.3g}, whose "
        f"squares over R = {R:.3g} overflow {held[largest].dtype}; expected finite ones, which "
        "ekfac=True averages. Compute in a wider dtype, or look at what scales the loss."
    )


@dataclass(frozen=True)
class Inverses:
    """Of a product whose factors are damped: (A + π√λ I)⁻¹ and (B + √λ/π I)⁻¹.

    Attributes:
        left: That of A, (group, in, in); of a diagonal the diagonal, (group, in).
        right: That of B, (group, out, out).
    """

    left: Tensor
    right: Tensor

    def solve(self, G: Float[Tensor, "group d_in d_out"]) -> Float[Tensor, "group d_in d_out"]:
        """(A + π√λ I)⁻¹ G (B + √λ/π I)⁻¹."""
        G = G @ self.right
        return self.left @ G if self.left.ndim == 3 else self.left.unsqueeze(-1) * G


def _inverse(Q: Tensor | None, eigenvalues: Tensor) -> Tensor:
    return 1 / eigenvalues if Q is None else (Q / eigenvalues.unsqueeze(-2)) @ Q.mT


def eigh_once() -> Eigh:
    """`factor_eigh`; equal inputs have one A, decomposed once."""
    # With the factor, so that none that comes later lies where it was.
    known: dict[tuple[int, torch.Size], tuple[Tensor, tuple[Tensor, Tensor | None]]] = {}

    def decompose(factor: Tensor) -> tuple[Tensor, Tensor | None]:
        key = factor.data_ptr(), factor.shape
        if key not in known:
            known[key] = factor, factor_eigh(factor)
        return known[key][1]

    return decompose


def basis_of(block: AnyBlock, kind: str, damping: float, split: bool, decompose: Eigh) -> Basis:
    """The basis of a block.

    Args:
        block: The block.
        kind: What it is taken for, as `Layout.kind` says.
        damping: λ, which the basis of a sum of two products holds for good: √λ is added to all
            four factors, and the two of each side are diagonalised at once.
        split: Whether both factors of a product are damped.
        decompose: What finds the eigenvalues of factors.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: A factor has a negative eigenvalue; the damping is too small for a sum of
            two products; or a block is too large to be written out.
    """
    if isinstance(block, Diagonal):  # a copy, as of one-hot rows: averages change in place
        return _exact(None, block.diagonal.reshape(1, -1).clone())
    if isinstance(block, Block) and kind == "product":
        return _of_product(block.terms[0].operator, split, decompose)
    if isinstance(block, Block) and kind == "two":
        return _of_two(block, damping)
    named = BlockDiagonal((block.operator,), (", ".join(block.params),))  # errors say which
    ((eigenvalues, Q),) = of_blocks(lambda one: symmetric_eigh(written_out(one)), named)
    return _exact(Q.unsqueeze(0), eigenvalues.unsqueeze(0))


def _of_product(product: Kronecker, split: bool, decompose: Eigh) -> Basis:
    (inputs, left), (outputs, right) = decompose(product.A), decompose(product.B)
    if left is None:  # the diagonal itself: averages change in place
        inputs = inputs.clone()
    return Basis(left, right, inputs, outputs, split)


def _of_two(block: Block, damping: float) -> Basis:
    first, second = block.terms
    alike = turned(second.operator, second.entries, first.entries)
    assert isinstance(alike, Kronecker)  # `Layout.kind` says so
    both = damped(KroneckerSum(first.operator, alike), Damping(damping, "factors"))
    assert isinstance(both, KroneckerSum)
    found = pencil(both)
    if found is None:
        raise OptionError(
            f"the block of {', '.join(block.params)} is a sum of two products that is singular up "
            f"to rounding with damping={damping}; expected a regular one. Pass a larger damping."
        )
    one = found.values.new_ones(1, 1)
    values = found.values / found.scale.square()
    return Basis(found.U, found.V, one, one, damping=0.0, values=values)


def _exact(Q: Tensor | None, eigenvalues: Tensor) -> Basis:
    return Basis(Q, None, eigenvalues, eigenvalues.new_ones(1, 1))
