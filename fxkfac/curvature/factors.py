"""Factors of some data, A = R Σ x xᵀ and B = (1/#rows) Σ g gᵀ, and those of several data sets.

Beside them are the counts in R and #rows: so that partial results of any size add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.blocks import Block, Dense, Diagonal, Kronecker
from fxkfac.curvature.curvature import AnyBlock, Curvature, no_block
from fxkfac.curvature.plan import BlockPlan, TermPlan, require_same_terms
from fxkfac.curvature.point import Point
from fxkfac.curvature.settings import Settings, differences
from fxkfac.errors import MergeError, OptionError
from fxkfac.functional import FunctionalModel
from fxkfac.likelihoods.base import Likelihood
from fxkfac.precision import accurate_dtype


@dataclass(frozen=True)
class Product:
    """A and B of one term.

    Attributes:
        A: R Σ x̃ x̃ᵀ of shape (group, in, in); its diagonal (in,) for one-hot rows.
        B: (1/#rows) Σ_c Σ g gᵀ of shape (group, out, out).
        rows: Number of rows; (group,) where groups have rows of their own.
    """

    A: Tensor
    B: Tensor
    rows: int | Tensor

    @staticmethod
    def of_sums(a: Tensor, b: Tensor, rows: int | Tensor) -> Product:
        """From R Σ x̃ x̃ᵀ and Σ g gᵀ, which is used up."""
        return Product(a, b.div_(divisor(rows)), rows)

    def plus(self, other: Product, weights: tuple[float, float]) -> Product:
        """The two together, their A by weights, their B by their numbers of rows."""
        rows = self.rows + other.rows
        B = (self.B * divisor(self.rows) + other.B * divisor(other.rows)) / divisor(rows)
        return Product(weights[0] * self.A + weights[1] * other.A, B, rows)


def divisor(rows: int | Tensor) -> int | Tensor:
    """What Σ g gᵀ is divided by; a group that no row has chosen has B = 0, too."""
    return rows.clamp_min(1).view(-1, 1, 1) if isinstance(rows, Tensor) else max(rows, 1)


@dataclass(frozen=True)
class Factors(Curvature):
    """The curvature of a model: a mapping from the name of a weight to its block.

    Attributes:
        settings: How it was computed.
        n: Number of data seen.
        count: What `reduction="mean"` divides by, over all data seen.
        point: The values of the parameters at which it was computed, if that is known.
    """

    settings: Settings
    n: int
    count: float
    model: FunctionalModel = field(repr=False)
    likelihood: Likelihood = field(repr=False)
    plans: Mapping[str, BlockPlan] = field(repr=False)
    products: Mapping[str, tuple[Product, ...]] = field(repr=False)
    exact: Mapping[str, Tensor] = field(repr=False)
    point: Point | None = field(default=None, repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that have a block, and their shapes."""
        return self.settings.parameters

    @property
    def like(self) -> Tensor:
        """A parameter, for the dtype and device of all."""
        held = self.model.tensors
        names = [n for n in self.settings.parameters if n in held] or list(held)
        return held[names[0]]

    def canonical(self, name: str) -> str:
        """The name of a tied parameter that the blocks know it by.

        Raises `UnknownParameter` where nothing is called so.
        """
        return name if name in self.shapes else self.model.resolve(name)

    @property
    def reduction(self) -> float:
        """R, for all data seen (paper, Equation 1)."""
        return self.likelihood.reduction_factor(self.count)

    @property
    def seen(self) -> tuple[int, Mapping[str, tuple[int, ...]]]:
        """Number of data seen, and for every block with factors the rows of each of its terms."""
        rows = {
            name: tuple(int(torch.as_tensor(p.rows, device="cpu").sum()) for p in products)
            for name, products in self.products.items()
        }
        return self.n, rows

    @cached_property
    def _unused(self) -> tuple[str, ...]:
        """Parameters with factors on other data, of inputs of other shapes, but not on these."""
        used = {name for plan in self.plans.values() for name in plan.parameters}
        wanted = (name for name, kind in self.settings.structures.items() if kind == "kronecker")
        return tuple(name for name in wanted if name not in used)

    def __getitem__(self, name: str) -> AnyBlock:
        name = self.canonical(name)
        if (block := self._unfactored(name)) is not None:
            return block
        if name not in self.plans:
            joined = {key: plan.parameters for key, plan in self.plans.items()}
            raise no_block(name, {**dict.fromkeys(self, ()), **joined})
        plan = self.plans[name]
        terms = [
            self._kronecker(plan, term, product)
            for term, product in zip(plan.terms, self.products[name], strict=True)
        ]
        return Block(plan.parameters, plan.shapes, tuple(terms))

    def _unfactored(self, name: str) -> AnyBlock | None:
        """An exact block, or the identity; `None` for a parameter that has factors.

        Zero for one that should have, but that these data do not use.
        """
        kind = self.settings.structures.get(name)
        if kind is None or (kind == "kronecker" and name not in self._unused):
            return None
        shape = self.settings.parameters[name]
        if kind in ("identity", "kronecker"):
            fill = torch.ones if kind == "identity" else torch.zeros
            dtype, device = accurate_dtype(self.like), self.like.device
            return Diagonal((name,), (shape,), fill(shape, dtype=dtype, device=device))
        made = Dense if kind == "dense" else Diagonal
        return made((name,), (shape,), self.exact[name])

    def _kronecker(self, plan: BlockPlan, term: TermPlan, product: Product) -> Kronecker:
        A, B = product.A, product.B
        if self.settings.fisher == "forward-only":
            B = torch.diag_embed(torch.ones_like(B.diagonal(dim1=-2, dim2=-1)))  # B = I
        return Kronecker(
            A[0] if A.ndim == 3 and A.shape[0] == 1 else A,
            B[0] if B.shape[0] == 1 else B,
            term,
            plan.offsets,
        )

    def __iter__(self) -> Iterator[str]:
        same = [name for name, kind in self.settings.structures.items() if kind == "identity"]
        return iter([*self.plans, *self.exact, *same, *self._unused])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __add__(self, other: Factors) -> Factors:
        """The factors of both data sets together, computed at the same parameters or not.

        The part of a `NoDataError`, of no batch, adds nothing.

        Raises:
            MergeError: The two were not computed in the same way.
        """
        if not isinstance(other, Factors):
            return NotImplemented
        require_same_computation(self, other)
        if not (self.n and other.n):
            return self if self.n else other
        count = self.count + other.count
        R = scale_of(self.likelihood, count)
        mine, theirs = (R / scale_of(self.likelihood, c) for c in (self.count, other.count))
        return replace(
            self,
            point=self.point if self.point == other.point else None,
            n=self.n + other.n,
            count=count,
            products={
                name: tuple(
                    p.plus(q, (mine, theirs))
                    for p, q in zip(products, other.products[name], strict=True)
                )
                for name, products in self.products.items()
            },
            exact={name: mine * e + theirs * other.exact[name] for name, e in self.exact.items()},
        )

    def __radd__(self, other: int) -> Factors:
        """So that `sum` adds up parts: it begins with zero."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


def require_factors(factors: Any) -> None:
    """Raise `OptionError` unless they are those of one computation, without corrections."""
    if not isinstance(factors, Factors):
        raise OptionError(
            f"factors is of type {type(factors).__name__}; expected the Factors that fxkfac.kfac "
            "returns."
        )


def require_same_computation(mine: Factors, others: Factors) -> None:
    """Raise `MergeError` unless both were computed in the same way."""
    for name, (here, there) in differences(mine.settings, others.settings).items():
        raise MergeError(
            f"these factors were computed with {name}={here!r}, the others with {name}={there!r}; "
            "expected the same, since only parts of one computation add up."
        )
    if mine.n and others.n:  # without data, the terms are those of the example
        require_same_terms(mine.plans.values(), others.plans.values())


def scale_of(likelihood: Likelihood, count: float) -> float:
    """R; one where no target counts, so that a part of the data may have none."""
    return likelihood.reduction_factor(count) if count or likelihood.reduction == "sum" else 1.0
