"""A damped Kronecker product, solved at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxkfac.linalg.operators import Damping, Kronecker, damped, solve

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def kronecker_solve(
    A: Float[Tensor, "group d_in d_in"],
    B: Float[Tensor, "group d_out d_out"],
    G: Float[Tensor, "group d_in d_out"],
    damping: float,
) -> Float[Tensor, "group d_in d_out"]:
    """Solve (A ⊗ B + damping · I) vec X = vec G exactly, by the eigenvalues of both factors.

    Raises:
        OptionError: The damping is negative, or zero where the product is singular.
    """
    return solve(damped(Kronecker(A, B), Damping(damping)), G)
