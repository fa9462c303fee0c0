"""Functional models: an ensemble by vmap is its members side by side; swapped parameters count."""

import pytest
import torch
from drawn import F64, rand, seeded
from quick import quick
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import fxkfac
from fxkfac.errors import ParameterError

MSE = nn.MSELoss(reduction="sum")
close = torch.testing.assert_close
MEMBERS = 3


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def conv_net():
    conv = nn.Conv2d(2, 3, 3, bias=False)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def ensemble(make):
    """The members, and a function of their stacked parameters."""
    modules = [seeded(make, seed=k) for k in range(MEMBERS)]
    params, _ = stack_module_state(modules)
    base = seeded(make).to("meta")

    def model(params, x):
        return vmap(lambda p, x: functional_call(base, p, (x,)), (0, None), out_dims=1)(params, x)

    return modules, model, {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("fisher", quick(["type-2", "empirical"], "type-2".__eq__))
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_member_has_a_block_of_its_own(fisher, sharing):
    """As many groups as members; each is what that member has by itself."""
    modules, model, params = ensemble(mlp)
    x, y = rand(6, 4), rand(6, MEMBERS, 3)
    program = fxkfac.trace(model, x, params)
    options = {"fisher": fisher, "sharing": sharing}
    together = fxkfac.kfac(program, MSE, (x, y), **options)
    for k, module in enumerate(modules):
        alone = fxkfac.kfac(fxkfac.trace(module, x), MSE, (x, y[:, k]), **options)
        for name, block in alone.items():
            assert len(together[name].A) == MEMBERS
            close(together[name].A[k], block.A)
            close(together[name].B[k], block.B)


def test_convolutions_are_taken_apart_by_member():
    """The members' kernels are one convolution with more channels, until `apart` says how many."""
    modules, model, params = ensemble(conv_net)
    x, y = rand(6, 2, 4, 4), rand(6, MEMBERS, 3)
    program = fxkfac.trace(model, x, params, apart={"0.weight": MEMBERS})
    together = fxkfac.kfac(program, MSE, (x, y)).dense("0.weight")
    expected = []
    for k, module in enumerate(modules):
        program = fxkfac.trace(module, x, ["0.weight"])
        expected.append(fxkfac.kfac(program, MSE, (x, y[:, k])).dense())
    close(together, torch.block_diag(*expected))


def test_the_swapped_parameters_are_meant():
    """Not the module's own, whose shapes they have."""
    own, other = seeded(mlp), seeded(mlp, seed=9)
    swapped = {name: p.detach() for name, p in other.named_parameters()}
    x, y = rand(6, 4), rand(6, 3)
    program = fxkfac.trace(lambda p, x: functional_call(own, p, (x,)), x, swapped)
    found = fxkfac.kfac(program, MSE, (x, y))
    expected = fxkfac.kfac(fxkfac.trace(other, x), MSE, (x, y))
    close(found.dense(), expected.dense())
    by_params = fxkfac.kfac(fxkfac.trace(own, x), MSE, (x, y), params=swapped)
    close(by_params.dense(), expected.dense())


def test_a_step_of_a_sampler():
    """Natural-gradient steps from one dict of parameters to the next, as samplers take them."""
    module, batch = seeded(mlp), {"x": rand(6, 4), "y": rand(6, 3)}
    params = {name: p.detach() for name, p in module.named_parameters()}

    def forward(params, batch):
        return functional_call(module, params, (batch["x"],))

    def loss(params):
        return MSE(forward(params, batch), batch["y"])

    program = fxkfac.trace(forward, (batch,), params)
    for _ in range(3):
        factors = fxkfac.kfac(program, MSE, ((batch,), batch["y"]), params=params)
        step = factors.solve(torch.func.grad(loss)(params), damping=1.0)
        after = {name: p - 0.3 * step[name] for name, p in params.items()}
        assert loss(after) < loss(params)
        params = after
    assert all(p.dtype == F64 for p in params.values())


def test_params_in_lists_and_tuples():
    """The (W, b) pairs of a functional MLP: names are positions."""

    def mlp(params, x):
        for W, b in params["layers"][:-1]:
            x = torch.tanh(x @ W + b)
        W, b = params["layers"][-1]
        return x @ W + b

    torch.manual_seed(0)
    params = {"layers": [(torch.randn(3, 4).double(), torch.zeros(4).double())]}
    params["layers"].append((torch.randn(4, 2).double(), torch.zeros(2).double()))
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    program = fxkfac.trace(mlp, x, params)
    assert program.parameters == ("layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1")
    assert max(fxkfac.check(program, nn.MSELoss(), (x, y)).values()) < 1e-12
    found = fxkfac.kfac(program, nn.MSELoss(), (x[:1], y[:1])).dense("layers.1.0", "layers.1.1")
    names = ["layers.1.0", "layers.1.1"]
    expected = fxkfac.exact.ggn(mlp, nn.MSELoss(), (x[:1], y[:1]), names, params)
    torch.testing.assert_close(found, expected)


def test_complex_parameters_are_refused():
    params = {"w": torch.randn(4, 3, dtype=torch.complex128), "b": torch.randn(3).double()}
    with pytest.raises(ParameterError, match=r"\['w'\] are complex; expected real ones"):
        fxkfac.trace(lambda p, x: (x + 0j @ p["w"]).real + p["b"], torch.randn(5, 4), params)


@pytest.mark.parametrize("params", [{}, [], {"at": torch.tensor([0, 1])}])
def test_no_parameter_at_all_is_named(params):
    x = rand(5, 2)
    with pytest.raises(ParameterError, match=r"selects none of the [01] tensors"):
        fxkfac.trace(lambda p, x: x, x, params)
    with pytest.raises(ParameterError, match=r"selects none of the [01] tensors"):
        fxkfac.exact.ggn(lambda p, x: x, MSE, (x, x), params=params)
    with pytest.raises(ParameterError, match="selects none of the 2 tensors"):
        fxkfac.trace(seeded(mlp)[:1], rand(5, 4), params=[])


LIKE_A_PARAMETER = {
    "new_zeros": lambda p: p.new_zeros(3),
    "new_ones": lambda p: p.new_ones(3),
    "new_full": lambda p: p.new_full((3,), 0.5),
    "new_empty": lambda p: p.new_empty(3).fill_(0.5),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda p: torch.full_like(p, 0.5),
}


@pytest.mark.parametrize("make", LIKE_A_PARAMETER.values(), ids=LIKE_A_PARAMETER)
def test_a_tensor_made_like_a_parameter_is_no_use_of_it(make):
    """It has its dtype and device, and none of its values, as a first hidden state has."""
    params = {"W": rand(4, 3), "b": rand(3)}
    x, y = rand(6, 4), rand(6, 3)
    program = fxkfac.trace(lambda p, x: (x @ p["W"] + p["b"]) * 2 + make(p["b"]), x, params)
    assert [use.parameters for use in program.uses] == [("W",), ("b",)]
    assert max(fxkfac.check(program, MSE, (x, y)).values()) < 1e-14


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_hidden_state_that_is_made_like_a_weight(kind):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(3, 7)
            self.cells = kind(4, 3, batch_first=True)

        def forward(self, tokens):
            h = next(self.parameters()).new_zeros(1, len(tokens), 3)
            state = (h, h) if kind is nn.LSTM else h
            return self.head(self.cells(self.table(tokens), state)[0]).movedim(-1, 1)

    model, tokens = seeded(Language), torch.arange(20).view(5, 4) % 7
    program = fxkfac.trace(model, tokens)
    assert not program.tapped.coupled
    loss, data = nn.CrossEntropyLoss(), (tokens, tokens.flip(1))
    assert max(fxkfac.check(program, loss, data).values()) < 1e-12
    block = fxkfac.kfac(program, loss, data)["head.weight"]
    split = [tuple(t[part] for t in data) for part in (slice(1), slice(1, None))]
    parts = fxkfac.kfac(program, loss, split)
    close(parts["head.weight"].dense(), block.dense())


ONE_BY_ONE = {
    "mv": lambda p, x: torch.stack([torch.mv(p["W"].T, row) for row in x]) + p["b"],
    "matmul": lambda p, x: torch.stack([row @ p["W"] for row in x]) + p["b"],
    "with the bias": lambda p, x: torch.stack([row @ p["W"] + p["b"] for row in x]),
    "put together": lambda p, x: torch.cat([x[k : k + 1] @ p["W"] for k in range(6)]) + p["b"],
}


@pytest.mark.parametrize("model", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_a_loop_over_the_data(model):
    """Each op has one row, and no axis of rows; a bias that joins several of them is by itself."""
    params = {"W": rand(4, 3), "b": rand(3)}
    x, loss, y = rand(6, 4), nn.CrossEntropyLoss(), torch.arange(6) % 3
    program = fxkfac.trace(model, x, params)
    assert max(fxkfac.check(program, loss, (x, y)).values()) < 1e-14
    expected = fxkfac.kfac(
        fxkfac.trace(lambda p, x: x @ p["W"] + p["b"], x, params), loss, (x, y)
    ).dense("W")
    close(fxkfac.kfac(program, loss, (x, y)).dense("W"), expected)


def test_a_model_of_vectors_is_exact_for_its_one_datum():
    params = {"V": rand(5, 4), "W": rand(5, 3)}
    x, loss, y = rand(1, 4), nn.CrossEntropyLoss(), torch.tensor([1])

    def model(p, x):
        return (torch.tanh(p["V"] @ x.squeeze(0)) @ p["W"]).unsqueeze(0)

    program = fxkfac.trace(model, x, params)
    assert "–" in str(program)  # no axis of a vector holds the data
    for sharing in ("expand", "reduce"):
        factors = fxkfac.kfac(program, loss, (x, y), sharing=sharing)
        for name in params:
            expected = fxkfac.exact.ggn(model, loss, (x, y), name, params=params)
            close(factors[name].dense(), expected)
    corrected = fxkfac.ekfac(program, loss, (x, y), factors)
    close(corrected["W"].dense(), factors["W"].dense())
