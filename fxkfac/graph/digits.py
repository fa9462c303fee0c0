"""How many digits count where two results are compared that should be equal but for rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxkfac.graph.dependence import depend_on

# What a product of float32 may be taken in inside, by torch's name for it: the dtype with the
# digits of that. TensorFloat-32 has those of float16.
INSIDE = {"tf32": torch.float16, "bf16": torch.bfloat16}


def lowest(graph: Graph, inputs: Sequence[Node]) -> torch.dtype:
    """The dtype with the fewest digits of all that depends on the inputs; float64 without any.

    A norm or a state-space scan may compute in float32 inside, whatever the model's dtype; and a
    product of float32 in less, where torch is allowed to: on a GPU convolutions are, by default.
    """
    tensors = _floating(graph, inputs)
    dtypes = {t.dtype for t in tensors}
    dtypes |= {_inside(t.device.type) for t in tensors if t.dtype == torch.float32}
    return _fewest({torch.float64, *dtypes})


def dtypes_of(graph: Graph, inputs: Sequence[Node]) -> set[torch.dtype]:
    """Of all floating point numbers that depend on the inputs."""
    return {t.dtype for t in _floating(graph, inputs)}


def _floating(graph: Graph, inputs: Sequence[Node]) -> list[Tensor]:
    values = (node.meta.get("val") for node in depend_on(graph, inputs))
    return [v for v in values if isinstance(v, Tensor) and v.dtype.is_floating_point]


def _inside(device: str) -> torch.dtype:
    """The digits that products of float32 have on a device, as torch is set now."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    allowed: dict[str, tuple[Any, ...]] = {
        "cuda": (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul),
        "cpu": (mkldnn.conv, mkldnn.rnn, mkldnn.matmul),
    }
    inside = {INSIDE.get(a.fp32_precision, torch.float32) for a in allowed.get(device, ())}
    return _fewest({torch.float32, *inside})


def is_half(dtype: torch.dtype) -> bool:
    """Whether it has half the bits of float32, or the digits of what has."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def _fewest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def rounding(t: Tensor, lowest: torch.dtype = torch.float64) -> float:
    """The relative rounding error of a tensor, which sums at least in float32.

    Args:
        t: What is expected.
        lowest: The dtype with the fewest digits of what it is computed from.
    """
    at_most = torch.finfo(torch.float32).eps
    return max(torch.finfo(t.dtype).eps, min(torch.finfo(lowest).eps, at_most))


def tolerance(t: Tensor, lowest: torch.dtype = torch.float64) -> float:
    """Half of the digits: far above rounding, far below a lost or doubled term.

    Half of those of half precision are one, by which two data may differ. So what is computed in
    that, and is more itself, is given the rounding of one op alone.
    """
    return max(rounding(t, lowest) ** 0.5, torch.finfo(lowest).eps)


def tolerance_of_parts(t: Tensor, lowest: torch.dtype) -> float:
    """The same where one side takes an op by its parts: a norm has up to four, and each rounds."""
    return max(tolerance(t, lowest), 4 * torch.finfo(lowest).eps)
