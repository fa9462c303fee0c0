"""Ops that are linear in one tensor: layout, sums, joining; and comparisons, which are constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxkfac.taylor.jet import Jet, constant, lift, refuse

AXES = {"dim", "dim0", "dim1", "axis0", "axis1", "dims", "start_dim", "end_dim", "source", "to"}
# op -> its arguments behind the tensor, in order
ARGUMENTS = {
    "transpose": "dim0 dim1",
    "swapaxes": "axis0 axis1",
    "swapdims": "dim0 dim1",
    "movedim": "source to",
    "moveaxis": "source to",
    "permute": "dims",
    "flip": "dims",
    "unsqueeze": "dim",
    "squeeze": "dim",
    "select": "dim index",
    "narrow": "dim start length",
    "unbind": "dim",
    "split": "size dim",
    "chunk": "size dim",
    "flatten": "start_dim end_dim",
    "unflatten": "dim sizes",
    "sum": "dim keepdim",
    "mean": "dim keepdim",
    "cumsum": "dim",
    "prod": "dim keepdim",
}
DEFAULTS = {"split": {"dim": 0}, "chunk": {"dim": 0}, "unbind": {"dim": 0}}
DEFAULTS["flatten"] = {"start_dim": 0, "end_dim": -1}
SPELLINGS = {"split_size_or_sections": "size", "split_size": "size", "chunks": "size"}
SPELLINGS |= {"destination": "to", "axis": "dim"}
REDUCTIONS = {"sum", "mean", "cumsum", "prod"}
MANY = {"permute", "flip"}  # their one argument may be spread out


def along_axes(func: Any, jet: Any, *args: Any, **kwargs: Any) -> Any:
    """An op that names axes: the same op on the streams, where every axis comes one later."""
    name = func.__name__
    names = ARGUMENTS[name].split()
    kwargs = {SPELLINGS.get(key, key): value for key, value in kwargs.items()}
    given = (args,) if name in MANY and args and isinstance(args[0], int) else args
    bound = {**DEFAULTS.get(name, {}), **dict(zip(names, given, strict=False)), **kwargs}
    room = jet.ndim + (name == "unsqueeze")
    for key in AXES & bound.keys():
        bound[key] = _shifted(bound[key], room)
    if name in REDUCTIONS:
        _keep_the_data(name, bound.get("dim"))
    if name == "permute":
        bound["dims"] = (0, *bound["dims"])
    ordered = [bound.pop(key) for key in names if key in bound]
    if name == "prod":
        return _product(jet, *ordered)
    result = func(jet.streams, *ordered, **bound)
    return jet.like(result) if isinstance(result, Tensor) else tuple(map(jet.like, result))


def _shifted(dims: Any, room: int) -> Any:
    """Axes of the value as axes of the streams."""
    if dims is None:
        return None
    if isinstance(dims, tuple | list):
        return tuple(_shifted(dim, room) for dim in dims)
    if not -room <= dims < room:
        raise IndexError(f"axis {dims} is out of range for {room} axes")
    return dims % room + 1


def _keep_the_data(name: str, dims: Any) -> None:
    dims = dims if isinstance(dims, tuple) else (dims,)
    if None in dims or 1 in dims or not dims:
        refuse(
            f"{name} over axis 0, where the data are,",
            "Name the other axes by `dim`, and have the data along axis 0",
        )


def _product(jet: Jet, dim: int, keepdim: bool = False) -> Jet:
    factors = [jet.like(part) for part in jet.streams.unbind(dim)]
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor  # type: ignore[operator]
    return product.like(product.streams.unsqueeze(dim)) if keepdim else product


def reshape(func: Any, jet: Jet, *shape: Any) -> Jet:
    """`view` and `reshape`."""
    return jet.like(jet.streams.reshape(len(jet.streams), *_spread(shape)))


def expand(func: Any, jet: Jet, *shape: Any) -> Jet:
    """To a shape with as many axes, or more in front."""
    shape = _spread(shape)
    more = len(shape) - jet.ndim
    return jet.like(jet.streams[(slice(None), *[None] * more)].expand(-1, *shape))


def _spread(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


def as_it_is(func: Any, jet: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear, entry by entry; of a constant that is to be like a jet, its dtype is looked at."""
    if not isinstance(jet, Jet):
        return func(jet, *(a.streams if isinstance(a, Jet) else a for a in args), **kwargs)
    streams = func(jet.streams, *args, **kwargs)
    if streams.is_floating_point() or streams.is_complex():
        return jet.like(streams)
    return func(jet.value, *args, **kwargs)  # whole numbers are constant almost everywhere


def index(func: Any, jet: Any, at: Any) -> Jet:
    """Slices, integers, new axes and at most one list or tensor."""
    at = at if isinstance(at, tuple) else (at,)
    plain = [isinstance(i, int | slice | torch.SymInt) or i is None or i is ... for i in at]
    others = [i for i, is_plain in zip(at, plain, strict=True) if not is_plain]
    # torch moves the axis of several lists to the front, and so before the streams
    if len(others) > 1 or not all(isinstance(i, list | Tensor) for i in others):
        refuse("indexing by more than one list or tensor", "Index along one axis after the other")
    return jet.like(jet.streams[(slice(None), *at)])


def join(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Jet:
    """`cat` and `stack`, where constants may be among the tensors."""
    dim = kwargs.get("axis", dim)
    like = next(t for t in tensors if isinstance(t, Jet))
    jets = [t if isinstance(t, Jet) else constant(t, like) for t in tensors]
    room = like.ndim + (func.__name__ == "stack")
    return like.like(func([jet.streams for jet in jets], dim=_shifted(dim, room)))


def where(func: Any, condition: Any, a: Any, b: Any) -> Jet:
    """A choice that itself has no derivative."""
    if func is Tensor.where:  # the method: what is chosen comes first
        condition, a = a, condition
    like = next((t for t in (a, b) if isinstance(t, Jet)), None)
    if like is None or isinstance(condition, Jet):
        refuse("where with a jet as its condition", "Compare it with a number")
    a, b = (t if isinstance(t, Jet) else constant(t, like) for t in (a, b))
    widest = max((a, b, condition), key=lambda t: t.ndim)
    return like.like(torch.where(condition, lift(a, widest).streams, lift(b, widest).streams))


def of_the_value(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Whatever is constant almost everywhere, or looks at shape and type only."""
    return func(*(a.value if isinstance(a, Jet) else a for a in args), **kwargs)


ENTRYWISE = "clone contiguous double float half bfloat16 neg negative positive to type_as"
OF_THE_VALUE = (
    "eq ne lt le gt ge zeros_like ones_like full_like new_zeros new_ones new_full new_tensor sign "
    "floor ceil round isnan isfinite is_floating_point numel"
)
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ARGUMENTS, along_axes),
    **dict.fromkeys(ENTRYWISE.split(), as_it_is),
    **dict.fromkeys(OF_THE_VALUE.split(), of_the_value),
    **dict.fromkeys(("view", "reshape"), reshape),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), join),
    "expand": expand,
    "__getitem__": index,
    "t": lambda func, jet: jet.transpose(0, 1),
    "where": where,
}
