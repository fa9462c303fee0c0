"""Errors of four approximations beside the exact blocks, against what is written out here."""

from __future__ import annotations

import json

import pytest
import torch
from drawn import classes, generator, rand, seeded
from torch import nn

import fxkfac
from fxkfac.comparison import DIAGONAL, METHODS
from fxkfac.errors import BatchAxisError, DataError, OptionError, UnknownParameter

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
close = torch.testing.assert_close


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def traced():
    model, data = seeded(mlp), (rand(8, 4), classes(8))
    return model, data, fxkfac.trace(model, data[0])


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_distances_are_those_of_the_matrices(traced, fisher):
    model, data, program = traced
    factors = fxkfac.kfac(program, CE, data, fisher=fisher)
    found = fxkfac.layer_errors(program, CE, data, factors)
    others = {
        "KFAC": factors,
        "EKFAC": fxkfac.ekfac(program, CE, data, factors),
        "KFOC": fxkfac.kfoc(program, CE, data, factors),
    }
    exact = fxkfac.exact.ggn if fisher == "type-2" else fxkfac.exact.empirical_fisher
    assert found.fisher == fisher
    assert [row.params for row in found] == [block.params for block in factors.values()]
    squares = dict.fromkeys(METHODS, 0.0)
    for row, name in zip(found, factors, strict=True):
        C = exact(model, CE, data, list(row.params))
        approximate = {k: c[name].dense() for k, c in others.items()}
        approximate[DIAGONAL] = torch.diag(C.diagonal())
        assert list(row.errors) == list(METHODS)
        close(row.norm, C.norm().item())
        for method, matrix in approximate.items():
            close(row.errors[method], ((matrix - C).norm() / C.norm()).item())
            squares[method] += (matrix - C).square().sum().item()
        assert 0 < row.errors["EKFAC"] < row.errors["KFAC"]  # what they are the nearest among
        assert 0 < row.errors["KFOC"] < row.errors["KFAC"]
    whole = sum(row.norm**2 for row in found)
    for method, total in squares.items():
        close(found.total.errors[method], (total / whole) ** 0.5)


def test_with_one_datum_nothing_but_the_diagonal_is_wrong(traced):
    _, data, program = traced
    one = data[0][:1], data[1][:1]
    factors = fxkfac.kfac(program, CE, one)
    for row in fxkfac.layer_errors(program, CE, one, factors):
        assert max(row.errors[m] for m in ("KFAC", "EKFAC", "KFOC")) < 1e-12
        assert row.errors[DIAGONAL] > 0.1


def test_of_drawn_labels_the_expectation_is_what_is_compared_with(traced):
    model, data, program = traced
    factors = fxkfac.kfac(program, CE, data, fisher="mc", generator=generator())
    found = fxkfac.layer_errors(program, CE, data, factors, names=["2.weight"])
    (row,) = found
    C = fxkfac.exact.type1_fisher(model, CE, data, ["2.weight", "2.bias"])
    close(row.norm, C.norm().item())
    close(row.distances["KFAC"], (factors["2.weight"].dense() - C).norm().item())


def test_a_function_at_other_parameters():
    def f(params, x):
        return torch.tanh(x @ params["a"]["W"]) @ params["b"]

    W = rand(4, 3)
    x, y = rand(6, 4), rand(6, 2)
    program = fxkfac.trace(f, x, {"a": {"W": W}, "b": rand(3, 2)})
    other = {"a": {"W": rand(4, 3, seed=5)}, "b": rand(3, 2, seed=6)}
    factors = fxkfac.kfac(program, MSE, (x, y), params=other)
    found = fxkfac.layer_errors(program, MSE, (x, y), factors, params=other)
    for row in found:
        C = fxkfac.exact.ggn(f, MSE, (x, y), list(row.params), params=other)
        close(row.norm, C.norm().item())
        close(row.distances["KFAC"], (factors[row.params[0]].dense() - C).norm().item())


def test_a_parameter_without_curvature_has_no_relative_error():
    def f(params, x):
        return x @ params["W"] + 0 * x[:, :2] @ params["lost"]

    x, y = rand(6, 4), rand(6, 2)
    program = fxkfac.trace(f, x, {"W": rand(4, 2), "lost": rand(2, 2)})
    factors = fxkfac.kfac(program, MSE, (x, y))
    found = fxkfac.layer_errors(program, MSE, (x, y), factors)
    rows = {row.params[0]: row for row in found}
    assert rows["lost"].norm == 0
    assert set(rows["lost"].errors.values()) == {None}
    assert "–" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_is_printed_and_in_plain_data(traced):
    _, data, program = traced
    found = fxkfac.layer_errors(program, CE, data, fxkfac.kfac(program, CE, data))
    title, header, _, *lines = str(found).splitlines()
    assert "type-2" in title
    assert header.split() == ["block", "entries", "norm", *METHODS[:3], "exact", "diagonal"]
    assert [line.split()[0] for line in lines] == ["0.weight", "2.weight", "all"]
    assert f"{found.rows[0].errors['KFOC']:.3f}" in lines[0].split()
    plain = found.as_dict()
    assert plain["rows"][1]["errors"] == found.rows[1].errors
    assert plain["total"]["entries"] == 25 + 18


class TestRefusals:
    def test_a_large_block_and_its_remedy(self, traced, monkeypatch):
        _, data, program = traced
        factors = fxkfac.kfac(program, CE, data)
        monkeypatch.setattr("fxkfac.comparison.LARGEST", 20)
        with pytest.raises(OptionError, match=r"'0.weight' has 25² .*at most 20².*`names`"):
            fxkfac.layer_errors(program, CE, data, factors)
        assert len(fxkfac.layer_errors(program, CE, data, factors, names=["2.weight"]).rows) == 1
        assert len(fxkfac.layer_errors(program, CE, data, factors, names="2.weight").rows) == 1

    def test_a_model_is_no_program(self, traced):
        model, data, program = traced
        factors = fxkfac.kfac(program, CE, data)
        with pytest.raises(OptionError, match="program is of type Sequential; expected"):
            fxkfac.layer_errors(model, CE, data, factors)

    def test_a_name_that_is_not_there(self, traced):
        _, data, program = traced
        factors = fxkfac.kfac(program, CE, data)
        with pytest.raises(UnknownParameter, match=r"2\.wieght"):
            fxkfac.layer_errors(program, CE, data, factors, names=["2.wieght"])

    def test_factors_without_gradients(self, traced):
        _, data, program = traced
        factors = fxkfac.kfac(program, CE, data, fisher="forward-only")
        with pytest.raises(OptionError, match="forward-only"):
            fxkfac.layer_errors(program, CE, data, factors)

    def test_factors_with_a_mask(self):
        x, y = rand(6, 5, 4), rand(6, 5, 3)
        program, data = fxkfac.trace(seeded(lambda: nn.Linear(4, 3)), x), (x, y)
        factors = fxkfac.kfac(program, MSE, data, mask=lambda x, y: y[..., 0] > 0)
        with pytest.raises(OptionError, match=r"computed with a mask.*; expected factors without"):
            fxkfac.layer_errors(program, MSE, data, factors)

    def test_data_that_can_be_read_once(self, traced):
        _, data, program = traced
        factors = fxkfac.kfac(program, CE, data)
        with pytest.raises(DataError, match="one pass uses up"):
            fxkfac.layer_errors(program, CE, iter([data]), factors)

    def test_data_along_another_axis(self):
        x, y = rand(3, 8, 4), rand(8, 2)
        program = fxkfac.trace(lambda p, x: (x @ p["W"]).sum(0), x, {"W": rand(4, 2)}, batch_axis=1)
        factors = fxkfac.kfac(program, MSE, (x, y))
        with pytest.raises(BatchAxisError, match=r"axes \[1\]; expected axis 0"):
            fxkfac.layer_errors(program, MSE, (x, y), factors)

    @pytest.mark.parametrize(
        ("moved", "said"),
        [(lambda f: f.T, r"axis 1 .* \(1 · N · 1\)"), (lambda f: f.T.flatten(), r"\(4 · N · 1\)")],
    )
    def test_predictions_along_another_axis(self, moved, said):
        """As long along axis 0 as there are data, or a multiple: exact matrices cannot tell."""
        x, y = rand(4, 3), rand(4, 4)
        program = fxkfac.trace(lambda p, x: moved(x @ p["W"]), x, {"W": rand(3, 4)})
        data = x, moved(y).contiguous()
        factors = fxkfac.kfac(program, MSE, data, fisher="empirical")
        with pytest.raises(BatchAxisError, match=f"{said}; expected the data in front"):
            fxkfac.layer_errors(program, MSE, data, factors)

    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_data_that_come_after_what_they_share(self, fisher):
        """Exact matrices count data by the first input, and would take two of them for one."""
        x, y, keys = rand(8, 3), rand(8, 2), rand(4, 3)
        params = {"W": rand(3, 3), "v": rand(4, 2)}
        program = fxkfac.trace(
            lambda p, keys, x: (x @ p["W"] @ keys.T).tanh() @ p["v"],
            (keys, x),
            params,
            batch_axis=(None, 0),
        )
        factors = fxkfac.kfac(program, MSE, ((keys, x), y), fisher=fisher)
        with pytest.raises(BatchAxisError, match=r"length 4 .* 8 data; .*all data share last"):
            fxkfac.layer_errors(program, MSE, ((keys, x), y), factors)

    def test_a_model_that_takes_derivatives_is_none_that_draws(self):
        def slope(params, x):
            x = x.clone().requires_grad_()
            u = (x @ params["W"]).tanh() @ params["v"]
            return torch.autograd.grad(u.sum(), x, create_graph=True)[0]

        x, y, params = rand(4, 2), rand(4, 2), {"W": rand(2, 3), "v": rand(3)}
        program = fxkfac.trace(slope, x, params)
        factors = fxkfac.kfac(program, MSE, (x, y))
        assert fxkfac.layer_errors(program, MSE, (x, y), factors).rows

    def test_a_model_that_draws(self):
        """Each pass would be of another model."""
        model, (x, y) = nn.Sequential(nn.Dropout(0.5), seeded(mlp)), (rand(8, 4), classes(8))
        program, state = fxkfac.trace(model, x), torch.get_rng_state()
        factors = fxkfac.kfac(program, CE, (x, y))
        with pytest.raises(OptionError, match=r"draws random numbers.* one model for all passes"):
            fxkfac.layer_errors(program, CE, (x, y), factors)
        assert torch.equal(torch.get_rng_state(), state)
        fxkfac.layer_errors(fxkfac.trace(model.eval(), x), CE, (x, y), factors)

    def test_a_derived_weight(self):
        x, y = rand(8, 4), rand(8, 2)
        program = fxkfac.trace(
            lambda p, x: x @ (p["W"].exp() / p["W"].exp().sum(0)),
            x,
            {"W": rand(4, 2)},
            structure={"W": "derived"},
        )
        factors = fxkfac.kfac(program, MSE, (x, y))
        with pytest.raises(OptionError, match="which the model computes from its parameters"):
            fxkfac.layer_errors(program, MSE, (x, y), factors)
