"""An accumulation that was saved goes on as if nothing had been: to the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest
import torch
from drawn import classes, generator, rand, seeded
from torch import nn
from zoo import ZOO

import fxkfac
from fxkfac.curvature.accumulated import Accumulated
from fxkfac.curvature.inductor import code
from fxkfac.errors import DataError, FileError, FxkfacError, MergeError, NonFiniteError, OptionError
from fxkfac.linalg import strip

CE, MSE = nn.CrossEntropyLoss, nn.MSELoss


def assert_same_bits(found, expected):
    assert (found.n, found.count) == (expected.n, expected.count)
    assert list(found) == list(expected)
    for name, products in expected.products.items():
        for mine, theirs in zip(found.products[name], products, strict=True):
            assert torch.equal(mine.A, theirs.A), name
            assert torch.equal(mine.B, theirs.B), name
            assert torch.equal(torch.as_tensor(mine.rows), torch.as_tensor(theirs.rows)), name
    for name, block in expected.exact.items():
        assert torch.equal(found.exact[name], block), name


def in_pieces(program, loss, batches, path, mask=None, every=1, **how):
    """Accumulated with a saving and a resuming after every so many batches."""
    accumulation = fxkfac.Accumulation(program, loss, mask=mask, generator=generator(), **how)
    for number, (x, y) in enumerate(batches):
        if number % every == 0:
            fxkfac.save(accumulation, path)
            del accumulation
            torch.rand(3)  # the global state is of no account
            accumulation = fxkfac.resume(path, program, loss, mask=mask)
        accumulation.add(x, y)
    return accumulation.factors()


def compare(program, loss, batches, path, mask=None, every=1, **how):
    whole = fxkfac.kfac(program, loss, batches, mask=mask, generator=generator(), **how)
    assert_same_bits(in_pieces(program, loss, batches, path, mask, every, **how), whole)
    return whole


MODELS = [
    "sequential", "tied_autoencoder", "embedding_head", "embedding_tied", "conv_groups",
    "bmm_experts", "einsum_groups",
]  # fmt: skip


@pytest.fixture(scope="module")
def zoo():
    made = {}

    def of(name):
        if name not in made:
            entry = ZOO[name]
            made[name] = entry, entry.trace(*entry.build(), 4)
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("fisher", "sharing", "apart"),
    [
        ("type-2", "expand", False),
        ("mc", "expand", True),
        ("mc", "reduce", False),
        ("empirical", "reduce", True),
        ("forward-only", "expand", False),
    ],
)
def test_the_zoo(zoo, tmp_path, name, fisher, sharing, apart):
    entry, program = zoo(name)
    data = entry.data(7)
    batches = [entry.take(data, index) for index in ([0, 1], [2, 3, 4], [5], [6, 0])]
    how = {"fisher": fisher, "sharing": sharing, "separate_weight_and_bias": apart}
    compare(program, entry.loss, batches, tmp_path / "x", **how)


def test_exact_blocks_norms_and_dropout(tmp_path):
    layers = [nn.Linear(4, 5), nn.LayerNorm(5), nn.Dropout(0.4), nn.Linear(5, 3)]
    model, x = seeded(lambda: nn.Sequential(*layers)), rand(12, 4)
    program = fxkfac.trace(model, x, structure={"0.weight": "dense", "3.bias": "identity"})
    batches = [(rand(n, 4, seed=n), classes(n, seed=n)) for n in (5, 3, 7)]
    how = {"fisher": "mc", "mc_samples": 2}
    found = compare(program, CE(), batches, tmp_path / "x", **how)
    assert {type(b) for b in found.values()} == {fxkfac.Block, fxkfac.Diagonal, fxkfac.Dense}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("rows", [(300, 100, 600, 700, 20), (600, 600, 600), (5, 5, 5)])
def test_triangles_and_rows_that_wait(tmp_path, rows, backend, monkeypatch):
    """Of so many inputs one triangle of a sum is kept up, or it is scaled; few rows wait."""
    assert strip(270) < 270
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(270, 3), nn.Tanh(), nn.Linear(3, 300))
    program = fxkfac.trace(model, torch.randn(4, 270))
    batches = [
        (torch.randn(n, 270, generator=generator(n)), torch.randn(n, 300, generator=generator(n)))
        for n in rows
    ]
    how = {"fisher": "mc", "backend": backend}
    compare(program, MSE(), batches, tmp_path / "x", **how)
    accumulation = fxkfac.resume(tmp_path / "x", program, MSE())
    moments = [m for i in accumulation.over.total.inputs for m in i.moments.values()]
    if sum(rows) > 600:
        assert any(m.gram is not None and not m.gram.is_empty for m in moments)
    else:
        assert all(m.waiting and m.gram is None for m in moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions(tmp_path, dtype):
    """Rows that wait lie in memory as they came; images have no rows."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).to(dtype)
    xs = [torch.randn(n, 3, 8, 8, generator=generator(n)).to(dtype) for n in (3, 5, 1, 9)]
    program = fxkfac.trace(model, xs[0])
    batches = [(x, classes(len(x))) for x in xs]
    for sharing in ("expand", "reduce"):
        compare(program, CE(), batches, tmp_path / "x", fisher="mc", sharing=sharing)


def test_transposed_rows_that_wait(tmp_path):
    params = {"W": rand(6, 5), "V": rand(3, 6)}

    def model(params, x):
        return (params["V"] @ torch.tanh(params["W"] @ x)).T

    program = fxkfac.trace(model, rand(5, 4), params, batch_axis=1)
    batches = [(rand(5, n, seed=n), rand(n, 3, seed=n)) for n in (3, 2, 5)]
    compare(program, MSE(), batches, tmp_path / "x")
    over = fxkfac.resume(tmp_path / "x", program, MSE()).over
    rows = [r for i in over.total.inputs for m in i.moments.values() for r in m.waiting]
    assert any(not r.is_contiguous() for r in rows)


def test_masks_and_ignored_targets(tmp_path):
    model, x, y = seeded(lambda: nn.Linear(4, 3)), rand(6, 5, 4), classes(6, 5)
    y[1, 3:] = y[2] = -100

    def swapped(params, x):
        return (x @ params["weight"].mT + params["bias"]).mT

    params = {"weight": model.weight.detach(), "bias": model.bias.detach()}
    program = fxkfac.trace(swapped, x, params)
    batches = [(x[k], y[k]) for k in ([0, 3], [1, 2], [4, 5])]
    compare(program, CE(), batches, tmp_path / "x", fisher="empirical")
    compare(program, CE(), batches, tmp_path / "x", mask=lambda x, y: y != -100)
    with pytest.raises(MergeError, match="masked is True there and False here"):
        fxkfac.resume(tmp_path / "x", program, CE())


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


X, Y = rand(6, 4), classes(6)
BATCHES = [(X[:2], Y[:2]), (X[2:5], Y[2:5]), (X[5:], Y[5:])]


@pytest.fixture(scope="module")
def program():
    return fxkfac.trace(seeded(net), X)


def test_factors_on_the_way_use_nothing_up(program):
    accumulation = fxkfac.Accumulation(program, CE(), fisher="mc", generator=generator())
    assert (accumulation.n, accumulation.batches) == (0, 0)
    for number, batch in enumerate(BATCHES):
        accumulation.add(*batch)
        sofar = fxkfac.kfac(
            program, CE(), BATCHES[: number + 1], fisher="mc", generator=generator()
        )
        for _ in range(2):
            assert_same_bits(accumulation.factors(), sofar)
    assert (accumulation.n, accumulation.batches) == (6, 3)
    assert repr(accumulation).startswith("Accumulation(6 data in 3 batches; mc, expand, Cross")


def test_nothing_yet(program, tmp_path):
    accumulation = fxkfac.Accumulation(program, CE())
    with pytest.raises(DataError, match="nothing was added yet"):
        accumulation.factors()
    fxkfac.save(accumulation, tmp_path / "x")
    assert fxkfac.resume(tmp_path / "x", program, CE()).batches == 0


def test_a_batch_that_fails_adds_nothing_and_may_come_again(program, tmp_path):
    accumulation = fxkfac.Accumulation(program, CE(), fisher="mc", generator=generator())
    for x, y in BATCHES:
        with pytest.raises(DataError, match=f"batch {accumulation.batches}"):
            accumulation.add(x / 0, y)
        with pytest.raises(DataError):
            accumulation.add(x, y + 7)
        with pytest.raises(DataError, match="a batch is of type tuple"):
            accumulation.add(x, None)
        with pytest.raises(NonFiniteError, match=f"batch {accumulation.batches}"):
            accumulation.add(x * 1e200, y)
        accumulation.add(x, y)
    whole = fxkfac.kfac(program, CE(), BATCHES, fisher="mc", generator=generator())
    assert_same_bits(accumulation.factors(), whole)


def test_an_interruption_while_sums_change(program, tmp_path, monkeypatch):
    """Half a batch in the sums is no number of batches."""
    accumulation = fxkfac.Accumulation(program, CE())
    accumulation.add(*BATCHES[0])
    fxkfac.save(accumulation, tmp_path / "x")
    merge = Accumulated.merge

    def stopped(self, other):
        merge(self, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(Accumulated, "merge", stopped)
    with pytest.raises(KeyboardInterrupt):
        accumulation.add(*BATCHES[1])
    for use in (
        accumulation.factors,
        lambda: accumulation.add(*BATCHES[1]),
        lambda: fxkfac.save(accumulation, tmp_path / "x"),
    ):
        with pytest.raises(FxkfacError, match=r"while batch 1 was being added.*fxkfac.resume"):
            use()
    with pytest.raises(KeyboardInterrupt) as stop:
        fxkfac.kfac(program, CE(), BATCHES)
    assert not hasattr(stop.value, "factors")
    monkeypatch.undo()
    accumulation = fxkfac.resume(tmp_path / "x", program, CE())
    for batch in BATCHES[1:]:
        accumulation.add(*batch)
    assert_same_bits(accumulation.factors(), fxkfac.kfac(program, CE(), BATCHES))


def test_what_it_was_told_is_in_the_file(program, tmp_path):
    told = fxkfac.Accumulation(
        program, CE(), fisher="mc", mc_samples=3, sharing="reduce", memory=7, backend="inductor"
    )
    fxkfac.save(told, tmp_path / "x")
    found = fxkfac.resume(tmp_path / "x", program, CE()).over
    assert found.settings == told.over.settings
    assert (found.memory, found.backend) == (7, "inductor")
    assert torch.equal(found.generator.get_state(), told.over.generator.get_state())


def test_other_parameters_and_buffers_are_refused(program, tmp_path):
    path = tmp_path / "x"
    fxkfac.save(fxkfac.Accumulation(program, CE()), path)
    other = seeded(net)
    with torch.no_grad():
        other[2].bias[1] += 1e-15
    with pytest.raises(MergeError, match=r"parameters or buffers '2.bias' are not those"):
        fxkfac.resume(path, fxkfac.trace(other, X), CE())
    own = {"2.bias": seeded(net)[2].bias}
    assert fxkfac.resume(path, fxkfac.trace(other, X), CE(), params=own).batches == 0


def test_another_program_loss_or_kind_is_refused(program, tmp_path):
    path = tmp_path / "x"
    accumulation = fxkfac.Accumulation(program, CE())
    accumulation.add(*BATCHES[0])
    fxkfac.save(accumulation, path)
    with pytest.raises(MergeError, match=r"loss is .*'mean'.* there and .*'sum'.* here"):
        fxkfac.resume(path, program, CE(reduction="sum"))
    wider = fxkfac.trace(seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))), X)
    with pytest.raises(MergeError, match=r"'0.weight' has shape \[5, 4\] there and \[6, 4\] here"):
        fxkfac.resume(path, wider, CE())
    with pytest.raises(FileError, match="holds an accumulation; expected factors"):
        fxkfac.load(path, program, CE())
    with pytest.raises(OptionError, match="program is of type Linear; expected"):
        fxkfac.resume(path, nn.Linear(4, 5), CE())
    fxkfac.save(accumulation.factors(), path)
    with pytest.raises(FileError, match="holds factors; expected an accumulation"):
        fxkfac.resume(path, program, CE())
    with pytest.raises(OptionError, match="dict cannot be saved"):
        fxkfac.save({}, path)


@pytest.fixture
def start(tmp_path):
    """Starts a process that saves to a path, and gives its number."""
    command = [sys.executable, str(Path(killed.__file__)), str(tmp_path / "x")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def one():
            print(file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield one
        server.stdin.close()


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, one_thread, start):
    program, loss = killed.problem()
    expected = killed.go_on(killed.started(program, loss)).factors()
    path, drawn, reached = tmp_path / "x", random.Random(0), [0]
    for number in range(20):
        process = start()
        while number == 0 and not path.exists():
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.2))
        os.kill(process, signal.SIGKILL)
        accumulation = fxkfac.resume(path, program, loss)
        reached.append(accumulation.batches)
        assert_same_bits(killed.go_on(accumulation).factors(), expected)
    assert reached == sorted(reached)
    assert reached[-1] > reached[1] > 0
