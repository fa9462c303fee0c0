"""Captured graph -> the uses of every parameter.

Requires: a functional graph whose parameters are placeholders.
Result: every op that a selected parameter (or a view of it) enters is a `Use` in normal form, or
is listed in `unsupported` with the reason. Nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Size, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from fxkfac.graph.axes import letters, renamed
from fxkfac.graph.dependence import LIKE, SHAPE_ONLY, STOPS, depend_on, reach_output
from fxkfac.graph.form import Form, OneHot
from fxkfac.graph.real import of_real_rows
from fxkfac.graph.rules.registry import RULES, NotLinear, Operand, call_of, operands
from fxkfac.graph.source import module_of, source_of
from fxkfac.graph.uses.apart import take_apart
from fxkfac.graph.uses.bias import join_biases
from fxkfac.graph.uses.ir import Example, Source, Use
from fxkfac.graph.uses.lift import lift
from fxkfac.graph.uses.route import route
from fxkfac.graph.uses.view import View, is_layout


@dataclass(frozen=True)
class Unsupported:
    """A use for which there is no normal form."""

    parameters: tuple[str, ...]
    op: str
    node: str
    reason: str
    source: Source | None
    module: str
    is_final: bool = False  # any front end would record the same op

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else f" in module {self.module or 'the model'!r}"
        code = f"\n    {self.source.code}" if self.source and self.source.code else ""
        return f"{', '.join(self.parameters)} enters {self.op}{at}: {self.reason}{code}"


@dataclass(frozen=True)
class Matched:
    """All uses in graph order, and what has no normal form."""

    uses: tuple[Use, ...]
    unsupported: tuple[Unsupported, ...]


def match(
    graph: Graph,
    parameters: Mapping[Node, str],
    inputs: Sequence[Node],
    example: Example,
    lifted: Collection[str] = (),
    apart: Mapping[str, int] | None = None,
) -> Matched:
    """Find every use of the parameters, whose nodes are the keys of `parameters`.

    Args:
        graph: The captured graph.
        parameters: The nodes of parameters and derived weights, and their names.
        inputs: The placeholders of the data.
        example: Shapes and numbers of one run.
        lifted: Names of ops that meet no data; see `fxkfac.graph.uses.lift`.
        apart: In how many parts weights are taken; see `fxkfac.graph.uses.apart`.
    """
    found: list[Use] = []
    unsupported: list[Unsupported] = []
    dependent, alive = depend_on(graph, inputs), reach_output(graph)
    for node, operand, chain in _entries(graph, parameters):
        if node not in alive:  # what it computes has no gradient
            continue
        try:
            use = _use(node, operand, chain, parameters, example)
            use = take_apart(replace(use, form=of_real_rows(node, use.form)), apart or {})
            if node.name in lifted:
                found += _lifted(use, node, dependent, example)
            else:
                found += _routed(use, node, example) or [use]
        except NotLinear as reason:
            unsupported.append(_refuse(node, chain, parameters, str(reason)))
    return Matched(tuple(join_biases(found, graph, example)), tuple(unsupported))


Chain = tuple[Node, ...]


def _entries(graph: Graph, parameters: Mapping[Node, str]) -> Iterable[tuple[Node, Operand, Chain]]:
    """Every (op, operand) that a parameter enters, with the layout ops on the way.

    The chain holds placeholders first, then layout ops in graph order, the operand last.
    """
    chains: dict[Node, Chain] = {}
    for node in graph.nodes:
        if node in parameters:
            chains[node] = (node,)
            continue
        entering = [n for n in node.all_input_nodes if n in chains]
        if not entering or node.target in SHAPE_ONLY | LIKE | STOPS:
            continue
        if is_layout(node) and len(entering) == len(_tensor_arguments(node)):
            chains[node] = _extend([chains[n] for n in entering], node, parameters)
        elif isinstance(node.target, OpOverload):
            for operand, argument in operands(call_of(node, {}, {}), chains.__contains__):
                yield node, operand, chains[argument]
        else:
            yield node, Operand(""), chains[entering[0]]


def _tensor_arguments(node: Node) -> list[Node]:
    """The arguments whose entries a layout op moves; the others are sizes."""
    first = node.args[0]
    return list(dict.fromkeys(first if isinstance(first, list | tuple) else [first]))


def _extend(chains: Sequence[Chain], node: Node, parameters: Mapping[Node, str]) -> Chain:
    """Put chains together: placeholders first, then layout ops without repetition."""
    merged = dict.fromkeys(n for chain in chains for n in chain)
    first = [n for n in merged if n in parameters]
    return (*first, *(n for n in merged if n not in parameters), node)


def _lifted(use: Use, node: Node, dependent: set[Node], example: Example) -> list[Use]:
    """The same use at each of the places where it meets data."""
    return [
        replace(use, node=at.name, form=form, y_shape=tuple(example.shapes[at]))
        for at, form in lift(node, use.form, dependent, example)
    ]


def _routed(use: Use, node: Node, example: Example) -> list[Use]:
    """The products that take the matrices which a use looks up, if that is what it does."""
    return [
        replace(
            use,
            op=op_name(at),
            node=at.name,
            form=form,
            source=source_of(at),
            module=module_of(at),
            x_shape=tuple(example.shapes[form.input]) if form.input is not None else (),
            y_shape=tuple(example.shapes[at]),
        )
        for at, form in route(node, use.form, example)
    ]


def _use(
    node: Node, operand: Operand, chain: Chain, parameters: Mapping[Node, str], example: Example
) -> Use:
    rule = RULES.get(node.target) if isinstance(node.target, OpOverload) else None
    if rule is None:
        raise NotLinear(
            f"there is no rule for {op_name(node)}, or it is not linear in the parameter"
        )
    example.require_real(*chain, node)
    form = rule(call_of(node, example.shapes, example.numbers), operand)
    view, form = _narrow(_view(chain, parameters, example), form, example.shapes[chain[-1]])
    _require_einsum(form)
    if view.scale is None:
        raise NotLinear("its parts are multiplied by different numbers")
    form = replace(form, scale=form.scale * view.scale)
    return Use(
        parameters=view.parameters,
        op=op_name(node),
        node=node.name,
        view=view,
        form=form,
        source=source_of(node),
        module=module_of(node),
        tap=-1,
        join=None,
        x_shape=tuple(example.shapes[form.input]) if form.input is not None else (),
        y_shape=tuple(example.shapes[node]),
    )


def _view(chain: Chain, parameters: Mapping[Node, str], example: Example) -> View:
    roots = [n for n in chain if n in parameters]
    numbers = {
        m: example.numbers[m] for n in chain for m in n.all_input_nodes if m in example.numbers
    }
    shapes = tuple(tuple(example.shapes[n]) for n in roots)
    return View(tuple(parameters[n] for n in roots), shapes, chain, numbers)


def _narrow(view: View, form: Form, shape: Size) -> tuple[View, Form]:
    """An axis along which the weight only repeats itself is a row axis, not one of the weight.

    One that repeats a part of itself, as the heads for every datum, is both: (rows, part), or
    (part, rows) where every entry stands several times next to itself.
    """
    if not {"expand", "repeat"} & set(view.steps):
        return view, form
    index, tokens = view.index(), form.weight.split()
    if len(tokens) != index.ndim:  # an axis with the groups of a convolution in it
        _require_one_for_all(view)
        return view, form
    periods = {axis: period for axis in range(len(shape)) if (period := _period(index, axis))}
    sizes: dict[str, int] = {}
    parts: dict[str, str] = {}
    for axis, period in list(periods.items()):
        token, (length, step) = tokens[axis], period
        if isinstance(form.prepare, OneHot) and token == "v" and length == 1:
            raise NotLinear("every index looks up the same entries; use them without an index")
        if length == 1:
            tokens[axis] = "1"
        elif form.prepare is None and form.folded is None:
            parts[token] = f"{token}_rows {token}" if step == 1 else f"{token} {token}_rows"
            sizes[token] = length
        else:
            del periods[axis]
    narrowed = replace(view, narrowed=tuple((axis, *p) for axis, p in periods.items()))
    _require_one_for_all(narrowed)
    x, y = renamed(form.x, parts), renamed(form.y, parts)
    return narrowed, replace(form, weight=" ".join(tokens), x=x, y=y, sizes={**form.sizes, **sizes})


def _require_one_for_all(view: View) -> None:
    """Raise `NotLinear` where entries come again as often as there are data."""
    index = view.index()
    if free_symbols(view.chain[-1].meta.get("val")) and len(index.unique()) < index.numel():
        raise NotLinear("it is repeated for the data within an axis; let the op broadcast it")


def _period(index: Tensor, axis: int) -> tuple[int, int] | None:
    """How many places of an axis all others repeat, and how far apart they are."""
    along = index.movedim(axis, 0)
    n = len(along)
    for k in (k for k in range(1, n) if n % k == 0):
        if (along.unflatten(0, (-1, k)) == along[:k]).all():
            return k, 1
        if (along.unflatten(0, (k, -1)) == along[:: n // k].unsqueeze(1)).all():
            return k, n // k
    return None


def _require_einsum(form: Form) -> None:
    known = [*letters(form.x), *letters(form.y), *form.group]
    lost = [a for a in letters(form.weight) if a not in known]
    if lost:
        raise NotLinear("the op sums over the parameter alone; sum it before the product")


def op_name(node: Node) -> str:
    """`aten.linear` for `aten.linear.default`; other overloads keep their name."""
    own = node.target.__name__ if isinstance(node.target, FunctionType) else str(node.target)
    return own.removesuffix(".default")


def _refuse(node: Node, chain: Chain, parameters: Mapping[Node, str], reason: str) -> Unsupported:
    names = tuple(parameters[n] for n in chain if n in parameters)
    at = source_of(node), module_of(node)
    return Unsupported(names, op_name(node), node.name, reason, *at, _is_basic(node.target))


def _is_basic(target: Any) -> bool:
    """Whether an op is a function of one number, as `exp` is, and of no simpler ops made."""
    if not isinstance(target, OpOverload):
        return False
    tensors = [a for a in target._schema.arguments if isinstance(a.type, torch.TensorType)]
    return len(tensors) == 1 and {torch.Tag.core, torch.Tag.pointwise} <= set(target.tags)


def unsupported_message(unsupported: Sequence[Unsupported]) -> str:
    """What an error says about uses without normal form."""
    listed = "\n".join(f"  {u}" for u in unsupported[:8])
    more = f"\n  and {len(unsupported) - 8} more" if len(unsupported) > 8 else ""
    number = f"{len(unsupported)} uses have" if len(unsupported) > 1 else "One use has"
    return (
        f"{number} no normal form (group, in, out):\n{listed}{more}\n"
        "Trace with unsupported='diagonal' for the exact diagonal of these parameters, with "
        "unsupported='skip' to leave them out, or select others by `params`. Where a weight is "
        f"computed from them, structure={{{unsupported[0].parameters[0]!r}: 'derived'}} gives that "
        "weight a block."
    )
