"""What inductor gets wrong -> ops of the same values that it gets right.

Found by comparing compiled with eager code, in PyTorch 2.13. Constants beside float64 and tensors
that share memory want two of its passes left out, too: see `OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

OPTIONS: dict[str, Any] = {
    # Takes a sum with zeros for what is summed, whose entries may share the memory written into.
    "joint_graph_constant_folding": False,
    # Chooses between numbers in single precision.
    "optimize_scatter_upon_const_tensor": False,
}
# Of a tensor whose entries share memory, inductor makes the copy in that memory, and is wrong.
INTO_A_COPY = {
    aten.index_put.default,
    aten.index_add.default,
    aten.index_copy.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.put.default,
    aten.diagonal_scatter.default,
}


TAG = "fxkfac: columns once"  # so that no code is taken that was written and kept before


@contextmanager
def columns_counted_once() -> Iterator[None]:
    """Have inductor write code that adds to where it should, several threads at once.

    In a tile of two axes it counts the inner one twice, and writes behind the memory: see
    https://github.com/pytorch/pytorch/issues/191837.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel

    def store(kernel: Any, name: str, index: Any, value: Any, mode: str | None = None) -> None:
        one = kernel.num_threads == 1 and not config.cpp.dynamic_threads
        turned = kernel.need_vec_transpose(kernel.rename_indexing(index))
        counts_twice = mode == "atomic_add" and not (one or turned)
        write = CppVecKernel.store if counts_twice else plain
        write(kernel, name, index, value, mode)

    plain, keys = CppTile2DKernel.store, torch.compiler.config
    tag = f"{keys.cache_key_tag} {TAG}"
    kept_apart = keys.patch(cache_key_tag=tag)  # type: ignore[attr-defined]  # found at run time
    with patch.object(CppTile2DKernel, "store", store), kept_apart:
        yield


def mend(node: Node) -> None:
    """Put what inductor gets right in the place of one node of a recorded graph."""
    if node.target in INTO_A_COPY and _repeats(node.all_input_nodes[0].meta["val"]):
        _write_out(node)
    elif node.target is aten.add.Tensor and "alpha" in node.kwargs:
        _scale_first(node)
    elif node.target is aten.bernoulli.default:  # it would draw in single precision
        node.target, node.args = aten.bernoulli.Tensor, (node.args[0], node.args[0])
    elif node.target in KERNELS:
        node.target = KERNELS[node.target]


def _repeats(t: Tensor) -> bool:
    """Whether entries of a tensor share memory."""
    return any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))


def _write_out(node: Node) -> None:
    """Give an op its first argument without shared memory."""
    first, *rest = node.args
    with node.graph.inserting_before(node):
        own = node.graph.call_function(
            aten.clone.default, (first,), {"memory_format": torch.contiguous_format}
        )
    node.args = (own, *rest)


def _scale_first(node: Node) -> None:
    """x + α y by two ops: where x or y is a product, inductor makes one op of both, without α."""
    x, y = node.args
    α: Any = node.kwargs["alpha"]
    with node.graph.inserting_before(node):
        if isinstance(y, Node):
            dtype = node.meta["val"].dtype  # in which the sum is taken
            if y.meta["val"].dtype != dtype:
                y = node.graph.call_function(aten._to_copy.default, (y,), {"dtype": dtype})
            scaled: Any = node.graph.call_function(aten.mul.Tensor, (y, α))
        else:
            scaled = y * α  # a number
    node.args, node.kwargs = (x, scaled), {}


def _as_it_is(op: OpOverload) -> Callable[..., Any]:
    """An op that compiled code calls as autograd does, in the place of one that it would write."""
    name = f"fxkfac::{op._schema.name.removeprefix('aten::')}"
    signature = str(op._schema)
    torch.library.define(name, signature[signature.index("(") :])
    torch.library.impl(name, "CompositeExplicitAutograd", op)
    torch.library.register_fake(name, op)
    found: Callable[..., Any] = getattr(torch.ops.fxkfac, name.removeprefix("fxkfac::")).default
    return found


# A window over the edge counts whole, and sizes are taken for scales.
KERNELS = {
    op: _as_it_is(op)
    for op in (
        aten.avg_pool2d_backward.default,
        aten.avg_pool3d_backward.default,
        aten.upsample_nearest2d_backward.default,
    )
}
