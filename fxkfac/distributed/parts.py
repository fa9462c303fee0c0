"""Factors, or a step, of some data <-> the tensors that are summed over ranks.

A rank without data has none of these tensors. It learns their shapes from the others, and adds
zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxkfac.curvature.factors import Factors, Product
from fxkfac.curvature.step import Step
from fxkfac.linalg.triangle import packed_shape

Part = Factors | Step

SYMMETRIC = ("A", "B", "dense")


@dataclass(frozen=True)
class Piece:
    """What one of the tensors is.

    Attributes:
        what: "A", "B", "rows", "dense", "diagonal", "loss" or "gradient".
        name: Of the parameter; and the number of the term.
        shape, dtype: Those of the tensor.
    """

    what: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_symmetric(self) -> bool:
        """Whether half of it tells all of it."""
        return self.what in SYMMETRIC and len(self.shape) >= 2

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """The shape in which it is sent."""
        return (
            (*self.shape[:-2], *packed_shape(self.shape[-1])) if self.is_symmetric else self.shape
        )

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def factors_of(part: Part) -> Factors:
    """The factors of a part."""
    return part.factors if isinstance(part, Step) else part


def terms(factors: Factors) -> list[tuple[str, int]]:
    """All Kronecker products, as (block, number of the term), in an order that all ranks have."""
    return [(n, k) for n in sorted(factors.plans) for k in range(len(factors.plans[n].terms))]


def products(factors: Factors) -> list[Product]:
    """The products in this order."""
    return [factors.products[name][k] for name, k in terms(factors)] if factors.products else []


def shared_inputs(factors: Factors) -> tuple[int, ...]:
    """For every product, the first one that holds the same A."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(p.A), k) for k, p in enumerate(products(factors)))


def pieces(part: Part) -> list[tuple[Piece, Tensor]]:
    """All tensors of a part, an A that terms share as often as they do."""
    factors = factors_of(part)
    found = list(_pieces_of_terms(factors))
    for name in sorted(factors.exact):
        found.append(_piece(factors.settings.structures[name], name, factors.exact[name]))
    if isinstance(part, Step):
        found.append(_piece("loss", "", part.loss))
        found += [_piece("gradient", n, part.gradients[n]) for n in sorted(part.gradients)]
    return found


def _pieces_of_terms(factors: Factors) -> Iterator[tuple[Piece, Tensor]]:
    for (name, k), product in zip(terms(factors), products(factors), strict=False):
        yield _piece("A", f"{name}, term {k}", product.A)
        yield _piece("B", f"{name}, term {k}", product.B)
        if isinstance(product.rows, Tensor):
            yield _piece("rows", f"{name}, term {k}", product.rows)


def _piece(what: str, name: str, t: Tensor) -> tuple[Piece, Tensor]:
    return Piece(what, name, tuple(t.shape), t.dtype), t


def numbers_of_rows(factors: Factors) -> tuple[int | None, ...]:
    """The number of rows of every product; `None` where groups have rows of their own."""
    return tuple(p.rows if isinstance(p.rows, int) else None for p in products(factors))


def with_sums(
    part: Part,
    n: int,
    count: float,
    rows: Sequence[int | None],
    sums: Sequence[tuple[Piece, Tensor]],
) -> Part:
    """A part with the sums over all ranks in the place of its own tensors.

    Args:
        part: Where everything else is from.
        n, count, rows: Those of all ranks together.
        sums: One for every piece: R Σ x̃ x̃ᵀ, Σ g gᵀ, ..
    """
    found = {(piece.what, piece.name): t for piece, t in sums}
    factors = factors_of(part)
    summed: dict[str, tuple[Product, ...]] = dict.fromkeys(factors.plans, ())
    for (name, k), number in zip(terms(factors), rows, strict=True):
        key = f"{name}, term {k}"
        of_all = found["rows", key] if number is None else number
        product = Product.of_sums(found["A", key], found["B", key], of_all)
        summed[name] = (*summed[name], product)
    exact = {piece.name: t for piece, t in sums if piece.what in ("dense", "diagonal")}
    factors = replace(factors, n=n, count=count, products=summed, exact=exact)
    if not isinstance(part, Step):
        return factors
    gradients = {name: found["gradient", name] for name in part.gradients}
    return Step(found["loss", ""], gradients, factors)
