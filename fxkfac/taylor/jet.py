"""A tensor with its derivatives, which torch functions take in the place of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxkfac.errors import UnsupportedUse

# name of a torch function -> rule(function, *args, **kwargs); the package fills it from its files
RULES: dict[str, Callable[..., Any]] = {}


Parts = tuple[Tensor, Tensor, Tensor]


class Jet:
    """A tensor with its derivatives, along one axis in front.

    They come together or apart, whichever a rule has made, and the other is made when it is asked
    for: a product takes all at once, and what is between two products needs no joining.

    Attributes:
        weights: (D,), or `None` for ones.
    """

    __array_ufunc__ = None  # so that a number of numpy's leaves its product with a jet to the jet

    def __init__(self, streams: Tensor | Parts, weights: Tensor | None) -> None:
        self._streams = streams if isinstance(streams, Tensor) else None
        self._parts = None if isinstance(streams, Tensor) else streams
        self.weights = weights

    @property
    def streams(self) -> Tensor:
        """(D + 2, ...): value, D derivatives, weighted sum of the second ones."""
        if self._streams is None:
            assert self._parts is not None
            self._streams = torch.cat(self._parts)
        return self._streams

    @property
    def parts(self) -> Parts:
        """(1, ...), (D, ...) and (1, ...), whose gradients come back without zeros around them."""
        if self._parts is None:
            assert self._streams is not None
            value, slopes, second = self._streams.split([1, len(self._streams) - 2, 1])
            self._parts = value, slopes, second
        return self._parts

    @property
    def _some(self) -> Tensor:
        return self._parts[0] if self._streams is None and self._parts else self.streams

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every torch function that meets a jet ends here, and is looked up by its name."""
        name = func.__name__
        rule = RULES.get(name)
        kwargs = dict(kwargs or {})
        if rule is None or kwargs.pop("inplace", False):
            refuse(name if rule is None else f"{name}(inplace=True)")
        if kwargs and not _takes(rule, func, args, kwargs):
            said = ", ".join(f"{key}=" for key in kwargs)
            refuse(f"{name}({said})", "Hand its tensors over by position")
        return rule(func, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """A tensor's methods."""
        method = getattr(Tensor, name, None)
        if name.startswith("_") or method is None:
            raise AttributeError(f"a jet of fxkfac.laplacian has no {name!r}")
        if not callable(method):
            refuse(name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def like(self, streams: Tensor | Parts) -> Jet:
        """A jet of other streams at the same points."""
        return Jet(streams, self.weights)

    value = property(lambda self: self.parts[0].squeeze(0))
    shape = property(lambda self: self._some.shape[1:])
    ndim = property(lambda self: self._some.ndim - 1)
    dtype = property(lambda self: self._some.dtype)
    device = property(lambda self: self._some.device)
    requires_grad = property(lambda self: self._some.requires_grad)
    T = property(lambda self: self.permute(*reversed(range(self.ndim))))
    mT = property(lambda self: self.transpose(-1, -2))  # noqa: N815

    def dim(self) -> int:
        """As a tensor's."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        refuse("bool")

    def __getitem__(self, at: Any) -> Any:
        return self.__torch_function__(Tensor.__getitem__, (), (self, at))

    def __setitem__(self, at: Any, value: Any) -> None:
        refuse("writing into a tensor", "Put it together by cat or where")


def _takes(rule: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a rule has these arguments."""
    try:
        signature(rule).bind(func, *args, **kwargs)
    except TypeError:
        return False
    return True


def _operator(function: Callable[..., Any], swapped: bool = False) -> Any:
    if swapped:
        return lambda self, other: Jet.__torch_function__(function, (), (other, self))
    return lambda self, *others: Jet.__torch_function__(function, (), (self, *others))


def _in_place(name: str) -> Callable[[Jet, Any], NoReturn]:
    """Not as out of place: another name of the tensor would keep what it was."""
    return lambda self, other: refuse(f"{name} in place", "Give the result a name: h = h + 1")


for _name in ["add", "sub", "mul", "matmul", "pow", "truediv"]:
    _function = getattr(torch, _name.replace("true", ""))
    setattr(Jet, f"__{_name}__", _operator(_function))
    setattr(Jet, f"__r{_name}__", _operator(_function, swapped=True))
    setattr(Jet, f"__i{_name}__", _in_place(_name))
for _name in ["neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"]:
    setattr(Jet, f"__{_name}__", _operator(getattr(torch, _name)))
for _name, _of in [("pos", "positive"), ("mod", "remainder"), ("floordiv", "floor_divide")]:
    setattr(Jet, f"__{_name}__", _operator(getattr(torch, _of)))


def refuse(what: str, advice: str = "") -> NoReturn:
    """Raise, naming what has no rule and what to write instead."""
    raise UnsupportedUse(
        f"{what} has no rule in fxkfac.laplacian. "
        + (advice or "Write it with linear ops, layout ops, products and elementwise functions")
        + ", or take the derivatives by nested torch.func.jvp instead."
    )


def constant(tensor: Any, like: Jet) -> Jet:
    """What does not depend on x, as a jet; a number has the dtype of another one."""
    dtype = like.dtype
    if isinstance(tensor, Tensor) and tensor.ndim:
        dtype = torch.promote_types(tensor.dtype, dtype)
    value = torch.as_tensor(tensor, dtype=dtype, device=like.device)[None]
    return like.like(torch.cat([value, value.new_zeros(len(like.streams) - 1, *value.shape[1:])]))


def lift(jet: Jet, other: Any) -> Jet:
    """The same with unit axes behind the first, so that `other` broadcasts as to the value."""
    missing = max(0, getattr(other, "ndim", 0) - jet.ndim)
    return jet.like(jet.streams[(slice(None), *[None] * missing)]) if missing else jet


def weighted(slopes: Tensor, weights: Tensor | None) -> Tensor:
    """Every slope in (D, ...) times its axis' weight."""
    if weights is None:
        return slopes
    return slopes * weights.to(slopes).view(-1, *[1] * (slopes.ndim - 1))
