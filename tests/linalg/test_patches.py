"""Moments of convolution patches equal those of all patches written out, by every way there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg.grams import patch_gram_of, rows
from torch import Tensor

from fxkfac.linalg import gram, patches, products, tiles
from fxkfac.linalg.windows import Axis, Windows, patch_sums

WAYS = ["chosen", "moved", "shifts", "patches"]


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def patch_gram(image: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Σ patch patchᵀ and Σ patch over all data and places."""
    total = patch_gram_of(image, windows)
    return total, patch_sums(image.sum(0, keepdim=True, dtype=total.dtype), windows)[0]


def force(patch: pytest.MonkeyPatch, way: str) -> None:
    """Moved images wherever they can be taken at all, by our kernel or by convolutions.

    Or patches everywhere; without a kernel a few at a time.
    """
    if way == "chosen":
        return

    def is_way(axes: tuple[Axis, ...], *_: object, **__: object) -> bool:
        return way in ("moved", "shifts") and all(a.stride == 1 for a in axes)

    patch.setattr(patches, "moving_pays", is_way)
    patch.setattr(patches, "shifts_pay", is_way)
    if way == "moved":
        patch.setattr(tiles, "COPIED", 1)
        return
    patch.setattr(tiles, "kernel_of", lambda dtype: None)
    patch.setattr(gram, "TILE", 2)
    for name, value in {"STRIP": 2, "CHUNK": 40, "FEW": 3}.items():
        patch.setattr(products, name, value)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def compare(image: Tensor, windows: Windows) -> None:
    x = rows(image, windows)
    flat = x.flatten(1, 2)
    total, sums = patch_gram(image, windows)
    close(total, flat.mT @ flat)
    close(total, total.mT)
    close(sums, flat.sum(1))
    close(patch_sums(image, windows), x.sum(2).movedim(1, 0))
    close(patch_gram_of(image, windows, 2), 2 * flat.mT @ flat)


@st.composite
def problems(draw: st.DrawFn, longest: int = 7) -> tuple[tuple[int, ...], Windows]:
    """The shape of an image, and windows at least one of which fits on it."""
    d = draw(st.integers(1, 3))
    most = (longest, 5, 3)[d - 1]
    lengths = st.integers(1, most)
    sizes, windows = [], []
    for _ in range(d):
        size, kernel = draw(lengths), draw(st.integers(1, min(4, most)))
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        after += max(0, dilation * (kernel - 1) + 1 - before - size - after)
        natural = (before + size + after - dilation * (kernel - 1) - 1) // stride + 1
        sizes.append(size)
        windows.append((kernel, stride, (before, after), dilation, draw(st.integers(1, natural))))
    kernel, stride, padding, dilation, places = zip(*windows, strict=True)
    stride = draw(st.sampled_from([(1,) * d, stride]))
    if stride == (1,) * d:
        places = None
    groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(0, 4)), groups * draw(st.integers(1, 3)), *sizes)
    whole = Windows(kernel, stride, padding, dilation, groups)
    if draw(st.booleans()):
        natural = rows(rand(*shape), whole).shape[2]
        places = tuple(a.places for a in whole.along(torch.empty(shape)))
        assert natural == torch.Size(places).numel()
        places = tuple(draw(st.integers(1, p)) for p in places)
    return shape, replace(whole, places=places)


@given(problems(), st.sampled_from(WAYS), st.sampled_from([torch.float32, torch.float64]))
def test_moments_are_those_of_all_patches(
    problem: tuple[tuple[int, ...], Windows], way: str, dtype: torch.dtype
) -> None:
    shape, windows = problem
    with pytest.MonkeyPatch.context() as patch:
        force(patch, way)
        compare(rand(*shape, dtype=dtype), windows)


def square(k: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Windows:
    return Windows((k, k), (stride,) * 2, ((padding,) * 2,) * 2, (1, 1), groups)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((3, 1, 1, 1), square(5, padding=2)),
        ((3, 2, 2, 2), square(3, padding=3)),
        ((2, 6, 9, 5), square(3, padding=1, groups=6)),
        ((0, 4, 8, 8), square(3, padding=1, groups=2)),
        ((8, 24, 12, 12), square(3, padding=1)),
        ((8, 3, 21, 17), square(7, stride=2, padding=3)),
        ((5, 48, 6, 6), square(1, stride=2)),
        ((5, 4, 6, 6), square(1, padding=2, stride=3)),
        ((2, 2, 30, 20), square(6, padding=3)),
        ((3, 4, 5, 4, 6), Windows((2, 3, 2), (1, 1, 1), ((0, 1), (2, 0), (1, 1)), (1, 2, 1), 2)),
        ((2, 3, 500), Windows((9,), (1,), ((0, 8),), (3,))),
    ],
)
def test_odd_and_usual_layers(way: str, shape: tuple[int, ...], windows: Windows) -> None:
    with pytest.MonkeyPatch.context() as patch:
        force(patch, way)
        compare(rand(*shape), windows)


def test_images_of_any_strides() -> None:
    windows = square(3, padding=1, groups=2)
    for image in (
        rand(3, 5, 6, 4).movedim(-1, 1),
        rand(3, 1, 5, 6).expand(3, 4, 5, 6),
        rand(3, 4, 10, 12)[:, :, ::2, 1::2],
    ):
        for way in WAYS[1:]:
            with pytest.MonkeyPatch.context() as patch:
                force(patch, way)
                compare(image, windows)


def test_more_taps_than_windows_find_places_for() -> None:
    """A kernel longer than the padded image lies nowhere."""
    windows, image = square(5, padding=1), rand(2, 3, 2, 2)
    total, sums = patch_gram(image, windows)
    assert not total.any()
    assert not sums.any()
    assert patch_sums(image, windows).shape == (2, 1, 75)


def test_half_precision_is_summed_in_float32() -> None:
    image, windows = rand(4, 3, 8, 8).to(torch.bfloat16), square(3, padding=1)
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            force(patch, way)
            total, sums = patch_gram(image, windows)
            expected, of_sums = patch_gram(image.float(), windows)
            assert total.dtype == sums.dtype == torch.float32
            close(total, expected)
            close(sums, of_sums)
