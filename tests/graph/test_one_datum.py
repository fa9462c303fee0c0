"""A batch of one, as a loader's last batch may be, of models that say `len(x)` or squeeze."""

from __future__ import annotations

import pytest
import torch
from drawn import F64, rand, seeded
from torch import Tensor, nn

import fxkfac
from fxkfac import exact

SUM = nn.MSELoss(reduction="sum")


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(1, 3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query.expand(len(x), -1) + self.linear(x.mean(1))).tanh()


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 4)) for n in (1, 4))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        h = h + self.places.repeat(len(x), 1, 1)
        return self.head(self.attend(h, h, h)[0][:, 0])


class FirstState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.randn(1, 1, 5))
        self.run, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.state.expand(-1, len(x), -1).contiguous()
        return self.head(self.run(x, h)[0][:, -1])


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.places.repeat(len(x), 1, 1)).tanh().mean(1))


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inside(self.queries.unsqueeze(0).expand(len(x), -1, -1))
        return self.head((q @ x.mT).softmax(-1) @ x).mean(1)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1)).tanh().squeeze()


class Unrolled(nn.Module):
    """The first product is one with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            h = torch.tanh(h @ self.W + step @ self.U)
        return self.head(h)


class Members(nn.Module):
    """Heads under vmap, whose biases have all axes of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.randn(2, 4)), nn.Parameter(rand(2, 3, 4))
        self.bias = nn.Parameter(rand(2, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(1) + torch.zeros(len(x), 1, dtype=x.dtype)
        scaled = torch.vmap(torch.mul, (None, 0))(h, self.scale)
        return torch.vmap(nn.functional.linear)(scaled, self.weight, self.bias).mean(0).tanh()


class Given(nn.Module):
    def __init__(self, run: nn.RNNBase) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.run(x, state)[0][:, -1]


MODELS = [Added, ClassToken, FirstState, Positions, Queries, Squeezed, Unrolled, Members]
X, Y = rand(6, 3, 4, seed=1), rand(6, 3, seed=2)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("traced_with", [6, 1])
def test_one_datum_has_half_the_sums_of_two_that_are_equal(
    make: type[nn.Module], sharing: str, traced_with: int
) -> None:
    program = fxkfac.trace(seeded(make).to(F64), X[:traced_with])
    y = Y[0] if make is Squeezed else Y[:1]
    one = fxkfac.kfac(program, SUM, (X[:1], y), sharing=sharing)
    two = fxkfac.kfac(program, SUM, (X[:1].repeat(2, 1, 1), Y[:1].repeat(2, 1)), sharing=sharing)
    assert list(one) == list(two)
    for name, block in one.items():
        torch.testing.assert_close(2 * block.dense(), two[name].dense())
    assert max(fxkfac.check(program, SUM, (X[:1], y)).values()) < 1e-9


def test_what_is_taken_apart_for_one_batch_size_alone_is_so_for_one_datum() -> None:
    """A recurrence from a state that is given, of as many units as the data traced first, two."""
    model = seeded(lambda: Given(nn.RNN(4, 2, 2, batch_first=True))).to(F64)
    data = (rand(1, 1, 4), rand(2, 1, 2, seed=1)), rand(1, 2, seed=2)
    program = fxkfac.trace(model, data[0], unsupported="skip", batch_axis=(0, 1))
    assert max(fxkfac.check(program, SUM, data).values()) < 1e-9
    assert not program.uncovered


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_exact_blocks_of_a_squeezed_prediction(structure: str) -> None:
    model = seeded(Squeezed).to(F64)
    program = fxkfac.trace(model, X, structure={"*": structure})
    factors = fxkfac.kfac(program, SUM, [(X, Y), (X[:1], Y[0])])
    again = torch.cat([X, X[:1]])
    expected = exact.ggn(model, SUM, (again, torch.cat([Y, Y[:1]])), ["head.weight"])
    found = factors["head.weight"].dense()
    expected = expected if structure == "dense" else expected.diag().diag()
    torch.testing.assert_close(found, expected)
