"""What is the user's stays as it is, and whatever state it is in, the numbers are right."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch
from drawn import classes, rand, seeded
from torch import nn
from torch.testing import assert_close

import fxkfac
from fxkfac import laplace
from fxkfac.errors import CaptureError
from fxkfac.functional import bind

CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x * self.scale)))


class Writing(Net):
    """It writes into its input; without gradients beside it only make_fx captures it."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, x):
        x -= 1.0
        x *= 2.0
        if not self.teacher:
            return super().forward(x)
        with torch.no_grad():
            target = super().forward(x)
        return super().forward(x) - 0.1 * target


@pytest.fixture
def data():
    return rand(6, 4), classes(6, C=3)


def test_inputs_that_are_conjugated_when_they_are_read():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x):
            return self.linear(torch.cat([x.real, x.imag], 1))

    model, x = seeded(Parts), torch.complex(rand(4, 3), rand(4, 3, seed=1))
    plain = x.conj().resolve_conj()
    expected = fxkfac.kfac(fxkfac.trace(model, plain), CE, (plain, classes(4, C=2))).dense()
    for example in (x, x.conj()):
        found = fxkfac.kfac(fxkfac.trace(model, example), CE, (x.conj(), classes(4, C=2)))
        assert_close(found.dense(), expected)


def test_parameters_that_inference_mode_made(data):
    model, plain = (seeded(Net) for _ in range(2))
    with torch.inference_mode():
        model.float().double()
    plain.float().double()
    found, expected = (fxkfac.kfac(fxkfac.trace(m, data[0]), CE, data) for m in (model, plain))
    assert_close(found.dense(), expected.dense())


@pytest.mark.parametrize("kind", ["leaf", "graph"])
@pytest.mark.parametrize("traced", ["before", "after"])
def test_buffers_that_ask_for_gradients(data, kind, traced):
    model = seeded(Net)
    program = fxkfac.trace(model, data[0])
    if kind == "leaf":
        model.scale.requires_grad_()
    else:
        model.scale = model.scale * model.a.weight.abs().mean(0)
    if traced == "after":
        program = fxkfac.trace(model, data[0])
    found = fxkfac.kfac(program, CE, data)
    model.scale = model.scale.detach()
    expected = fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data)
    assert expected.dense().norm() > 0
    assert_close(found.dense(), expected.dense())


@pytest.mark.parametrize("teacher", [False, True])
def test_a_model_that_writes_into_its_input(data, teacher):
    model, (x, y) = seeded(lambda: Writing(teacher)), data
    own = x.clone()
    program = fxkfac.trace(model, x)
    factors = fxkfac.kfac(program, CE, (x, y))
    fxkfac.step(program, CE, (x, y))
    fxkfac.check(program, CE, (x, y))
    fxkfac.ekfac(program, CE, (x, y), factors)
    fxkfac.influence(program, CE, factors, (x, y), (x, y), damping=0.1)
    assert torch.equal(x, own)
    posterior = laplace.posterior(factors)
    draws = laplace.sample(posterior, 3, torch.Generator().manual_seed(0))
    found = laplace.linearised(posterior, draws, x)
    each = [{name: d[k : k + 1] for name, d in draws.items()} for k in range(3)]
    assert_close(found, torch.cat([laplace.linearised(posterior, one, own) for one in each]))
    assert_close(laplace.predictions(posterior, draws, x)[1], _prediction(model, draws, own))
    assert torch.equal(x, own)


def _prediction(model, draws, x):
    return torch.func.functional_call(model, {n: d[1] for n, d in draws.items()}, (x.clone(),))


def test_an_optimizer_that_runs_the_model_for_its_buffers(data):
    class Normed(Writing):
        def __init__(self):
            super().__init__(teacher=False)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(super().forward(x))

    model, (x, y) = seeded(Normed), data
    own = x.clone()
    fxkfac.optim.KFAC(fxkfac.trace(model, x), CE, lr=0.1).step(x, y)
    assert torch.equal(x, own)


def test_a_model_keeps_its_own_lists_and_dicts(data):
    model = seeded(Net)
    model.settings = {"scale": 1.0, "nested": [1, {"two": 2}], "pair": ([3], 4)}
    model.a.log = log = deque([0])
    settings, nested, two = model.settings, model.settings["nested"], model.settings["nested"][1]
    fxkfac.trace(model, data[0])
    assert model.settings is settings
    assert model.a.log is log
    assert settings["nested"] is nested
    assert nested[1] is two
    assert settings == {"scale": 1.0, "nested": [1, {"two": 2}], "pair": ([3], 4)}


class Keeping(nn.Module):
    """It counts its calls, and keeps what it has computed."""

    def __init__(self, generator=None):
        super().__init__()
        self.a, self.calls, self.log, self.generator = nn.Linear(4, 3), 0, [], generator

    def forward(self, x):
        self.calls, self.last = self.calls + 1, self.a(x)
        self.log.append(self.last.mean())
        drawn = 0 if self.generator is None else torch.rand(3, generator=self.generator)
        return self.last + drawn


@pytest.mark.parametrize("of_function", [False, True])
def test_a_model_has_not_counted_our_calls_nor_kept_what_they_computed(data, of_function):
    model, (x, y) = seeded(Keeping), data
    scaled = (lambda p, x: model(x) * p["s"]), x, {"s": torch.ones(3)}
    program = fxkfac.trace(*(scaled if of_function else (model, x)))
    fxkfac.kfac(program, CE, [(x, y), (x[:1], y[:1])])
    fxkfac.exact.ggn(model, CE, data, ["a.bias"])
    assert (model.calls, model.log) == (0, [])
    assert not hasattr(model, "last")


def test_a_generator_of_the_models_own_is_where_it_was(data):
    model = seeded(lambda: Keeping(torch.Generator().manual_seed(0)))
    before = model.generator.get_state()
    with pytest.raises(CaptureError):
        fxkfac.trace(model, data[0])
    assert model.generator.get_state().equal(before)


def test_a_generator_in_a_closure_is_where_it_was(data):
    generator = torch.Generator().manual_seed(0)
    before, w = generator.get_state(), {"w": rand(4, 3)}

    def model(p, x):
        return torch.rand(3, generator=generator, dtype=x.dtype) + x @ p["w"]

    with pytest.raises(CaptureError):
        fxkfac.trace(model, data[0], w)
    assert generator.get_state().equal(before)
    fxkfac.exact.ggn(model, CE, [data], params=w)
    assert generator.get_state().equal(before)


def test_recurrent_modules_know_that_their_weights_are_the_same(data):
    model = seeded(lambda: nn.GRU(4, 3))
    bound = bind(model, None)
    bound(bound.current(), data[0])
    assert not model._weights_have_changed()


def test_hooks_of_parameters_that_change_gradients_are_refused(data):
    model = seeded(Net)
    seen = []
    model.a.weight.register_hook(lambda g: seen.append(g.norm()))
    program = fxkfac.trace(model, data[0])
    fxkfac.kfac(program, CE, data)
    model.a.weight.register_hook(lambda g: 0 * g)
    with pytest.raises(CaptureError, match=r"hook of the parameter 'a.weight'"):
        fxkfac.trace(model, data[0])


def test_hooks_of_all_modules_are_noticed(data):
    """One that changes outputs would change those of a graph's own modules, too."""
    program, seen = fxkfac.trace(seeded(Net), data[0]), []
    before = fxkfac.kfac(program, CE, data)
    register = nn.modules.module.register_module_forward_hook
    for hook, refused in ((lambda m, x, y: seen.append(m), False), (lambda m, x, y: 2 * y, True)):
        handle = register(hook)
        try:
            if refused:
                with pytest.raises(CaptureError):
                    fxkfac.kfac(program, CE, data)
            else:
                assert_close(fxkfac.kfac(program, CE, data).dense(), before.dense())
        finally:
            handle.remove()
    assert_close(fxkfac.kfac(program, CE, data).dense(), before.dense())


def test_inside_a_transform_of_torch_func_is_refused(data):
    program = fxkfac.trace(seeded(Net), data[0])

    def inside(x):
        fxkfac.kfac(program, CE, (x, data[1]))
        return x.sum()

    with pytest.raises(CaptureError, match=r"inside a transform of torch\.func"):
        torch.func.grad(inside)(data[0])


def test_threads_take_turns_at_the_random_state(data):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 60), nn.Dropout(0.3), nn.Linear(60, 3)))
    program = fxkfac.trace(model, data[0])
    found = []

    def some():
        for _ in range(20):
            generator = torch.Generator().manual_seed(4)
            found.append(fxkfac.kfac(program, CE, data, fisher="mc", generator=generator))

    before = torch.get_rng_state()
    threads = [threading.Thread(target=some) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(before, torch.get_rng_state())
    assert len(found) == 40
    for factors in found:
        assert torch.equal(factors.dense("2.weight"), found[0].dense("2.weight"))


def test_a_loaded_optimizer_shares_nothing_with_the_other(data):
    def build():
        model = seeded(Net)
        program = fxkfac.trace(model, data[0], structure={"a.bias": "skip"})
        return model, fxkfac.optim.KFAC(program, CE, lr=0.1)

    (model, optimizer), (other, again) = build(), build()
    optimizer.step(*data)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    optimizer.step(*data)
    again.step(*data)
    assert torch.equal(model.a.bias, other.a.bias)


def test_a_report_on_another_default_device(data):
    factors = fxkfac.kfac(fxkfac.trace(seeded(Net), data[0]), CE, data)
    expected = str(factors.report())
    with torch.device("meta"):
        assert str(factors.report()) == expected


@pytest.mark.parametrize("teacher", [False, True])
def test_running_averages_of_all_batches(teacher):
    """A norm without a momentum asks its own buffer for one, of which no prediction knows."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.norm = nn.BatchNorm1d(5, momentum=None)

        def forward(self, x):
            with torch.no_grad():
                target = self.a(x).mean() if teacher else 0.0
            return self.b(torch.tanh(self.norm(self.a(x)))) - target

    model, plain = seeded(Normed), seeded(Normed)
    plain.norm.momentum = 0.1
    data = rand(6, 4), classes(6, C=3)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found, expected = (
        fxkfac.kfac(fxkfac.trace(m, data[0]), CE, data, fisher="empirical") for m in (model, plain)
    )
    assert_close(found.dense(), expected.dense())
    assert model.norm.momentum is None
    for name, b in model.named_buffers():
        assert torch.equal(b, buffers[name])
