"""Vectors that go back together give the factors of vectors that go back one by one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from drawn import classes, rand
from torch import nn

import fxkfac
from fxkfac.curvature import diagonal, receive, together
from fxkfac.errors import OptionError

F64 = torch.float64
CE = nn.CrossEntropyLoss()
SIZES = [0, 1, 7, 2**10, 2**40]


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def close(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name].dense(), expected[name].dense(), msg=name)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GELU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(48, 5),
    )


class Shared(nn.Module):
    """Twice the same layer, a table of positions and a class token by hand."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(4, 4), nn.Linear(4, 5)
        self.position, self.scale = nn.Parameter(rand(3, 4)), nn.Parameter(rand(4))

    def forward(self, x):
        h = (self.inside(x) + self.position).tanh() * self.scale
        return self.out(self.inside(h).relu()).mean(1)


MODELS = {"mlp": (mlp, (7, 4)), "cnn": (cnn, (3, 2, 7, 7)), "shared": (Shared, (6, 3, 4))}


@pytest.fixture(params=MODELS)
def problem(request):
    make, shape = MODELS[request.param]
    model, x = seeded(make), rand(*shape)
    y = torch.randint(5, (len(x),), generator=torch.Generator().manual_seed(1))
    return model, (x, y)


def sizes_seen(monkeypatch):
    """How many vectors went back together, each time."""
    seen, send = [], together.send_back
    monkeypatch.setattr(
        receive,
        "send_back",
        lambda f, root, v, retain: (seen.append(len(v)), send(f, root, v, retain)),
    )
    return seen


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("fisher", "samples"), [("type-2", 1), ("type-1", 1), ("mc", 7)])
def test_the_same_factors_for_any_memory(problem, sharing, fisher, samples, monkeypatch):
    model, data = problem
    program = fxkfac.trace(model, data[0])
    seen = sizes_seen(monkeypatch)

    def factors(memory):
        generator = torch.Generator().manual_seed(0)
        how = {"fisher": fisher, "mc_samples": samples, "sharing": sharing, "memory": memory}
        return fxkfac.kfac(program, CE, data, generator=generator, **how)

    expected = factors(0)
    vectors = len(seen)
    assert set(seen) == {1}
    for memory in SIZES[1:]:
        close(factors(memory), expected)
    close(factors(None), expected)
    assert max(seen) == vectors


def test_exact_blocks(problem):
    model, data = problem
    for structure in ("diagonal", "dense"):
        names = {name: structure for name, _ in model.named_parameters()}
        exact = fxkfac.trace(model, data[0], structure=names)
        close(*(fxkfac.kfac(exact, CE, data, memory=m) for m in (2**40, 0)))


def test_padding_that_gradients_tell():
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 5)))
    loss = nn.CrossEntropyLoss(ignore_index=-1)

    x = torch.arange(12).view(3, 4) % 9
    y = torch.tensor([[1, 2, -1, -1], [0, 1, 2, 3], [4, -1, -1, -1]])

    def by_token(params, x):
        return torch.func.functional_call(model, params, x).mT

    program = fxkfac.trace(by_token, x, dict(model.named_parameters()))
    close(*(fxkfac.kfac(program, loss, (x, y), memory=m) for m in (2**40, 0)))


class Alone(torch.autograd.Function):
    """A derivative of its own, which reads numbers in Python: of one gradient at a time."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 3 * g if float(g.abs().sum()) >= 0 else g


def test_operations_that_take_one_vector_at_a_time(monkeypatch):
    model = seeded(mlp)

    def f(params, x):
        h = (x @ params["0.weight"].T + params["0.bias"]).tanh()
        return Alone.apply(h) @ params["2.weight"].T

    x, y = rand(7, 4), torch.arange(7) % 5
    program = fxkfac.trace(f, x, dict(model.named_parameters()))
    seen = sizes_seen(monkeypatch)
    close(*(fxkfac.kfac(program, CE, (x, y), memory=m) for m in (2**40, 0)))
    assert set(seen) == {1}


def test_labels_do_not_depend_on_it(problem):
    model, data = problem
    program = fxkfac.trace(model, data[0])
    close(
        *(
            fxkfac.step(
                program,
                CE,
                data,
                mc_samples=3,
                memory=m,
                generator=torch.Generator().manual_seed(2),
            ).factors
            for m in (2**40, 0)
        )
    )


def test_what_is_no_number_of_bytes():
    x = rand(4, 3)
    program = fxkfac.trace(nn.Linear(3, 2).double(), x)
    for memory in (-1, 1.5, True, "1GB"):
        with pytest.raises(OptionError, match="number of bytes"):
            fxkfac.kfac(program, CE, (x, classes(4, C=2)), memory=memory)


def test_chunks():
    assert list(together.chunks(range(5), 2)) == [([0, 1], False), ([2, 3], False), ([4], True)]
    assert list(together.chunks([], 2)) == []


def test_more_go_together_where_a_call_costs_more_than_memory():
    assert together.memory_on(torch.device("cpu")) < together.memory_on(torch.device("cuda"))


def test_a_few_go_one_by_one(monkeypatch):
    """A pair takes longer than two, and three as long as that."""
    program = fxkfac.trace(seeded(mlp), rand(7, 4))
    data, one = (rand(7, 4), torch.arange(7) % 5), 7 * (6 + 5) * 8
    seen = sizes_seen(monkeypatch)
    fxkfac.kfac(program, CE, data, memory=3 * one)
    fxkfac.kfac(program, CE, data, memory=4 * one)
    assert seen == [1, 1, 1, 1, 4]


@pytest.mark.parametrize("alone", [True, False])
def test_who_listens_hears_the_gradient_and_keeps_nothing_alive(alone):
    root, heard = torch.zeros((), requires_grad=True), []
    first = together.listened(root, rand(2, 3), heard.append, alone)
    parts = (first * rand(3, seed=1)).split([1, 2], dim=1)  # one node of two outputs
    second = together.listened(root, parts[1], heard.append, alone)
    prediction, vector = second.exp(), rand(2, 2, seed=2)
    expected = torch.autograd.grad(prediction, [second, first], vector, retain_graph=True)
    heard.clear()
    together.send_back(prediction, root, vector.unsqueeze(0), retain_graph=False)
    torch.testing.assert_close(heard, list(expected))
    alive = [weakref.ref(t) for t in (first, second, prediction)]
    gc.disable()
    try:
        del first, second, parts, prediction
        assert [t() for t in alive] == [None] * 3
    finally:
        gc.enable()


class Distances(nn.Module):
    """PyTorch 2.13's rule for vmap of cdist's derivative is wrong, and says nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(5, 2)
        self.centres = torch.randn(5, 3)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(self.a(x), self.b(self.centres.to(x)))))


@pytest.mark.parametrize("fisher", ["type-2", "type-1"])
@pytest.mark.parametrize("kind", ["bias", "dense"])
def test_a_rule_that_is_wrong_without_a_word_is_found(fisher, kind):
    torch.manual_seed(0)
    model, x, y = Distances().double(), torch.randn(3, 3).double(), torch.tensor([0, 1, 1])
    loss = nn.CrossEntropyLoss()
    structure = {"a.weight": "dense"} if kind == "dense" else {}
    name = "a.weight" if kind == "dense" else "a.bias"
    program = fxkfac.trace(model, x, ["a.*", "head.*"], structure=structure)
    factors = fxkfac.kfac(program, loss, (x, y), fisher=fisher, separate_weight_and_bias=True)
    expected = fxkfac.exact.ggn(model, loss, (x, y), [name])
    torch.testing.assert_close(factors[name].dense(), expected, rtol=1e-10, atol=1e-14)


class Solved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        return torch.linalg.solve(torch.diag_embed(self.inside(x).exp()), self.b).sum(1)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))
        self.register_buffer("S", torch.eye(4).to_sparse())

    def forward(self, x):
        return self.inside(x).tanh() @ torch.sparse.mm(self.S, self.b)


@pytest.mark.parametrize("make", [Solved, Sparse])
@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_exact_blocks_where_an_op_takes_one_datum_at_a_time(make, kind):
    model, data = seeded(make), (rand(5, 3), rand(5, 2))
    program = fxkfac.trace(model, data[0], unsupported=kind)
    expected = fxkfac.exact.ggn(model, nn.MSELoss(), data, "b")
    found = fxkfac.kfac(program, nn.MSELoss(), data).dense("b")
    if kind == "diagonal":
        expected = expected.diagonal().diag()
    torch.testing.assert_close(found, expected)


def test_exact_blocks_by_a_wrong_rule_are_made_one_by_one(monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return x * self.w.sin()

    def wrong(function, in_dims, **how):  # for gradients, as a wrong rule would be
        right = torch.func.vmap(function, in_dims, **how)

        def call(*given):
            found = right(*given)
            return {n: 1.5 * g for n, g in found.items()} if isinstance(found, dict) else found

        return call

    model, data = seeded(Scaled), (rand(3, 4), rand(3, 4))
    program = fxkfac.trace(model, data[0], unsupported="dense")
    monkeypatch.setattr(diagonal, "vmap", wrong)
    expected = fxkfac.exact.ggn(model, nn.MSELoss(), data, "w")
    for _ in range(2):
        found = fxkfac.kfac(program, nn.MSELoss(), data).dense("w")
        torch.testing.assert_close(found, expected)


def test_roundings_of_half_precision_are_no_wrong_rule(monkeypatch):
    model, x = seeded(mlp).bfloat16(), rand(9, 4).bfloat16()
    program, seen = fxkfac.trace(model, x), sizes_seen(monkeypatch)
    fxkfac.kfac(program, CE, (x, classes(9, C=5)))
    assert seen == [4]  # of five classes, all together


def test_a_number_without_axes_has_a_gradient_of_every_vector():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(5)), nn.Linear(1, 2)

        def forward(self, x):
            return self.head(torch.tanh(x.squeeze() @ self.w).reshape(-1, 1))

    model, data = seeded(Inner), (rand(1, 5), rand(1, 2))
    program = fxkfac.trace(model, rand(4, 5))
    expected = fxkfac.exact.ggn(model, nn.MSELoss(), data, "w")
    torch.testing.assert_close(fxkfac.kfac(program, nn.MSELoss(), data).dense("w"), expected)
