"""Experiments on one captured graph: is it the model, and where are the data in its taps?

Requires: a graph that some front end captured. Result: a graph that gave the model's predictions on
the example and on other data, and the uses with what the experiments found of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.errors import NonFiniteError
from fxkfac.graph.dependence import SHAPE_ONLY, depend_on
from fxkfac.graph.experiments.by_values import has_size_of_values, is_by_values
from fxkfac.graph.experiments.coupling import Coupling, coupling
from fxkfac.graph.experiments.locate import Located, locate, other_order
from fxkfac.graph.experiments.record import record
from fxkfac.graph.experiments.verify import is_model, run_graph
from fxkfac.graph.flat import FlatModel, State
from fxkfac.graph.front_ends.capture import Captured, Refusal
from fxkfac.graph.signature import near
from fxkfac.graph.structure import Structures
from fxkfac.graph.tap import tap_uses, without_dropout
from fxkfac.graph.uses.derived import derived_weights, require_no_other
from fxkfac.graph.uses.ir import Example, Use
from fxkfac.graph.uses.match import Matched, match
from fxkfac.isolation import is_finite

TRIAL_SIZE = 3  # data in the experiments: few, and no divisor of most other sizes
MOST = 10  # data of which it is seen whether they depend on each other: as many as five sets tell


@dataclass(frozen=True)
class Trial:
    """A captured graph that gives the model's predictions, and data for the experiments on it.

    In `state`, parameters that are zero are not, since what is multiplied by them would not show.
    """

    model: FlatModel
    captured: Captured
    dynamic: bool  # whether the graph is good for other batch sizes
    state: State
    data: list[Tensor]
    generator: torch.Generator
    structures: Structures
    derived: Mapping[Node, str]  # weights that are computed from parameters, by name


def attempt(
    model: FlatModel,
    captured: Captured,
    tensors: list[Tensor],
    dynamic: bool,
    structures: Structures,
) -> Trial:
    """Compare graph and model on the example and at another batch size.

    Raises:
        Refusal: The graph does not give the model's prediction.
        NonFiniteError: That holds NaN or Inf itself.
    """
    generator, state = torch.Generator().manual_seed(0), model.state()
    n = model.signature.batch_size(tensors)
    if wrong := is_model(model, captured, state, tensors):
        if not is_finite(model.predict(state, tensors)):
            raise NonFiniteError(
                "the model's own prediction for these inputs holds NaN or Inf; expected finite "
                "numbers. Look at the parameters, or at the inputs and their masks."
            )
        raise Refusal(wrong)
    state = _without_zeros(model, state, generator)
    data = model.signature.vary(tensors, TRIAL_SIZE + (n == TRIAL_SIZE), generator)
    dynamic = dynamic and not _differs_at(model, captured, state, data)
    dynamic = dynamic and not _runs_out(captured, state, tensors, data)
    if not dynamic:
        data = model.signature.vary(tensors, n, generator)
        if wrong := is_model(model, captured, state, data):
            raise Refusal(f"on data unlike the example {wrong}")
        _require_no_choice(model, captured, state, data, generator)
    through = {node: p for node, p in captured.placeholders().items() if p in structures.derived}
    inputs = dict(zip(captured.inputs(), model.signature.axes, strict=True))
    derived = derived_weights(captured.module.graph, through, inputs)
    with_block = {node: p for node, p in captured.placeholders().items() if structures.has_own(p)}
    require_no_other(captured.module.graph, derived, with_block)
    return Trial(model, captured, dynamic, state, data, generator, structures, derived)


def _without_zeros(model: FlatModel, state: State, generator: torch.Generator) -> State:
    """The same with small numbers in parameters that are zero, as those of a new head may be."""
    zero = [n for n in model.bound.tensors if state[n].is_floating_point() and not state[n].any()]
    return {**state, **{name: near(state[name], generator) for name in zero}}


def _require_no_choice(
    model: FlatModel,
    captured: Captured,
    state: State,
    data: list[Tensor],
    generator: torch.Generator,
) -> None:
    """Refuse a graph that holds for the signs of the example alone, as of an unrolled loop.

    Data with other signs may lie outside of what the model is defined on; then nothing is known.
    """
    for other in model.signature.unlike(data, generator):
        try:
            defined = bool(torch.isfinite(model.predict(state, other)).all())
            wrong = is_model(model, captured, state, other) if defined else ""
        except Exception:  # the model's own, of whatever kind, or the graph's refusal of such data
            continue
        if wrong:
            raise Refusal(
                f"on data with other signs {wrong}: the path through the model depends on the data"
            )


def _differs_at(
    model: FlatModel, captured: Captured, state: State, data: list[Tensor]
) -> str | None:
    """What is wrong at another batch size; a model of its own size, as of one graph, has none."""
    try:
        return is_model(model, captured, state, data)
    except Exception as error:  # the model's own
        return str(error)


def _runs_out(captured: Captured, state: State, tensors: list[Tensor], data: list[Tensor]) -> bool:
    """Whether parameters meet no rows that meet some in the example, as in a loop over slices.

    Such ops do not tell where the data are, and for more data the loop is too short.
    """
    empty = _meet_nothing(captured, state, data)
    return bool(empty) and not empty <= _meet_nothing(captured, state, tensors)


def _meet_nothing(captured: Captured, state: State, data: list[Tensor]) -> set[Node]:
    """Ops of a parameter without entries; an expert to which values send no row is none."""
    graph = captured.module.graph
    shapes = record(captured.module, [*captured.arguments(state), *data]).shapes
    empty = [n for n, shape in shapes.items() if 0 in shape and not has_size_of_values(n)]
    of_data = set(depend_on(graph, captured.inputs())) if empty else set()
    of_parameters = set(depend_on(graph, list(captured.placeholders()))) if empty else set()
    return {n for n in empty if any(i in of_parameters - of_data for i in n.all_input_nodes)}


def match_and_locate(trial: Trial, example: Example) -> tuple[Matched, Located]:
    """Match, and find by experiment where the data are in each tap.

    An op that meets no data may need to be lifted. Whether it does, the same experiment tells: both
    ways are tapped in it. One datum has no other order: there what can be lifted is, unless it has
    the axes of the data.
    """
    plain = _match(trial, example, ())
    graph, inputs = trial.captured.module.graph, trial.captured.inputs()
    dependent = depend_on(graph, inputs)
    names = {n.name for n in dependent}
    apart = {u.node for u in plain.uses if u.node not in names}
    ways = {frozenset[str](): plain}
    if apart:
        ways[frozenset(apart)] = _match(trial, example, apart)
    uses, located = _locate(trial, [u for way in ways.values() for u in way.uses])
    constant = zip(uses[: len(plain.uses)], located.constant, strict=False)
    lifted = frozenset(u.node for u, c in constant if c and u.node in apart)
    if apart and trial.model.signature.batch_size(trial.data) == 1:
        alike = {n.name for n in depend_on(graph, inputs, blind=SHAPE_ONLY)}
        lifted = frozenset(apart - alike - {u.node for u in ways[frozenset(apart)].unsupported})
    if lifted not in ways:  # some are to be lifted and others not
        ways = {lifted: _match(trial, example, lifted)}
        uses, located = _locate(trial, ways[lifted].uses)
    start = 0 if lifted == next(iter(ways)) else len(plain.uses)
    end = start + len(ways[lifted].uses)
    located = replace(located, uses=located.uses[start:end], constant=located.constant[start:end])
    return ways[lifted], located


def _match(trial: Trial, example: Example, lifted: Collection[str]) -> Matched:
    captured = trial.captured
    apart = set(trial.model.bound.selected) - set(trial.structures.derived)
    selected = {n: name for n, name in captured.placeholders().items() if name in apart}
    selected |= trial.derived
    graph, parts = captured.module.graph, trial.structures.apart
    return match(graph, selected, captured.inputs(), example, lifted, parts)


def _locate(trial: Trial, uses: Sequence[Use]) -> tuple[tuple[Use, ...], Located]:
    signature = trial.model.signature
    quiet, uses = tap_uses(without_dropout(trial.captured.module), uses)
    located = locate(
        lambda data, taps: run_graph(trial.captured, quiet, trial.state, data, taps),
        signature.permute,
        trial.data,
        other_order(signature.batch_size(trial.data)),
        uses,
        trial.generator,
        trial.captured.lowest,
        lambda: _shape_for_more(trial),
    )
    routed = {n.name for n in trial.captured.module.graph.nodes if has_size_of_values(n)}
    constant = (c and u.node not in routed for c, u in zip(located.constant, uses, strict=True))
    return uses, replace(located, constant=tuple(constant))


def _shape_for_more(trial: Trial) -> torch.Size | None:
    """The shape of the prediction for one datum more, of a model that takes one more."""
    signature = trial.model.signature
    order = torch.tensor([0, *range(signature.batch_size(trial.data))], device="cpu")
    try:
        return trial.model.predict(trial.state, signature.permute(trial.data, order)).shape
    except Exception:  # the model's own, of whatever kind
        return None


def find_coupling(
    trial: Trial, located: Located, uses: Sequence[Use], tensors: list[Tensor]
) -> Coupling:
    """Whether the prediction for some data changes with others.

    Where no one axis of the prediction holds the data, as in a matrix that compares every datum
    with every other one, no part of it is one datum's own. More data than those of the trial
    are looked at where the example has more, since fewer may not meet, as where each one is
    compared with the third before; but where values say where a datum is, that is known
    for those of the trial alone.
    """
    if located.prediction is None:
        return Coupling(coupled=True)
    quiet, uses = tap_uses(without_dropout(trial.captured.module), uses)
    graph, inputs = trial.captured.module.graph, trial.captured.inputs()
    signature, data = trial.model.signature, trial.data
    n = min(signature.batch_size(tensors), MOST)
    if n > signature.batch_size(data) and not is_by_values(graph, inputs):
        data = signature.vary(tensors, n, trial.generator)
    with torch.no_grad():
        return coupling(
            lambda data, sink: run_graph(trial.captured, quiet, trial.state, data, sink),
            quiet.graph,
            data,
            signature.replaced,
            signature.batch_size(data),
            located.prediction,
            uses,
            trial.generator,
            trial.captured.lowest,
        )
