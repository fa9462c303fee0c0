"""Products as a convolution's weight gradients: the same as matrix products, in every dtype."""

import pytest
import torch
from einops import rearrange
from linalg.grams import gram_of, patch_gram_of

from fxkfac.linalg import Windows, tiles
from fxkfac.linalg import correlation as module
from fxkfac.linalg.correlation import correlation

F32 = torch.float32


def numbers(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(scale))


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(tiles, "kernel_of", lambda dtype: None)
    monkeypatch.setattr(module, "LEAST", 0)
    monkeypatch.setattr(module, "blas_is_behind", lambda: True)


@pytest.mark.parametrize("d", [1, 64, 256, 300, 500])
@pytest.mark.parametrize("rows", [31, 32, 100])
def test_rows_in_blocks_and_what_is_left_of_them(rows, d):
    x = numbers(1, rows, d)
    close(gram_of(x), x.double().mT @ x.double())
    close(gram_of(x, 2 * x), 5 * x.double().mT @ x.double())


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (500, 1), (130, 2), (5, 5)])
@pytest.mark.parametrize("space", [(7,), (3, 4), (2, 1, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_of_length_one(channels, groups, space, stride):
    image, d = numbers(4, channels, *space), len(space)
    ones = (1,) * d
    windows = Windows(ones, (stride,) * d, ((0, 0),) * d, ones, groups)
    found = patch_gram_of(image, windows)
    seen = image[(..., *[slice(None, None, stride)] * d)].double()
    rows = rearrange(seen, "n (g c) ... -> g (n ...) c", g=groups)
    close(found, rows.mT @ rows)


@pytest.mark.parametrize("dtype", [F32, torch.float64])
@pytest.mark.parametrize("group", [1, 2])
def test_shifts(dtype, group):
    x, y = numbers(3, 4, 5, 6, dtype=dtype), numbers(3, 6, 9, 8, seed=1, dtype=dtype)
    found = correlation(x, y, (3, 2), (2, 2), group).double()
    X, Y = x.double().unflatten(1, (group, -1)), y.double().unflatten(1, (group, -1))
    for k in range(3):
        for m in range(2):
            moved = Y[..., 2 * k : 2 * k + 5, 2 * m : 2 * m + 6]
            close(found[2 * k + m], torch.einsum("ngcpq,ngepq->gce", X, moved))


def test_a_matrix_product_takes_their_place(monkeypatch):
    x, image = numbers(1, 64, 70), numbers(4, 70, 3, 3)
    windows = Windows((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    fast = gram_of(x), patch_gram_of(image, windows)
    monkeypatch.setattr(module.torch.backends.mkldnn, "is_available", lambda: False)
    assert not module.is_faster(x, 100)
    slow = gram_of(x), patch_gram_of(image, windows)
    for a, b in zip(fast, slow, strict=True):
        close(a, b.double())
