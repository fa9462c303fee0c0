"""nn.LSTM and its like as people have them: in single precision, stacked, in training."""

import pytest
import torch
from torch import nn

import fxkfac
from fxkfac.graph.tap import without_dropout

CE = nn.CrossEntropyLoss()


class Last(nn.Module):
    """A recurrent module, and a linear layer behind its last step."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **options)
        self.head = nn.Linear(6 if options.get("bidirectional") else 3, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def seeded(*args, **options):
    torch.manual_seed(0)
    return Last(*args, **options)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_single_precision(n, bidirectional):
    """A CPU has a whole LSTM of this precision as one op, which knows its batch size."""
    model = seeded(nn.LSTM, bidirectional=bidirectional)
    program = fxkfac.trace(model, torch.randn(n, 5, 4))
    assert set(program.parameters) == {name for name, _ in model.named_parameters()}
    for size in (n, 3):
        data = torch.randn(size, 5, 4), torch.randint(3, (size,))
        assert max(fxkfac.check(program, CE, data).values()) < 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_layers(kind):
    model = seeded(kind, num_layers=2, dropout=0.4).train().double()
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    program = fxkfac.trace(model, x)
    assert program.tapped.prediction == (0, 1, 1)
    generators = [torch.Generator().manual_seed(k) for k in (1, 1, 2)]
    one, same, other = (
        fxkfac.step(program, CE, (x, y), fisher="empirical", generator=g) for g in generators
    )
    assert torch.equal(one.loss, same.loss)
    assert not torch.equal(one.loss, other.loss)
    assert torch.equal(one.factors["head.weight"].A, same.factors["head.weight"].A)


def test_dropout_that_is_switched_off_keeps_the_mean():
    model = seeded(nn.LSTM, num_layers=2, dropout=0.4).train().double()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    captured = fxkfac.trace(model, x).tapped.captured
    state = dict(model.named_parameters())
    found = without_dropout(captured.module)(*captured.arguments(state), x)
    assert torch.allclose(found, model.eval()(x))


class ByHand(nn.Module):
    """A recurrent net that begins with zeros of its own."""

    def __init__(self, zeros, product):
        super().__init__()
        self.zeros, self.product = zeros, product
        self.U, self.V = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        h = self.zeros(x)
        for t in range(x.shape[1]):
            h = torch.tanh(self.product(h, self.U) + x[:, t] @ self.V)
        return h


@pytest.mark.parametrize("product", [torch.matmul, torch.mm])
@pytest.mark.parametrize(
    "zeros",
    [
        lambda x: torch.zeros(len(x), 3),
        lambda x: x.new_zeros(len(x), 3),
        lambda x: torch.zeros_like(x[:, 0, :3]),
    ],
)
def test_a_first_state_of_zeros_has_rows(zeros, product):
    """However it is spelt, and whatever the size of the batches, which choose the front end."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 2, 4), torch.randn(5, 3)
    program = fxkfac.trace(ByHand(zeros, product), x)
    for size in (5, 4, 1):
        data = zip(x.split(size), y.split(size), strict=True)
        factors = fxkfac.kfac(program, nn.MSELoss(), data)
        assert factors.products["U"][0].rows == factors.products["V"][0].rows == 10
