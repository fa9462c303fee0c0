"""What `torch.export` records is taken as it comes where it is functional."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram, export
from zoo import ZOO, Entry

import fxkfac
from fxkfac.graph.front_ends.pure import is_functional

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Applied(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function, training=False):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4, dtype=torch.float64), nn.BatchNorm1d(4).double()
        self.function = function
        self.train(training)

    def forward(self, x):
        return self.function(self, self.layer(x))


PURE = {
    "relu": lambda m, y: y.relu(),
    "reshape": lambda m, y: y.reshape(-1, 2, 2).mT.flatten(1),
    "chunk": lambda m, y: torch.cat(y.chunk(2, -1), -1).contiguous(),
    "batch_norm_eval": lambda m, y: m.norm(y),
    "dropout_eval": lambda m, y: F.dropout(y, 0.5, m.training),
    "sizes": lambda m, y: y / y.shape[0],
}
IMPURE = {
    "in_place": lambda m, y: y.relu_(),
    "written": lambda m, y: torch.zeros_like(y).copy_(y),
    "composite": lambda m, y: torch.tensor_split(y, 2, -1)[0],
}


def recorded(model):
    return export(model, (X,), dynamic_shapes=({0: Dim.AUTO},)).graph_module.graph


@pytest.mark.parametrize("name", PURE)
def test_functional(name):
    assert is_functional(recorded(Applied(PURE[name])))


@pytest.mark.parametrize("name", IMPURE)
def test_not_functional(name):
    assert not is_functional(recorded(Applied(IMPURE[name])))


@pytest.mark.parametrize("name", ["batch_norm_eval", "dropout_eval"])
def test_the_same_op_in_training(name):
    assert not is_functional(recorded(Applied(PURE[name], training=True)))


# A module that is called `in`, as no attribute can be in Python's own text, torch cannot run again.
TWICE = [e for e in ZOO.values() if e.unshared and e.name != "module_dict"]


@pytest.mark.parametrize("entry", TWICE, ids=lambda e: e.name)
def test_the_graph_made_functional_is_the_same(entry: Entry, monkeypatch):
    """Both ways give the same parameters the same normal forms."""

    def forms(program):
        uses = sorted(program.uses, key=lambda u: u.parameters)
        return [(u.parameters, u.x_shape, u.y_shape, u.form.scale, u.batch) for u in uses]

    as_it_comes = forms(entry.trace(*entry.build(), 3))
    monkeypatch.setattr("fxkfac.graph.front_ends.capture.is_functional", lambda graph: False)
    assert forms(entry.trace(*entry.build(), 3)) == as_it_comes


def test_most_models_are_not_recorded_twice(monkeypatch):
    def refuse(self, table):
        raise AssertionError("recorded once more")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    for function in PURE.values():
        program = fxkfac.trace(Applied(function), X, unsupported="skip")
        assert program.tapped.captured.front_end == "torch.export"


def test_what_stays_as_long_as_it_is_is_not_expanded():
    """Of a symbolic length, too; and what does get longer still is."""
    longer = fxkfac.trace(Applied(lambda m, y: y.expand(3, *y.shape).sum(0)), X)
    same = fxkfac.trace(Applied(lambda m, y: y.expand(y.shape[0], -1) + 1), X)
    found = [
        any(n.target is torch.ops.aten.expand.default for n in p.graph_module.graph.nodes)
        for p in (longer, same)
    ]
    assert found == [True, False]
    assert same.at(X[:3])[0] is same.tapped  # of any number of data
