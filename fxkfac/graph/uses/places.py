"""Where an output's entries lie in an operand, after layout ops: which axis became which.

The entries are numbered, and the numbers moved as the layout ops move the entries. An axis that
walks along one of the output's axes has a step of that axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from fxkfac.graph.axes import axis_tokens, letters


def own_axes(places: Tensor, shape: Sequence[int]) -> list[list[int]]:
    """For each axis of the output the axes of the operand that walk along it, outermost first.

    Args:
        places: The numbers of the output's entries, as they lie in the operand.
        shape: The output's shape.
    """
    steps: list[dict[int, int]] = [{} for _ in shape]
    for axis, size in enumerate(places.shape):
        if size == 1:
            continue
        step = int(places.movedim(axis, 0).flatten(1)[:2, 0].diff())
        for k, length in enumerate(shape):
            stride = math.prod(shape[k + 1 :])
            if stride <= step < stride * length and step % stride == 0:
                steps[k][axis] = step
    return [sorted(own, key=own.__getitem__, reverse=True) for own in steps]


def are_axes(
    places: Tensor, y: str, names: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]
) -> bool:
    """Whether axes lead to every entry's place, not only to those that they were found by.

    Args:
        places: The numbers of the output's entries, as they lie in the operand.
        y: The output's axes, an einops axis list.
        names: The operand's axes; those that the output lacks are broadcast.
        shape: The output's shape.
        sizes: Lengths that the shape does not tell.
    """
    kept = " ".join(n if n in axis_tokens(y) or n in letters(y) else "1" for n in names)
    numbers = torch.arange(math.prod(shape), device="cpu").view(*shape)
    own = {a: n for a, n in sizes.items() if a in letters(y)}
    try:
        return rearrange(numbers, f"{y} -> {kept}", **own).expand(places.shape).equal(places)
    except (EinopsError, RuntimeError):
        return False
