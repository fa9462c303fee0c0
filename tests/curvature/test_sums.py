"""Sums of curvatures, damping of factors, and parts of a weight taken apart."""

import pytest
import torch
from drawn import F64, rand, seeded
from torch import nn

import fxkfac
from fxkfac.errors import MergeError, OptionError

PARAMS = {"W": rand(5, 2, seed=1), "b": rand(5, seed=2), "V": rand(1, 5, seed=3)}
X, Z = rand(6, 2, seed=4), rand(4, 2, seed=5)


def net(params, x):
    return torch.tanh(x @ params["W"].T + params["b"]) @ params["V"].T


def residual(params, x):
    return fxkfac.laplacian(lambda z: net(params, z), x).laplacian


def factors(model, x, **options):
    program = fxkfac.trace(model, x, PARAMS)
    return fxkfac.kfac(program, nn.MSELoss(), (x, torch.zeros(len(x), 1, dtype=F64)), **options)


@pytest.mark.parametrize("apart", [False, True])
def test_the_sum_is_the_sum_of_the_matrices(apart):
    interior, boundary = factors(residual, X), factors(net, Z, separate_weight_and_bias=apart)
    total = fxkfac.sum_of(interior, boundary)
    expected = interior.dense(*PARAMS) + boundary.dense(*PARAMS)
    torch.testing.assert_close(total.dense(*PARAMS), expected)
    gradients = {name: rand(*t.shape, seed=9) for name, t in PARAMS.items()}
    solved = total.solve(gradients, damping=0.3)
    flat = torch.cat([solved[name].flatten() for name in PARAMS])
    found = expected @ flat + 0.3 * flat
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in gradients.values()]))


def test_damped_factors_of_a_sum_of_two():
    total = fxkfac.sum_of(factors(residual, X), factors(net, Z, separate_weight_and_bias=True))
    gradients = {"W": rand(5, 2, seed=9)}
    solved = total.solve(gradients, damping=0.04, damp="factors")["W"]

    def damped(factor):
        return factor + 0.2 * torch.eye(len(factor), dtype=F64)

    matrix = sum(torch.kron(damped(t.B), damped(t.A)) for t in total["W"].terms)
    assert len(total["W"].terms) == 2
    torch.testing.assert_close(matrix @ solved.flatten(), gradients["W"].flatten())


def test_damped_factors_of_a_tied_weight():
    """One use as it is stored and one the other way round."""

    def tied(params, x):
        return torch.tanh(x @ params["W"]) @ params["W"].T

    W, x = rand(4, 3), rand(5, 4)
    program = fxkfac.trace(tied, x, {"W": W})
    block = fxkfac.kfac(program, nn.MSELoss(), (x, x))["W"]
    eye = {n: 0.2 * torch.eye(n, dtype=F64) for n in (3, 4)}
    first, second = block.terms
    matrix = torch.kron(first.A + eye[4], first.B + eye[3])
    matrix = matrix + torch.kron(second.B + eye[4], second.A + eye[3])
    g = rand(12)
    torch.testing.assert_close(matrix @ block.solve(g, 0.04, "factors"), g)


def assert_solved(curvature, names, gradients):
    """As by the matrix."""
    λ = 0.3
    solved = curvature.solve(gradients, damping=λ)
    C = curvature.dense(*names) + λ * torch.eye(sum(gradients[n].numel() for n in names))
    flat = torch.cat([gradients[name].flatten() for name in names])
    found = torch.cat([solved[name].flatten() for name in names])
    torch.testing.assert_close(found, torch.linalg.solve(C, flat))


def test_losses_that_each_use_a_head_of_their_own():
    """To the other's head each one adds nothing."""
    heads = PARAMS | {"V2": rand(2, 5, seed=6)}

    def second(params, x):
        return net(params | {"V": params["V2"]}, x)

    first, other = (
        fxkfac.kfac(fxkfac.trace(f, X, heads), nn.MSELoss(), (X, torch.zeros(6, d, dtype=F64)))
        for f, d in ((net, 1), (second, 2))
    )
    total = fxkfac.sum_of(first, other)
    expected = first.dense(*heads) + other.dense(*heads)
    torch.testing.assert_close(total.dense(*heads), expected)
    assert_solved(total, tuple(heads), {n: rand(*t.shape, seed=9) for n, t in heads.items()})


def test_a_weight_that_some_inputs_do_not_use_has_a_block_of_zeros():
    def model(params, x):
        h = torch.einsum("ntd,de->nte", x, params["W"]) if x.shape[1] > 2 else x
        return torch.tanh(h.sum(1)) @ params["V"]

    weights = {"W": rand(3, 3), "V": rand(3, 1, seed=1)}
    long, short = rand(5, 4, 3), rand(5, 2, 3)
    program = fxkfac.trace(model, long, weights)
    each = [fxkfac.kfac(program, nn.MSELoss(), (x, rand(5, 1, seed=2))) for x in (short, long)]
    assert not each[0]["W"].dense().any()
    assert set(each[0].operator().shapes) == set(weights)
    assert [row.params for row in each[0].report()] == [("V",), ("W",)]
    for curvature in (each[0], fxkfac.sum_of(*each)):
        assert_solved(
            curvature, ("W", "V"), {n: rand(*t.shape, seed=9) for n, t in weights.items()}
        )
    total = fxkfac.sum_of(*each).dense("W", "V")
    torch.testing.assert_close(total, each[0].dense("W", "V") + each[1].dense("W", "V"))


def test_parts_do_not_fit():
    one = factors(net, X)
    smaller = {"W": rand(5, 2), "b": rand(5), "V": rand(2, 5)}
    program = fxkfac.trace(net, X, smaller)
    other = fxkfac.kfac(program, nn.MSELoss(), (X, rand(6, 2)))
    with pytest.raises(MergeError, match="'V' has shape"):
        fxkfac.sum_of(one, other)
    with pytest.raises(MergeError, match="nothing to sum"):
        fxkfac.sum_of()


def test_damping_of_factors_must_be_positive():
    with pytest.raises(OptionError, match="damping=0"):
        factors(net, X).solve(PARAMS, damping=0, damp="factors")
    with pytest.raises(OptionError, match="damp='both'"):
        factors(net, X).solve(PARAMS, damping=1.0, damp="both")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_gates_taken_apart_are_the_diagonal_blocks_of_all(sharing):
    model, x, y = seeded(Recurrent), rand(5, 3, 4), rand(5, 2)
    apart = fxkfac.trace(model, x, apart={"lstm.*": 4})
    assert max(fxkfac.check(apart, nn.MSELoss(), (x, y)).values()) < 1e-9
    one, four = (
        fxkfac.kfac(program, nn.MSELoss(), (x, y), sharing=sharing)
        for program in (fxkfac.trace(model, x), apart)
    )
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert four[name].B.shape == (4, 3, 3)
        torch.testing.assert_close(four[name].A, one[name].A)
        size = model.get_parameter(name).numel() // 4
        mask = torch.block_diag(*[torch.ones(size, size, dtype=F64)] * 4)
        torch.testing.assert_close(four.dense(name), one.dense(name) * mask)


def test_parts_that_are_not_of_the_output_are_refused():
    with pytest.raises(OptionError, match="axis 0"):
        fxkfac.trace(lambda p, x: x @ p["W"], X, {"W": rand(2, 4)}, apart={"W": 2})
    with pytest.raises(OptionError, match="in 3 equal parts"):
        fxkfac.trace(net, X, PARAMS, apart={"W": 3})
