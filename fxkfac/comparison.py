"""Factors, data -> how far KFAC, EKFAC, KFOC and the exact diagonal are from each exact block.

‖Ĉ − C‖ / ‖C‖ in the Frobenius norm, with C by plain automatic differentiation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxkfac.exact as exact
from fxkfac.curvature.corrections.ekfac import ekfac
from fxkfac.curvature.corrections.kfoc import kfoc
from fxkfac.curvature.curvature import AnyBlock, Curvature
from fxkfac.curvature.data import Data, batches
from fxkfac.curvature.factors import Factors, require_factors
from fxkfac.curvature.options import require_program
from fxkfac.curvature.report import block_name
from fxkfac.errors import BatchAxisError, OptionError
from fxkfac.exact.data import size_of
from fxkfac.functional import FunctionalModel, Params, copied
from fxkfac.graph.program import Program
from fxkfac.graph.table import columns
from fxkfac.isolation import no_draws
from fxkfac.parameters import nest_names
from fxkfac.reached import held

LARGEST = 2**12  # entries of a block that is written out: five matrices of 128 MiB
DIAGONAL = "exact diagonal"
METHODS = ("KFAC", "EKFAC", "KFOC", DIAGONAL)
EXPECTED: dict[str, Callable[..., Tensor]] = {  # of drawn flavours, what they converge to
    "type-2": exact.ggn,
    "curvature-propagation": exact.ggn,
    "type-1": exact.type1_fisher,
    "mc": exact.type1_fisher,
    "empirical": exact.empirical_fisher,
}


@dataclass(frozen=True)
class LayerError:
    """How far approximations are from one exact block.

    Attributes:
        params: Names of its parameters.
        numel: Number of their entries.
        norm: ‖C‖.
        distances: For every approximation, ‖Ĉ − C‖.
    """

    params: tuple[str, ...]
    numel: int
    norm: float
    distances: Mapping[str, float]

    @property
    def errors(self) -> dict[str, float | None]:
        """For every approximation, ‖Ĉ − C‖ / ‖C‖; `None` where C is zero."""
        return {k: d / self.norm if self.norm else None for k, d in self.distances.items()}


@dataclass(frozen=True)
class LayerErrors:
    """A row for every block; `print` shows them.

    Attributes:
        fisher: The flavour whose exact block C is.
        rows: One for every block.
        total: All of them along one diagonal.
    """

    fisher: str
    rows: tuple[LayerError, ...]
    total: LayerError

    def __iter__(self) -> Iterator[LayerError]:
        return iter(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The same in lists, dicts, numbers and text, as JSON has them."""
        return {
            "fisher": self.fisher,
            "rows": [_plain(row) for row in self.rows],
            "total": _plain(self.total),
        }

    def __str__(self) -> str:
        rows = [(block_name(row.params), row) for row in self.rows]
        header = ("block", "entries", "norm", *METHODS)
        lines = [_line(name, row) for name, row in [*rows, ("all", self.total)]]
        title = f"relative Frobenius errors beside the exact blocks ({self.fisher})"
        return "\n".join([title, *columns([header, *lines])])


def layer_errors(
    program: Program,
    loss: Any,
    data: Data,
    factors: Factors,
    params: Params | None = None,
    names: str | Sequence[str] | None = None,
) -> LayerErrors:
    """How far KFAC, EKFAC, KFOC and the exact diagonal are from the exact block of every layer.

    EKFAC and KFOC are computed by passes over the data, the exact blocks by automatic
    differentiation of the model, independent of the program: one backward pass for every number
    of the prediction, and for every block anew. So take few data.

    Args:
        program, loss, factors, params: As of `fxkfac.ekfac`.
        data: One (inputs, targets) pair, or a list of them, with the data on axis 0.
        names: Names of the blocks, or one name; all of them by default.

    Returns:
        Distances in float64. For `"mc"` and `"curvature-propagation"` C is the expectation, and
        so what is drawn too few times is part of the distance.

    Raises:
        OptionError: A block is too large to be written out, or is one of a derived weight; the
            factors were computed with a mask; or the model draws random numbers, as dropout does
            in training.
        UnknownParameter: There is no block of that name.
        DataError, MergeError, UnsupportedUse, BatchAxisError, NonFiniteError: As of `fxkfac.kfoc`.
    """
    require_program(program)
    require_factors(factors)
    _require_all_rows(factors)
    _require_batch_first(program)
    listed = [names] if isinstance(names, str) else names
    chosen = {name: factors[name] for name in (factors if listed is None else listed)}
    for name, block in chosen.items():
        _require_small(name, block)
        _require_parameters(name, block, program.model)
    found: dict[str, Curvature] = {
        "KFAC": factors,
        "EKFAC": ekfac(program, loss, data, factors, params),
        "KFOC": kfoc(program, loss, data, factors, params=params),
    }
    for inputs, _ in batches(data):  # which fit the program, as the passes have found
        _require_counted(program, inputs)
        _require_no_draws(program.model, inputs, params)
    model, values = _as_bound(program.model, params)
    compute, rows = EXPECTED[factors.settings.fisher], []
    for name, block in chosen.items():
        with program.model.autocast.again():
            C = compute(model, loss, data, list(block.params), values).cpu().double()
        approximations = {method: c[name].dense().cpu() for method, c in found.items()}
        approximations[DIAGONAL] = torch.diag(C.diagonal())
        distances = {k: _norm(approximate - C) for k, approximate in approximations.items()}
        rows.append(LayerError(block.params, block.numel, _norm(C), distances))
    return LayerErrors(factors.settings.fisher, tuple(rows), _total(rows))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _total(rows: Sequence[LayerError]) -> LayerError:
    """The root of the sum of squares: blocks beside each other."""
    distances = {
        method: sum(row.distances[method] ** 2 for row in rows) ** 0.5 for method in METHODS
    }
    norm = sum(row.norm**2 for row in rows) ** 0.5
    names = tuple(name for row in rows for name in row.params)
    return LayerError(names, sum(row.numel for row in rows), norm, distances)


def _require_all_rows(factors: Factors) -> None:
    if factors.settings.masked:
        raise OptionError(
            "these factors were computed with a mask, which leaves out rows, but the exact blocks "
            "are of all that the model does; expected factors without one. Compute them anew on "
            "data without padding."
        )


def _require_batch_first(program: Program) -> None:
    axes, at = program.signature.axes, program.tapped.prediction
    if any(axis not in (0, None) for axis in axes):
        raise BatchAxisError(
            f"the inputs have their data along axes {list(axes)}; expected axis 0, where exact "
            "matrices look for them. Wrap the model in one that moves that axis to the front."
        )
    if at is not None and at[:2] != (0, 1):
        axis, outer, inner = at
        raise BatchAxisError(
            f"axis {axis} of the prediction is laid out as ({outer} · N · {inner}); expected the "
            "data in front, on axis 0, where exact matrices look for them. Wrap the model in one "
            "that moves them there, and the targets with them."
        )


def _require_counted(program: Program, inputs: Any) -> None:
    n = program.signature.batch_size(program.signature.tensors(inputs))
    if (counted := size_of(inputs)) != n:
        raise BatchAxisError(
            f"the first input has length {counted} along axis 0, and there are {n} data; expected "
            "an input of the data in front, by which exact matrices count them. Wrap the model in "
            "one that takes what all data share last."
        )


def _require_no_draws(model: FunctionalModel, inputs: Any, params: Params | None) -> None:
    alike = "one model for all passes over the data"
    # A model may take derivatives itself.
    with torch.enable_grad(), held(model.model), no_draws(alike):
        model(model.override(params), copied(inputs))


def _require_small(name: str, block: AnyBlock) -> None:
    if block.numel > LARGEST:
        raise OptionError(
            f"the exact block of {name!r} has {block.numel:,}² entries; expected at most "
            f"{LARGEST:,}². Name smaller blocks by `names`, or take a narrower model."
        )


def _require_parameters(name: str, block: AnyBlock, bound: FunctionalModel) -> None:
    if lost := [p for p in block.params if p not in bound.tensors]:
        raise OptionError(
            f"the block {name!r} is of {', '.join(lost)}, which the model computes from its "
            "parameters, and so has no exact block by differentiation; expected a parameter's. "
            "Name the other blocks by `names`."
        )


def _as_bound(
    bound: FunctionalModel, params: Params | None
) -> tuple[nn.Module | Callable[..., Any], Params]:
    """The user's model, and all its parameters as they were nested."""
    values = bound.override(params)
    if bound.structure is None:
        return bound.model, values
    aliased = {alias: values[name] for alias, name in bound.aliases.items()}
    return bound.model, nest_names(values | aliased, bound.structure)


def _plain(row: LayerError) -> dict[str, Any]:
    return {
        "params": list(row.params),
        "entries": row.numel,
        "norm": row.norm,
        "distances": dict(row.distances),
        "errors": row.errors,
    }


def _line(name: str, row: LayerError) -> tuple[str, ...]:
    errors = ("–" if e is None else f"{e:.3f}" for e in (row.errors[m] for m in METHODS))
    return (name, f"{row.numel:,}", f"{row.norm:.2e}", *errors)
