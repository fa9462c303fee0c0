"""Scores equal those of dense gradients and matrices, datum by datum and pair by pair."""

from __future__ import annotations

import pytest
import torch
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO

import fxkfac
from fxkfac import errors
from fxkfac.curvature.losses import likelihood_of
from fxkfac.graph.verify import FlatModel

F64 = torch.float64
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
DAMPING = 0.03
N_TRAIN, N_TEST = 5, 3


def own_gradients(program, loss, data, names):
    """(N, numel): autograd on the model itself, one datum after the other."""
    likelihood, rows = likelihood_of(loss), []
    inputs, targets = data
    tensors = program.signature.tensors(inputs)
    for i in range(program.signature.batch_size(tensors)):
        one = program.signature.permute(tensors, torch.tensor([i]))
        model = FlatModel(program.model, program.signature.with_constants(inputs))
        prediction = model.predict(model.state(), one).detach()
        sent = likelihood.scale * likelihood.gradient(prediction, targets[i : i + 1])
        gradients = model.gradients(model.state(), one, sent, names)
        rows.append(torch.cat([gradients[n].flatten() for n in names]))
    return torch.stack(rows)


def expected_scores(program, loss, factors, train, test, damping=DAMPING):
    names = list(factors.shapes)
    G, H = (own_gradients(program, loss, data, names) for data in (train, test))
    C = factors.dense(*names)
    return -G @ torch.linalg.solve(C + damping * torch.eye(len(C), dtype=C.dtype), H.mT)


def assert_scores(found, expected):
    assert found.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)


REFUSED = ()
CHOSEN = [
    name
    for name, e in ZOO.items()
    if e.expected == "right"
    and not (e.coupled or e.random)
    and e.target_axis == 0
    and e.trace_options.get("batch_axis", 0) == 0
    and e.tolerance <= 1e-9
]


@pytest.mark.parametrize("name", CHOSEN)
def test_every_model_of_the_zoo(name):
    entry = ZOO[name]
    model, params = entry.build()
    program = entry.trace(model, params, 4)
    n = N_TRAIN + N_TEST
    data = entry.data(n)
    train, test = entry.take(data, range(N_TRAIN)), entry.take(data, range(N_TRAIN, n))
    factors = fxkfac.kfac(program, entry.loss, train)
    found = fxkfac.influence(program, entry.loss, factors, train, test, DAMPING)
    assert_scores(found, expected_scores(program, entry.loss, factors, train, test))
