"""Compiled forward and backward passes come to what autograd comes to, step by step."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from benchmarks.models import GPT
from devices import digits_like, network
from drawn import classes, generator, rand, seeded
from quick import quick
from torch import nn
from zoo import ZOO

import fxkfac
from fxkfac.curvature import backends, moments
from fxkfac.curvature.inductor import code, inside, whole
from fxkfac.curvature.inductor.inside import is_fixed, is_open
from fxkfac.curvature.inductor.traced import Kind, traced
from fxkfac.curvature.padding import Padding
from fxkfac.errors import DataError, FxkfacError, OptionError

has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="inductor needs a C++ compiler")

CE = nn.CrossEntropyLoss()
FLAVOURS = (
    {"fisher": "mc"},
    {"fisher": "type-2", "sharing": "reduce"},
    {"fisher": "empirical", "separate_weight_and_bias": True},
)


def assert_close(found, expected, digits):
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=digits * scale)


def assert_same(a, b, digits):
    assert list(a) == list(b)
    for name, block in a.items():
        if not isinstance(block, fxkfac.Block):
            assert_close(block.dense(), b[name].dense(), digits)
            continue
        for mine, other in zip(block.terms, b[name].terms, strict=True):
            assert_close(mine.A, other.A, digits)
            assert_close(mine.B, other.B, digits)


def compare(program, loss, data, digits, flavours=FLAVOURS):
    """Both backends from the same random state, which dropout and labels are drawn from."""
    for options in flavours:
        found, expected = (
            fxkfac.kfac(program, loss, data, generator=generator(), backend=b, **options)
            for b in ("inductor", "eager")
        )
        assert_same(found, expected, digits)
    found, expected = (
        fxkfac.step(program, loss, data, generator=generator(), backend=b)
        for b in ("inductor", "eager")
    )
    assert_same(found.factors, expected.factors, digits)
    assert_close(found.loss, expected.loss, digits)
    for name, g in expected.gradients.items():
        assert_close(found.gradients[name], g, digits)


SOME = {"dropout_train", "batch_norm_train", "layer_norm", "unused_parameter", "lora", "rms_norm"}
SOME |= {"shared_storage", "embedding_padding", "attention_weights", "conv_groups"}
SOME |= {"conv_circular", "transposed_conv_2d", "custom_function", "switched"}
LACKING = {"packed_lstm", "packed_gru", "packed_projected", "expert_choice", "loop_over_data"}
RIGHT = [n for n, e in ZOO.items() if e.expected == "right" and n not in LACKING]


@pytest.mark.parametrize("name", quick(RIGHT, sorted(SOME)[::4].__contains__))
def test_a_graph_that_is_cut_at_the_prediction(name, monkeypatch):
    """The parts themselves, run as they are: compiling all of them takes too long."""
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)
    entry = ZOO[name]
    program = entry.trace(*entry.build(), 4)
    flavours = [o for o in FLAVOURS if entry.reduce or "sharing" not in o]
    compare(program, entry.loss, [entry.data(4), entry.data(3)], 1e-10, flavours)


@pytest.mark.parametrize("enough", [1, moments.ENOUGH])
@pytest.mark.parametrize(
    "name", quick(RIGHT, {"einsum_implicit", *sorted(SOME)[1::4]}.__contains__)
)
def test_products_may_be_opaque_or_outside(name, enough, monkeypatch):
    """As they are for wide layers on a CPU, of one vector and of several; the zoo is narrow.

    Few rows leave the code as they are.
    """
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)
    monkeypatch.setattr(moments, "ENOUGH", enough)
    for module in (inside, backends):
        monkeypatch.setattr(module, "is_open", lambda schedule, device: False)
    entry = ZOO[name]
    program = entry.trace(*entry.build(), 4)
    flavours = [o for o in FLAVOURS if entry.reduce or "sharing" not in o]
    compare(program, entry.loss, [entry.data(4), entry.data(3)], 1e-10, flavours)


def test_a_result_does_not_depend_on_the_labels_that_were_seen_first(monkeypatch):
    """With class weights these say by what a sum is multiplied in the end."""
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())
    x, first, second = rand(600, 200), torch.zeros(600).long(), torch.arange(600) % 3
    program, fresh = (fxkfac.trace(seeded(lambda: nn.Linear(200, 3)), x) for _ in range(2))
    how = {"fisher": "empirical", "backend": "inductor"}
    fxkfac.kfac(program, loss, (x, first), **how)
    found, expected = (fxkfac.kfac(p, loss, (x, second), **how) for p in (program, fresh))
    assert torch.equal(found["weight"].A, expected["weight"].A)


def test_what_is_kept_has_values_for_others(monkeypatch):
    """Tables for images of one size, which nothing else here has, are made while one records."""
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)

    def make():
        return nn.Sequential(nn.Conv2d(20, 2, 3, padding=1), nn.Tanh(), nn.Flatten())

    x, y = rand(4, 20, 11, 13), rand(4, 286)
    program = fxkfac.trace(seeded(make), x)
    rows = nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)
    for backend in ("inductor", "eager"):
        found = fxkfac.kfac(program, nn.MSELoss(reduction="sum"), (x, y), backend=backend)
        A = found["0.weight"].A[:-1, :-1]
        assert_close(A, 2 * rows.mT @ rows, 1e-10)


class Branches(nn.Module):
    """Two layers at whose outputs the same gradient arrives."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head((self.left(x[:, :4]) + self.right(x[:, 4:])).tanh())


def test_equal_sums_may_come_as_one_tensor(monkeypatch):
    def merged(module, given, options):
        """A compiler that makes one tensor of equal results."""

        def run(*arguments):
            kept = []
            for t in module(*arguments):
                kept.append(next((k for k in kept if k.shape == t.shape and k.equal(t)), t))
            return kept

        return run

    monkeypatch.setattr(code, "_compiled", merged)
    x = rand(6, 9)
    program = fxkfac.trace(seeded(Branches), x)
    compare(program, CE, [(x[:4], classes(4)), (x[4:], classes(2))], 1e-10)


def test_code_that_is_replayed_writes_over_what_it_returned(monkeypatch):
    """As a CUDA graph does: sums of earlier batches are copies by then."""

    def replayed(module, given, options):
        kept = []

        def run(*arguments):
            found = module(*arguments)
            if not kept:
                kept.extend(t.clone() for t in found)
            for mine, t in zip(kept, found, strict=True):
                mine.copy_(t)
            return kept

        return run

    def code_of(*arguments, replays):
        return code.code_of(*arguments, replays=True)

    monkeypatch.setattr(code, "_compiled", replayed)
    monkeypatch.setattr(whole, "code_of", code_of)
    x = rand(12, 9)
    program = fxkfac.trace(seeded(Branches), x[:4])
    data = [(part, classes(4, seed=k)) for k, part in enumerate(x.split(4))]
    compare(program, CE, data, 1e-10, [{"fisher": "mc"}, {"fisher": "empirical"}])


LOSSES = {
    "cross-entropy": (CE, classes(6, C=3)),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), classes(6, C=3)),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0])), classes(6, C=3)),
    "soft": (CE, rand(6, 3).softmax(1)),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), (rand(6, 3) > 0).double()),
    "squares": (nn.MSELoss(), rand(6, 3)),
}


@pytest.fixture
def parts_made(monkeypatch):
    """How many parts have run; none is compiled."""
    made = []
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: made.append(1) or module)
    return made


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)).train()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fisher", quick(["mc", "empirical"], "mc".__eq__))
def test_a_batch_as_one_graph(name, fisher, parts_made):
    """Labels and dropout are drawn as without; loss and gradients are of the same draw."""
    loss, y = LOSSES[name]
    program, x = fxkfac.trace(seeded(net), rand(6, 5)), rand(6, 5)
    compare(program, loss, (x, y), 1e-12, [{"fisher": fisher}])
    assert len(parts_made) == 2  # of the factors, and of the step


def test_another_loss_is_another_graph(parts_made):
    program, x = fxkfac.trace(seeded(net), rand(6, 5)), rand(6, 5)
    for loss, y in LOSSES.values():
        compare(program, loss, (x, y), 1e-12, [{"fisher": "mc"}])
    assert len(parts_made) == 2 * len(LOSSES)


class OfMine(fxkfac.Likelihood):
    """Whose labels and checks may do what they like with a prediction."""

    def distribution(self, prediction):
        return torch.distributions.Categorical(logits=prediction)


@pytest.mark.parametrize("loss", [CE, OfMine()], ids=["two labels", "a likelihood of one's own"])
def test_two_calls_where_one_is_not_enough(loss, parts_made):
    program, x = fxkfac.trace(seeded(net), rand(6, 5)), rand(6, 5)
    samples = 2 if loss is CE else 1
    options = [{"fisher": "mc", "mc_samples": samples}]
    compare(program, loss, (x, classes(6, C=3)), 1e-12, options)
    assert len(parts_made) > 2


def test_targets_are_looked_at_before_the_code_runs(parts_made):
    program, x = fxkfac.trace(seeded(net), rand(6, 5)), rand(6, 5)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(DataError, match="no class index"):
        fxkfac.kfac(
            program,
            CE,
            (x, classes(6, C=3) + 7),
            None,
            "mc",
            generator=generator,
            backend="inductor",
        )
    assert not parts_made
    assert torch.equal(before, generator.get_state())


def test_where_sums_are_inside():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def sink(width, hold=False, mask=None):
        program = fxkfac.trace(nn.Linear(width, 3).double(), rand(4, width))
        over = fxkfac.Accumulation(program, CE).over
        padding = Padding(mask)
        found = over.sink(over.schedule, padding, torch.tensor([0]))
        found.hold = hold
        return found

    assert is_open(sink(190).schedule, cpu)
    assert not is_open(sink(191).schedule, cpu)  # with the bias, two strips of a triangle
    assert is_open(sink(191).schedule, gpu)
    assert is_fixed(sink(191))
    assert not is_fixed(sink(4, hold=True))
    assert not is_fixed(sink(4, mask=torch.ones(4, 1)))


@needs_compiler
@pytest.mark.slow
def test_linear_layers_dropout_and_batches_of_two_sizes():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3)))
    model, x = model.float(), rand(9, 5).float()
    program = fxkfac.trace(model, x)
    state = torch.get_rng_state()
    compare(program, CE, [(x[:5], classes(5)), (x[5:], classes(4)), (x[:5], classes(5))], 1e-5)
    assert torch.equal(state, torch.get_rng_state())


@needs_compiler
@pytest.mark.slow
def test_convolutions():
    def make():
        first, second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, groups=2)
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(16, 3))

    x = rand(4, 4, 6, 6)
    compare(fxkfac.trace(seeded(make), x), CE, (x, classes(4)), 1e-10)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_norms_behind_a_convolution():
    """Compiled code lays out what a convolution gives in its own way; exact blocks read it."""
    program = fxkfac.trace(network(), digits_like()[0])
    compare(program, CE, digits_like(), 1e-10)


class Wide(nn.Module):
    """Patches and rows that are wider than a strip, and few rows that wait."""

    def __init__(self):
        super().__init__()
        self.conv, self.rows = nn.Conv2d(24, 4, 3, padding=1), nn.Linear(36, 200)
        self.head = nn.Linear(200, 3)

    def forward(self, x):
        return self.head(self.rows(self.conv(x).tanh().flatten(2)).relu().mean(1))


@needs_compiler
def test_wide_layers():
    x = rand(128, 24, 6, 6)
    program, y = fxkfac.trace(seeded(Wide), x), classes(128)
    assert not is_open(fxkfac.Accumulation(program, CE).over.schedule, x.device)
    found, expected = (
        fxkfac.kfac(program, CE, [(x, y), (-x, y)], fisher="mc", generator=generator(), backend=b)
        for b in ("inductor", "eager")
    )
    assert_same(found, expected, 1e-10)


@needs_compiler
def test_a_sum_with_a_factor_behind_a_product():
    """Inductor by itself makes one op of both, and loses the factor."""
    entry = ZOO["bias_from_the_left"]
    compare(entry.trace(*entry.build(), 6), entry.loss, entry.data(6), 1e-10, FLAVOURS[2:])


ROWS = torch.tensor([2, 0])
TINY = torch.tensor([[0], [2], [1], [5]])
WRONG = {  # by inductor alone, forwards or back; of an image and its rows
    "a factor, in bytes": lambda im, x: torch.add(x, torch.arange(24).view(4, 6).byte(), alpha=-1),
    "a factor of a number": lambda im, x: torch.add(x, 2.0, alpha=0.3),
    "a factor, in float32": lambda im, x: torch.add(x, x.float(), alpha=1 / 3),
    "a window over the edge": lambda im, x: F.avg_pool2d(im, 2, ceil_mode=True),
    "in one dimension": lambda im, x: F.avg_pool1d(x, 4, ceil_mode=True),
    "in three": lambda im, x: F.avg_pool3d(im, 2, ceil_mode=True),
    "scales": lambda im, x: F.interpolate(im, scale_factor=1.7),
    "draws": lambda im, x: x * torch.bernoulli(torch.full_like(x, 0.3)),
    "numbers": lambda im, x: x * torch.full_like(x, 0.1).scatter(1, TINY, 0.7),
    "columns": lambda im, x: x.new_zeros(6, 4).index_add(0, torch.arange(6), x.T),
    "put": lambda im, x: torch.put(x.sum().expand(4, 6), ROWS, x[0, :2]),
    "diagonal": lambda im, x: torch.diagonal_scatter(x.sum().expand(4, 6), x[0, :4]),
    "beside zeros": lambda im, x: (x.sum(0).expand(4, 6) + 0 * x).index_add(0, ROWS, x[:2]),
    "beside ones": lambda im, x: (x.sum(0) * torch.ones_like(x)).index_copy(0, ROWS, x[:2]),
}


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_add_columns_where_they_belong(dtype):
    """Inductor by itself writes behind the memory."""

    def added(x):
        return x.new_zeros(24, 4).index_add(0, torch.arange(24), 2 * x.T)

    x = rand(4, 24).to(dtype)
    module, result = traced(added, [Kind.of(x)])
    compiled = code.code_of(module, result, set(module.graph.nodes))
    name = next(n.name for n in module.graph.nodes if n.op == "placeholder")
    for _ in range(20):
        assert torch.equal(code.read(result.name, compiled({name: x})), 2 * x.T)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_what_inductor_gets_wrong_is_kept_from_it():
    def values_and_gradients(*inputs):
        found = {}
        for name, function in WRONG.items():
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = function(*leaves)
            vector = torch.arange(1.0, y.numel() + 1).view_as(y).to(y).sin()
            gradients = torch.autograd.grad(y, leaves, vector, allow_unused=True)
            found[name] = [y.detach(), *(g for g in gradients if g is not None)]
        return found

    inputs = rand(2, 4, 7, 6), rand(4, 6)
    module, results = traced(values_and_gradients, [Kind.of(t) for t in inputs])
    arguments = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    compiled = code.code_of(module, results, set(module.graph.nodes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = compiled(dict(zip(arguments, inputs, strict=True)))
        torch.manual_seed(0)
        expected = values_and_gradients(*inputs)
    for name, tensors in code.read(code.names_of(results), found).items():
        for t, right in zip(tensors, expected[name], strict=True):
            torch.testing.assert_close(t, right, rtol=1e-12, atol=1e-12, msg=name)


@needs_compiler
@pytest.mark.slow
def test_attention_with_padding():
    """Padding that ignored targets show, and that a mask shows."""
    model, tokens, targets = seeded(lambda: GPT(1, 8, 2, 6, 7)), classes(4, 6, C=7), classes(4, 6)
    program, ignoring = fxkfac.trace(model, tokens), targets.clone()
    ignoring[1, 4:] = -100
    compare(program, CE, (tokens, targets), 1e-10)
    compare(program, CE, (tokens, ignoring), 1e-10, FLAVOURS[:1])
    real = torch.arange(6).expand(4, 6) < 5
    options = {"fisher": "empirical", "mask": lambda x, y: real}
    compare(program, CE, (tokens, targets), 1e-10, [options])


@needs_compiler
def test_other_parameters_and_their_layout():
    params = {"W": rand(3, 5)}
    x, loss = rand(4, 5), nn.MSELoss()
    program = fxkfac.trace(lambda p, x: torch.tanh(x @ p["W"].T), x, params)
    for other in ({"W": rand(3, 5, seed=1)}, {"W": rand(5, 3, seed=2).T}):
        found, expected = (
            fxkfac.kfac(program, loss, (x, rand(4, 3)), other, backend=b)
            for b in ("inductor", "eager")
        )
        assert_same(found, expected, 1e-10)


def small():
    x = rand(4, 5)
    return fxkfac.trace(seeded(lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh())), x), x


def test_no_compiler():
    """Inductor looks for one before anything that it compiled before is used."""
    inductor = pytest.importorskip("torch._inductor.config")
    without = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    program, x = small()
    with inductor.patch(without), pytest.raises(FxkfacError, match="C\\+\\+ compiler"):
        fxkfac.kfac(program, CE, (x, classes(4)), backend="inductor")


def test_no_such_backend():
    program, x = small()
    with pytest.raises(OptionError, match="backend='jit'"):
        fxkfac.kfac(program, CE, (x, classes(4)), backend="jit")


def test_what_depends_on_values_is_refused():
    """Lengths of packed sequences are checked whenever the graph runs."""
    entry = ZOO["packed_lstm"]
    program = entry.trace(*entry.build(), 4)
    with pytest.raises(OptionError, match="backend='eager'"):
        fxkfac.kfac(program, entry.loss, entry.data(4), backend="inductor")
