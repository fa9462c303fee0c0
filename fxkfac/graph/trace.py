"""Model and example inputs -> program: capture, match, tap, locate, verify.

Orchestration only: each step is a file of its own, and the last two are what makes the first
three trustworthy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxkfac.errors import CaptureError, FxkfacError, UnsupportedUse
from fxkfac.functional import FunctionalModel, Inputs, Params, bind
from fxkfac.graph.capture import FRONT_ENDS, Captured, Refusal, quietly
from fxkfac.graph.derived import derived_weights
from fxkfac.graph.ir import Example, Use
from fxkfac.graph.lift import SUMMED
from fxkfac.graph.locate import Located, locate
from fxkfac.graph.match import Matched, Unsupported, match, unsupported_message
from fxkfac.graph.program import Program, Tapped
from fxkfac.graph.record import record
from fxkfac.graph.signature import BatchAxes, Signature, signature_of
from fxkfac.graph.structure import Structures, structures_of
from fxkfac.graph.tap import tap_uses, without_dropout
from fxkfac.graph.verify import FlatModel, State, is_model, require_gradients, run_graph

TRIAL_SIZE = 3  # data in the experiments: few, and no divisor of most other sizes


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
        params: For a function, its possibly nested dict of tensors. For a module, names or shell
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
    program.structures  # noqa: B018 - raises for what cannot be together
    return program


def compile_graph(
    model: FlatModel, tensors: list[Tensor], structures: Structures, dynamic: bool = True
) -> Tapped:
    """Try the front ends in order; take the first whose graph is proven to be the model.

    Where it has uses without normal form, the others may take the op apart: the one that covers
    most parameters is taken.
    With `dynamic` false the graph is taken for this batch size alone.
    """
    refusals: dict[str, str] = {}
    best: Tapped | None = None
    example = _to_capture(model.signature, tensors, dynamic)
    for name, front_end in FRONT_ENDS.items():
        try:
            with quietly():
                captured = front_end(model.bound, model.signature, example)
                tapped = _compile(model, captured, tensors, dynamic, structures)
        except FxkfacError:
            raise
        except Refusal as reason:
            refusals[name] = str(reason)
            continue
        except Exception as error:  # front ends raise whatever their depths raise
            refusals[name] = _shorten(error)
            continue
        tapped = replace(tapped, refusals=dict(refusals))
        if not tapped.unsupported:
            return tapped
        if best is None or len(tapped.uncovered) < len(best.uncovered):
            best = tapped
    refused = _refused(best, structures)
    if dynamic and model.signature.batch_size(tensors) == 1 and (best is None or refused):
        return compile_graph(model, tensors, structures, dynamic=False)
    if refused:
        raise UnsupportedUse(unsupported_message(refused))
    if best is not None:
        return best
    raise CaptureError(_capture_message(model.bound, refusals))


def _refused(tapped: Tapped | None, structures: Structures) -> list[Unsupported]:
    """The uses without normal form that are an error."""
    unsupported = tapped.unsupported if tapped else ()
    return [u for u in unsupported if any(structures.refuses(p) for p in u.parameters)]


def _to_capture(signature: Signature, tensors: list[Tensor], dynamic: bool) -> list[Tensor]:
    """The example; with a datum more where a batch of one would be taken for a unit axis."""
    if not dynamic or signature.batch_size(tensors) > 1:
        return tensors
    return signature.vary(tensors, 2, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Trial:
    """A captured graph that gives the model's predictions, and data for the experiments on it."""

    model: FlatModel
    captured: Captured
    dynamic: bool  # whether the graph is good for other batch sizes
    state: State
    data: list[Tensor]
    generator: torch.Generator
    structures: Structures | None = None
    derived: Mapping[Node, str] = field(default_factory=dict)


def _compile(
    model: FlatModel,
    captured: Captured,
    tensors: list[Tensor],
    dynamic: bool,
    structures: Structures,
) -> Tapped:
    """Match, tap, locate and verify one captured graph."""
    own = {name: node for node, name in captured.placeholders().items()}
    derived = derived_weights(
        captured.module.graph, {own[name]: name for name in structures.derived}, captured.inputs()
    )
    trial = _try(model, captured, tensors, dynamic)
    trial = replace(trial, structures=structures, derived=derived)
    example = record(captured.module, [*trial.state.values(), *trial.data])
    matched, uses, located = _match(trial, example, frozenset())
    if summed := frozenset(u.node for u, c in zip(uses, located.constant, strict=True) if c):
        matched, uses, located = _match(trial, example, summed)
    uses, unsupported = _covered(uses, located, matched)
    module, uses = tap_uses(captured.module, uses)
    tapped = Tapped(
        captured,
        module,
        uses,
        unsupported,
        located.prediction,
        trial.dynamic,
        set(),
        coupled=located.coupled,
        derived={name: (n.name, tuple(example.shapes[n])) for n, name in derived.items()},
    )
    lost = set(tapped.uncovered)
    if lost & set(tapped.derived):
        raise Refusal(f"derived weights have no normal form: {unsupported[0]}")
    covered = [name for name in model.bound.selected if name not in lost]
    taps = run_graph(module, trial.state, trial.data)
    require_gradients(model, tapped, taps, trial.state, trial.data, covered)
    return tapped


def _try(model: FlatModel, captured: Captured, tensors: list[Tensor], dynamic: bool) -> _Trial:
    """Compare graph and model on the example and at another batch size."""
    generator, state = torch.Generator().manual_seed(0), model.state()
    n = model.signature.batch_size(tensors)
    if wrong := is_model(model, captured, state, tensors):
        raise Refusal(wrong)
    other = model.signature.vary(tensors, TRIAL_SIZE + (n == TRIAL_SIZE), generator)
    if dynamic and not _differs_at(model, captured, state, other):
        return _Trial(model, captured, True, state, other, generator)
    same = model.signature.vary(tensors, n, generator)
    if wrong := is_model(model, captured, state, same):
        raise Refusal(f"on data unlike the example {wrong}")
    return _Trial(model, captured, False, state, same, generator)


def _differs_at(
    model: FlatModel, captured: Captured, state: State, data: list[Tensor]
) -> str | None:
    """What is wrong at another batch size; a model of its own size, as of one graph, has none."""
    try:
        return is_model(model, captured, state, data)
    except Exception as error:  # the model's own
        return str(error)


def _match(
    trial: _Trial, example: Example, lifted: frozenset[str]
) -> tuple[Matched, tuple[Use, ...], Located]:
    """Match, and find by experiment where the data are in each tap."""
    captured, bound, signature = trial.captured, trial.model.bound, trial.model.signature
    assert trial.structures is not None
    apart = set(bound.selected) - set(trial.structures.derived)
    selected = {n: name for n, name in captured.placeholders().items() if name in apart}
    selected |= trial.derived
    matched = match(
        captured.module.graph, selected, captured.inputs(), example, lifted, trial.structures.apart
    )
    quiet, uses = tap_uses(without_dropout(captured.module), matched.uses)
    located = locate(
        lambda data: run_graph(quiet, trial.state, data),
        signature.permute,
        trial.data,
        signature.batch_size(trial.data),
        uses,
        trial.generator,
    )
    routed = {n.name for n in captured.module.graph.nodes if _is_routed(n)}
    constant = (c and u.node not in routed for c, u in zip(located.constant, uses, strict=True))
    return matched, uses, replace(located, constant=tuple(constant))


def _is_routed(node: Node) -> bool:
    """Whether the number of rows depends on values: a single one looks the same in any order."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(str(size).startswith("u") for size in value.shape)


def _covered(
    uses: Sequence[Use], located: Located, matched: Matched
) -> tuple[tuple[Use, ...], tuple[Unsupported, ...]]:
    """Give the uses their batch axes; a parameter with one use without normal form loses all."""
    summed = [
        Unsupported(u.parameters, u.op, u.node, SUMMED, u.source, u.module)
        for u, constant in zip(uses, located.constant, strict=True)
        if constant
    ]
    unsupported = (*matched.unsupported, *summed)
    lost = {p for u in unsupported for p in u.parameters}
    kept: list[Use] = []
    places: dict[int, int] = {}
    for k, (use, batch) in enumerate(zip(uses, located.uses, strict=True)):
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


def _capture_message(bound: FunctionalModel, refusals: Mapping[str, str]) -> str:
    name = getattr(bound.model, "__name__", type(bound.model).__name__)
    reasons = "\n".join(f"  {front_end}: {reason}" for front_end, reason in refusals.items())
    return (
        f"no front end could capture {name}:\n{reasons}\n"
        "Mend what the most general one names (the last), or trace a function around the part of "
        "the model that can be captured."
    )
