"""Program -> for each of its blocks, where the entries of its parameters are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.corrections.overlap import may_repeat
from fxkfac.curvature.curvature import strided
from fxkfac.curvature.plan import BlockPlan, TermPlan
from fxkfac.curvature.schedule import schedule_of
from fxkfac.curvature.settings import Settings, differences
from fxkfac.errors import MergeError, ParameterError, UnknownParameter
from fxkfac.graph.program import Program
from fxkfac.graph.structure import EXACT
from fxkfac.optim.boxes import Box, boxes_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Layout:
    """The parameters of one block, and the order of its matrix.

    Attributes:
        params: Their names.
        shapes: Their shapes.
        entries: Numbers of the entries along the parameters' concatenated rvec.
        kind: `"product"`, `"two"` for a sum of two products that is inverted as such, or `"exact"`
            for a block that is written out, or diagonal.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    entries: Int[Tensor, "group d_in d_out"]
    kind: str

    def matrix(
        self, gradients: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Float[Tensor, "group d_in d_out"]:
        """The gradients of the block's parameters in its order.

        Raises:
            UnknownParameter: One of them is missing.
            OptionError: One of them is sparse.
            ParameterError: One of them has another shape than its parameter.
        """
        missing = [name for name in self.params if name not in gradients]
        if missing:
            raise UnknownParameter(
                f"there is no gradient of {missing}, whose block is that of {self.params}; "
                "expected those of all of its parameters."
            )
        found = [strided(name, gradients[name]) for name in self.params]
        for name, g, shape in zip(self.params, found, self.shapes, strict=True):
            if g.shape != shape:
                raise ParameterError(
                    f"the gradient of {name!r} has shape {tuple(g.shape)}; expected that of the "
                    f"parameter, {shape}. Solve for several gradients one after the other."
                )
        if self.boxes is None:
            flat = _joined(found)
            return flat[self.entries.to(flat.device)].to(dtype)
        parts = [box.of(g.contiguous()) for box, g in zip(self.boxes, found, strict=True)]
        if len(parts) == 1:
            return parts[0].to(dtype)
        G = found[0].new_empty(self.entries.shape, dtype=dtype)
        for box, part in zip(self.boxes, parts, strict=True):
            box.part(G).copy_(part)
        return G

    def parameters(
        self,
        matrix: Float[Tensor, "group d_in d_out"],
        gradients: Mapping[str, Tensor],
        damping: float,
    ) -> dict[str, Tensor]:
        """What was solved in the block's order, by parameter.

        Where the block has no entry the curvature is zero, so that damping alone divides.
        """
        if self.boxes is None:
            own = [strided(name, gradients[name]) for name in self.params]
            return self._looked_up(matrix, _joined(own).to(matrix.dtype) / damping)
        made = {}
        for name, shape, box in zip(self.params, self.shapes, self.boxes, strict=True):
            made[name] = matrix.new_empty(shape)
            box.of(made[name]).copy_(box.part(matrix))
        return made

    def _looked_up(self, matrix: Tensor, flat: Tensor) -> dict[str, Tensor]:
        flat[self.entries.to(flat.device)] = matrix
        named = zip(self.params, self.shapes, flat.split(self._sizes), strict=True)
        return {name: part.view(shape) for name, shape, part in named}

    @cached_property
    def boxes(self) -> tuple[Box, ...] | None:
        """The same as strides, where every parameter is a box of the block."""
        return boxes_of(self.entries, self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]


def plans_of(program: Program, settings: Settings) -> list[dict[str, BlockPlan]]:
    """The blocks with Kronecker factors, by name, of every graph; the first is the trace's."""
    how = settings.structures, settings.separate_weight_and_bias
    schedules = [schedule_of(program, tapped, *how) for tapped in program.graphs]
    return [{plan.name: plan for plan in schedule.blocks} for schedule in schedules]


def require_blocks(found: Settings, expected: Settings) -> None:
    """Raise `MergeError` unless factors with the first settings have the blocks of the others."""
    differ = differences(found, expected)
    for what in ("parameters", "structures", "separate_weight_and_bias"):
        if what in differ:
            had, wanted = differ[what]
            raise MergeError(
                f"the factors were computed with {what}={had!r}; expected {wanted!r}. Compute them "
                "with the program and the options of this preconditioner."
            )


def are_same(plans: Mapping[str, BlockPlan], others: Mapping[str, BlockPlan]) -> bool:
    """Whether they are of one graph, as nearly always."""
    return [*map(id, plans.values())] == [*map(id, others.values())]


def layouts(
    plans: Mapping[str, BlockPlan], settings: Settings, own: Collection[str], split: bool
) -> dict[str, Layout]:
    """Every block whose parameters are all the model's own, by name.

    The block of a weight that is computed from parameters says nothing of their gradients.

    Args:
        plans: The blocks with Kronecker factors.
        settings: Which others there are.
        own: Names of the selected parameters.
        split: Whether factors are damped.
    """
    found = {name: _of_plan(plan, split) for name, plan in plans.items()}
    for name, kind in settings.structures.items():
        if kind in EXACT:
            shape = settings.parameters[name]
            found[name] = Layout((name,), (shape,), _column(torch.Size(shape).numel()), "exact")
    return {name: layout for name, layout in found.items() if set(own).issuperset(layout.params)}


def require_all(found: Mapping[str, Layout], expected: Mapping[str, Layout]) -> None:
    """Raise `MergeError` unless the blocks found hold all parameters that others do."""
    held = {name for layout in found.values() for name in layout.params}
    if lost := [name for name, layout in expected.items() if not held.issuperset(layout.params)]:
        raise MergeError(
            f"these data use no {sorted(lost)[:4]}, so that there is no curvature of it; "
            "expected data that use all that was traced. Leave it out: trace with "
            "structure='skip' for it."
        )


def _of_plan(plan: BlockPlan, split: bool) -> Layout:
    entries = [term.entries(plan.offsets) for term in plan.terms]
    # An entry that comes twice ties what the product holds apart: its inverse is not the block's.
    once = not any(map(_repeats, plan.terms, entries))
    if once and len(entries) == 1:
        return Layout(plan.parameters, plan.shapes, entries[0], "product")
    if once and split and len(entries) == 2 and _lie_alike(*entries):
        return Layout(plan.parameters, plan.shapes, entries[0], "two")
    return Layout(plan.parameters, plan.shapes, _column(plan.numel), "exact")


def _repeats(term: TermPlan, entries: Tensor) -> bool:
    return may_repeat(term) and bool((entries.flatten().bincount() > 1).any())


def _lie_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two products are of the same entries, in one orientation or in both."""
    return second.equal(first) or second.mT.equal(first)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _column(numel: int) -> Tensor:
    return torch.arange(numel, device="cpu").view(1, -1, 1)


def held(program: Program) -> dict[str, Tensor]:
    """The tensors in which the user holds the selected parameters, by name."""
    return {name: program.model.now(name) for name in program.asked.selected}
