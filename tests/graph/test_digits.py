"""What is rounded in less than its own dtype is given the rounding of that, and no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from zoo import CE, rand

import fxkfac
from fxkfac.graph.deviation import compared

TF32, BF16 = 1.2e-3, 4e-3  # what roundings of such products may differ by, relative


class ByPlace(nn.Module):
    """A net that rounds otherwise at every place of a batch, as kernels of a GPU may."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.inside, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, x.shape[0], device=x.device).unsqueeze(1)
        h = self.inside(x).float() * (1 + self.noise * places)
        return self.out(torch.tanh(h)).float()


def are_found(noise: float) -> bool:
    """Whether the data are told from one another, and are independent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ByPlace(noise)
    program = fxkfac.trace(model, rand(3, 4).float())
    found = all(use.batch is not None for use in program.uses)
    return found and not program.tapped.coupled


@pytest.fixture
def products() -> Iterator[None]:
    """The way products of float32 are taken is put back."""
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.parametrize("inside", ["tf32", "bf16"])
def test_products_that_are_taken_in_less(inside: str, products: None) -> None:
    noise = TF32 if inside == "tf32" else BF16
    assert are_found(noise / 10)
    assert not are_found(noise)
    torch.backends.mkldnn.matmul.fp32_precision = inside  # type: ignore[attr-defined]
    assert are_found(noise)
    assert not are_found(10 * noise)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert are_found(BF16)
        assert not are_found(10 * BF16)


class Normed(nn.Module):
    """A norm between layers, which the graph takes by its parts, and autocast in half precision."""

    def __init__(self, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        inside = nn.Conv1d(2, 4, 3, bias=bias)
        self.inside, self.norm, self.out = inside, norm, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.inside(x)).tanh().flatten(1))


NORMS = {
    "layer": lambda: nn.LayerNorm([4, 6]),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch": lambda: nn.BatchNorm1d(4).eval(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_under_autocast(norm: str, bias: bool) -> None:
    """A bias before a norm may have no gradient but rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normed(NORMS[norm](), bias)
    data = rand(5, 2, 8).float(), torch.arange(5) % 3
    expected = fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data)
    with torch.autocast("cpu", torch.bfloat16):
        found = fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data)
    for name, block in expected.items():
        off = (found[name].dense() - block.dense()).norm() / block.dense().norm()
        assert 0 < off < 0.05


def test_what_is_lost_in_half_precision_is_found() -> None:
    def wrong(off: float, moved: float, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        expected = {"large": torch.ones(4), "small": 0.01 * torch.ones(4)}
        found = {"large": expected["large"], "small": (1 + off) * expected["small"]}
        rounded = {"large": expected["large"], "small": (1 + moved) * expected["small"]}
        return compared(found, expected, dtype, lambda: rounded)[1]

    assert not wrong(0.03, 0)
    assert wrong(0.04, 0) == ["small"]
    assert not wrong(0.04, 0.02)
    assert not wrong(1, 1)  # nothing but rounding
    assert wrong(20, 20) == ["small"]  # but of a tenth of the largest, not more
    assert wrong(0.001, 0, torch.float32) == ["small"]  # where there are digits, they count
    assert not wrong(0.001, 1, torch.float32)
    assert wrong(0.1, 1, torch.float32) == ["small"]  # half of them, whatever moves


def test_check_says_the_same(products: None) -> None:
    program = fxkfac.trace(nn.Linear(4, 3), rand(5, 4).float())
    data = rand(5, 4).float(), torch.arange(5) % 3
    assert max(fxkfac.check(program, CE, data).values()) < 1e-5
    captured = program.tapped.captured
    assert captured.lowest == torch.float32
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert captured.lowest == torch.float16
