"""What every parameter's block is made of: choices, exact blocks, derived weights, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from drawn import classes, rand, seeded
from quick import quick
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.utils import parametrizations

import fxkfac
from fxkfac.errors import BatchAxisError, OptionError, UnknownParameter, UnsupportedUse

MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()


class Made(nn.Module):
    """A module whose forward is a function of itself and the input, with parameters of shapes."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            drawn = isinstance(part, tuple)
            setattr(self, name, nn.Parameter(torch.randn(part)) if drawn else part)

    def forward(self, x):
        return self._forward(self, x)


def randomised(make, seed=0):
    """A seeded module, none of whose parameters is zero or one."""

    def drawn():
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.5 * torch.randn_like(p))
        return model

    return seeded(drawn, seed)


def assert_relative(found, expected, tolerance=1e-10):
    assert found.shape == expected.shape
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


# --- choices ---


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.PReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


def of_rows(program):
    return {row.parameter: row.structure for row in program.coverage()}


def test_every_parameter_has_one_row_and_shares_sum_to_one():
    model = randomised(conv_net)
    coverage = fxkfac.trace(model, rand(3, 2, 4, 4)).coverage()
    assert [row.parameter for row in coverage] == [name for name, _ in model.named_parameters()]
    assert [row.numel for row in coverage] == [p.numel() for p in model.parameters()]
    assert all(row.reason for row in coverage)
    assert sum(coverage.shares().values()) == pytest.approx(1)
    for name, p in model.named_parameters():
        assert name in str(coverage), p.shape


def test_automatic_choices():
    found = of_rows(fxkfac.trace(randomised(conv_net), rand(3, 2, 4, 4)))
    assert found["1.weight"] == found["2.weight"] == "diagonal"
    assert {k for n, k in found.items() if n not in ("1.weight", "2.weight")} == {"kronecker"}


@pytest.mark.parametrize("policy", ["diagonal", "dense", "identity", "skip"])
def test_rows_of_parameters_that_are_skipped_unused_or_without_rule(policy):
    model = randomised(
        lambda: Made(
            lambda m, x: m.head(x) * m.rate.exp(),
            rate=(3,),
            head=nn.Linear(4, 3),
            unused=(5,),
        )
    )
    program = fxkfac.trace(model, rand(3, 4), unsupported=policy, structure={"head.b*": "skip"})
    coverage = program.coverage()
    assert sorted(row.parameter for row in coverage) == sorted(dict(model.named_parameters()))
    assert sum(coverage.shares().values()) == pytest.approx(1)
    assert of_rows(program)["rate"] == policy
    assert of_rows(program)["head.bias"] == "skip"
    assert of_rows(program)["unused"] == "diagonal"


def test_a_later_pattern_overrides_an_earlier_one():
    model, x = randomised(conv_net), rand(3, 2, 4, 4)
    structure = {"*": "identity", "*.weight": "diagonal", "4.*": "dense", "4.bias": "kronecker"}
    found = of_rows(fxkfac.trace(model, x, structure=structure))
    assert found == {
        "0.weight": "diagonal",
        "0.bias": "identity",
        "1.weight": "diagonal",
        "1.bias": "identity",
        "2.weight": "diagonal",
        "4.weight": "dense",
        "4.bias": "kronecker",
    }


def test_a_structure_that_does_not_exist_or_a_pattern_that_matches_nothing():
    model, x = randomised(conv_net), rand(3, 2, 4, 4)
    with pytest.raises(OptionError, match="blockdiagonal"):
        fxkfac.trace(model, x, structure={"0.*": "blockdiagonal"})
    with pytest.raises(OptionError, match="unsupported="):
        fxkfac.trace(model, x, unsupported="derived")
    with pytest.raises(UnknownParameter, match="nothing"):
        fxkfac.trace(model, x, structure={"nothing.*": "diagonal"})


def test_two_uses_of_different_kinds_are_one_dense_block():
    model = randomised(lambda: Made(lambda m, x: m.w * x.tanh() + m.w, w=(4,)))
    assert of_rows(fxkfac.trace(model, rand(3, 4))) == {"w": "dense"}


# --- exact blocks ---


def twice(m, x):
    return torch.tanh(x @ m.W) @ m.W.T


def tied(m, i):
    return m.table(i).tanh().mean(1) @ m.table.weight.T


def norm_and_scale(m, x):
    return m.gamma * m.norm(x).tanh() + m.gamma * x


def tokens(m, x):
    return m.layer(x).tanh().mean(1)


# Name -> model, input, loss.
EXACT = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, stride=2), nn.Tanh()), rand(4, 2, 4, 4), MSE),
    "grouped conv": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh()),
        rand(3, 4, 4),
        MSE,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        classes(4, 2, C=5),
        CE,
    ),
    "shared axes": (lambda: Made(tokens, layer=nn.Linear(4, 3)), rand(3, 5, 4), CE),
    "used twice": (lambda: Made(twice, W=(4, 3)), rand(4, 4), MSE),
    "tied embedding": (lambda: Made(tied, table=nn.Embedding(5, 3)), classes(4, 3, C=5), CE),
    "norm scales": (
        lambda: Made(norm_and_scale, gamma=(4,), norm=nn.LayerNorm(4)),
        rand(3, 2, 4),
        MSE,
    ),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()), rand(3, 4, 3), MSE),
    "transposed conv": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh()),
        rand(3, 2, 3),
        MSE,
    ),
    "without rule": (lambda: Made(lambda m, x: (x @ m.w.exp()).tanh(), w=(4, 3)), rand(3, 4), MSE),
    "added": (
        lambda: Made(lambda m, x: (x + m.positions).tanh(), positions=(3, 4)),
        rand(3, 3, 4),
        MSE,
    ),
}
OTHERS = {"type-2": fxkfac.exact.ggn, "empirical": fxkfac.exact.empirical_fisher}


def exact_case(case, seed=0):
    make, x, loss = EXACT[case]
    model = randomised(make)
    shape = model(x).shape
    y = classes(shape[0], C=shape[-1]) if loss is CE else rand(*shape, seed=5)
    return model, loss, (x, y)


@pytest.mark.parametrize("fisher", OTHERS)
@pytest.mark.parametrize("kind", quick(["diagonal", "dense"], "dense".__eq__))
@pytest.mark.parametrize("case", EXACT)
def test_exact_blocks_equal_autodiff(case, kind, fisher):
    model, loss, data = exact_case(case)
    program = fxkfac.trace(model, data[0], unsupported=kind, structure={"*": kind})
    factors = fxkfac.kfac(program, loss, data, fisher=fisher)
    names = dict(model.named_parameters())
    assert set(factors) == set(names)
    for name in names:
        expected = OTHERS[fisher](model, loss, data, name)
        block = factors[name]
        assert isinstance(block, fxkfac.Dense if kind == "dense" else fxkfac.Diagonal)
        wanted = expected if kind == "dense" else expected.diagonal().diag()
        assert_relative(block.dense(), wanted)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("case", ["without rule", "tied embedding", "conv"])
def test_two_halves_add_up_to_all_data(case, kind):
    model, loss, (x, y) = exact_case(case)
    program = fxkfac.trace(model, x, unsupported=kind, structure={"*": kind})
    whole = fxkfac.kfac(program, loss, (x, y))
    halves = fxkfac.kfac(program, loss, (x[:1], y[:1])) + fxkfac.kfac(program, loss, (x[1:], y[1:]))
    batches = fxkfac.kfac(program, loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    for name, block in whole.items():
        assert_relative(halves[name].dense(), block.dense())
        assert_relative(batches[name].dense(), block.dense())


@pytest.mark.parametrize("case", ["norm scales", "group norm"])
def test_the_automatic_diagonal_is_exact(case):
    model, loss, data = exact_case(case)
    program = fxkfac.trace(model, data[0])
    factors, found = fxkfac.kfac(program, loss, data), of_rows(program)
    assert "diagonal" in found.values() or "dense" in found.values()
    for name, kind in found.items():
        expected = fxkfac.exact.ggn(model, loss, data, name)
        if kind != "kronecker":
            wanted = expected if kind == "dense" else expected.diagonal().diag()
            assert_relative(factors[name].dense(), wanted)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_the_unsupported_policy_alone(kind):
    model, loss, data = exact_case("without rule")
    with pytest.raises(UnsupportedUse, match="exp"):
        fxkfac.trace(model, data[0])
    program = fxkfac.trace(model, data[0], unsupported=kind)
    assert program.uncovered == ("w",)
    expected = fxkfac.exact.ggn(model, loss, data, "w")
    wanted = expected if kind == "dense" else expected.diagonal().diag()
    assert_relative(fxkfac.kfac(program, loss, data)["w"].dense(), wanted)
    assert f"exact {kind} instead" in str(program)


def test_solve_with_exact_blocks():
    model, loss, data = exact_case("conv")
    kinds = {"*.weight": "dense", "*.bias": "diagonal"}
    factors = fxkfac.kfac(fxkfac.trace(model, data[0], structure=kinds), loss, data)
    for block in factors.values():
        v, eye = rand(block.numel, seed=3), torch.eye(block.numel, dtype=torch.float64)
        expected = torch.linalg.solve(block.dense() + 0.1 * eye, v)
        assert_relative(block.solve(v, 0.1), expected)


def test_identity_and_skip():
    model, loss, data = exact_case("embedding")
    kinds = {"0.weight": "identity", "3.weight": "kronecker", "3.bias": "skip"}
    program = fxkfac.trace(model, data[0], structure=kinds)
    assert of_rows(program) == kinds
    factors = fxkfac.kfac(program, loss, data)
    assert set(factors) == {"0.weight", "3.weight"}
    eye = torch.eye(15, dtype=torch.float64)
    assert torch.equal(factors["0.weight"].dense(), eye)
    assert torch.equal((factors + factors)["0.weight"].dense(), eye)
    assert factors["3.weight"].params == ("3.weight",)


def test_a_skipped_bias_leaves_its_weight_alone():
    model, loss, data = exact_case("shared axes")
    plain = fxkfac.kfac(fxkfac.trace(model, data[0]), loss, data, separate_weight_and_bias=True)
    for kind in ("skip", "identity", "diagonal", "dense"):
        program = fxkfac.trace(model, data[0], structure={"layer.bias": kind})
        found = fxkfac.kfac(program, loss, data)
        assert found["layer.weight"].params == ("layer.weight",)
        assert_relative(found["layer.weight"].dense(), plain["layer.weight"].dense())


# --- derived weights ---


def normed(layer):
    return nn.Sequential(parametrizations.weight_norm(layer), nn.Tanh())


def lora(m, x):
    return F.linear(x, m.W + m.B @ m.A, m.b).tanh()


# Model, input, pattern, name of the derived weight, and (model, plain weight's name, value).
DERIVED = {
    "weight norm": (
        lambda: normed(nn.Linear(4, 3)),
        rand(5, 4),
        "*original*",
        "0.weight",
        lambda m: (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), m[0].weight),
    ),
    "weight norm of a conv": (
        lambda: normed(nn.Conv1d(2, 3, 2)),
        rand(5, 2, 4),
        "*original*",
        "0.weight",
        lambda m: (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh()), m[0].weight),
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()).eval(),
        rand(5, 4),
        "*original*",
        "0.weight",
        lambda m: (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), m[0].weight),
    ),
    "orthogonal": (
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), nn.Tanh()
        ),
        rand(5, 3),
        "*original*",
        "0.weight",
        lambda m: (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), m[0].weight),
    ),
}


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("case", DERIVED)
def test_a_derived_weight_has_the_factors_of_the_plain_one(case, fisher):
    make, x, pattern, name, plain_of = DERIVED[case]
    model = randomised(make)
    program = fxkfac.trace(model, x, structure={pattern: "derived"})
    data = x, rand(*model(x).shape, seed=5)
    assert name in str(program)
    assert max(fxkfac.check(program, MSE, data).values()) < 1e-9
    plain, weight = plain_of(model)
    plain = plain.double()
    with torch.no_grad():
        plain[0].weight.copy_(weight)
        plain[0].bias.copy_(model[0].bias)
    expected = fxkfac.kfac(fxkfac.trace(plain, x), MSE, data, fisher=fisher)["0.weight"]
    factors = fxkfac.kfac(program, MSE, data, fisher=fisher)
    assert list(factors) == [name]
    assert_relative(factors[name].A, expected.A)
    assert_relative(factors[name].B, expected.B)
    hidden = [n for n, kind in of_rows(program).items() if kind == "derived"]
    assert hidden
    assert not set(hidden) & set(factors)


def test_merged_lora_is_named_by_its_parameters():
    model = randomised(lambda: Made(lora, W=rand(3, 4), A=(2, 4), B=(3, 2), b=(3,)))
    x, y = rand(5, 4), rand(5, 3, seed=5)
    program = fxkfac.trace(model, x, structure={"[AB]": "derived"})
    factors = fxkfac.kfac(program, MSE, (x, y))
    (name,) = [n for n in factors if n != "b"]
    assert "A" in name
    assert "B" in name
    assert name in str(program)
    assert max(fxkfac.check(program, MSE, (x, y)).values()) < 1e-9
    params = {"W": (model.W + model.B @ model.A).detach(), "b": model.b.detach()}
    plain = fxkfac.trace(lambda p, x: F.linear(x, p["W"], p["b"]).tanh(), x, params)
    expected = fxkfac.kfac(plain, MSE, (x, y))["W"]
    assert_relative(factors[name].A, expected.A)
    assert_relative(factors[name].B, expected.B)


def by_distance(m, x):
    """A Toeplitz weight of the sequence's length: e^(−a |s − t|)."""
    places = torch.arange(x.shape[1])
    return torch.exp(-m.a.exp() * (places[:, None] - places).abs())


COMPUTED = {
    "one of several results": (lambda m, x: torch.linalg.qr(m.a)[0], (4, 4)),
    "the first of them alone": (lambda m, x: m.a.sort(dim=1)[0], (4, 4)),
    "over a constant": (lambda m, x: m.a.tanh() / m.a.norm().detach(), (4, 4)),
    "of the data's length": (by_distance, (1,)),
}


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("case", COMPUTED)
def test_weights_are_computed_in_many_ways(case, teacher):
    """What runs without gradients beside it wants another front end, with symbols for lengths."""
    weight, shape = COMPUTED[case]

    def forward(m, x):
        with torch.no_grad():
            target = x @ weight(m, x) if teacher else 0.0
        return (x @ weight(m, x)).tanh() - target

    model, x, target = randomised(lambda: Made(forward, a=shape)), rand(5, 4), rand(5, 4, seed=5)
    program = fxkfac.trace(model, x, structure={"a": "derived"})
    assert max(fxkfac.check(program, MSE, (x, target)).values()) < 1e-9
    value = weight(model, x).detach()
    plain = fxkfac.trace(lambda p, x: (x @ p["W"]).tanh() - teacher * (x @ value), x, {"W": value})
    for data in ((x, target), (x[:3], target[:3])):
        (found,) = fxkfac.kfac(program, MSE, data).values()
        expected = fxkfac.kfac(plain, MSE, data)["W"]
        assert_relative(found.dense(), expected.dense())


@pytest.mark.parametrize("used_apart", [False, True])
def test_another_parameter_in_a_derived_weight_is_refused(used_apart):
    """Its block would lack what reaches it through the weight."""

    def forward(m, x):
        apart = x.sin() @ m.u if used_apart else 0
        return (x @ (m.w + m.u)).tanh() + apart

    model, x = randomised(lambda: Made(forward, w=(4, 3), u=(4, 3))), rand(5, 4)
    with pytest.raises(OptionError, match=r"'u' enters the weight 'add\(w\)'(.|\n)*'identity'"):
        fxkfac.trace(model, x, structure={"w": "derived"})
    for other in ("derived", "identity", "skip"):
        if not (used_apart and other == "derived"):
            assert fxkfac.trace(model, x, structure={"w": "derived", "u": other})


def test_a_complex_derived_weight_is_refused_by_what_helps():
    def forward(m, x):
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.c), n=5)

    model = randomised(lambda: Made(forward, c=(5,)))
    with pytest.raises(OptionError, match=r"complex.*'diagonal' or 'dense'"):
        fxkfac.trace(model, rand(3, 5), structure={"c": "derived"})


C128 = torch.complex128
COMPLEX = {
    "a product": lambda m, x: ((x.to(C128) @ m.w.to(C128)) * (2 + 1j)).real.square(),
    "a product with complex data": lambda m, x: ((1j + x) @ m.w.to(C128)).abs(),
    "a bias behind a Fourier transform": lambda m, x: torch.fft.irfft(
        torch.fft.rfft(x) + m.w[0, :3]
    ),
    "a scale": lambda m, x: (x.to(C128) * m.w[0] * (2 + 1j)).real.square(),
    "a look-up": lambda m, x: (m.w.to(C128)[(x > 0).long()] * (2 + 1j)).real.square(),
    "positions": lambda m, x: (1j * x.exp() + m.w[torch.arange(4), 0]).abs(),
    "a factor": lambda m, x: (x * torch.exp(0.5j * m.w[0] + x)).real,
    "a summand's factor": lambda m, x: torch.add(x.to(C128), m.w[0], alpha=2j).abs(),
}


@pytest.mark.parametrize("case", COMPLEX)
def test_where_values_are_complex_a_parameter_has_no_factors_but_an_exact_block(case):
    model = randomised(lambda: Made(COMPLEX[case], w=(4, 3 if "product" in case else 4)))
    x = rand(3, 4)
    with pytest.raises(UnsupportedUse, match="values are complex"):
        fxkfac.trace(model, x)
    target = torch.zeros_like(model(x))
    program = fxkfac.trace(model, x, structure={"w": "dense"})
    found = fxkfac.kfac(program, MSE, (x, target))["w"].dense()
    assert_relative(found, fxkfac.exact.ggn(model, MSE, (x, target), ["w"]))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_that_scales_all_is_a_scale(shape):
    model = randomised(lambda: Made(lambda m, x: m.s * m.head(x), head=nn.Linear(3, 1), s=shape))
    data = rand(5, 3), rand(5, 1, seed=5)
    factors = fxkfac.kfac(fxkfac.trace(model, data[0]), MSE, data)
    assert isinstance(factors["s"], fxkfac.Diagonal)
    assert_relative(factors["s"].dense(), fxkfac.exact.ggn(model, MSE, data, ["s"]))


@pytest.mark.parametrize("name", ["head.weight", "head.bias"])
def test_derived_where_the_parameter_meets_data_itself(name):
    model = randomised(lambda: Made(lambda m, x: m.head(x), head=nn.Linear(4, 3)))
    with pytest.raises(OptionError, match=name):
        fxkfac.trace(model, rand(3, 4), structure={name: "derived"})


def test_new_parameters_make_a_new_derived_weight():
    model, x = randomised(lambda: normed(nn.Linear(4, 3))), rand(5, 4)
    data = x, rand(5, 3, seed=5)
    program = fxkfac.trace(model, x, structure={"*original*": "derived"})
    params = {n: 2 * p.detach() + 0.1 for n, p in model.named_parameters()}
    found = fxkfac.kfac(program, MSE, data, params)["0.weight"]
    other = randomised(lambda: normed(nn.Linear(4, 3)))
    with torch.no_grad():
        for n, p in other.named_parameters():
            p.copy_(params[n])
    again = fxkfac.trace(other, x, structure={"*original*": "derived"})
    assert_relative(found.B, fxkfac.kfac(again, MSE, data)["0.weight"].B)
    assert torch.allclose(functional_call(model, params, (x,)), other(x))


# --- refusals ---


def test_dense_limit():
    model, x = nn.Linear(4, 3).double(), rand(3, 4)
    with pytest.raises(OptionError, match="dense_limit"):
        fxkfac.trace(model, x, structure={"weight": "dense"}, dense_limit=11)
    program = fxkfac.trace(model, x, structure={"weight": "dense"}, dense_limit=12)
    assert of_rows(program)["weight"] == "dense"
    bent = exact_case("without rule")[0]
    with pytest.raises(OptionError, match="dense_limit"):
        fxkfac.trace(bent, x, unsupported="dense", dense_limit=11)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_forward_only_with_exact_structures(kind):
    model, loss, data = exact_case("conv")
    program = fxkfac.trace(model, data[0], structure={"0.weight": kind})
    with pytest.raises(OptionError, match="forward-only"):
        fxkfac.kfac(program, loss, data, fisher="forward-only")


def test_forward_only_takes_scales_as_all_others():
    model, loss, data = exact_case("group norm")
    factors = fxkfac.kfac(fxkfac.trace(model, data[0]), loss, data, fisher="forward-only")
    assert isinstance(factors["0.weight"], fxkfac.Block)


def joined(m, x):
    return F.linear(x, torch.cat([m.first, m.second])).tanh()


def test_mixed_structures_on_a_joined_operand():
    model, x = randomised(lambda: Made(joined, first=(2, 4), second=(1, 4))), rand(3, 4)
    for kind in ("diagonal", "dense"):
        with pytest.raises(OptionError, match=r"first.*second"):
            fxkfac.trace(model, x, structure={"first": kind, "second": "kronecker"})
    data = x, rand(3, 3, seed=5)
    program = fxkfac.trace(model, x, structure={"*": "dense"})
    for name, block in fxkfac.kfac(program, MSE, data).items():
        assert_relative(block.dense(), fxkfac.exact.ggn(model, MSE, data, name))


def batch_normed():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).train()


def test_coupled_data():
    model, data = randomised(batch_normed), (rand(5, 4), rand(5, 2, seed=5))
    program = fxkfac.trace(model, data[0])
    row = {r.parameter: r for r in program.coverage()}["1.weight"]
    assert row.structure == "diagonal"
    assert "coupled" in row.reason
    block = fxkfac.kfac(program, MSE, data)["1.weight"]
    assert isinstance(block, fxkfac.Diagonal)
    assert (block.diagonal > 0).all()
    for kind in ("diagonal", "dense"):
        for name in ("1.weight", "0.weight", "3.weight"):
            asked = fxkfac.trace(model, data[0], structure={name: kind})
            with pytest.raises(BatchAxisError):
                fxkfac.kfac(asked, MSE, data)


def test_evaluated_data_are_not_coupled():
    model, data = randomised(batch_normed).eval(), (rand(5, 4), rand(5, 2, seed=5))
    program = fxkfac.trace(model, data[0], structure={"*": "diagonal"})
    for name, block in fxkfac.kfac(program, MSE, data).items():
        expected = fxkfac.exact.ggn(model, MSE, data, name)
        assert_relative(block.dense(), expected.diagonal().diag())


# --- streams of nested derivatives ---


def mlp(params, x):
    for k in ("first", "second"):
        x = torch.tanh(x @ params[k]["W"] + params[k]["b"])
    return x @ params["third"]["W"] + params["third"]["b"]


def poisson(params, x):
    net = partial(mlp, params)

    def second(v):
        return jvp(lambda at: jvp(net, (at,), (v,))[1], (x,), (v,))[1]

    return sum(second(e.expand_as(x)) for e in torch.eye(2, dtype=x.dtype))


def weights_of(d_in=2, width=4):
    sizes = {"first": (d_in, width), "second": (width, width), "third": (width, 1)}
    return {k: {"W": rand(i, o, seed=i + o), "b": rand(o, seed=o)} for k, (i, o) in sizes.items()}


def test_streams_that_occur_twice_are_merged():
    params, x = weights_of(), rand(5, 2)
    data = x, rand(5, 1, seed=5)
    program = fxkfac.trace(poisson, x, params)
    uses = {name: sum(name in u.parameters for u in program.uses) for name in program.parameters}
    # x and both directions; then the value, both slopes, both second derivatives; of the last
    # layer, which is linear, the second derivatives alone.
    assert (uses["first.W"], uses["second.W"], uses["third.W"]) == (3, 5, 2)
    assert (uses["first.b"], uses["second.b"], uses["third.b"]) == (1, 1, 0)
    assert len(program.uses) == 12
    assert max(fxkfac.check(program, MSE, data).values()) < 1e-9
    kinds = fxkfac.trace(poisson, x, params, structure={"*W": "dense"})
    for name, block in fxkfac.kfac(kinds, MSE, data).items():
        if name.endswith("W"):
            assert_relative(block.dense(), fxkfac.exact.ggn(poisson, MSE, data, name, params))
