"""Factors and bases <-> plain dicts of tensors and numbers, which `torch.load` reads safely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.factors import Factors, Product, Settings
from fxkfac.curvature.likelihoods import Likelihood
from fxkfac.curvature.plan import BlockPlan
from fxkfac.errors import OptionError
from fxkfac.functional import FunctionalModel
from fxkfac.optim.basis import Basis


def of_factors(factors: Factors) -> dict[str, Any]:
    """A, B, exact blocks and counts."""
    return {
        "n": factors.n,
        "count": factors.count,
        "products": {
            name: [{"A": p.A, "B": p.B, "rows": p.rows} for p in products]
            for name, products in factors.products.items()
        },
        "exact": dict(factors.exact),
    }


def to_factors(
    state: Mapping[str, Any],
    settings: Settings,
    model: FunctionalModel,
    likelihood: Likelihood,
    plans: Mapping[str, BlockPlan],
    device: torch.device,
) -> Factors:
    """Inverse of `of_factors`, for a program of the same blocks."""
    moved = _Once(device)
    return Factors(
        settings=settings,
        n=state["n"],
        count=state["count"],
        model=model,
        likelihood=likelihood,
        plans=plans,
        products={
            name: tuple(Product(**{key: moved(value) for key, value in p.items()}) for p in kept)
            for name, kept in state["products"].items()
        },
        exact={name: moved(block) for name, block in state["exact"].items()},
    )


def of_basis(basis: Basis) -> dict[str, Any]:
    """The fields of a basis."""
    return {field.name: getattr(basis, field.name) for field in fields(basis)}


def to_basis(state: Mapping[str, Any], device: torch.device) -> Basis:
    """Inverse of `of_basis`."""
    moved = _Once(device)
    return Basis(**{name: moved(value) for name, value in state.items()})


def require_same_blocks(found: Collection[str], expected: Collection[str]) -> None:
    """Raise `OptionError` unless a state, if it has blocks at all, has those of the program."""
    if found and set(found) != set(expected):
        raise OptionError(
            f"the state is of the blocks {sorted(found)[:8]}; expected those of this program, "
            f"{sorted(expected)[:8]}. Load the state of an optimizer of the same program."
        )


class _Once:
    """Tensors on another device; what was one tensor is one there."""

    def __init__(self, device: torch.device):
        self.device, self.made = device, dict[int, Tensor]()

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self.made.setdefault(id(value), value.to(self.device))
