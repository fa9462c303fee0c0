"""Rows of an op's output that are real, where the others are padding: marks in a graph.

A packed sequence is captured as a padded one (see `packed`). Its products say which of their rows
are real by a call of `real_rows`, which changes nothing. `match` reads it: then the normal form has
the rows, and nobody above it knows of packed sequences. Lengths are data, so that what is wrong
with them only a run of the graph can tell, by `checked_lengths`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx import Node

from fxkfac.errors import DataError
from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.form import Form, Routes
from fxkfac.graph.rules.registry import NotLinear


class RealRows(Function):
    """While a front end records, what becomes `real_rows` in the graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, real: Tensor) -> Tensor:
        """The output as it is."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Refused: the products of a backward pass inside the model would have no mark."""
        raise RuntimeError(
            "the model takes gradients through packed sequences; pad them instead, and leave the "
            "padding out by kfac(.., mask=..)"
        )


class CheckedLengths(Function):
    """The same for `checked_lengths`."""

    @staticmethod
    def forward(ctx: Any, lengths: Tensor, steps: int, whole: bool) -> Tensor:
        """The lengths as they are."""
        return lengths.view_as(lengths)


def real_rows(y: Tensor, real: Tensor) -> Tensor:
    """The output of an op, of whose rows along axis 0 these are real."""
    return y


def checked_lengths(lengths: Tensor, steps: int, whole: bool) -> Tensor:
    """Lengths of sequences, each of which has 1 to `steps` steps.

    Args:
        lengths: The lengths.
        steps: The number of steps to which the sequences are padded.
        whole: Whether the longest one must have all of them.

    Raises:
        DataError: The lengths are others.
    """
    if torch._C._are_functorch_transforms_active():  # datum by datum, after a run on all of them
        return lengths
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > steps:
        raise DataError(
            f"the lengths of packed sequences are {shortest} to {longest}; expected 1 to {steps}, "
            "the number of steps that there are."
        )
    if whole and longest < steps:
        raise DataError(
            f"the longest of the packed sequences has {longest} steps, and the input {steps}, so "
            f"that the prediction's shape depends on the lengths. Pass total_length={steps} to "
            "pad_packed_sequence, or cut the steps off the input that no sequence has."
        )
    return lengths


def of_real_rows(node: Node, form: Form) -> Form:
    """The form of an op with its real rows, where the graph says which ones these are."""
    mark = next((user for user in node.users if user.target is real_rows), None)
    if mark is None or form.input is None:  # a bias by itself has one row for each datum
        return form
    rows, real = axis_tokens(form.y)[0], mark.args[1]
    if rows not in form.rows:
        raise NotLinear(
            "its own axis holds the packed sequences; let it be one for all of them, by expand"
        )
    assert isinstance(real, Node)
    return replace(form, routes=Routes(real, rows, axis="", size=1))
