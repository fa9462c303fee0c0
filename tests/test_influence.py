"""Scores equal those of dense gradients and matrices, datum by datum and pair by pair."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from drawn import rand, seeded
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from zoo import ZOO

import fxkfac
from fxkfac import errors
from fxkfac.attribution import solve
from fxkfac.graph.flat import FlatModel
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.linalg import rows

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


# Models of every kind of term: views, groups, tied and repeated uses, tokens, exact blocks.
CHOSEN = (
    "tied_autoencoder",
    "called_twice",
    "layer_norm",
    "einsum_heads",
    "bmm_experts",
    "different_ranks",
    "biases_only",
    "unused_parameter",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_models_of_the_zoo(name):
    entry = ZOO[name]
    model, params = entry.build()
    program = entry.trace(model, params, 4)
    n = N_TRAIN + N_TEST
    data = entry.data(n)
    train, test = entry.take(data, range(N_TRAIN)), entry.take(data, range(N_TRAIN, n))
    factors = fxkfac.kfac(program, entry.loss, train)
    found = fxkfac.influence(program, entry.loss, factors, train, test, DAMPING)
    assert_scores(found, expected_scores(program, entry.loss, factors, train, test))


class Embedded(nn.Module):
    """Tokens and positions, a mixing over time, and a head for every place."""

    def __init__(self, tied):
        super().__init__()
        self.token, self.position = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4)
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids):
        h = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        h = h + self.inside(h).tanh().cumsum(1)
        return self.head(h).transpose(1, 2)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, groups=1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "cnn": cnn,
    "embedding": lambda: Embedded(tied=False),
    "tied": lambda: Embedded(tied=True),
}
INPUTS = {"mlp": (4,), "cnn": (1, 6, 6)}


def data_of(kind, n, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind in INPUTS:
        x = torch.randn(n, *INPUTS[kind], dtype=F64, generator=generator)
        return x, torch.randint(3, (n,), generator=generator)
    ids, labels = torch.randint(7, (2, n, 5), generator=generator)
    return ids, labels.masked_fill(ids == 0, -100)


class Case:
    """A model, its data and its program."""

    def __init__(self, kind):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = MODELS[kind]().double()
        self.train, self.test = data_of(kind, N_TRAIN, 1), data_of(kind, N_TEST, 2)
        self.program = fxkfac.trace(self.model, self.train[0][:4])

    def factors(self, **options):
        return fxkfac.kfac(self.program, CE, self.train, **options)

    def scores(self, factors, train=None, test=None, damping=DAMPING, **options):
        train, test = train or self.train, test or self.test
        return fxkfac.influence(self.program, CE, factors, train, test, damping, **options)

    def expected(self, factors, damping=DAMPING):
        """By `vmap(grad)` of the loss with reduction="sum"."""

        def own_loss(params, x, y):
            f = functional_call(self.model, params, (x.unsqueeze(0),))
            return nn.functional.cross_entropy(f, y.unsqueeze(0), reduction="sum")

        params = {n: p.detach() for n, p in self.model.named_parameters() if n in factors.shapes}
        G, H = (
            self._flat(vmap(grad(own_loss), (None, 0, 0))(params, *d), factors)
            for d in (self.train, self.test)
        )
        C = factors.dense(*factors.shapes)
        return -G @ torch.linalg.solve(C + damping * torch.eye(len(C), dtype=F64), H.mT)

    def _flat(self, gradients, factors):
        return torch.cat([gradients[n].flatten(1) for n in factors.shapes], 1)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def mlp():
    return Case("mlp")


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_scores_are_those_of_dense_gradients(case, separate, sharing):
    factors = case.factors(separate_weight_and_bias=separate, sharing=sharing)
    assert_scores(case.scores(factors), case.expected(factors))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "embedding"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_corrected_eigenvalues(kind, sharing):
    case = Case(kind)
    factors = fxkfac.ekfac(case.program, CE, case.train, case.factors(sharing=sharing))
    assert_scores(case.scores(factors), case.expected(factors))


@pytest.mark.parametrize("memory", [1, 3000, 2**30])
def test_batches_and_little_memory_change_nothing(case, memory):
    factors = case.factors()
    train, test = ([(x[:2], y[:2]), (x[2:], y[2:])] for x, y in (case.train, case.test))
    found = case.scores(factors, train, test, memory=memory)
    assert_scores(found, case.expected(factors))


def test_one_test_datum_meets_the_rows_one_by_one(case):
    factors = case.factors()
    x, y = case.test
    found = case.scores(factors, test=(x[:1], y[:1]))
    assert_scores(found, case.expected(factors)[:, :1])


def test_chunks_of_one_datum(case, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST_CHUNK", 1)
    factors = case.factors()
    assert_scores(case.scores(factors), case.expected(factors))


class LongOnly(nn.Module):
    """A scale that only long sequences meet."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((x * self.scale if x.shape[1] > 3 else x).tanh()).mean(1)


@pytest.mark.parametrize("lengths", [(5, 2), (2, 5)])
def test_a_scale_that_some_test_data_do_not_use(lengths):
    torch.manual_seed(0)
    model = LongOnly().double()
    train, *test = ((torch.randn(4, T, 4).double(), torch.randint(3, (4,))) for T in (5, *lengths))
    program = fxkfac.trace(model, train[0])
    factors = fxkfac.kfac(program, CE, train)
    found = fxkfac.influence(program, CE, factors, train, test, DAMPING)

    def gradients(x, y):
        params = dict(model.named_parameters())
        return vmap(
            grad(lambda p, x, y: CE(functional_call(model, p, (x[None],)), y[None])), (None, 0, 0)
        )(params, x, y)

    def flat(data):
        parts = [gradients(*one) for one in data]
        return torch.cat([torch.cat([p[n].flatten(1) for n in factors.shapes], 1) for p in parts])

    C = factors.dense()
    inverse = torch.linalg.inv(C + DAMPING * torch.eye(len(C)).double())
    assert_scores(found, -flat([train]) @ inverse @ flat(test).mT)


def test_reduction_is_the_factors_alone(mlp):
    factors = mlp.factors()
    loss = nn.CrossEntropyLoss(reduction="sum")
    found = fxkfac.influence(mlp.program, loss, factors, mlp.train, mlp.test, DAMPING)
    assert torch.equal(found, mlp.scores(factors))


def test_other_parameters_and_nothing_changed(mlp):
    params = {name: 2 * p.detach() for name, p in mlp.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in mlp.model.named_parameters()}
    random = torch.get_rng_state()
    factors = mlp.factors(params=params)
    found = mlp.scores(factors, params=params)
    other = copy.deepcopy(mlp.model)
    other.load_state_dict(params)
    program = fxkfac.trace(other, mlp.train[0])
    again = fxkfac.kfac(program, CE, mlp.train)
    expected = fxkfac.influence(program, CE, again, mlp.train, mlp.test, DAMPING)
    assert_scores(found, expected)
    assert torch.equal(random, torch.get_rng_state())
    for name, p in mlp.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_a_datum_that_helps_itself(mlp):
    """On itself, every score is a negative square."""
    scores = mlp.scores(mlp.factors(), test=mlp.train)
    torch.testing.assert_close(scores, scores.mT)
    assert (scores.diagonal() < 0).all()


def test_leaving_out_is_the_score_over_what_the_mean_divides_by():
    """MSE's divides by the outputs, too; with weight decay the minimum has a formula."""
    N, d_out = 200, 4
    x, y = rand(N, 3), rand(N, d_out, seed=1)

    def minimum(weights):
        each = 2 / (N * d_out) * (x * weights.unsqueeze(1)).mT
        return torch.linalg.solve(each @ x + DAMPING * torch.eye(3, dtype=F64), each @ y)

    weights = torch.ones(N, dtype=F64)
    whole = minimum(weights)
    weights[7] = 0.0
    change = (x[:5] @ minimum(weights) - y[:5]).square() - (x[:5] @ whole - y[:5]).square()

    def model(params, x):
        return x @ params["W"]

    program = fxkfac.trace(model, x, {"W": whole})
    factors = fxkfac.kfac(program, MSE, (x, y))
    scores = fxkfac.influence(program, MSE, factors, (x, y), (x[:5], y[:5]), DAMPING)
    torch.testing.assert_close(-scores[7] / (N * d_out), change.sum(1), rtol=0.05, atol=1e-4)


def test_what_is_skipped_has_no_part(mlp):
    program = fxkfac.trace(mlp.model, mlp.train[0], structure={"0.*": "skip"})
    factors = fxkfac.kfac(program, CE, mlp.train)
    assert set(factors.shapes) == {"2.weight", "2.bias"}
    found = fxkfac.influence(program, CE, factors, mlp.train, mlp.test, DAMPING)
    assert_scores(found, expected_scores(program, CE, factors, mlp.train, mlp.test))


# --- by tokens ---


def expected_by_tokens(case, factors):
    """(n_train, tokens, n_test): autograd of one token's loss after the other."""
    names = list(factors.shapes)
    params = {n: p for n, p in case.model.named_parameters() if n in names}
    (x, y), rows = case.train, []
    for i in range(len(x)):
        prediction = case.model(x[i : i + 1])
        each = nn.functional.cross_entropy(prediction, y[i : i + 1], reduction="none").flatten()
        for loss in each:
            gradients = torch.autograd.grad(
                loss, list(params.values()), retain_graph=True, materialize_grads=True
            )
            of = dict(zip(params, gradients, strict=True))
            rows.append(torch.cat([of[n].flatten() for n in names]))
    G = torch.stack(rows)
    H = own_gradients(case.program, CE, case.test, names)
    C = factors.dense(*names)
    scores = -G @ torch.linalg.solve(C + DAMPING * torch.eye(len(C), dtype=F64), H.mT)
    return scores.unflatten(0, (len(x), -1))


def by_tokens(case, factors, train, **options):
    return fxkfac.token_influence(case.program, CE, factors, train, case.test, DAMPING, **options)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_scores_of_tokens_are_those_of_dense_gradients(case, sharing):
    factors = case.factors(sharing=sharing)
    found = by_tokens(case, factors, case.train)
    assert_scores(found, expected_by_tokens(case, factors))
    assert_scores(found.sum(1), case.scores(factors))  # a sequence is all of its tokens
    if case.train[1].ndim == 2:
        assert found.shape[1] == 5
        ignored = case.train[1] == -100
        assert ignored.any()
        assert (found[ignored] == 0).all()


@pytest.mark.parametrize("memory", [1, 2**30])
def test_tokens_in_batches_with_corrected_eigenvalues(memory):
    case = Case("embedding")
    factors = fxkfac.ekfac(case.program, CE, case.train, case.factors())
    x, y = case.train
    found = by_tokens(case, factors, [(x[:2], y[:2]), (x[2:], y[2:])], memory=memory)
    assert_scores(found, expected_by_tokens(case, factors))


def test_sequences_of_two_lengths_are_refused_by_tokens():
    case = Case("embedding")
    x, y = case.train
    with pytest.raises(errors.DataError, match=r"batch 1 of train has 4 tokens .* before 5"):
        by_tokens(case, case.factors(), [(x, y), (x[:, :4], y[:, :4])])


# --- what is refused ---


def test_factors_that_are_none(mlp):
    with pytest.raises(errors.OptionError, match="factors is of type dict; expected"):
        mlp.scores({})


def test_factors_of_another_program(mlp):
    other = Case("cnn").factors()
    with pytest.raises(errors.MergeError, match="differ in the parameters"):
        mlp.scores(other)


@pytest.mark.parametrize(("damping", "message"), [(-1.0, "damping=-1.0"), (0.0, "singular")])
def test_damping(mlp, damping, message):
    with pytest.raises(errors.OptionError, match=message):
        mlp.scores(mlp.factors(), damping=damping)


def test_memory(mlp):
    torch.testing.assert_close(
        mlp.scores(mlp.factors(), memory=0), mlp.scores(mlp.factors()), rtol=1e-10, atol=1e-12
    )
    for memory in (-1, 0.5, True):
        with pytest.raises(errors.OptionError, match=r"memory=.*expected a whole number of bytes"):
            mlp.scores(mlp.factors(), memory=memory)


def test_data_in_an_order_that_nobody_knows(mlp):
    loader = DataLoader(TensorDataset(*mlp.train), batch_size=2, shuffle=True)
    with pytest.raises(errors.DataError, match="train is a DataLoader that shuffles"):
        mlp.scores(mlp.factors(), train=loader)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(range(N_TRAIN))},
        {"batch_sampler": BatchSampler(RandomSampler(range(N_TRAIN)), 2, False)},
    ],
    ids=["sampler", "batch_sampler"],
)
def test_samplers_that_shuffle(mlp, options):
    loader = DataLoader(TensorDataset(*mlp.train), **options)
    with pytest.raises(errors.DataError, match="train is a DataLoader that shuffles"):
        mlp.scores(mlp.factors(), train=loader)


def test_gradients_without_numbers():
    """A root has no slope at zero, where the prediction is finite all the same."""
    model = seeded(lambda: nn.Linear(4, 3, bias=False))
    net = nn.Sequential(model, Length())
    x, y = rand(4, 4), rand(4, 1)
    program = fxkfac.trace(net, x)
    factors = fxkfac.kfac(program, MSE, (x, y))
    with pytest.raises(errors.NonFiniteError, match="batch 0 of test: a gradient holds NaN"):
        fxkfac.influence(program, MSE, factors, (x, y), (torch.zeros_like(x), y), DAMPING)


class Length(nn.Module):
    def forward(self, h):
        return h.square().sum(1, keepdim=True).sqrt()


def test_an_iterator_that_is_used_up(mlp):
    test = [(x.unsqueeze(0), y.unsqueeze(0)) for x, y in zip(*mlp.test, strict=True)]
    with pytest.raises(errors.DataError, match="iterator used up"):
        mlp.scores(mlp.factors(), train=iter([mlp.train]), test=test, memory=1)


def test_no_data_and_wrong_targets(mlp):
    with pytest.raises(errors.DataError, match="no batch"):
        mlp.scores(mlp.factors(), test=iter([]))
    x, y = mlp.train
    with pytest.raises(errors.DataError, match="NaN"):
        mlp.scores(mlp.factors(), train=(x * float("nan"), y))
    with pytest.raises(errors.DataError):
        mlp.scores(mlp.factors(), train=(x, y[:2]))


def test_coupled_data():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = data_of("mlp", 6, 1)
    program = fxkfac.trace(model, x, structure={"1.*": "skip"})
    factors = fxkfac.kfac(program, CE, (x, y))
    with pytest.raises(errors.BatchAxisError, match="depends on the others'"):
        fxkfac.influence(program, CE, factors, (x, y), (x, y), DAMPING)


def test_blocks_without_taps(mlp):
    program = fxkfac.trace(mlp.model, mlp.train[0], structure={"0.bias": "identity"})
    factors = fxkfac.kfac(program, CE, mlp.train)
    with pytest.raises(errors.UnsupportedUse, match=r"0\.bias: no tap"):
        fxkfac.influence(program, CE, factors, mlp.train, mlp.test, DAMPING)


def test_overlapping_products_that_are_too_large(monkeypatch):
    monkeypatch.setattr(solve, "LARGEST_DENSE", 10)
    tied = Case("tied")
    with pytest.raises(errors.UnsupportedUse, match=r"token\.weight.*different orientations"):
        tied.scores(tied.factors())
