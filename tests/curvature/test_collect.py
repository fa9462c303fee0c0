"""Sums over uses, vectors and batches: nothing is kept longer than needed, and nothing twice."""

import gc
import weakref

import pytest
import torch
from drawn import F64, classes, rand, seeded
from torch import nn

import fxkfac
from fxkfac.curvature import moments

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def close(found, expected):
    assert list(found) == list(expected)
    for name, block in found.items():
        torch.testing.assert_close(block.dense(), expected[name].dense(), rtol=1e-10, atol=1e-14)


class TestFewRows:
    """Rows wait for others over batches, until their product pays."""

    @pytest.mark.parametrize("enough", [1, 7, 10**6])
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_batches_of_any_size(self, monkeypatch, enough, sharing):
        monkeypatch.setattr(moments, "ENOUGH", enough)
        program, x, y = fxkfac.trace(seeded(mlp), rand(5, 4)), rand(23, 4, seed=1), classes(23)
        parts = [(x[s], y[s]) for s in (slice(1), slice(1, 4), slice(4, 21), slice(21, 23))]
        found = fxkfac.kfac(program, CE, parts, sharing=sharing)
        monkeypatch.setattr(moments, "ENOUGH", 1)
        close(found, fxkfac.kfac(program, CE, (x, y), sharing=sharing))

    def test_a_loader_that_fills_one_buffer_again_and_again(self):
        program, x, y = fxkfac.trace(seeded(mlp), rand(5, 4)), rand(12, 4, seed=1), classes(12)
        buffer, labels = torch.empty(3, 4, dtype=F64), torch.empty(3, dtype=torch.int64)

        def again():
            for k in range(0, 12, 3):
                yield buffer.copy_(x[k : k + 3]), labels.copy_(y[k : k + 3])

        close(fxkfac.kfac(program, CE, again()), fxkfac.kfac(program, CE, (x, y)))

    def test_a_batch_that_fails_adds_nothing(self):
        program, x, y = fxkfac.trace(seeded(mlp), rand(5, 4)), rand(6, 4, seed=1), classes(6)
        wrong = (x * float("inf"), y)
        with pytest.raises(fxkfac.FxkfacError) as info:
            fxkfac.kfac(program, CE, [(x, y), (x, y), wrong])
        close(info.value.factors, fxkfac.kfac(program, CE, [(x, y), (x, y)]))


def tensors():
    """All tensors that Python holds; by type, as `isinstance` asks objects that may be gone."""
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def alive(*shape):
    """The number of tensors of a shape; those of a capture have shapes that are not known yet."""
    return sum(type(t) is torch.Tensor and t.shape == shape for t in tensors())


class Watched(fxkfac.Likelihood):
    """Counts the inputs that are held when the forward pass is over."""

    def nll(self, prediction, target):
        return (prediction - target).square().sum(1) / 2

    def gradient(self, f, y):
        self.held = alive(11, 8)
        return f - y


def test_an_input_is_let_go_once_its_products_are_summed():
    model = seeded(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 2)))
    program, loss = fxkfac.trace(model, rand(5, 8)), Watched()
    x, y = rand(11, 8), rand(11, 2)
    fxkfac.kfac(program, loss, (x, y), fisher="empirical")
    # The data and what stands for them; copies of rows that wait for others.
    assert loss.held <= 2 + 7
    many, targets = rand(moments.ENOUGH, 8), rand(moments.ENOUGH, 2)
    loss.gradient = lambda f, y: (setattr(loss, "held", alive(moments.ENOUGH, 8)), f - y)[1]
    fxkfac.kfac(program, loss, (many, targets), fisher="empirical")
    assert loss.held <= 2


@pytest.mark.parametrize("function", [fxkfac.kfac, fxkfac.step])
def test_nothing_waits_for_the_garbage_collector(function):
    program, data = fxkfac.trace(seeded(mlp), rand(5, 4)), (rand(9, 4), classes(9))
    function(program, CE, data)
    gc.collect()
    gc.disable()
    try:
        before = len(tensors())
        function(program, CE, data)
        assert len(tensors()) == before
    finally:
        gc.enable()


def attention(params, x):
    q, k, v = (x @ params[n].T for n in "qkv")
    return ((q @ k.mT).softmax(-1) @ v).mean(1) @ params["o"].T


def test_equal_inputs_have_one_factor():
    params = {n: rand(4, 4, seed=k) for k, n in enumerate("qkvo")}
    program, data = fxkfac.trace(attention, rand(3, 5, 4), params), (rand(3, 5, 4), rand(3, 4))
    products = fxkfac.kfac(program, MSE, data).products
    assert products["q"][0].A is products["k"][0].A
    assert products["q"][0].A is products["v"][0].A
    assert products["q"][0].A is not products["o"][0].A
    close(
        fxkfac.kfac(program, MSE, [data, data]),
        fxkfac.kfac(program, MSE, tuple(torch.cat([t, t]) for t in data)),
    )


def test_equal_inputs_differ_where_only_gradients_tell_the_padding():
    """Keys of ignored positions are seen by others, and queries are not; then A is not shared."""

    def f(params, x):
        q, k, v = (x @ params[n].T for n in "qkv")
        return (((q @ k.mT).softmax(-1) @ v) @ params["o"].T).mT

    params = {n: rand(4, 4, seed=k) for k, n in enumerate("qkvo")}
    program, x = fxkfac.trace(f, rand(3, 5, 4), params), rand(6, 5, 4)
    y = classes(6, 5, C=4)
    ignored = y.clone()
    ignored[:, :2] = -100
    apart = [
        fxkfac.kfac(program, CE, (x[:3], ignored[:3])),
        fxkfac.kfac(program, CE, (x[3:], y[3:])),
    ]
    assert not torch.equal(apart[0]["q"].A, apart[0]["k"].A)
    for order in ([0, 1], [1, 0]):
        parts = [((x[:3], ignored[:3]), (x[3:], y[3:]))[k] for k in order]
        close(fxkfac.kfac(program, CE, parts), apart[0] + apart[1])


def test_a_model_goes_with_its_program():
    model = seeded(mlp)
    program = fxkfac.trace(model, rand(5, 4))
    fxkfac.kfac(program, CE, (rand(9, 4), classes(9)))
    gone = weakref.ref(model)
    del model, program
    gc.collect()
    assert gone() is None


def test_convolutions_are_taken_from_the_image(monkeypatch):
    seen = []
    add = moments.Moment.add_image
    monkeypatch.setattr(
        moments.Moment, "add_image", lambda m, *a: seen.append(a[0].windows.kernel) or add(m, *a)
    )
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 2)))
    x = rand(2, 2, 5, 5)
    fxkfac.kfac(fxkfac.trace(model, x), MSE, (x, rand(2, 2, 4, 4)), fisher="empirical")
    assert sorted(seen) == [(1, 1), (2, 2), (3, 3)]  # B and A of the first, B of the second


class TestStep:
    def test_over_several_batches(self):
        model, x, y = seeded(mlp), rand(7, 4), classes(7)
        program = fxkfac.trace(model, x[:2])
        found = fxkfac.step(program, CE, [(x[:3], y[:3]), (x[3:], y[3:])], fisher="type-2")
        loss = CE(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(found.loss, loss.detach())
        for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(found.gradients[name], g)
            assert p.grad is None
        close(found.factors, fxkfac.kfac(program, CE, (x, y)))

    def test_dropout_is_drawn_once_for_all_three(self):
        """With one mask, the empirical Fisher of one datum is its gradient's square."""
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
        program, data = fxkfac.trace(model, rand(2, 4)), (rand(1, 4), classes(1))
        found = fxkfac.step(program, CE, data, fisher="empirical")
        for block in found.factors.values():
            g = torch.cat([found.gradients[n].flatten() for n in block.params])
            torch.testing.assert_close(block.dense(), torch.outer(g, g))

    def test_the_same_labels_as_kfac(self):
        program, data = fxkfac.trace(seeded(mlp), rand(5, 4)), (rand(9, 4), classes(9))
        found, expected = (
            f(program, CE, data, fisher="mc", generator=torch.Generator().manual_seed(3))
            for f in (fxkfac.step, fxkfac.kfac)
        )
        close(found.factors, expected)

    def test_gradients_lie_in_memory_as_their_parameters_do(self):
        """Also where autograd's do not, and where one tensor of its is the gradient of two."""

        def f(params, x):
            return x @ params["W"].mT + params["a"] + params["b"]

        params = {"W": rand(4, 2).mT, "a": rand(2), "b": rand(2, seed=1)}
        program = fxkfac.trace(f, rand(3, 4), params)
        data = [(rand(3, 4, seed=k), rand(3, 2, seed=k)) for k in (2, 3)]
        found = [fxkfac.step(program, MSE, part).gradients for part in ([data[0]], data)]
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        loss = MSE(*(torch.cat([f(leaves, x) for x, _ in data]), torch.cat([y for _, y in data])))
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for (name, g), e in zip(found[1].items(), expected, strict=True):
            torch.testing.assert_close(g, e, msg=name)
            assert {g.stride(), found[0][name].stride()} == {params[name].stride()}
        assert found[1]["a"].data_ptr() != found[1]["b"].data_ptr()

    def test_parameters_that_nothing_uses_or_that_are_skipped(self):
        def f(params, x):
            return x @ params["W"] + params["V"].sum() * 0 + x @ params["U"]

        params = {"W": rand(4, 2), "V": rand(3), "U": rand(4, 2, seed=1), "unused": rand(2)}
        program = fxkfac.trace(f, rand(3, 4), params, structure={"V": "skip", "U": "identity"})
        x, y = rand(3, 4), rand(3, 2)
        found = fxkfac.step(program, MSE, (x, y))
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        expected = torch.autograd.grad(
            MSE(f(leaves, x), y), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        for (name, g), e in zip(found.gradients.items(), expected, strict=True):
            torch.testing.assert_close(g, e, msg=name)

    @pytest.mark.parametrize("loss", [CE, nn.CrossEntropyLoss(reduction="sum")], ids=str)
    def test_ignored_targets(self, loss):
        model, x = seeded(mlp), rand(6, 4)
        y = torch.tensor([0, -100, 2, 1, -100, 0])
        found = fxkfac.step(fxkfac.trace(model, x), loss, (x, y))
        expected = loss(model(x), y)
        torch.testing.assert_close(found.loss, expected.detach())
        (g,) = torch.autograd.grad(expected, model[0].weight)
        torch.testing.assert_close(found.gradients["0.weight"], g)
