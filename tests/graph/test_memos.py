"""A model that keeps what it has computed of its parameters is refused, and left as it was."""

import copy

import pytest
import torch
from torch import nn

import fxkfac
from fxkfac.errors import CaptureError

F64 = torch.float64
X, Y = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
CE = nn.CrossEntropyLoss()


class Base(nn.Module):
    """A net with a table that is added on the way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 3, dtype=F64)
        self.table, self.kept = nn.Parameter(torch.randn(2, 3, dtype=F64)), {}
        self.norm = nn.BatchNorm1d(4, dtype=F64).eval()

    def added(self):
        return self.table[:, [0, 1, 2, 1]]

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.layer(x)).unsqueeze(1) + self.added()).mean(1))


class InADict(Base):
    """Filled at the first call in eval mode."""

    def added(self):
        if self.training:
            return super().added()
        if "table" not in self.kept:
            self.kept["table"] = super().added()
        return self.kept["table"]


class InAnAttribute(Base):
    """Likewise."""

    memo = None

    def added(self):
        if self.memo is None:
            self.memo = super().added()
        return self.memo


class MadeAnew(Base):
    """Leaves what it has computed, and a constant, for others to read."""

    def added(self):
        self.last = super().added()
        self.kept.setdefault("positions", torch.arange(4))
        self.kept["loss"] = self.last.square().mean()
        return self.last


@pytest.mark.parametrize("kind", [InADict, InAnAttribute])
def test_a_memo_is_refused(kind):
    model = kind().eval()
    before = {name: copy.copy(v) for name, v in vars(model).items() if name == "kept"}
    attributes = set(vars(model))
    with pytest.raises(CaptureError, match=f"of a {kind.__name__}, and reads it at the next call"):
        fxkfac.trace(model, X)
    assert set(vars(model)) == attributes
    assert model.kept == before["kept"] == {}


def test_the_mode_without_it():
    model = InADict()
    model.norm.eval()
    program = fxkfac.trace(model, X)
    step = fxkfac.step(program, CE, (X, Y))
    (expected,) = torch.autograd.grad(CE(model(X), Y), [model.table])
    assert torch.allclose(step.gradients["table"], expected, rtol=1e-10)


def test_what_is_made_at_every_call_is_none():
    model = MadeAnew().eval()
    program = fxkfac.trace(model, X)
    model(X)
    step = fxkfac.step(program, CE, (X, Y))
    assert len(program.graphs) == 1
    (expected,) = torch.autograd.grad(CE(model(X), Y), [model.table])
    assert torch.allclose(step.gradients["table"], expected, rtol=1e-10)
