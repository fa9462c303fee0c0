"""The words of the graph floor: one use of a parameter, and where it comes from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from torch import Size, Tensor
from torch.fx import Node

from fxkfac.errors import FxkfacError
from fxkfac.graph.form import BatchAxis, Form
from fxkfac.graph.rules.registry import NotLinear
from fxkfac.graph.uses.view import View


@dataclass(frozen=True)
class Source:
    """A line of the user's own code."""

    file: str
    line: int
    function: str
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Example:
    """What the graph's nodes were in one run: shapes of tensors, which are complex, numbers."""

    shapes: Mapping[Node, Size] = field(repr=False)
    numbers: Mapping[Node, Any] = field(repr=False)
    complex: Set[Node] = field(repr=False)

    def require_real(self, *nodes: Node) -> None:
        """Raise `NotLinear` where one of these is complex: x and g do not tell the gradient there.

        That of a real parameter is the real part of Σ x̄ gᵀ, and is squared after it is taken.
        """
        if not self.complex.isdisjoint(nodes):
            raise NotLinear(
                "its values are complex, so that a real parameter's gradient is the real part of a "
                "sum, and has no factors"
            )


class Unpickled:
    """What knows a traced graph: there are copies of it, but no pickles.

    It refuses by itself, before its parts are looked at: the user's function may be none that has a
    name to be pickled by.
    """

    def __reduce__(self) -> NoReturn:
        raise FxkfacError(
            "a traced graph is pickled, as by torch.save or on the way to another process, and "
            "what knows it with it; its operations cannot be. Write factors by fxkfac.save and "
            "read them by fxkfac.load; trace anew where the graph is needed."
        )

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


@dataclass(frozen=True, eq=False)
class Join:
    """A bias that shares the rows of a weight use: together they are W̃ = (W b).

    Attributes:
        weight: Position of the weight use in `Program.uses`.
        entries: For every (group, out) of the weight use, the number of the bias entry there.
        scale: What the bias is multiplied by, relative to the product.
    """

    weight: int
    entries: Tensor = field(repr=False)
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Use(Unpickled):
    """One place where one parameter, or a view of it, enters one linear op.

    Attributes:
        parameters: The names whose entries the operand holds; more than one after `cat`.
        op: The ATen overload, such as `aten.linear`.
        node: Name of the op's node in the graph.
        view: The layout ops between the parameters and the op.
        form: The op as one einsum.
        source: The user's own line, `None` where no line of theirs led here.
        module: Path of the module that ran the op, empty where there is none.
        tap: Position of the op's output among the program's taps.
        join: For a bias, the weight use whose rows it shares, if there is one.
        x_shape, y_shape: Shapes at trace time; x's is `()` where the input is the constant one.
        batch: Where the data are laid out in the rows; `None` where that is not known.
    """

    parameters: tuple[str, ...]
    op: str
    node: str
    view: View
    form: Form
    source: Source | None
    module: str
    tap: int
    join: Join | None
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    batch: BatchAxis | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Use:
        """The same: nothing in it changes, and its nodes are a graph's."""
        return self

    @property
    def parameter(self) -> str:
        """The first parameter's name."""
        return self.parameters[0]

    @property
    def is_bias(self) -> bool:
        """Whether the input is the constant one."""
        return self.form.input is None
