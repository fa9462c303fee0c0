"""Blocks -> their eigenvalues as plain numbers, as a drawing shows them."""

from __future__ import annotations

from collections.abc import Iterator

from fxkfac.curvature.blocks import Block
from fxkfac.curvature.curvature import AnyBlock, Curvature
from fxkfac.curvature.eigen import EigenBlock
from fxkfac.isolation import full_precision
from fxkfac.linalg import operators
from fxkfac.linalg.operators import Operator
from fxkfac.ranges import require


@full_precision()
def spectra(curvature: Curvature) -> dict[str, dict[str, list[float]]]:
    """The eigenvalues of every block, with all scaling done, from the largest to the smallest.

    Args:
        curvature: What `kfac`, `ekfac`, `kfoc` or their kin returned.

    Returns:
        For the name of every weight, by what they are eigenvalues of: `A` and `B` of a Kronecker
        product, of several groups together; `A 1`, `B 1`, `A 2`, … of a sum of such; `block` of
        an exact block, of a diagonal, or of one with eigenvalues of its own (EKFAC). To be passed
        on as `program.draw("model.html", details=fxkfac.spectra(factors))`.

    Raises:
        OptionError: `curvature` is something else, such as one block; or an eigenvalue is negative
            beyond rounding.
        NonFiniteError: A factor holds NaN or Inf.
    """
    require(
        isinstance(curvature, Curvature),
        f"curvature is of type {type(curvature).__name__}; expected what fxkfac.kfac, ekfac or "
        "kfoc returns.",
    )
    return {
        name: {label: _numbers(operator) for label, operator in _operators(block)}
        for name, block in curvature.items()
    }


def _numbers(operator: Operator) -> list[float]:
    λ = operators.eigenvalues(operator).detach().flatten()
    return [float(value) for value in λ.sort(descending=True).values.tolist()]


def factors_of(block: AnyBlock) -> Iterator[tuple[str, Operator]]:
    """`A` and `B` of every Kronecker product of a block, numbered where there are several."""
    terms = block.terms if isinstance(block, Block) else ()
    for k, term in enumerate(terms):
        for label, side in zip("AB", term.sides, strict=True):
            yield _numbered(label, k, len(terms)), side


def _operators(block: AnyBlock) -> Iterator[tuple[str, Operator]]:
    """Everything of a block that has a spectrum of its own."""
    if isinstance(block, EigenBlock):
        for k, part in enumerate(block.terms):
            yield _numbered("block", k, len(block.terms)), part.operator
    elif isinstance(block, Block):
        yield from factors_of(block)
    else:
        yield "block", block.operator


def _numbered(label: str, k: int, count: int) -> str:
    return f"{label} {k + 1}" if count > 1 else label
