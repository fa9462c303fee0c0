"""What autograd does, as one graph of operations, traced without the values of any tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxkfac.curvature.inductor.code import EAGER, first_line
from fxkfac.curvature.inductor.mended import mend
from fxkfac.errors import FxkfacError, OptionError
from fxkfac.graph.quiet import quietly
from fxkfac.graph.tap import Taps
from fxkfac.graph.tapped import Tapped

aten = torch.ops.aten

# Compiled code lays out what it computes in its own way, in which these may need a copy.
VIEWS = {aten.view.default, aten._unsafe_view.default}


class Kind(NamedTuple):
    """A tensor without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(t: Tensor) -> Kind:
        """That of a tensor."""
        return Kind(t.shape, t.stride(), t.dtype, t.device)

    def empty(self) -> Tensor:
        """One of this kind."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def shape_only(self) -> Tensor:
        """One of this shape, dtype and device that takes no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


@contextmanager
def traceable() -> Iterator[None]:
    """Raise `OptionError` for whatever ops say when they meet tensors without values."""
    try:
        yield
    except FxkfacError:
        raise
    except Exception as error:
        raise OptionError(
            "backend='inductor' cannot trace this graph without the values of its tensors, on "
            f"which something in it may depend: {first_line(error)} {EAGER}"
        ) from error


def prediction_kind(tapped: Tapped, kinds: Sequence[Kind]) -> Kind:
    """Of what kind the prediction is, laid out without gaps."""
    with quietly(), FakeTensorMode(allow_non_fake_inputs=True):
        f = tapped.module(Taps(), *(kind.empty() for kind in kinds)).detach()
        return Kind.of(torch.empty_like(f))


def traced(function: Callable[..., Any], kinds: Sequence[Kind]) -> tuple[GraphModule, Any]:
    """The graph of a function of tensors of these kinds, in which nothing changes in place.

    Returns:
        The graph, and the function's result with nodes in the place of tensors.
    """
    specs: list[pytree.TreeSpec] = []

    def flat(*arguments: Tensor) -> list[Any]:
        leaves, spec = pytree.tree_flatten(function(*arguments))
        specs.append(spec)
        return leaves

    # Without values, nothing of the graph can depend on them unnoticed.
    with quietly(), FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [kind.empty() for kind in kinds]
        recorded = make_fx(flat)(*arguments)
        # A part may only run by itself if nothing writes into what another one reads.
        module = make_fx(functionalize(recorded, remove="mutations"))(*arguments)
    for node in list(module.graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target in VIEWS:
            node.target = aten.reshape.default
        else:
            mend(node)
    leaves: Any = module.graph.output_node().args[0]
    return module, pytree.tree_unflatten(leaves, specs[0])
