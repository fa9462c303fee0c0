"""Vectors that go back together: one backward pass for several of them, as many as memory allows.

Each operation of a backward pass then runs once for all, which pays where it is small: for small
batches, narrow layers and many classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fxkfac.precision import accurate, accurate_dtype
from fxkfac.ranges import require_count

if TYPE_CHECKING:
    from jaxtyping import Float

Item = TypeVar("Item")
Heard = dict[int, Tensor]  # the digest of the gradients at every tap

FEW = 4  # vectors, below which going back together takes longer than one after the other
LARGE = 2.0**10  # a gradient that grows sixtyfold on its way is no overflow yet
MEMORY = 2**25  # bytes: what fits the cache of a CPU gains by it, and larger vectors do not
MEMORY_ELSEWHERE = 2**30  # on a device where every call costs more than a missed cache


def require_memory(memory: int | None) -> int | None:
    """A number of bytes, or none. Raises `OptionError` for anything else."""
    if memory is None:
        return None
    return require_count("memory", memory, "whole number of bytes", least=0)


def memory_on(device: torch.device) -> int:
    """The bytes that vectors which go back together may take where nobody says so."""
    return MEMORY if device.type == "cpu" else MEMORY_ELSEWHERE


class Listen(torch.autograd.Function):
    """What it is, with somebody who is told of the gradient; all paths end at the root.

    The root is a number that asks for a gradient, and gets none. In its place the lowest outputs
    would have to be leaves, and stay until the end.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, y: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        """The output as it is."""
        ctx.tell = tell
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """Tell, and hand the gradient on."""
        ctx.tell(gradients[0])
        return None, gradients[0], None


def listened(root: Tensor, y: Tensor, tell: Callable[[Tensor], None], alone: bool) -> Tensor:
    """The output, with somebody who is told of its gradient.

    Args:
        root: At which all paths end.
        y: The output.
        tell: Who is told.
        alone: Whether nothing but the root asks for gradients.
    """
    maker = y.grad_fn if alone else None
    if maker is None:
        heard: Tensor = Listen.apply(root, y, tell)
        return heard
    place = y.output_nr  # a path leads from it to the root, and takes one call less

    def hear(gradients: Sequence[Tensor | None]) -> None:
        if (g := gradients[place]) is not None:
            tell(g)

    maker.register_prehook(hear)
    return y


class Unpack(torch.autograd.Function):
    """Tells of the gradients of all vectors in one tensor, (vectors, *shape), within a `vmap`."""

    @staticmethod
    def forward(gradient: Tensor, tell: Callable[[Tensor], None], vectors: int) -> Tensor:
        """A gradient that is the same for all vectors: zero, as it is linear in them."""
        tell(gradient.expand(vectors, *gradient.shape))
        return gradient.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is needed later."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int, None, None],
        gradient: Tensor,
        tell: Callable[[Tensor], None],
        vectors: int,
    ) -> tuple[Tensor, None]:
        """Tell, with the vectors in the first axis."""
        tell(gradient.movedim(in_dims[0], 0))
        return gradient.new_empty(0), None


def send_back(prediction: Tensor, root: Tensor, vectors: Tensor, retain_graph: bool) -> None:
    """Backpropagate vectors, (vectors, *shape of the prediction), in one pass."""

    def send(vector: Tensor) -> Tensor:
        torch.autograd.grad(prediction, root, vector, retain_graph=retain_graph, allow_unused=True)
        return vector.new_empty(0)

    if vectors.shape[0] > 1:
        torch.func.vmap(send)(vectors)
    else:
        send(vectors[0])


def enlarged(vectors: Tensor, underflows: bool) -> tuple[Tensor, Tensor | None]:
    """What goes back in the place of vectors, and the power of two by which it is larger, if it is.

    In float16 small gradients are lost on the way: so the largest entry is made about `LARGE`.
    """
    if not underflows:
        return vectors, None
    largest = vectors.detach().abs().amax().float() if vectors.numel() else vectors.new_ones(())
    power = _power(largest.clamp_max(LARGE))
    return vectors * power.to(vectors.dtype), power


def _power(size: Tensor) -> Tensor:
    """By which a size in float32 becomes about `LARGE`; no float16 overflows by it."""
    return torch.exp2(torch.log2(LARGE / size.clamp_min(LARGE * 2**-15)).floor())


def reduced(g: Tensor, power: Tensor | None) -> Tensor:
    """A gradient of what was enlarged, as that of the vectors; at least in float32."""
    return g if power is None else g.to(torch.promote_types(g.dtype, power.dtype)) / power


def gradients_of(
    f: Tensor, at: Sequence[Tensor], vector: Tensor, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Those of ⟨vector, f⟩; `None` where f does not depend on a tensor."""
    if not at or not f.requires_grad:
        return (None,) * len(at)
    return torch.autograd.grad(f, list(at), vector, retain_graph=retain_graph, allow_unused=True)


def summed_gradients(
    gradients: Callable[[Tensor], Sequence[Tensor | None]], cotangent: Tensor, underflows: bool
) -> list[Tensor | None]:
    """The gradients of a cotangent in parameters, at least in float32.

    They are sums over all rows, which float16 may not hold: so it is the sum of the cotangent's
    entries, without their signs, that is made about `LARGE` there.
    """
    power = None
    if underflows:
        power = _power(cotangent.abs().sum(dtype=torch.float32))
        cotangent = cotangent * power.to(cotangent.dtype)
    found = (None if g is None else reduced(g, power) for g in gradients(cotangent))
    return [None if g is None else g.to(accurate_dtype(g)) for g in found]


def goes_together(
    prediction: Tensor, root: Tensor, listen: Callable[[int], Heard], lowest: torch.dtype
) -> bool:
    """Whether two vectors can go back at once: every operation of the graph has a rule for it.

    A rule may also be wrong without a word, as PyTorch 2.13's is for `cdist`. So two vectors go
    back together, and each by itself, and every tap must hear the same.

    Args:
        prediction, root: Where vectors start, and where all paths end.
        listen: What the taps will have heard, once so many vectors have gone back.
        lowest: The dtype with the fewest digits in which anything is computed.
    """

    def heard(vectors: Tensor) -> Heard:
        found = listen(len(vectors))
        send_back(prediction, root, vectors, retain_graph=True)
        return found

    numbers = torch.arange(2 * prediction.numel(), device=prediction.device)
    vectors = numbers.cos().to(prediction.dtype).view(2, *prediction.shape)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            both = heard(vectors)
        except (RuntimeError, NotImplementedError):  # an operation of the user's own
            return False
    # Without a rule an operation runs for one vector after the other, and says so.
    if any("batching rule" in str(warning.message) for warning in said):
        return False
    return _same(both, [heard(vector) for vector in vectors.split(1)], torch.finfo(lowest).eps)


def digest(g: Float[Tensor, "vectors ..."]) -> Float[Tensor, "vectors 2"]:
    """Two numbers of every vector's gradient, which hang on all of its entries."""
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    flat = accurate(g).reshape(len(g), -1)  # a number has no other axis than the vectors'
    weights = torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype).cos()
    return torch.stack([torch.linalg.vector_norm(flat, dim=1), flat @ weights], dim=1)


def _same(both: Heard, alone: Sequence[Heard], eps: float) -> bool:
    """Whether what taps heard is equal up to roundings of this size."""
    if any(each.keys() != both.keys() for each in alone):
        return False
    expected = {place: torch.cat([each[place] for each in alone]) for place in both}
    largest = max((t.abs().amax().item() for t in expected.values()), default=0.0)
    for place, t in expected.items():
        own = torch.linalg.vector_norm(t).item()
        if not torch.allclose(both[place], t, rtol=0.0, atol=eps**0.5 * own + 64 * eps * largest):
            return False
    return True


def chunks(items: Iterable[Item], size: int) -> Iterator[tuple[list[Item], bool]]:
    """So many at a time, and whether they are the last ones."""
    rest = iter(items)
    part = list(islice(rest, size))
    while part:
        following = list(islice(rest, size))
        yield part, not following
        part = following


def of_each(read: Callable[[Tensor], Tensor], gradients: Tensor) -> Tensor:
    """What is read of the gradient of each vector, (group, vectors, ..); of one, (group, ..)."""
    if gradients.shape[0] == 1:
        return read(gradients[0])
    found: Tensor = torch.func.vmap(read)(gradients)
    return found.movedim(0, 1)
