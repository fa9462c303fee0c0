"""Tables of positions whose indices have a unit axis, and parameters without axes."""

import torch
from drawn import F64, rand, seeded
from torch import nn

import fxkfac


class Embedded(nn.Module):
    """Tokens and positions, the positions' indices with an axis of length one."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = (
            nn.Embedding(7, 4),
            nn.Embedding(5, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.head(torch.tanh(self.tokens(x) + self.places(places)))


def test_positions_with_a_unit_axis():
    model, x = seeded(Embedded), torch.arange(12).view(4, 3) % 7
    program = fxkfac.trace(model, x)
    data = x, rand(4, 3, 2)
    assert program.tapped.dynamic
    assert max(fxkfac.check(program, nn.MSELoss(), data).values()) < 1e-9
    one = x[:1], rand(1, 3, 2)
    factors = fxkfac.kfac(program, nn.MSELoss(reduction="sum"), data)
    assert factors["places.weight"].A.tolist() == [8.0, 8.0, 8.0, 0.0, 0.0]
    single = fxkfac.kfac(program, nn.MSELoss(), one, sharing="reduce")
    assert single.dense().isfinite().all()


def test_the_diagonal_of_a_number():
    params, x = {"s": torch.tensor(0.3, dtype=F64)}, rand(4, 3)

    def f(params, x):
        return params["s"].exp() * x

    program = fxkfac.trace(f, x, params, unsupported="diagonal")
    data = x, rand(4, 3)
    found = fxkfac.kfac(program, nn.MSELoss(), data)["s"].diagonal
    expected = fxkfac.exact.ggn(f, nn.MSELoss(), data, ["s"], params)
    torch.testing.assert_close(found.reshape(1, 1), expected)
