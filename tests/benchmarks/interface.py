"""What stands between the benchmark and a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Factors = dict[str, tuple[Tensor, Tensor]]  # A and B by the layer's name


class Slope(NamedTuple):
    """Loss and gradients by the parameter's name, which the flavour "step" has beside factors."""

    loss: Tensor
    gradients: dict[str, Tensor]


class Prepared(NamedTuple):
    """A call that computes the factors, and how to read its result.

    `call` is what is timed, and ends with the library's own result; `read` turns that into A and B
    of each layer, with the mean over the loss terms in them, and `slope` into loss and gradients.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Factors]
    slope: Callable[[Any], Slope] | None = None


class Refused(Exception):
    """The library cannot do this; the message says why."""
