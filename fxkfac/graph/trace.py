"""Model and example inputs -> program: capture, match, tap, locate, verify.

Orchestration only: each step is a file of its own, and the last two are what makes the first
three trustworthy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxkfac.errors import CaptureError, FxkfacError, UnsupportedUse
from fxkfac.functional import FunctionalModel, Inputs, Params, bind
from fxkfac.graph.experiments.by_values import is_by_values
from fxkfac.graph.experiments.locate import Located
from fxkfac.graph.experiments.record import record
from fxkfac.graph.experiments.trial import attempt, find_coupling, match_and_locate
from fxkfac.graph.experiments.verify import (
    WRONG_GRADIENTS,
    lost_axis,
    require_gradients,
    require_graph_gradients,
)
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.front_ends.capture import (
    ABOVE_AUTOGRAD,
    FRONT_ENDS,
    Captured,
    Refusal,
    any_momentum,
)
from fxkfac.graph.front_ends.constructs import Construct, constructs_of
from fxkfac.graph.front_ends.cuts import Cut, first_cut
from fxkfac.graph.program import Program
from fxkfac.graph.quiet import dispatch_kept, quietly
from fxkfac.graph.signature import BatchAxes, Signature, signature_of
from fxkfac.graph.structure import Structures, structures_of
from fxkfac.graph.tap import tap_uses
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.lift import SUMMED
from fxkfac.graph.uses.match import Matched, Unsupported, unsupported_message
from fxkfac.isolation import full_precision

FAR = (16, 256)  # by which data are larger, where a backward of the user's own is not in the graph


@full_precision()
def trace(
    model: nn.Module | Callable[..., Any],
    inputs: Inputs,
    params: Params | Iterable[str] | None = None,
    unsupported: str = "error",
    *,
    structure: Mapping[str, str] | None = None,
    dense_limit: int = 2**14,
    apart: Mapping[str, int] | None = None,
    batch_axis: BatchAxes = 0,
) -> Program:
    """Compile a model into a program whose graph emits what KFAC needs.

    Args:
        model: A module, called `model(*inputs)`, `model(x)` for a single tensor, `model(**inputs)`
            for a dict; or a function `f(params, *inputs)` / `f(params, **inputs)`.
        inputs: Example inputs, a batch of at least one datum. Two or more that differ are better:
            with a batch size of one, PyTorch's own ops may not tell a batch axis from a unit axis.
        params: For a function, its tensors in nested dicts, lists or tuples; a position is a name
            like a key, as in `"layers.0.1"`. For a module, names or shell
            patterns, or a dict of tensors in the place of its own; default: all that require
            gradients.
        unsupported: What to do with a parameter that enters an op without a rule: `"error"`,
            `"diagonal"` or `"dense"` (exact, from every datum's gradient), `"identity"`, `"skip"`.
        structure: For names or shell patterns, what the block is made of: `"kronecker"`,
            `"diagonal"`, `"dense"`, `"identity"` or `"skip"`; or `"derived"`, for parameters from
            which a weight is computed: that weight gets the block. A later one overrides an
            earlier one. Default: Kronecker factors; for scales, as of norms, the exact diagonal.
        dense_limit: Most entries that a parameter with a dense block may have.
        apart: For names or shell patterns, in how many equal parts along axis 0 the weight is
            taken, each with a block of its own: 4 for the gates of an LSTM.
        batch_axis: Axis of the inputs along which the data are; or, as `in_dims` of `torch.vmap`,
            an int or `None` for each input.

    Returns:
        The program. `print(program)` shows every use.

    Raises:
        CaptureError: No front end could capture the model; each one's reason is given.
        UnsupportedUse: A parameter enters an op that has no rule, and `unsupported="error"`.
        UnknownParameter, ParameterError: See `params` and `structure`.
        OptionError: There is no such structure, or a dense block would be too large.
        DataError: The inputs hold no batch.
    """
    bound = bind(model, params)
    structures = structures_of(bound, structure, unsupported, dense_limit, apart)
    bound = replace(bound, selected=structures.tapped)
    program = Program(bound, signature_of(inputs, batch_axis), structures, compile_graph)
    program.at(inputs)
    program.coverage()  # raises for structures that cannot be together
    return program


def compile_graph(
    model: FlatModel, tensors: list[Tensor], structures: Structures, dynamic: bool = True
) -> Tapped:
    """Try the front ends in order; take the first whose graph is proven to be the model.

    Where it has uses without normal form, the others may take the op apart: the one that covers
    most parameters is taken. They are not tried where no op can be taken apart.
    With `dynamic` false the graph is taken for this batch size alone.
    """
    best: Tapped | None = None
    with quietly():
        cut = first_cut(model, tensors, model.bound.selected)
    refusals = dict.fromkeys(ABOVE_AUTOGRAD, cut.name) if cut else {}
    example = _to_capture(model.signature, tensors, dynamic)

    def captured_by(name: str) -> Tapped:
        with any_momentum(model.bound.model):
            captured = FRONT_ENDS[name](model.bound, model.signature, example)
        return _compile(model, captured, tensors, dynamic, structures, cut)

    for name in _in_order(cut):
        refusals.pop(name, None)  # of the one that comes last, and is tried after all
        found = _tried(captured_by, name)
        if isinstance(found, str):
            refusals[name] = found
            continue
        tapped = replace(found, refusals=dict(refusals))
        if not tapped.unsupported:
            return tapped
        if best is None or len(tapped.uncovered) < len(best.uncovered):
            best = tapped
        if all(u.is_final for u in tapped.unsupported):
            break
    if dynamic and model.signature.batch_size(tensors) == 1 and (best is None or best.unsupported):
        return _of_one(model, tensors, structures, best)
    if refused := _refused(best, structures):
        raise UnsupportedUse(unsupported_message(refused))
    if best is not None:
        return best
    with quietly():
        met = constructs_of(model, tensors)
    raise CaptureError(_capture_message(model.bound, refusals, met))


def _of_one(
    model: FlatModel, tensors: list[Tensor], structures: Structures, best: Tapped | None
) -> Tapped:
    """The graph for one datum alone, or the one for all batch sizes where it covers as much."""
    if best is None or _refused(best, structures):
        return compile_graph(model, tensors, structures, dynamic=False)
    try:
        own = compile_graph(model, tensors, structures, dynamic=False)
    except FxkfacError:
        return best
    return own if len(own.uncovered) < len(best.uncovered) else best


def _tried(captured_by: Callable[[str], Tapped], name: str) -> Tapped | str:
    """What a front end gives, or why it gives nothing."""
    with dispatch_kept():
        try:
            with quietly():
                return captured_by(name)
        except FxkfacError:
            raise
        except Refusal as reason:
            return str(reason)
        except Exception as error:  # front ends raise whatever their depths raise
            return _shorten(error)


def _in_order(cut: Cut | None) -> list[str]:
    """The front ends, without those that lose gradients, or these last."""
    safe = [name for name in FRONT_ENDS if cut is None or name not in ABOVE_AUTOGRAD]
    return [*safe, *ABOVE_AUTOGRAD] if cut and cut.of_function else safe


def _refused(tapped: Tapped | None, structures: Structures) -> list[Unsupported]:
    """The uses without normal form that are an error."""
    unsupported = tapped.unsupported if tapped else ()
    return [u for u in unsupported if any(structures.refuses(p) for p in u.parameters)]


def _to_capture(signature: Signature, tensors: list[Tensor], dynamic: bool) -> list[Tensor]:
    """The example; with a datum more where a batch of one would be taken for a unit axis."""
    if not dynamic or signature.batch_size(tensors) > 1:
        return tensors
    return signature.vary(tensors, 2, torch.Generator().manual_seed(0))


def _compile(
    model: FlatModel,
    captured: Captured,
    tensors: list[Tensor],
    dynamic: bool,
    structures: Structures,
    cut: Cut | None,
) -> Tapped:
    """Match, tap, locate and verify one captured graph."""
    trial = attempt(model, captured, tensors, dynamic, structures)
    example = record(captured.module, [*captured.arguments(trial.state), *trial.data])
    matched, located = match_and_locate(trial, example)
    uses, unsupported = _covered(matched, located)
    found = find_coupling(trial, located, uses, tensors)
    module, uses = tap_uses(captured.module, uses)
    tapped = Tapped(
        captured,
        module,
        uses,
        unsupported,
        located.prediction,
        trial.dynamic,
        set(),
        coupled=found.coupled,
        alike=not found.known,
        by_values=is_by_values(captured.module.graph, captured.inputs()),
        derived={name: (n.name, tuple(example.shapes[n])) for n, name in trial.derived.items()},
    )
    alone = trial.dynamic and model.signature.batch_size(tensors) == 1
    if alone and (wrong := lost_axis(tapped, trial.state, tensors)):
        raise Refusal(wrong)
    lost = set(tapped.uncovered)
    if lost & set(tapped.derived):
        raise Refusal(f"derived weights have no normal form: {unsupported[0]}")
    covered = [name for name in model.bound.selected if name not in lost]
    for size in (1, *FAR) if cut and captured.front_end in ABOVE_AUTOGRAD else (1,):
        data = [size * t if t.is_floating_point() else t for t in trial.data]
        require_gradients(model, tapped, trial.state, data, covered)
    exact = [name for name in tapped.uncovered if structures.exact_if_lost(name)]
    require_graph_gradients(model, captured, trial.state, trial.data, exact)
    return tapped


def _covered(matched: Matched, located: Located) -> tuple[tuple[Use, ...], tuple[Unsupported, ...]]:
    """Give the uses their batch axes; a parameter with one use without normal form loses all."""
    summed = [
        Unsupported(u.parameters, u.op, u.node, SUMMED, u.source, u.module)
        for u, constant in zip(matched.uses, located.constant, strict=True)
        if constant
    ]
    unsupported = (*matched.unsupported, *summed)
    lost = {p for u in unsupported for p in u.parameters}
    kept: list[Use] = []
    places: dict[int, int] = {}
    for k, (use, batch) in enumerate(zip(matched.uses, located.uses, strict=True)):
        if lost & set(use.parameters):
            continue
        places[k] = len(kept)
        kept.append(replace(use, batch=batch))
    return tuple(_rejoined(u, places) for u in kept), unsupported


def _rejoined(use: Use, places: Mapping[int, int]) -> Use:
    if use.join is None:
        return use
    weight = places.get(use.join.weight)
    return replace(use, join=None if weight is None else replace(use.join, weight=weight))


def _shorten(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:240]}"


def _capture_message(
    bound: FunctionalModel, refusals: Mapping[str, str], met: Sequence[Construct]
) -> str:
    name = getattr(bound.model, "__name__", type(bound.model).__name__)
    reasons = "\n".join(f"  {front_end}: {reason}" for front_end, reason in refusals.items())
    of_gradients = {reason.startswith(WRONG_GRADIENTS) for reason in refusals.values()}
    blamed = [c for c in met if c.of_gradients in of_gradients][:4]
    if blamed:
        listed = "\n".join(f"  {c}" for c in blamed)
        return (
            f"no front end could capture {name}:\n{reasons}\n"
            f"What stands in the way, and what to do:\n{listed}\n"
            "Or trace a function around the part of the model that can be captured."
        )
    return (
        f"no front end could capture {name}:\n{reasons}\n"
        "Mend what the most general one names (the last), or trace a function around the part of "
        "the model that can be captured."
    )
