"""Eigenvalues as plain numbers: those of the factors and blocks, written out."""

from __future__ import annotations

import pytest
import torch
from drawn import F64, rand, seeded
from torch import nn

import fxkfac

LOSS = nn.MSELoss()


def falling(matrix):
    return torch.linalg.eigvalsh(matrix).flip(-1).tolist()


@pytest.fixture(scope="module")
def model():
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))


@pytest.fixture(scope="module")
def data():
    return rand(6, 3), rand(6, 2, seed=1)


def test_spectra_of_factors_and_exact_blocks(model, data):
    program = fxkfac.trace(model, data[0], structure={"2.bias": "dense"})
    factors = fxkfac.kfac(program, LOSS, data)
    found = fxkfac.spectra(factors)
    assert list(found) == list(factors)
    first = factors["0.weight"]
    assert found["0.weight"] == {
        "A": pytest.approx(falling(first.A), abs=1e-12),
        "B": pytest.approx(falling(first.B), abs=1e-12),
    }
    diagonal = factors["1.weight"].diagonal.sort(descending=True).values.tolist()
    assert found["1.weight"] == {"block": pytest.approx(diagonal)}
    assert found["2.bias"] == {"block": pytest.approx(falling(factors["2.bias"].matrix))}


def test_spectra_of_groups_are_put_together():
    model = seeded(lambda: nn.Conv1d(4, 6, 2, groups=2))
    x, y = rand(3, 4, 5), rand(3, 6, 4, seed=1)
    factors = fxkfac.kfac(fxkfac.trace(model, x), LOSS, (x, y))
    found = fxkfac.spectra(factors)["weight"]
    both = sorted((v for A in factors["weight"].A for v in falling(A)), reverse=True)
    assert found["A"] == pytest.approx(both, abs=1e-12)
    assert len(found["B"]) == 6


def test_spectra_of_a_sum_are_numbered():
    params = {"w": torch.eye(3, dtype=F64) + 0.1 * rand(3, 3)}
    x, y = rand(5, 3), rand(5, 3, seed=1)
    program = fxkfac.trace(lambda p, x: torch.tanh(x @ p["w"]) @ p["w"].T, x, params)
    found = fxkfac.spectra(fxkfac.kfac(program, LOSS, (x, y)))["w"]
    assert list(found) == ["A 1", "B 1", "A 2", "B 2"]


def test_spectra_of_corrected_blocks_are_their_eigenvalues(model, data):
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, LOSS, data)
    corrected = fxkfac.ekfac(program, LOSS, data, factors)
    expected = corrected["0.weight"].eigenvalues.flatten().sort(descending=True).values.tolist()
    assert fxkfac.spectra(corrected)["0.weight"] == {"block": pytest.approx(expected, abs=1e-14)}
