"""Drawn network -> nested boxes: for a module its modules, for a function the functions it calls.

`scopes` says where each node is: the path of modules around it. A repeat has a part of that path
to itself, between what is around all of the layers and what is inside the first of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
from torch import nn

from fxkfac.graph.drawing.fold import common_path
from fxkfac.graph.drawing.repeats import Repeat

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

OPS = ("op", "unsupported")
Scope = tuple[str, ...]  # names of nested modules, and keys of repeats


@dataclass(frozen=True)
class Box:
    """A module, a function, or repeated layers that are no module of their own.

    Attributes:
        scope: Its path.
        name: What it is called, beginning at the box around it.
        remark: The module's class, if it is one.
        count: How many layers it stands for.
        plain: Whether it is drawn without frame and name.
        nodes: Keys of the nodes in it, without those in `inner`.
        inner: The boxes in it.
    """

    scope: Scope
    name: str
    remark: str
    count: int
    plain: bool
    nodes: tuple[str, ...]
    inner: tuple[Box, ...]


def set_paths(network: nx.MultiDiGraph, program: Program) -> None:
    """Give every op its `path`: the modules around it, or of a function's ops, the functions."""
    of_module = isinstance(program.model.model, nn.Module)
    for _, node in network.nodes(data=True):
        if "op" in node:
            inside = node["module"] if of_module else node["function"]
            root = "" if of_module else network.graph["model"]
            node["path"] = tuple(inside.split(".")) if inside not in ("", root) else ()


def scopes(network: nx.MultiDiGraph) -> dict[str, Scope]:
    """In which nested boxes each node is drawn."""
    paths = {key: node["path"] for key, node in network.nodes(data=True) if "op" in node}
    quiet = {key for key in paths if network.nodes[key]["kind"] == "quiet"}
    drawn = {outer for key in paths if key not in quiet for outer in _outward(paths[key])}
    for key in quiet:  # a module of quiet ops alone has no box of its own
        paths[key] = next((s for s in _outward(paths[key]) if s in drawn), ())
    places = {key: _with_repeats(network, key, path) for key, path in paths.items()}
    for key, node in network.nodes(data=True):
        if node["kind"] == "parameter":
            beside = beside_of(network, key)
            readers = [beside] if beside in places else network.successors(key)
            places[key] = common_path(places.get(reader, ()) for reader in readers)
    return places


def plain_scopes(network: nx.MultiDiGraph, places: Mapping[str, Scope]) -> set[Scope]:
    """Modules that hold one op, and need no frame where space is short: parameters name them."""
    ops = Counter(place for key, place in places.items() if network.nodes[key]["kind"] in OPS)
    around = {outer for place in places.values() for outer in _outward(place)[1:]}
    lone = {scope for scope in places.values() if ops[scope] <= 1 and scope not in around}
    return {scope for scope in lone if scope and scope[-1] not in network.graph["repeats"]}


def _outward(scope: Scope) -> list[Scope]:
    return [scope[:k] for k in range(len(scope), -1, -1)]


def _with_repeats(network: nx.MultiDiGraph, key: str, path: Scope) -> Scope:
    scope = path
    for name in reversed(network.nodes[key].get("repeats", ())):
        around = network.graph["repeats"][name].outside
        depth = len(common_path([around, path]))
        # What belongs to a layer, but to no module in it, is drawn in the layer's own box.
        inner = scope[depth:] if depth == len(around) else scope[len(path) :]
        scope = (*around, name, *inner)
    return scope


def beside_of(network: nx.MultiDiGraph, parameter: str) -> str:
    """The op beside which a parameter is drawn, in one stack with the op's others.

    A parameter of ops side by side is drawn above them, in a stack of its own; those without use
    are in one stack, whose name is empty.
    """
    first, *others = [*network.successors(parameter)] or [""]
    return first if all(nx.has_path(network, first, other) for other in others) else parameter


def boxes(
    program: Program, network: nx.MultiDiGraph, places: Mapping[str, Scope], plain: set[Scope]
) -> Box:
    """The outermost box, which is the model; the others are inside.

    Args:
        program: What `fxkfac.trace` returned.
        network: What is drawn.
        places: What `scopes` returned.
        plain: Which have no frame.
    """
    (box,) = _Boxes(program, network, places, plain).of((), ())
    return box


def names_around(network: nx.MultiDiGraph, scope: Scope, plain: set[Scope]) -> Scope:
    """The modules that are named around what is in a box, so that it need not name them."""
    named = scope[:-1] if scope in plain else scope
    return tuple(part for part in named if part not in network.graph["repeats"])


@dataclass(frozen=True)
class _Boxes:
    program: Program
    network: nx.MultiDiGraph
    places: Mapping[str, Scope]
    plain: set[Scope]

    def of(self, scope: Scope, above: Scope) -> list[Box]:
        """One module as a box; of one that only holds others, these."""
        here = tuple(key for key, place in self.places.items() if place == scope)
        inside = [p for p in self.places.values() if p[: len(scope)] == scope != p]
        inner = dict.fromkeys(p[: len(scope) + 1] for p in inside)
        is_drawn = not scope or here or (len(inner) > 1 and not self._is_list(scope))
        around = scope if is_drawn else above
        found = [box for below in inner for box in self.of(below, around)]
        if not is_drawn:
            return found
        name, remark, count = self._title(scope, above)
        plain = scope in self.plain and count == 1
        return [Box(scope, name, remark, count, plain, here, tuple(found))]

    def _title(self, scope: Scope, above: Scope) -> tuple[str, str, int]:
        """Name, class, and count of the layers that it stands for."""
        if not scope:
            return str(self.network.graph["model"]), "", 1
        module = self._module(scope)
        kind = type(module).__name__ if module is not None else ""
        parts = scope[len(above) :]
        found = [self._repeats[part] for part in parts if part in self._repeats]
        name = ".".join(part for part in parts if part not in self._repeats)
        ends = [(repeat.first, repeat.last) for repeat in found]
        if len(ends) == 1 and ends[0][0] == self._path(scope) != ends[0][1]:
            outer = len(self._path(above))
            name = " … ".join(".".join(end[outer:]) for end in ends[0])
        return name, kind, math.prod(repeat.count for repeat in found)

    @property
    def _repeats(self) -> dict[str, Repeat]:
        return self.network.graph.get("repeats", {})

    def _path(self, scope: Scope) -> Scope:
        return tuple(part for part in scope if part not in self._repeats)

    def _module(self, scope: Scope) -> nn.Module | None:
        model, path = self.program.model.model, ".".join(self._path(scope))
        if not isinstance(model, nn.Module) or scope[-1:] in [(name,) for name in self._repeats]:
            return None
        return model.get_submodule(path)

    def _is_list(self, scope: Scope) -> bool:
        """Whether this is a module that never runs itself."""
        return isinstance(self._module(scope), nn.ModuleList | nn.ModuleDict)
