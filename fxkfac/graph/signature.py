"""The inputs of a model as a flat list of tensors, and where each one has its batch axis."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxkfac.errors import DataError
from fxkfac.graph.front_ends.constants import constant_key
from fxkfac.isolation import is_finite

ONE = pytree.tree_structure((0,))  # of a single tensor
BatchAxes = Any  # an int for all tensors, or a tree as of the inputs with int or None (as in vmap)


@dataclass(frozen=True)
class Signature:
    """How inputs are flattened into tensors, and the batch axis of each of these.

    Attributes:
        spec: The nesting of the inputs.
        constants: Leaves that are not tensors, by position among all leaves.
        axes: Batch axis of every tensor leaf; `None` where it has none, as an attention mask may.
    """

    spec: pytree.TreeSpec
    constants: dict[int, Any]
    axes: tuple[int | None, ...]

    def leaves(self, inputs: Any) -> list[Any]:
        """All leaves of `inputs`, which must be nested as at trace time, tensors where those were.

        Keywords may come in any order.
        """
        if isinstance(inputs, Tensor) and self.spec == ONE:  # as nearly always, at every batch
            return [inputs]
        leaves, spec = pytree.tree_flatten(_as_tuple(inputs))
        if spec != self.spec:
            leaves, spec = pytree.tree_flatten(self._in_order(inputs))
        if spec != self.spec:
            raise DataError(
                f"the inputs are nested as {spec}, but the program was traced with {self.spec}. "
                "Pass inputs of the same structure, or trace anew."
            )
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) == (k in self.constants):
                raise DataError(self._other_kind(k, leaf))
        return leaves

    def tensors(self, inputs: Any) -> list[Tensor]:
        """The tensor leaves of `inputs`, which must be nested as at trace time."""
        return [leaf for leaf in self.leaves(inputs) if isinstance(leaf, Tensor)]

    def _in_order(self, inputs: Any) -> Any:
        """Keyword arguments in the order of the trace."""
        nested, names = _as_tuple(inputs), self.spec.context
        if self.spec.type is not dict or not isinstance(nested, dict) or set(nested) != set(names):
            return nested
        return {name: nested[name] for name in names}

    def _other_kind(self, k: int, leaf: Any) -> str:
        """The message for a tensor in the place of a constant, or the other way round."""
        places = pytree.tree_unflatten(list(range(self.spec.num_leaves)), self.spec)
        path = next(path for path, at in pytree.tree_flatten_with_path(places)[0] if at == k)
        before = type(self.constants[k]).__name__ if k in self.constants else "Tensor"
        return (
            f"inputs{pytree.keystr(path)} is of type {type(leaf).__name__}, but was of type "
            f"{before} when the program was traced. Pass a tensor where there was one and nowhere "
            "else, or trace anew: a program for each way to call the model."
        )

    def inputs(self, tensors: list[Tensor]) -> Any:
        """Inverse of `tensors`."""
        rest = iter(tensors)
        total = len(tensors) + len(self.constants)
        leaves = [self.constants[k] if k in self.constants else next(rest) for k in range(total)]
        return pytree.tree_unflatten(leaves, self.spec)

    def with_constants(self, inputs: Any) -> Signature:
        """The same signature with the leaves of `inputs` that are not tensors."""
        if not self.constants:
            return self
        leaves = self.leaves(inputs)
        return replace(self, constants={k: leaves[k] for k in self.constants})

    def batch_size(self, tensors: list[Tensor]) -> int:
        """Number of data N. Raises `DataError` where the tensors disagree, or hold none."""
        pairs = zip(tensors, self.axes, strict=True)
        # A tensor without the axis holds none.
        sizes = {t.shape[a] if a < t.ndim else 0 for t, a in pairs if a is not None}
        if len(sizes) != 1 or 0 in sizes:
            found = [tuple(t.shape) for t in tensors]
            raise DataError(
                f"the inputs have shapes {found} with batch axes {list(self.axes)}; expected the "
                "same number of data, at least one, along each of these axes. "
                "If an input has no batch axis, trace with batch_axis=(0, None, ..) as for vmap."
            )
        return sizes.pop()

    def key(self, leaves: list[Any], tensors: list[Tensor]) -> Hashable:
        """What must be equal for a graph with a dynamic batch axis to be the same graph."""
        fixed = tuple(constant_key(leaves[k]) for k in self.constants)  # these at the same places
        shapes = tuple(
            tuple(-1 if k == axis else size for k, size in enumerate(t.shape))
            for t, axis in zip(tensors, self.axes, strict=True)
        )
        return fixed, shapes, tuple((t.dtype, t.device) for t in tensors)

    def permute(self, tensors: list[Tensor], order: Tensor) -> list[Tensor]:
        """The same data in another order."""
        return [
            t if axis is None else t.index_select(axis, order.to(t.device))
            for t, axis in zip(tensors, self.axes, strict=True)
        ]

    def vary(self, tensors: list[Tensor], size: int, generator: Generator) -> list[Tensor]:
        """`size` data like those given, and no two alike as far as floating point numbers tell.

        Whole numbers have no others near by that are sure to be valid: so they are taken from data
        that differ, where there are such. One of each datum's, such as the length of a sequence,
        stays as it is; numbers in descending order stay so.
        """
        n = self.batch_size(tensors)
        repeated = self.permute(tensors, self._some(tensors, size, n))
        return [
            t if axis is None else _varied(t, size > n and not _is_number(t), generator)
            for t, axis in zip(repeated, self.axes, strict=True)
        ]

    def _some(self, tensors: list[Tensor], size: int, n: int) -> Tensor:
        """The first data, but with that of the largest number: the longest sequence, say.

        And with one that is unlike the first in as many tensors as any.
        """
        if size >= n:
            return torch.arange(size, device="cpu") * n // size
        pairs = zip(tensors, self.axes, strict=True)
        largest = [int(t.argmax()) for t, axis in pairs if axis is not None and _is_number(t)]
        differ = [(t != t[:1]).any(1) for t in self._rows(tensors, n)]
        unlike = int(torch.stack([d.cpu() for d in differ]).sum(0).argmax())
        chosen = list(dict.fromkeys([*largest, 0, unlike, *range(n)]))[:size]
        return torch.tensor(sorted(chosen), device="cpu")

    def replaced(self, tensors: list[Tensor], chosen: Tensor) -> list[Tensor]:
        """The same data with another one in the place of each that is chosen.

        That is the one farthest from the first; in the place of those as far as it, the first.
        """
        n = self.batch_size(tensors)
        distances = torch.stack([_from_first(t).cpu() for t in self._rows(tensors, n)]).sum(0)
        others = torch.where(distances < distances.max(), distances.argmax(), 0)
        return self.permute(tensors, torch.where(chosen, others, torch.arange(n, device="cpu")))

    def _rows(self, tensors: list[Tensor], n: int) -> list[Tensor]:
        """A row for each datum, of every tensor that has data."""
        pairs = zip(tensors, self.axes, strict=True)
        return [
            t.movedim(axis, 0).reshape(n, t.numel() // n) for t, axis in pairs if axis is not None
        ]

    def unlike(self, tensors: list[Tensor], generator: Generator) -> Iterator[list[Tensor]]:
        """Other data of the same size: all signs +, all −, any; indices drawn anew."""
        for least, most in ((1, 1), (0, 0), (0, 1)):
            yield [
                t if axis is None else _unlike(t, least, most, generator)
                for t, axis in zip(tensors, self.axes, strict=True)
            ]


def _from_first(rows: Tensor) -> Tensor:
    """How far each row is from the first, from 0 to 1."""
    rows = rows.double()
    scale = rows.norm(dim=1) + rows[0].norm()
    return torch.where(scale > 0, (rows - rows[0]).norm(dim=1) / scale, 0.0)


def _unlike(t: Tensor, least: int, most: int, generator: Generator) -> Tensor:
    if not t.is_floating_point():
        return _varied(t, repeats=True, generator=generator)
    g = generator
    signs = torch.randint(least, most + 1, t.shape, generator=g, device=g.device).to(t)
    return t.abs() * (2 * signs - 1)


def _is_number(t: Tensor) -> bool:
    """Whether a tensor holds one whole number for each datum."""
    return t.ndim == 1 and not t.is_floating_point() and t.dtype != torch.bool


def near(t: Tensor, generator: Generator, drawn: Sequence[int] | None = None) -> Tensor:
    """Floating point numbers near those given; `drawn` is the shape of what is drawn for them.

    Zero entries move too, and no entry changes its sign: log and sqrt stay defined.
    """
    g, shape = generator, t.shape if drawn is None else drawn
    noise = torch.rand(shape, generator=g, dtype=torch.float32, device=g.device).to(t)
    return torch.where(t == 0, 0.1 * noise, t * (1 + 0.1 * noise))


def _varied(t: Tensor, repeats: bool, generator: Generator) -> Tensor:
    g = generator
    if t.is_floating_point():
        return near(t, generator)
    if t.dtype == torch.bool or not repeats:
        return t
    chosen = torch.randint(t.numel(), t.shape, generator=g, device=g.device)
    return t.flatten()[chosen.to(t.device)]


def _as_tuple(inputs: Any) -> Any:
    """DataLoader hands out lists where the data set held tuples: the same nesting here."""
    if isinstance(inputs, dict):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def signature_of(inputs: Any, batch_axis: BatchAxes) -> Signature:
    """Flatten example inputs and find the batch axis of each tensor.

    With an int, that axis is the batch axis of every tensor that is as long there as the first
    tensor is. Otherwise `batch_axis` is a tree like the inputs that says it for each.
    """
    _require_padded(inputs)
    leaves, spec = pytree.tree_flatten(_as_tuple(inputs))
    constants = {k: leaf for k, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    if isinstance(batch_axis, int) and not isinstance(batch_axis, bool):
        return Signature(spec, constants, _same_length(leaves, batch_axis))
    tree = tuple(batch_axis) if isinstance(batch_axis, list) else batch_axis
    per_leaf = pytree._broadcast_to_and_flatten(tree, spec)
    if per_leaf is None:
        raise DataError(
            f"batch_axis={batch_axis!r} does not fit inputs nested as {spec}; expected an int, or "
            "an int or None for each input, as in_dims of torch.vmap."
        )
    axes = tuple(
        _axis_of(leaf, a)
        for a, leaf in zip(per_leaf, leaves, strict=True)
        if isinstance(leaf, Tensor)
    )
    return Signature(spec, constants, axes)


def _axis_of(t: Tensor, axis: Any) -> int | None:
    """An axis as a number from zero up."""
    if axis is None:
        return None
    if not isinstance(axis, int) or isinstance(axis, bool) or not -t.ndim <= axis < t.ndim:
        raise DataError(
            f"batch_axis is {axis!r} for an input of shape {tuple(t.shape)}; expected one of its "
            "axes, or None."
        )
    return axis % t.ndim


def _require_padded(inputs: Any) -> None:
    leaves = pytree.tree_leaves(inputs, is_leaf=lambda part: isinstance(part, PackedSequence))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        raise DataError(
            "an input is a PackedSequence, in which the data are on no axis. Pass the padded "
            "sequences and a tensor of their lengths, and let the model (or a function around it) "
            "call pack_padded_sequence."
        )


def _same_length(leaves: list[Any], axis: int) -> tuple[int | None, ...]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lengths = [t.shape[axis] if -t.ndim <= axis < t.ndim else None for t in tensors]
    first = next((n for n in lengths if n is not None), None)
    if not tensors:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "empty"
        raise DataError(
            f"no tensor among the inputs, which are {kinds}; expected a batch of examples as a "
            "tensor, or several in a tuple, list or dict. Pass one, as by torch.as_tensor."
        )
    if not first:
        raise DataError(
            f"no input has data along axis {axis}: found {[tuple(t.shape) for t in tensors]}; "
            "expected a batch of at least one example. Put the batch axis first, or say batch_axis."
        )
    return tuple(
        axis % t.ndim if n == first else None for t, n in zip(tensors, lengths, strict=True)
    )


def require_finite(tensors: list[Tensor]) -> None:
    """Raise `DataError` where an input holds NaN or Inf."""
    for k, t in enumerate(tensors):
        if t.is_floating_point() and not is_finite(t):
            bad = int((~torch.isfinite(t)).sum())
            raise DataError(
                f"input tensor {k} of shape {tuple(t.shape)} holds {bad} values that are NaN or "
                "Inf; expected finite numbers. Clean the data, or look at what scaled them."
            )
