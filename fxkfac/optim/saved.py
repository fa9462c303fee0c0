"""Averages and bases <-> plain dicts of tensors and numbers, which `torch.load` reads safely."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxkfac.curvature.factors import Factors, Product
from fxkfac.curvature.plan import BlockPlan
from fxkfac.curvature.running import RunningAverage
from fxkfac.curvature.settings import Settings
from fxkfac.errors import FxkfacError, OptionError
from fxkfac.graph.program import Program
from fxkfac.likelihoods.base import Likelihood
from fxkfac.optim.basis import Basis
from fxkfac.optim.layout import Layout
from fxkfac.ranges import require


def refuse_to_copy(what: str) -> NoReturn:
    """Raise `FxkfacError`: a copy would have a program of its own, whose model nobody holds."""
    raise FxkfacError(
        f"{what} is copied or pickled, and its program with it; expected neither. Save its "
        "state_dict() and the model's, and make another one of the other model."
    )


def of_average(average: RunningAverage) -> dict[str, Any]:
    """Averages of A, B and exact blocks, and how many updates there were."""
    if (held := average.averages) is None:
        return {}
    return {
        "updates": average.updates,
        "n": held.n,
        "count": held.count,
        "products": {
            name: [{"A": p.A, "B": p.B, "rows": p.rows} for p in products]
            for name, products in held.products.items()
        },
        "exact": dict(held.exact),
        "entries": _entries_of(held.plans),
    }


def _entries_of(plans: Mapping[str, BlockPlan]) -> dict[str, list[str]]:
    """Digests of which entries the terms of every block are of."""
    return {name: [term.entries for term in plan.identities] for name, plan in plans.items()}


def to_average(
    state: Mapping[str, Any],
    program: Program,
    settings: Settings,
    plans: Mapping[str, BlockPlan],
    likelihood: Likelihood,
    decay: float,
) -> RunningAverage:
    """Inverse of `of_average`, for a program of the same blocks."""
    average, copied = RunningAverage(decay), _Once(program.like.device)
    if state:
        products = {
            name: tuple(Product(**{key: copied(value) for key, value in p.items()}) for p in kept)
            for name, kept in state["products"].items()
        }
        averages = Factors(
            settings=settings,
            n=state["n"],
            count=state["count"],
            model=program.model,
            likelihood=likelihood,
            plans=plans,
            products=products,
            exact={name: copied(block) for name, block in state["exact"].items()},
        )
        average.restore(averages, state["updates"])
    return average


def of_basis(basis: Basis) -> dict[str, Any]:
    """The fields of a basis."""
    return {field.name: getattr(basis, field.name) for field in fields(basis)}


def to_basis(state: Mapping[str, Any], device: torch.device) -> Basis:
    """Inverse of `of_basis`."""
    copied = _Once(device)
    return Basis(**{name: copied(value) for name, value in state.items()})


def plans_like(
    average: Mapping[str, Any], every: Sequence[Mapping[str, BlockPlan]]
) -> Mapping[str, BlockPlan]:
    """The first plans of whose entries averages are; the very first where there are none."""
    return next((plans for plans in every if not _differing(average, plans)), every[0])


def require_same_entries(average: Mapping[str, Any], plans: Mapping[str, BlockPlan]) -> None:
    """Raise `OptionError` unless averages, if there are any, are of the entries in these plans."""
    if differ := _differing(average, plans):
        raise OptionError(
            f"the state is of other entries of {differ[:4]} than those that the inputs of the "
            "trace use, as of a table of positions; expected the same. Trace the model on inputs "
            "of the shape that the optimizer was trained with."
        )


def _differing(average: Mapping[str, Any], plans: Mapping[str, BlockPlan]) -> list[str]:
    found, expected = average.get("entries", {}), _entries_of(plans)
    return sorted(name for name in found if found[name] != expected.get(name, found[name]))


def require_same_blocks(found: Collection[str], expected: Collection[str]) -> None:
    """Raise `OptionError` unless a state, if it has blocks at all, has those of the program."""
    if found and set(found) != set(expected):
        raise OptionError(
            f"the state is of the blocks {sorted(found)[:8]}; expected those of this program, "
            f"{sorted(expected)[:8]}. Load the state of an optimizer of the same program."
        )


def require_fit(name: str, basis: Basis, layout: Layout, split: bool, ekfac: bool) -> None:
    """Raise `OptionError` unless a basis is one that is made for a layout with these options."""
    expected, found = layout.entries.shape[1:], basis.eigenvalues().shape[1:]
    require(
        found == expected,
        f"the state's block of {name!r} is of {tuple(found)} entries; expected "
        f"{tuple(expected)}. Load the state of an optimizer of the same program.",
    )
    if layout.kind == "product":
        require(
            basis.split == split and (ekfac or basis.values is None),
            f"the state's block of {name!r} was made with another damp= or ekfac=; expected "
            "the same. Load it with the options with which it was saved.",
        )


class _Once:
    """Copies of tensors on a device; what was one tensor is one there, too."""

    def __init__(self, device: torch.device):
        self.device, self.made = device, dict[int, Tensor]()

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self.made.setdefault(id(value), value.to(self.device, copy=True))
