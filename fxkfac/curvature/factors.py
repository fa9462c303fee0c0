"""Raw sums -> factors: A = R Σ x xᵀ, B = (1/#rows) Σ g gᵀ, merged, scaled and laid out on request.

Sums and counts are kept raw, and turned into A and B only when asked: so that two partial results
add up to exactly the result of all data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.blocks import Block, Diagonal, Kronecker
from fxkfac.curvature.likelihoods import Likelihood
from fxkfac.curvature.plan import BlockPlan, TermPlan
from fxkfac.curvature.sharing import Counted, accurate_dtype
from fxkfac.errors import MergeError, UnknownParameter
from fxkfac.functional import FunctionalModel, unknown

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Sums:
    """Raw sums of one term over the data seen so far.

    Attributes:
        a: Σ x̃ x̃ᵀ of shape (group, in, in), or its diagonal `Counted` for one-hot rows.
        b: Σ_c Σ g gᵀ of shape (group, out, out), without R.
        rows: Number of rows summed in `a`.
    """

    a: Tensor | Counted
    b: Tensor
    rows: int

    def __add__(self, other: Sums) -> Sums:
        if isinstance(self.a, Counted) and isinstance(other.a, Counted):
            a: Tensor | Counted = Counted(self.a.diagonal + other.a.diagonal)
        else:
            assert isinstance(self.a, Tensor)
            assert isinstance(other.a, Tensor)
            a = self.a + other.a
        return Sums(a, self.b + other.b, self.rows + other.rows)


@dataclass(frozen=True)
class Settings:
    """What must be equal for two partial results to be parts of one."""

    fisher: str
    sharing: str
    mc_samples: int
    separate_weight_and_bias: bool
    loss: str
    parameters: Mapping[str, tuple[int, ...]]  # the covered ones and their shapes


@dataclass(frozen=True)
class Factors(Mapping[str, Block | Diagonal]):
    """The curvature of a model: a mapping from the name of a weight to its block.

    Attributes:
        settings: How it was computed.
        n: Number of data seen.
        count: What `reduction="mean"` divides by, over all data seen.
    """

    settings: Settings
    n: int
    count: float
    model: FunctionalModel = field(repr=False)
    likelihood: Likelihood = field(repr=False)
    plans: Mapping[str, BlockPlan] = field(repr=False)
    sums: Mapping[str, tuple[Sums, ...]] = field(repr=False)
    diagonals: Mapping[str, Tensor] = field(repr=False)

    @property
    def reduction(self) -> float:
        """R, for all data seen (paper, Equation 1)."""
        return self.likelihood.reduction_factor(self.count)

    def __getitem__(self, name: str) -> Block | Diagonal:
        name = self.model.aliases.get(name, name)
        if name in self.diagonals:
            raw = self.diagonals[name]
            return Diagonal((name,), (tuple(raw.shape),), self.reduction * raw)
        if name not in self.plans:
            raise unknown(name, self)
        plan = self.plans[name]
        terms = [
            self._kronecker(plan, term, s)
            for term, s in zip(plan.terms, self.sums[name], strict=True)
        ]
        return Block(plan.parameters, plan.shapes, tuple(terms))

    def _kronecker(self, plan: BlockPlan, term: TermPlan, sums: Sums) -> Kronecker:
        a = sums.a.diagonal if isinstance(sums.a, Counted) else sums.a
        A = self.reduction * a  # A = R Σ x̃ x̃ᵀ
        if self.settings.fisher == "forward-only":
            B = torch.diag_embed(torch.ones_like(sums.b.diagonal(dim1=-2, dim2=-1)))  # B = I
        else:
            B = sums.b / sums.rows  # B = (1/#rows) Σ_c Σ g gᵀ
        return Kronecker(
            A[0] if A.ndim == 3 and len(A) == 1 else A,
            B[0] if len(B) == 1 else B,
            term,
            plan.offsets,
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self.plans, *self.diagonals])

    def __len__(self) -> int:
        return len(self.plans) + len(self.diagonals)

    def __add__(self, other: Factors) -> Factors:
        """The factors of both data sets together, exactly.

        Raises:
            MergeError: The two were not computed in the same way.
        """
        if self.settings != other.settings:
            raise MergeError(
                f"these factors were computed with {self.settings}, the others with "
                f"{other.settings}; only parts of one computation add up."
            )
        if {n: p.structure for n, p in self.plans.items()} != {
            n: p.structure for n, p in other.plans.items()
        }:
            raise MergeError(
                "these factors and the others come from graphs that use the parameters in other "
                "ways, as control flow that depends on shapes may make them; expected the same "
                "uses. Compute factors for inputs of one shape at a time."
            )
        return replace(
            self,
            n=self.n + other.n,
            count=self.count + other.count,
            sums={
                name: tuple(a + b for a, b in zip(mine, other.sums[name], strict=True))
                for name, mine in self.sums.items()
            },
            diagonals={name: d + other.diagonals[name] for name, d in self.diagonals.items()},
        )

    def dense(self, *names: str) -> Float[Tensor, "numel numel"]:
        """The curvature of the named parameters (all, without names) as one matrix.

        The order is that of their concatenated rvec, as stored; zeros between blocks.

        Raises:
            UnknownParameter: A name is not among the parameters covered.
        """
        chosen = [self._canonical(name) for name in names or self.settings.parameters]
        sizes = [self.model.tensors[name].numel() for name in chosen]
        first = self.model.tensors[chosen[0]]
        total = torch.zeros(
            sum(sizes), sum(sizes), dtype=accurate_dtype(first), device=first.device
        )
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        spans = {name: slice(*span) for name, span in zip(chosen, pairwise(ends), strict=True)}
        for block in self.values():
            inside = [name for name in block.params if name in spans]
            if inside:
                _fill(total, block, inside, spans)
        return total

    def _canonical(self, name: str) -> str:
        canonical = self.model.aliases.get(name, name)
        if canonical not in self.settings.parameters:
            raise unknown(name, self.settings.parameters)
        return canonical

    def solve(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """The natural gradient: (block + damping · I)⁻¹ gradient, in the order of `gradients`.

        Args:
            gradients: The gradient of every parameter of every block that is to be solved.
            damping: Added to every eigenvalue.

        Raises:
            UnknownParameter: A block's other parameter has no gradient here.
            OptionError: The damping is negative, or zero where a block is singular.
        """
        if not any(name in gradients for block in self.values() for name in block.params):
            raise unknown(next(iter(gradients), ""), self.settings.parameters)
        solved: dict[str, Tensor] = {}
        for block in self.values():
            if not set(block.params) & set(gradients):
                continue
            missing = [name for name in block.params if name not in gradients]
            if missing:
                raise UnknownParameter(
                    f"gradients hold {sorted(set(gradients) & set(block.params))} but not "
                    f"{missing}, which are in the same block; pass them all."
                )
            flat = torch.cat([gradients[name].detach().flatten() for name in block.params])
            flat = flat.to(accurate_dtype(flat))
            parts = block.solve(flat, damping).split([torch.Size(s).numel() for s in block.shapes])
            for name, shape, part in zip(block.params, block.shapes, parts, strict=True):
                solved[name] = part.view(shape).to(gradients[name].dtype)
        return {name: solved[name] for name in gradients if name in solved}


def _fill(
    total: Tensor, block: Block | Diagonal, inside: list[str], spans: Mapping[str, slice]
) -> None:
    sizes = [torch.Size(s).numel() for s in block.shapes]
    starts = dict(zip(block.params, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    length = dict(zip(block.params, sizes, strict=True))
    matrix = block.dense()
    for row in inside:
        for column in inside:
            part = matrix.narrow(0, starts[row], length[row])
            total[spans[row], spans[column]] = part.narrow(1, starts[column], length[column])
