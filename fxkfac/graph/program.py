"""The program: the tapped graph, its uses, and what to do when other inputs come along."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxkfac.functional import FunctionalModel, Inputs, Params
from fxkfac.graph.coverage import Coverage, coverage
from fxkfac.graph.experiments.by_values import located_again
from fxkfac.graph.experiments.verify import agrees
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.front_ends.constructs import require_own_gradients
from fxkfac.graph.front_ends.watch import Watch, watch_for
from fxkfac.graph.quiet import quietly
from fxkfac.graph.signature import Signature, require_finite
from fxkfac.graph.structure import Choice, Structures
from fxkfac.graph.table import headline, program_table
from fxkfac.graph.tap import Sink, Taps
from fxkfac.graph.tapped import Run, Tapped
from fxkfac.graph.uses.ir import Unpickled, Use
from fxkfac.isolation import full_precision, require_gradients_on, without_graph
from fxkfac.reached import held

if TYPE_CHECKING:
    import networkx

Compile = Callable[..., Tapped]


@dataclass(frozen=True, eq=False)
class Program(Unpickled):
    """A traced model. Made by `fxkfac.trace`; `print` shows every use.

    Attributes:
        model: The user's model as a pure function.
        signature: How inputs are nested, and their batch axes.
        asked: The structures that the user asked for.
    """

    model: FunctionalModel
    signature: Signature
    asked: Structures
    _compile: Compile = field(repr=False)
    _cache: dict[Hashable, Tapped] = field(default_factory=dict, repr=False)
    _watches: list[Watch] = field(default_factory=list, repr=False)
    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(torch.initial_seed() % 2**63),
        repr=False,
    )

    @property
    def tapped(self) -> Tapped:
        """The tapped graph of the example that was traced."""
        return next(iter(self._cache.values()))

    @property
    def graphs(self) -> tuple[Tapped, ...]:
        """All tapped graphs so far, that of the example first: of other shapes there are others."""
        return tuple(self._cache.values())

    @property
    def like(self) -> Tensor:
        """A parameter, if possible one with curvature, for the dtype and device of all."""
        return self.model.tensors[[*self.model.selected, *self.model.tensors][0]]

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every use of every covered parameter, in graph order."""
        return self.tapped.uses

    @property
    def graph_module(self) -> GraphModule:
        """The tapped graph: (sink, parameters, buffers, inputs) -> prediction."""
        return self.tapped.module

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are covered by uses, or used nowhere."""
        lost = set(self.uncovered)
        return tuple(name for name in self.model.selected if name not in lost)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the parameters with a use that has no normal form."""
        return self.tapped.uncovered

    @property
    def unsupported(self) -> str:
        """What is done with parameters that have a use without normal form."""
        return self.asked.unsupported

    @property
    def structures(self) -> dict[str, Choice]:
        """What the block of every selected parameter is made of, and why."""
        return self.structures_for(self.tapped)

    def structures_for(self, tapped: Tapped) -> dict[str, Choice]:
        """The same for one of the program's graphs."""
        return dict(tapped.once("structures", lambda: self.asked.choose(tapped, self._sizes())))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all selected parameters and of the weights derived from them."""
        own = {name: tuple(self.model.tensors[name].shape) for name in self.asked.selected}
        return own | {name: shape for name, (_, shape) in self.tapped.derived.items()}

    def coverage(self) -> Coverage:
        """Who got what: a row for every parameter; `print` shows it with shares in per cent."""
        own = {name: c for name, c in self.structures.items() if name in self.asked.selected}
        return coverage(own, self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}

    @full_precision()
    def at(
        self, inputs: Inputs, state: Mapping[str, Tensor] | None = None
    ) -> tuple[Tapped, list[Tensor]]:
        """The tapped graph for these inputs, and their tensors; compiled where it is new.

        Args:
            inputs: One batch, nested as the example was.
            state: Parameters and buffers in the place of the model's own.

        Raises:
            DataError: Inputs of another structure, or that hold no batch, NaN or Inf.
            ParameterError: The model has other parameters than when it was traced.
            CaptureError, UnsupportedUse: As `fxkfac.trace`, for inputs of a new shape.
        """
        tapped, tensors = self._at(inputs)
        if tapped.by_values:
            with quietly():
                tapped = located_again(tapped, self.signature, state or self.state(), tensors)
        return tapped, tensors

    def _at(self, inputs: Inputs) -> tuple[Tapped, list[Tensor]]:
        """The same with the layouts that were found on the example."""
        require_gradients_on()
        leaves = self.signature.leaves(inputs)
        tensors = [without_graph(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        require_finite(tensors)
        n = self.signature.batch_size(tensors)
        called = self.signature.key(leaves, tensors)
        key, tapped = self._known(called, n)
        if tapped is not None and n in tapped.verified:
            return tapped, tensors
        model = FlatModel(self.model, self.signature.with_constants(inputs))
        with held(self.model.model):
            if tapped is None:
                require_own_gradients(self.model)
                key = (called, watch_for(model, tensors, self._watches).key())
                return self._compile_for(key, model, tensors, n, dynamic=True), tensors
            if not agrees(model, tapped, tensors, n):
                return self._compile_for(key, model, tensors, n, dynamic=False), tensors
        return tapped, tensors

    def _known(self, called: Hashable, n: int) -> tuple[Hashable, Tapped | None]:
        """The graph for what the model is called with, and is now; and its key."""
        for watch in self._watches:
            key = (called, watch.key())
            if tapped := self._cache.get((key, n)) or self._cache.get(key):
                return key, tapped
        return called, None

    def _compile_for(
        self, key: Hashable, model: FlatModel, tensors: list[Tensor], n: int, dynamic: bool
    ) -> Tapped:
        tapped = self._compile(model, tensors, self.asked, dynamic)
        tapped.verified.add(n)
        self._cache[key if tapped.dynamic else (key, n)] = tapped
        return tapped

    @full_precision()
    def run(self, inputs: Inputs, params: Params | None = None, sink: Sink | None = None) -> Run:
        """Run the tapped graph on one batch.

        Args:
            inputs: One batch, nested as the example was.
            params: Tensors in the place of the model's own parameters.
            sink: What receives the inputs of the uses and the outputs of their ops.

        Raises:
            DataError, CaptureError, UnsupportedUse: As `at`.
            UnknownParameter, ParameterError: `params` do not fit the model's.
        """
        state = self.state(params)
        tapped, tensors = self.at(inputs, state)
        return self.run_graph(tapped, tensors, state, sink or Taps())

    def run_graph(
        self, tapped: Tapped, tensors: list[Tensor], state: Mapping[str, Tensor], sink: Sink
    ) -> Run:
        """The same for a graph that is known, and for parameters and buffers together."""
        with torch.enable_grad():
            # What wraps a call of a module takes as long as some of its ops.
            prediction = tapped.module.forward(sink, *tapped.captured.arguments(state), *tensors)
        return Run(tapped, prediction, self.signature.batch_size(tensors))

    def state(self, params: Params | None = None) -> dict[str, Tensor]:
        """Parameters and buffers, with tensors in the place of the model's own parameters.

        None asks for a gradient: a path to it would be one that leads past the taps' root.
        """
        buffers = {
            name: without_graph(b) if b.requires_grad or b.is_inference() else b
            for name, b in self.model.buffers().items()
        }
        return {**self.model.override(params), **buffers}

    def draw(
        self,
        path: str | os.PathLike[str],
        *,
        fold: bool = False,
        colour: Mapping[str, float] | None = None,
        colour_name: str = "value",
        details: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> str:
        """Draw the graph with its taps; the ending of `path` says the format. Returns the path.

        Args:
            path: Ends in .svg, .png, .pdf, .gv, or .html for a page.
            fold: Draw layers that repeat once, with their count.
            colour: A number for each parameter that is to be coloured.
            colour_name: What these numbers are.
            details: What the page shows of a parameter beside its shapes.

        `fxkfac.graph.drawing.draw` says more, and which errors there are.
        """
        from fxkfac.graph.drawing.draw import draw

        return draw(self, path, fold=fold, colour=colour, colour_name=colour_name, details=details)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Parameters, views, ops and taps as a graph with attributes."""
        from fxkfac.graph.network import to_networkx

        return to_networkx(self)

    def __str__(self) -> str:
        return program_table(self)

    def __repr__(self) -> str:
        return f"Program({headline(self)})"
