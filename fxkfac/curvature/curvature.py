"""Blocks -> the curvature of all their parameters: as a matrix, and as a system to solve."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.blocks import Block, Dense, Diagonal
from fxkfac.curvature.eigen import EigenBlock
from fxkfac.curvature.report import Report
from fxkfac.curvature.summarise import report_of
from fxkfac.errors import OptionError, ParameterError, UnknownParameter
from fxkfac.functional import unknown
from fxkfac.graph.uses.ir import Unpickled
from fxkfac.isolation import full_precision
from fxkfac.linalg import operators
from fxkfac.linalg.operators import BlockDiagonal, Damping, Named
from fxkfac.parameters import canonical_names
from fxkfac.precision import accurate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

AnyBlock = Block | Diagonal | Dense | EigenBlock


class Curvature(Unpickled, Mapping[str, AnyBlock]):
    """A mapping from the name of a weight to its block. No parameter is in two blocks."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that have a block, and their shapes."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and device of all."""

    @abstractmethod
    def canonical(self, name: str) -> str:
        """The name of a tied parameter that the blocks know it by."""

    @full_precision()
    def dense(self, *names: str) -> Float[Tensor, "numel numel"]:
        """The curvature of the named parameters (all, without names) as one matrix.

        The order is that of their concatenated rvec, as stored; zeros between blocks. For a
        weight stored as (out, in) it is B ⊗ A (paper, Equation 4a).

        Raises:
            UnknownParameter: A name is not among the parameters covered.
            ParameterError: A parameter is named twice.
        """
        chosen = [self._known(name) for name in names or self.shapes]
        if twice := [name for name, times in Counter(chosen).items() if times > 1]:
            raise ParameterError(f"the parameter {twice[0]!r} is named twice; name it once.")
        sizes = [torch.Size(self.shapes[name]).numel() for name in chosen]
        total = torch.zeros(
            sum(sizes), sum(sizes), dtype=accurate_dtype(self.like), device=self.like.device
        )
        ends = list(accumulate(sizes, initial=0))
        spans = {name: slice(*span) for name, span in zip(chosen, pairwise(ends), strict=True)}
        for block in self.values():
            inside = [name for name in block.params if name in spans]
            if inside:
                _fill(total, block, inside, spans)
        return total

    def _known(self, name: str) -> str:
        if not isinstance(name, str):
            raise ParameterError(
                f"a name is of type {type(name).__name__}; expected text. Pass names one after the "
                "other, as in dense('0.weight', '2.weight')."
            )
        canonical = self.canonical(name)
        if canonical not in self.shapes:
            raise unknown(name, self.shapes)
        return canonical

    @full_precision()
    def solve(
        self, gradients: Mapping[str, Tensor], damping: float, damp: str = "block"
    ) -> dict[str, Tensor]:
        """The natural gradient: (block + damping · I)⁻¹ gradient, in the order of `gradients`.

        Args:
            gradients: The gradient of every parameter of every block that is to be solved.
            damping: How much; see `fxkfac.operators.Damping`.
            damp: Of what: the `"block"`, or its `"factors"`, by which a sum of two products
                is inverted without being written out; see there for others.

        Raises:
            UnknownParameter: A block's other parameter has no gradient here, or no parameter is
                called so.
            ParameterError: `gradients` is no mapping, or one of another shape, or not floating.
            OptionError: The damping is negative, or zero where a block is singular; or a gradient
                is sparse, is none, or comes under two names of one parameter.
        """
        if not isinstance(gradients, Mapping):
            raise ParameterError(
                f"gradients are of type {type(gradients).__name__}; expected a mapping from names "
                "of parameters to tensors."
            )
        named = canonical_names(gradients, self.canonical)
        covered = {name: own for own, name in named.items() if name in self.shapes}
        operator = operators.damped(self.operator(*(covered or gradients)), Damping(damping, damp))
        given = {name: strided(own, gradients[own]) for name, own in covered.items()}
        solved = operators.solve(operator, given)
        return {covered[name]: solved[name] for name in covered}

    @full_precision()
    def operator(self, *names: str) -> Named:
        """The curvature of the named parameters (all, without names) as an operator.

        It acts on tensors by name, and everything in `fxkfac.linalg.operators` works with it. The
        names must be all of their blocks; what it holds is in the order of the blocks.

        Raises:
            UnknownParameter: A name is not among the parameters covered, or another parameter of
                its block is missing.
        """
        chosen = {self._known(name) for name in names or self.shapes}
        blocks = [block for block in self.values() if chosen & set(block.params)]
        for block in blocks:
            missing = [name for name in block.params if name not in chosen]
            if missing:
                raise UnknownParameter(
                    f"found {sorted(chosen & set(block.params))} but not {missing}, which are in "
                    "the same block; pass them all."
                )
        shapes = {n: s for b in blocks for n, s in zip(b.params, b.shapes, strict=True)}
        labels = tuple(", ".join(block.params) for block in blocks)
        return Named(BlockDiagonal(tuple(b.operator for b in blocks), labels), shapes)

    @full_precision()
    def report(self) -> Report:
        """What the blocks are, in numbers: a row for each, and one for all; `print` shows a table.

        Sizes, condition numbers of A, B and their product, rank, largest eigenvalue, trace and its
        share in that of all, bytes. What is singular, empty or not finite is said so. It takes the
        eigenvalues of every factor; a sum of overlapping products is written out for them.
        """
        n, rows = self.seen
        blocks = dict(self)
        return report_of(list(blocks.values()), n, [rows.get(name, ()) for name in blocks])

    @property
    def seen(self) -> tuple[int | None, Mapping[str, tuple[int, ...]]]:
        """Number of data seen, and for every block with factors the rows of each of its terms.

        `None` and nothing where blocks are a sum or an average of what was counted.
        """
        return None, {}


class OfBlocks(Curvature):
    """A curvature whose blocks are there, by the names of their weights."""

    blocks: Mapping[str, AnyBlock]

    def __getitem__(self, name: str) -> AnyBlock:
        name = self.canonical(name)
        if name not in self.blocks:
            raise no_block(name, {key: block.params for key, block in self.blocks.items()})
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


def no_block(name: str, held: Mapping[str, Sequence[str]]) -> UnknownParameter:
    """An error that names the block which a parameter has joined, or those that there are.

    Args:
        name: What no block is called.
        held: For every block by its name, the parameters in it.
    """
    joined = [key for key, params in held.items() if name in params]
    if not joined:
        return unknown(name, held, "parameter with a block")  # the model may have it
    return UnknownParameter(
        f"{name!r} has no block of its own, but is in that of {joined[0]!r}. Ask for this one, or "
        "compute factors with separate_weight_and_bias=True."
    )


def strided(name: str, gradient: Tensor) -> Tensor:
    """A gradient without its graph.

    Raises:
        OptionError: It is sparse, or none.
        ParameterError: It is not floating: its natural gradient would be truncated to its dtype.
    """
    if not isinstance(gradient, Tensor):
        raise OptionError(
            f"the gradient of {name!r} is of type {type(gradient).__name__}; expected a tensor. "
            "Leave out the parameters of its block, or take zeros where nothing came back."
        )
    if gradient.layout is not torch.strided:
        raise OptionError(
            f"the gradient of {name!r} is of layout {gradient.layout}; expected a dense one, since "
            "a natural gradient has entries everywhere. Make the embedding with sparse=False."
        )
    if not gradient.is_floating_point():
        raise ParameterError(
            f"the gradient of {name!r} is {gradient.dtype}; expected a floating tensor. Convert it "
            "by `.float()`."
        )
    return gradient.detach()


def _fill(total: Tensor, block: AnyBlock, inside: list[str], spans: Mapping[str, slice]) -> None:
    sizes = [torch.Size(s).numel() for s in block.shapes]
    starts = dict(zip(block.params, accumulate(sizes, initial=0), strict=False))
    length = dict(zip(block.params, sizes, strict=True))
    matrix = block.dense()
    for row in inside:
        for column in inside:
            part = matrix.narrow(0, starts[row], length[row])
            total[spans[row], spans[column]] = part.narrow(1, starts[column], length[column])
