"""Model -> captured graph, by the front end that can.

Result: a functional ATen graph whose placeholders are all parameters, all buffers and the input
tensors, in this order, and whose output is the prediction. No front end captures everything, so
they are tried in order, and each one's refusal is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fxkfac.errors import ParameterError
from fxkfac.functional import FunctionalModel, prediction_of, split_inputs
from fxkfac.graph.custom import whole_functions
from fxkfac.graph.dependence import reach_output
from fxkfac.graph.digits import dtypes_of, lowest
from fxkfac.graph.front_ends.cleanup import STOP, rebuild
from fxkfac.graph.front_ends.packed import packing
from fxkfac.graph.front_ends.pure import is_functional
from fxkfac.graph.front_ends.recurrence import FUSED
from fxkfac.graph.merge import OWN
from fxkfac.graph.signature import Signature
from fxkfac.graph.source import is_users
from fxkfac.isolation import held_by
from fxkfac.parameters import nest_names

DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor
MARKS: dict[Any, str] = {
    **dict.fromkeys((Tensor.detach, torch.detach), STOP),
    **dict.fromkeys((torch.zeros, torch.zeros_like, Tensor.new_zeros), OWN),
}


class Refusal(Exception):
    """A front end cannot capture this model. The text is the reason."""


@dataclass(frozen=True)
class Captured:
    """A model's graph.

    Attributes:
        module: Called with parameters, buffers and input tensors; returns the prediction.
        parameters, buffers: The names of the first placeholders, in order.
        front_end: Who captured it.
    """

    module: GraphModule
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    front_end: str

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters and buffers, as the graph takes them."""
        return *self.parameters, *self.buffers

    def arguments(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """What the graph takes before the inputs, by name: the model's order may be another now.

        Raises:
            ParameterError: The model holds others than the graph takes.
        """
        names = self.names
        if state.keys() != set(names):
            raise ParameterError(
                "the model has changed since it was traced: it has lost "
                f"{[name for name in names if name not in state]}, and "
                f"{[name for name in state if name not in names]} are new; expected the "
                "parameters and buffers of the trace. Trace anew."
            )
        return [state[name] for name in names]

    def placeholders(self) -> dict[Node, str]:
        """The parameters' placeholders and their names."""
        return dict(zip(self._nodes(), self.parameters, strict=False))

    def inputs(self) -> list[Node]:
        """The placeholders of the input tensors."""
        return self._nodes()[len(self.parameters) + len(self.buffers) :]

    @cached_property
    def used(self) -> frozenset[str]:
        """Names of the parameters to which a gradient may come back from the prediction."""
        reached = reach_output(self.module.graph)
        return frozenset(name for node, name in self.placeholders().items() if node in reached)

    @property
    def lowest(self) -> torch.dtype:
        """The dtype with the fewest digits in which anything is computed of the parameters."""
        return lowest(self.module.graph, self._nodes()[: len(self.parameters)])

    @cached_property
    def underflows(self) -> bool:
        """Whether anything is computed of the parameters in float16, which ends at 6e-8."""
        nodes = self._nodes()[: len(self.parameters)]
        return torch.float16 in dtypes_of(self.module.graph, nodes)

    def _nodes(self) -> list[Node]:
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]


def by_export(bound: FunctionalModel, signature: Signature, tensors: list[Tensor]) -> Captured:
    """`torch.export` with a dynamic batch axis: keeps linear, conv, einsum .. whole."""
    params = [] if isinstance(bound.model, nn.Module) else _leaves(bound)
    axes = [None if a is None else {a: Dim.AUTO} for a in signature.axes]
    dynamic = ([None] * len(params), axes)
    callee = _Callee(bound, signature)
    with held_by(callee.modules()):
        program = export(callee, (params, tensors), dynamic_shapes=dynamic)
    if not is_functional(program.graph_module.graph):
        program = program.run_decompositions({})
    for node in program.graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Refusal(f"the graph keeps a sub-graph, {node.target}")
    names = [*bound.tensors, *bound.buffers()]
    roles: dict[str, str | int | Tensor] = {}
    leaf = -len(params)
    for spec in program.graph_signature.input_specs:
        key, target = spec.arg.name, (spec.target or "").removeprefix("model.")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            roles[key] = bound.aliases.get(target, target)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            roles[key] = program.constants[spec.target]
        elif spec.kind == InputKind.USER_INPUT:
            roles[key] = leaf if leaf >= 0 else names[leaf + len(params)]
            leaf += 1
        else:
            raise Refusal(f"the graph takes an input of kind {spec.kind}")
    result = program.graph_signature.user_outputs[-1]
    own = tuple(bound.tensors), tuple(bound.buffers())
    module = rebuild(
        program.graph_module, roles, own[0], bound.selected, own[1], len(tensors), str(result)
    )
    return Captured(module, *own, "torch.export")


@contextmanager
def any_momentum(model: Any) -> Iterator[None]:
    """Give a momentum to norms that have none, who ask a buffer for a number, which no graph does.

    No prediction hangs on it, and buffers are copies while a model is captured.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    norms = [m for m in modules if isinstance(m, _NormBase) and m.momentum is None]
    try:
        for m in norms:
            m.momentum = 0.1
        yield
    finally:
        for m in norms:
            m.momentum = None


class _Callee(nn.Module):
    """What export sees: lists of tensors in, the prediction out."""

    def __init__(self, bound: FunctionalModel, signature: Signature) -> None:
        super().__init__()
        self.bound, self.signature = [bound], signature  # in a list: no sub-module twice
        if isinstance(bound.model, nn.Module):
            self.model = bound.model

    def forward(self, params: list[Tensor], tensors: list[Tensor]) -> Tensor:
        bound, inputs = self.bound[0], self.signature.inputs(tensors)
        args, kwargs = split_inputs(inputs)
        if bound.structure is None:
            with bound.autocast.again():
                return prediction_of(self.model(*args, **kwargs))
        named = dict(zip(bound.tensors, params, strict=True))
        named |= {alias: named[name] for alias, name in bound.aliases.items()}
        with (
            fx_traceback.preserve_node_meta(),
            _RecordSource(),  # export records modules' lines alone
            bound.autocast.again(),
        ):
            return prediction_of(bound.model(nest_names(named, bound.structure), *args, **kwargs))


def _leaves(bound: FunctionalModel) -> list[Tensor]:
    """The parameters as fresh leaves, so that gradients taken inside the model can be traced."""
    return [t.requires_grad_() if t.is_floating_point() else t for t in bound.current().values()]


def by_make_fx(mode: str) -> Callable[[FunctionalModel, Signature, list[Tensor]], Captured]:
    """`make_fx`: records below autograd and functorch, so it sees through both."""

    def capture(bound: FunctionalModel, signature: Signature, tensors: list[Tensor]) -> Captured:
        names = [*bound.tensors, *bound.buffers()]

        def flat(*values: Tensor) -> Tensor:
            named = dict(zip(names, values, strict=False))
            with _RecordSource(), packing():
                return prediction_of(bound(named, signature.inputs(list(values[len(names) :]))))

        data = [t.clone() for t in tensors]  # the model may write into its inputs
        example = [*_leaves(bound), *bound.buffers().values(), *data]
        with (
            fx_traceback.preserve_node_meta(),
            whole_functions(_marked_here),
            # Both have whole recurrent nets as one op.
            torch.backends.cudnn.flags(enabled=False),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            module = make_fx(flat, FUSED, tracing_mode=mode)(*example)  # type: ignore[arg-type]
            if _mutates(module):
                functional = functionalize(Interpreter(module).run)
                module = make_fx(functional, tracing_mode=mode)(*example)  # type: ignore[arg-type]
        placeholders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        roles: dict[str, str | int | Tensor] = dict(zip(placeholders, names, strict=False))
        roles |= {n: k for k, n in enumerate(placeholders[len(names) :])}
        (output,) = (n for n in module.graph.nodes if n.op == "output")
        (result,) = output.all_input_nodes
        own = tuple(bound.tensors), tuple(bound.buffers())
        module = rebuild(
            module, roles, own[0], bound.selected, own[1], len(tensors), result.name, True
        )
        return Captured(module, *own, f"make_fx ({mode})")

    return capture


def _mutates(module: GraphModule) -> bool:
    targets = [n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return any(target._schema.is_mutable for target in targets)


class _RecordSource(TorchFunctionMode):
    """Give every recorded node the user's line, and mark what the user asked for.

    Below autograd, `detach` also stands wherever autograd saved a tensor for later, and zeros where
    a tensor has no tangent. Only the user's own detach, and what runs without gradients, stops the
    gradient; and only the user's own zeros are data.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == DATA:  # leaves no node, and is what `detach` gives
            func = Tensor.detach
        frame = sys._getframe(1)
        mark = MARKS.get(func, "")
        if mark == OWN and "_functorch" in frame.f_code.co_filename:  # for what has no tangent
            mark = ""
        with _marked(frame, mark):
            return func(*args, **(kwargs or {}))


@contextmanager
def _marked(frame: FrameType | None, mark: str = "") -> Iterator[None]:
    """Give every node that is recorded now the user's line, a mark, and whether gradients stop."""
    meta = fx_traceback.current_meta
    before = dict(meta)
    if trace := _trace_of(frame):
        meta["stack_trace"] = trace
    marks = {mark, "" if torch.is_grad_enabled() else STOP} - {""}
    if marks:
        meta["custom"] = dict.fromkeys(marks, True)
    try:
        yield
    finally:
        meta.clear()
        meta.update(before)


def _marked_here() -> AbstractContextManager[None]:
    return _marked(sys._getframe(1))


def _trace_of(frame: FrameType | None) -> str:
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'


FRONT_ENDS: dict[str, Callable[[FunctionalModel, Signature, list[Tensor]], Captured]] = {
    "torch.export": by_export,
    "make_fx (symbolic)": by_make_fx("symbolic"),
    "make_fx (real)": by_make_fx("real"),
}
ABOVE_AUTOGRAD = ("torch.export",)  # they see neither where gradients are off nor whose they are
