"""Program -> the same program as data: a networkx graph of parameters, ops, taps and their flow.

Keys are the names of the nodes in the captured graph; every attribute is a plain Python value, so
that the network can be written as GraphML. `to_networkx` says which attributes there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxkfac.graph.attributes import parameter_attributes, shape_of, symbols_of, use_attributes
from fxkfac.graph.dependence import LIKE, SHAPE_ONLY, is_float
from fxkfac.graph.source import module_of, source_of
from fxkfac.graph.table import shape_text, where
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.match import STOPS, op_name
from fxkfac.graph.uses.view import LAYOUT_OPS, is_layout

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

# Where a value comes from: the key of a node in the network, and the layout ops on the way.
Origin = tuple[str, tuple[str, ...]]


def to_networkx(program: Program) -> nx.MultiDiGraph:
    """The program as a graph with attributes.

    Nodes have a `kind` and a `name`, and a `shape` (empty where it is not known) in which N is the
    batch axis:

    - `parameter`: `numel`; `status` is covered, unsupported (see `reason`), unused, or
      frozen (its curvature was not asked for); `structure` says what its block is made of.
    - `input`, `buffer` and `prediction`.
    - `op`: a linear op with a tap. `op`, `module`, `function`, `source` and `code` say where it
      is. `tap` says which tap it has, and `tapped` the node whose output that is: another one
      where the op itself meets no data. `input` (the node of the captured graph that holds x, and
      with experts that of the choice; empty for a bias), `x`, `y` (at the tap), `batch`,
      `orientation`, and the factors' sizes `group`, `d_in` (one more where a bias has joined),
      `d_out`, `A` and `B` are those of the first weight that enters, sizes where its block has
      factors; `joins` names the weight whose factors a bias shares.
    - `unsupported`: an op that a parameter enters without normal form (see `reason`): no tap.
    - `quiet`: any other op.

    Edges have a `kind`:

    - `data`: forward. `gradient` says that the backpropagated vectors pass here on their way from
      the prediction down to a tap.
    - `parameter`: from a parameter to an op. `view` names the layout ops on the way; an edge that
      is a use has all of the attributes from `tap` to `joins` of its own.
    """
    captured = program.tapped.captured
    model, dynamic = program.model.model, program.tapped.dynamic
    name = getattr(model, "__name__", type(model).__name__)
    network = nx.MultiDiGraph(model=name, front_end=captured.front_end, dynamic=dynamic)
    builder = _Builder(program, network)
    for node in captured.module.graph.nodes:
        builder.add(node)
    _mark_gradients(network, builder.gradient_stops)
    return network


@dataclass
class _Builder:
    """Adds one node of the captured graph after the other to the network."""

    program: Program
    network: nx.MultiDiGraph
    origins: dict[Node, list[Origin]] = field(default_factory=dict)
    gradient_stops: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        captured = self.program.tapped.captured
        placeholders = captured.module.graph.find_nodes(op="placeholder")
        names = [*captured.parameters, *captured.buffers, *_input_names(self.program)]
        self.names = dict(zip(placeholders, names, strict=True))
        self.parameters, self.symbols = captured.placeholders(), symbols_of(self.program)
        self.buffers = set(placeholders[len(self.parameters) :][: len(captured.buffers)])
        # One operand has several uses where its op meets the data at several additions: the first.
        ops = enumerate(_op_of(use) for use in self.program.uses)
        self.places = {op: k for k, op in reversed(list(ops))}
        self.structures = self.program.structures
        self.reasons = {u.node: u.reason for u in self.program.tapped.unsupported}

    def add(self, node: Node) -> None:
        """Add a node, or only note what its value is a view or a copy of."""
        self.origins[node] = self._origins(node)
        if self.origins[node] != [(node.name, ())]:
            return
        if node.target in STOPS or not is_float(node):
            self.gradient_stops.add(node.name)
        if node in self.parameters:
            parameter = parameter_attributes(self.program, self.names[node], self.structures)
            self.network.add_node(node.name, **parameter)
        elif node.op in ("placeholder", "get_attr"):
            self._add_end(node)
        elif node.op == "output":
            shape = shape_of(node.all_input_nodes[0], self.symbols, self.program.tapped.prediction)
            self.network.add_node(node.name, kind="prediction", name="prediction", shape=shape)
            self._add_edges(node)
        else:
            self._add_op(node)

    def _origins(self, node: Node) -> list[Origin]:
        """What a value comes from: itself, except for numbers, copies, and views of parameters."""
        sources = [source for n in node.all_input_nodes for source in self.origins[n]]
        if node.target in SHAPE_ONLY or (_is_plain(node) and not sources):
            return []
        status = {self.network.nodes[key].get("status", "") for key, _ in sources}
        step = LAYOUT_OPS[node.target] if is_layout(node) else None
        is_view = {"", "frozen"}.isdisjoint(status) or status == {"frozen"}
        if node.target in LIKE and sources and "" not in status:
            return []  # zeros in a parameter's shape
        if step is None or not sources or not (is_view or (step == "" and len(sources) == 1)):
            return [(node.name, ())]
        steps = (step,) if step else ()
        return list(dict.fromkeys((key, (*before, *steps)) for key, before in sources))

    def _add_end(self, node: Node) -> None:
        is_buffer = node.op == "get_attr" or node in self.buffers
        readers = [u for u in self.program.uses if u.form.input and u.form.input.name == node.name]
        shape = shape_of(node, self.symbols)
        if readers and not shape:
            shape = shape_text(readers[0].x_shape, readers[0].form.x, readers[0])
        name = self.names.get(node, str(node.target))
        self.network.add_node(
            node.name, kind="buffer" if is_buffer else "input", name=name, shape=shape
        )

    def _add_op(self, node: Node) -> None:
        source, name = source_of(node), getattr(node.target, "__name__", "")
        self.network.add_node(
            node.name,
            kind="quiet",
            name=node.name,
            op=name.partition(".")[0],
            module=module_of(node),
            function=source.function if source else "",
            source=where(source, "") if source else "",
            code=source.code if source else "",
            shape=shape_of(node, self.symbols),
        )
        self._add_edges(node)
        here = [place for (name, _), place in self.places.items() if name == node.name]
        if here:
            first = min(here, key=lambda place: self.program.uses[place].is_bias)
            main = use_attributes(self.program, first, self.structures)
            self.network.add_node(node.name, **main, kind="op")
        elif lost := self._lost_at(node):
            reason = self.reasons.get(node.name, f"another use of {lost[0]} has no normal form")
            self.network.add_node(node.name, kind="unsupported", reason=reason)

    def _lost_at(self, node: Node) -> list[str]:
        """Names of the unsupported parameters that enter an op and are differentiated there."""
        keys = self.network.predecessors(node.name) if node.target not in STOPS | LIKE else ()
        entering = [self.network.nodes[key] for key in keys]
        return [n["name"] for n in entering if n.get("status") == "unsupported"]

    def _add_edges(self, node: Node) -> None:
        for operand in node.all_input_nodes:
            place = self.places.get((node.name, operand.name))
            attributes = (
                {} if place is None else use_attributes(self.program, place, self.structures)
            )
            for key, steps in self.origins[operand]:
                if self.network.nodes[key]["kind"] == "parameter":
                    view = {"kind": "parameter", "view": " ".join(steps)}
                    self.network.add_edge(key, node.name, **view, **attributes)
                elif not self.network.has_edge(key, node.name):
                    # A derived weight is an op's output, and enters as a parameter does.
                    self.network.add_edge(key, node.name, kind="data", gradient=False, **attributes)


def _op_of(use: Use) -> tuple[str, str]:
    """Names of the op that the parameter enters, and of its operand there."""
    operand = use.view.chain[-1]
    readers = {node.name: node for node in operand.users}
    if use.node not in readers:  # tapped behind the op: at an addition, or where rows have chosen
        ways = [n for n, r in readers.items() if op_name(r) == use.op and _leads(r, use.node)]
        ways += [n for n, r in readers.items() if _feeds(r, use.node)]
        return ways[0], operand.name
    return use.node, operand.name


def _leads(node: Node, end: str) -> bool:
    """Whether only layout ops lie between a node and the one named `end`."""
    return any(user.name == end or (is_layout(user) and _leads(user, end)) for user in node.users)


def _feeds(node: Node, end: str) -> bool:
    """Whether the node named `end` has anything from this one."""
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().users) - seen
        seen |= new
        waiting += new
    return any(reader.name == end for reader in seen)


def _input_names(program: Program) -> list[str]:
    """`input` for a single one; otherwise its keyword or its position."""
    places: list[Any] = [object() for _ in program.signature.axes]
    leaves = pytree.tree_flatten_with_path(program.signature.inputs(places))[0]
    paths = [pytree.keystr(path) for path, leaf in leaves if leaf in places]
    names = [re.sub(r"\W+", ".", path).strip(".") for path in paths]
    if names == ["0"]:
        return ["input"]
    return [f"input {name}" if name[:1].isdigit() else name for name in names]


def _is_plain(node: Node) -> bool:
    """Whether this is a Python function, as those that reckon with sizes are."""
    return node.op == "call_function" and not isinstance(node.target, OpOverload)


def _mark_gradients(network: nx.MultiDiGraph, stops: set[str]) -> None:
    """Mark the data edges between a tap and the prediction through which gradients flow."""
    data = nx.DiGraph((u, v) for u, v, kind in network.edges(data="kind") if kind == "data")
    data.remove_nodes_from(stops)
    tapped = {key for _, key in network.nodes(data="tapped") if key in data}
    (prediction,) = (key for key, kind in network.nodes(data="kind") if kind == "prediction")
    above = _reached(data, tapped)
    below = _reached(data.reverse(copy=False), [prediction])
    for u, v, attributes in network.edges(data=True):
        if attributes["kind"] == "data":
            attributes["gradient"] = {u, v} <= above & below


def _reached(graph: nx.DiGraph, starts: Iterable[str]) -> set[str]:
    reached = set(starts)
    for start in tuple(reached):
        reached |= nx.descendants(graph, start)
    return reached
