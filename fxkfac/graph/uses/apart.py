"""Parts of one weight as blocks of their own: the four gates of an LSTM, query, key and value.

The parts share their input, and so one factor A; each has its own B. In the normal form the number
of the part is a group axis that the input does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fxkfac.errors import OptionError
from fxkfac.graph.axes import axis_tokens, renamed
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import normal_weight


def take_apart(use: Use, apart: Mapping[str, int]) -> Use:
    """The use with its out axis in as many parts as `apart` says for its parameter.

    Raises:
        OptionError: The parts along axis 0 of the parameter are not parts of the op's output.
    """
    parts = apart.get(use.parameter, 1)
    if parts == 1 or use.is_bias:
        return use
    form = use.form
    numbers = normal_weight(use)  # (group, in, out)
    size, out = use.view.numel, numbers.shape[-1]
    (axis, *more) = form.d_out or [""]
    alone = len(use.parameters) == 1 and not more and len(numbers) == 1 and axis  # in one group
    if alone and size % parts == 0 and out % parts == 0:
        expected = torch.arange(out, device="cpu") // (out // parts)
        if bool((numbers // (size // parts) == expected).all()):
            split = {axis: f"part {axis}"}
            return replace(
                use,
                form=replace(
                    form,
                    weight=renamed(form.weight, split),
                    y=renamed(form.y, split),
                    sizes={**form.sizes, "part": parts},
                    apart=("part",),
                ),
            )
    raise OptionError(
        f"apart[{use.parameter!r}] is {parts}, but axis 0 of the parameter, as it enters {use.op} "
        f"with weight axes {axis_tokens(form.weight)}, is not the output in {parts} equal parts. "
        "Leave it out of `apart`."
    )
