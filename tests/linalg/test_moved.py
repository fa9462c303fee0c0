"""The kernel for images, which has no patches."""

from __future__ import annotations

from math import inf, nan, prod

import pytest
import torch
from drawn import rand
from kernel_rows import F32, F64, error
from linalg.grams import rows
from torch import Tensor

from fxkfac.linalg import Windows, moved, patches, tiles
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.places import layout_of

pytestmark = pytest.mark.skipif(tiles.kernel_of(F32) is None, reason="no C++ compiler")


def windows(
    kernel: int, before: int, after: int, dilation: int = 1, dimensions: int = 2
) -> Windows:
    return Windows(*((k,) * dimensions for k in (kernel, 1, (before, after), dilation)))


def same(kernel: int, dimensions: int = 2) -> Windows:
    """With as many places as the image has positions."""
    return windows(kernel, kernel // 2, kernel // 2, 1, dimensions)


def plain(image: Tensor, of: Windows) -> Tensor:
    """The sum in double precision, of patches."""
    x = rows(image.double(), of)[0].flatten(0, 1)
    return x.T @ x


def by_moving(
    image: Tensor, of: Windows, threads: int, total: Tensor, *, adds: bool = False
) -> float:
    """The trace of a total to which half of the sum was added; no memory is read before."""
    down, across = lies = layout_of(image.movedim(1, -1).unsqueeze(0))
    _, plan = moved.plan(of.along(image))
    moving = tiles.kernel_of(image.dtype).functions.moved
    numbers = moving.room(down.number, across.number, plan.data_ptr(), threads)
    room = image.new_full((numbers + 99,), nan)
    to = total.data_ptr(), total.stride(0), 0.5, adds
    trace = moving.run(*to, *lies.at(image.data_ptr()), plan.data_ptr(), room.data_ptr(), threads)
    assert bool(room[numbers:].isnan().all())
    return trace


IMAGES = {
    "one panel": (rand(70, 20, 9, 8), same(3)),
    "two panels, many images": (rand(300, 70, 4, 3), same(3)),
    "three panels, many images": (rand(40, 130, 9, 8), same(3)),
    "four panels, one image": (rand(1, 150, 9, 8), same(3)),
    "five panels, too many sums for each thread": (rand(70, 200, 7, 7), same(3)),
    "larger than what is taken together": (rand(3, 10, 40, 41), same(3)),
    "one large image": (rand(1, 20, 40, 41), same(3)),
    "two large images": (rand(2, 70, 30, 41), same(3)),
    "no zeros around": (rand(30, 33, 6, 7), windows(3, 0, 0)),
    "zeros on one side": (rand(30, 18, 6, 7), windows(4, 3, 0)),
    "dilation": (rand(30, 18, 6, 7), windows(3, 2, 1, dilation=2)),
    "windows larger than the image": (rand(30, 50, 2, 1), windows(5, 4, 4)),
    "ends outside": (rand(9, 18, 6, 7), windows(2, 3, 3)),
    "many taps, in several rounds": (rand(12, 3, 32, 32), same(7)),
    "more taps than a vector has entries": (rand(9, 17, 9, 9), same(5)),
    "lines": (rand(9, 17, 500), same(9, dimensions=1)),
    "three dimensions": (rand(9, 17, 4, 5, 3), same(3, dimensions=3)),
    "channels last": (rand(30, 9, 8, 20).movedim(-1, 1), same(3)),
    "other strides": (rand(30, 20, 18, 8)[:, ::2, ::2], same(3)),
    "larger than the cache, in whole lines": (rand(8, 96, 6, 6), same(3)),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("image", "of"), IMAGES.values(), ids=IMAGES)
def test_images_are_summed_as_their_patches_are(
    image: Tensor, of: Windows, threads: int, dtype: torch.dtype
) -> None:
    image = image.to(dtype)
    expected, d = 0.5 * plain(image, of), image.shape[1] * prod(of.kernel)
    found, tolerance = torch.full((d, d), nan, dtype=dtype), 2e-6 if dtype == F32 else 1e-14
    trace = by_moving(image, of, threads, found)
    assert error(found, expected) < tolerance
    assert torch.equal(found, found.T)
    assert trace == pytest.approx(float(found.double().trace()), rel=1e-4)
    trace = by_moving(image, of, threads, found, adds=True)
    assert error(found, 2 * expected) < tolerance
    assert torch.equal(found, found.T)
    assert trace == pytest.approx(float(found.double().trace()), rel=1e-4)


def test_nothing_is_written_beside_the_sum() -> None:
    image, of = rand(20, 30, 6, 6), same(3)
    beside = torch.full((272, 300), 7.0, dtype=F64)
    by_moving(image, of, 2, beside[1:271, 5:275])
    assert error(beside[1:271, 5:275], 0.5 * plain(image, of)) < 1e-14
    beside[1:271, 5:275] = 7.0
    assert bool((beside == 7.0).all())


@pytest.mark.parametrize("number", [inf, -inf, nan, 1e30])
def test_the_trace_tells_of_what_is_no_number(number: float) -> None:
    image, of = rand(4, 20, 6, 5).float(), same(3)
    axes, kernel = of.along(image), tiles.kernel_of(F32)
    for place in ((0, 0, 0, 0), (3, 19, 5, 4), (1, 7, 2, 2)):
        wrong = image.clone()
        wrong[place] = number
        sums = Gram(torch.empty(1, 180, 180))
        moved.add_moved(sums, kernel, wrong, axes)
        assert sums.numbers()
        sums = Gram(torch.empty(1, 180, 180))
        moved.add_moved(sums, kernel, image, axes)
        assert not sums.numbers()


def test_which_images_are_moved() -> None:
    sizes, axes = (64, 1, 32), same(3).along(torch.empty(1, 1, 16, 16))
    assert patches.moving_pays(axes, sizes, by_digits=True)
    assert not patches.moving_pays(axes, (64, 1, 2), by_digits=False)  # of which few are multiplied
    strided = Windows((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)).along(torch.empty(1, 1, 16, 16))
    assert not patches.moving_pays(strided, sizes, by_digits=False)
    many = windows(9, 0, 0).along(torch.empty(1, 1, 16, 16))  # boxes
    taps = windows(999, 0, 0, dimensions=1).along(torch.empty(1, 1, 9999))
    assert not any(patches.moving_pays(axes, sizes, by_digits=False) for axes in (many, taps))
