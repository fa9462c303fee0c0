"""The traps of capturing a model: each is seen through, or refused by name; none is silent."""

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F
from drawn import F64, classes, generator, rand, seeded
from torch import nn

import fxkfac
from fxkfac import exact
from fxkfac.errors import BatchAxisError, CaptureError, FxkfacError

MSE, CE = nn.MSELoss, nn.CrossEntropyLoss
close = torch.testing.assert_close


def line_of(code):
    """Where in this file the one line is that ends in the comment `# HERE: code`."""
    with open(__file__) as file:
        found = [k for k, line in enumerate(file, 1) if line.rstrip().endswith(f"# HERE: {code}")]
    (line,) = found
    return line


def proves(program, inputs, targets, loss=None):
    """The gradients from the taps are autograd's, at this batch."""
    errors = fxkfac.check(program, loss or MSE(), (inputs, targets))
    assert set(errors) == set(program.parameters)
    assert max(errors.values()) < 1e-9


def same(found, expected):
    assert list(found) == list(expected)
    for name in found:
        close(found[name].dense(), expected[name].dense())


X, Y = rand(5, 4, seed=5), rand(5, 3, seed=6)


class Clipped(torch.autograd.Function):
    """A step whose backward is that of the identity: nothing that autograd would derive."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g


class Doubling(torch.autograd.Function):
    """sin, with twice its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.cos()


class TestCustomBackward:
    """A front end keeps the forward ops and loses the backward without a word."""

    @pytest.mark.parametrize("function", [Clipped, Doubling])
    @pytest.mark.parametrize("as_module", [False, True])
    def test_refused_or_right(self, function, as_module):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.last(function.apply(self.first(x)))

        def model(params, x):
            return function.apply(x @ params["W"]) @ params["V"]

        params = None if as_module else {"W": rand(4, 3), "V": rand(3, 3)}
        chosen = seeded(Model) if as_module else model
        program, refused = None, ""
        try:
            program = fxkfac.trace(chosen, X, params)
        except CaptureError as error:
            refused = str(error)
        if program is not None:
            proves(program, X, Y)
        else:
            assert ("first.weight" if as_module else "W") in refused
            assert "custom autograd.Function" in refused

    def test_a_part_above_the_function_can_be_selected(self):
        def model(params, x):
            return Doubling.apply(x @ params["W"]) @ params["V"]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.last(Doubling.apply(self.first(x)))

        module = seeded(Model)
        program = fxkfac.trace(module, X, ["last.*"])
        close(
            fxkfac.kfac(program, MSE(), (X[:1], Y[:1])).dense(),
            exact.ggn(module, MSE(), (X[:1], Y[:1]), ["last.weight", "last.bias"]),
        )


class TestValuesOfTheExample:
    """A value that a front end did not see computed would be a constant in its graph."""

    @pytest.mark.parametrize(
        "shift", [lambda x: float(x.numpy().mean()), lambda x: x.tolist()[0][0]]
    )
    def test_refused(self, shift):
        def model(params, x):
            return x @ params["W"] + shift(x)

        program = None
        with contextlib.suppress(CaptureError):
            program = fxkfac.trace(model, X, {"W": rand(4, 3)})
        if program is not None:  # a front end that saw the value computed is right on other data
            assert max(fxkfac.check(program, MSE(), (X + 1, Y)).values()) < 1e-12

    def test_refused_also_where_parameters_may_be_left_out(self):
        def model(params, x):
            return (x @ params["W"]) * params["gain"] + float(x.numpy().mean())

        for policy in ("diagonal", "skip"):
            with pytest.raises(CaptureError, match="model"):
                fxkfac.trace(model, X, {"W": rand(4, 3), "gain": rand(3)}, policy)

    def test_values_of_the_model_are_no_values_of_the_example(self):
        """Python numbers that stay the same from call to call may be constants."""

        class Scaled(nn.Linear):
            rate = 0.5

            def forward(self, x):
                return super().forward(x) * self.rate

        model = seeded(lambda: Scaled(4, 3))
        proves(fxkfac.trace(model, X), X * 3, Y)


class TestTiedParameters:
    def test_one_block_under_both_names(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
                self.second.weight = self.first.weight

            def forward(self, x):
                return self.second(torch.tanh(self.first(x)))

        x = rand(5, 3)
        program = fxkfac.trace(seeded(Tied), x)
        proves(program, x, Y)
        factors = fxkfac.kfac(program, MSE(), (x, Y), separate_weight_and_bias=True)
        assert set(factors) == {"first.weight", "first.bias", "second.bias"}
        close(factors["second.weight"].A, factors["first.weight"].A)
        close(factors.dense("second.weight"), factors.dense("first.weight"))
        assert len(factors["first.weight"].terms) == 1

    def test_both_names_select_and_stand_in(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(3, 3, bias=False)
                self.b = nn.Linear(3, 3, bias=False)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(torch.tanh(self.a(x)))

        x, model, other = rand(5, 3), seeded(Tied), rand(3, 3, seed=9)
        programs = [fxkfac.trace(model, x, [name]) for name in ("a.weight", "b.weight")]
        same(*(fxkfac.kfac(p, MSE(), (x, Y)) for p in programs))
        by_name = [
            fxkfac.kfac(programs[0], MSE(), (x, Y), params={name: other})
            for name in ("a.weight", "b.weight")
        ]
        same(*by_name)
        with torch.no_grad():
            model.a.weight.copy_(other)
        same(by_name[0], fxkfac.kfac(fxkfac.trace(model, x), MSE(), (x, Y)))

    def test_one_tensor_under_two_names_of_a_function(self):
        def model(params, x):
            return torch.tanh(x @ params["a"]) @ params["b"]

        W, x = rand(3, 3), rand(5, 3)
        program = fxkfac.trace(model, x, {"a": W, "b": W})
        factors = fxkfac.kfac(program, MSE(), (x, Y))
        assert list(factors) == ["a"]
        close(factors["b"].A, factors["a"].A)
        proves(program, x, Y)

    def test_a_transposed_storage_is_not_the_same_parameter(self):
        """Two views of one storage that differ are two parameters."""
        W = rand(3, 3)

        def model(params, x):
            return torch.tanh(x @ params["a"]) @ params["b"]

        program = fxkfac.trace(model, rand(5, 3), {"a": W, "b": W.T})
        assert set(fxkfac.kfac(program, MSE(), (rand(5, 3), Y))) == {"a", "b"}


def normed():
    return nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Dropout(0.3), nn.Linear(3, 3)
    )


class TestTheCallersState:
    @pytest.mark.parametrize("train", [True, False])
    def test_buffers_and_randomness_are_left_alone(self, train):
        model = seeded(normed).train(train)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        before = torch.get_rng_state()
        program = fxkfac.trace(model, X)
        fxkfac.check(program, MSE(), (X, Y))
        fxkfac.kfac(program, MSE(), [(X, Y), (X[:3], Y[:3])], fisher="mc")
        assert torch.equal(torch.get_rng_state(), before)
        assert dict(model.named_buffers()).keys() == buffers.keys()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        assert all(module.training == train for module in model.modules())

    def test_also_where_no_front_end_does(self):
        def model(params, x):
            y = F.dropout(x @ params["W"])
            return y if y.sum().item() > 0 else y.flip(1)

        before = torch.get_rng_state()
        with pytest.raises(CaptureError):
            fxkfac.trace(model, X, {"W": rand(4, 3)})
        assert torch.equal(torch.get_rng_state(), before)
        # and no transform is left open
        close(torch.func.grad(lambda x: x.square().sum())(X), 2 * X)

    def test_a_failure_inside_a_transform_leaves_nothing_open(self):
        def model(params, x):
            def f(z):
                y = torch.tanh(z @ params["W"])
                return y if y.sum().item() > 0 else -y

            return torch.func.jvp(f, (x,), (x,))[1]

        with pytest.raises(CaptureError):
            fxkfac.trace(model, X, {"W": rand(4, 3)})
        close(torch.func.jvp(torch.sin, (X,), (X,))[1], X.cos() * X)

    @pytest.mark.parametrize("act", [torch.sin, F.silu])
    def test_a_failure_inside_a_hessian_leaves_gradients_on(self, act):
        """Symbolic `make_fx` fails inside the two transforms, and has left dispatch keys out."""

        def model(params, x):
            def laplacian(row):
                return torch.func.hessian(lambda r: act(r @ params["W"]).sum())(row).trace()

            return torch.vmap(laplacian)(x).unsqueeze(1)

        program = fxkfac.trace(model, X, {"W": rand(4, 3)})
        assert "make_fx (symbolic)" in program.tapped.refusals
        proves(program, X, rand(5, 1))
        assert (rand(3).requires_grad_() * 2).requires_grad

    def test_gradients_and_flags_are_left_alone(self):
        model = seeded(normed).eval()
        model[0].bias.requires_grad_(False)
        model[0].weight.grad = torch.ones(3, 4, dtype=F64)
        program = fxkfac.trace(model, X)
        fxkfac.kfac(program, MSE(), (X, Y))
        fxkfac.check(program, MSE(), (X, Y))
        assert torch.equal(model[0].weight.grad, torch.ones(3, 4, dtype=F64))
        assert model[3].weight.grad is None
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
        assert program.parameters == ("0.weight", "3.weight", "3.bias")

    def test_under_no_grad_and_inference_mode(self):
        model = seeded(normed).eval()
        expected = fxkfac.kfac(fxkfac.trace(model, X), MSE(), (X, Y))
        with torch.no_grad():
            same(fxkfac.kfac(fxkfac.trace(model, X), MSE(), (X, Y)), expected)
            proves(fxkfac.trace(model, X), X, Y)


class TestModes:
    def test_a_flipped_mode_is_noticed(self):
        model = seeded(normed)
        with torch.no_grad():
            model[1].running_mean += 1
            model[1].running_var *= 3
        program = fxkfac.trace(model.train(), X)
        found = {}
        for mode in (True, False, True):
            model.train(mode)
            fresh = fxkfac.trace(model, X)
            found[mode] = fxkfac.kfac(program, MSE(), (X, Y), generator=generator())
            same(found[mode], fxkfac.kfac(fresh, MSE(), (X, Y), generator=generator()))
        assert not torch.allclose(found[True]["3.weight"].A, found[False]["3.weight"].A)

    def test_the_mode_of_one_part(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        program = fxkfac.trace(model.eval(), X)
        model[1].train()
        a, b = (fxkfac.kfac(program, MSE(), (X, Y), generator=generator(seed)) for seed in (1, 2))
        assert not torch.allclose(a["2.weight"].A, b["2.weight"].A)

    def test_buffers_are_read_anew(self):
        model = seeded(normed).eval()
        program = fxkfac.trace(model, X)
        before = fxkfac.kfac(program, MSE(), (X, Y))["3.weight"].A
        model.train()(X * 7 + 1)
        model.eval()
        after = fxkfac.kfac(program, MSE(), (X, Y))
        assert not torch.allclose(after["3.weight"].A, before)
        same(after, fxkfac.kfac(fxkfac.trace(model, X), MSE(), (X, Y)))


class TestParametersAreReadAnew:
    @pytest.fixture
    def traced(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
        return model, fxkfac.trace(model, X)

    @staticmethod
    def follows(model, program, before):
        after = fxkfac.kfac(program, MSE(), (X, Y))
        assert not torch.allclose(after.dense(), before.dense())
        same(after, fxkfac.kfac(fxkfac.trace(model, X), MSE(), (X, Y)))

    def test_after_an_optimizer_step(self, traced):
        model, program = traced
        before = fxkfac.kfac(program, MSE(), (X, Y))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        MSE()(model(X), Y).backward()
        optimizer.step()
        self.follows(model, program, before)

    @pytest.mark.parametrize("assign", [False, True])
    def test_after_loading_a_state(self, traced, assign):
        model, program = traced
        before = fxkfac.kfac(program, MSE(), (X, Y))
        state = {name: t.clone() * 1.5 for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        self.follows(model, program, before)

    def test_after_a_new_parameter_in_its_place(self, traced):
        model, program = traced
        before = fxkfac.kfac(program, MSE(), (X, Y))
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        self.follows(model, program, before)

    def test_after_setting_data(self, traced):
        model, program = traced
        before = fxkfac.kfac(program, MSE(), (X, Y))
        model[0].weight.data = model[0].weight.detach() * 2
        self.follows(model, program, before)


class Recurrent(nn.Module):
    """A cell whose initial state has the batch size of the example, in Python."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(4 + 3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.zeros(int(x.shape[0]), 3, dtype=x.dtype)
        for k in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, k], h], dim=1)))
        return self.head(h)


class TestBatchSizes:
    SIZES = (5, 2, 7)

    @staticmethod
    def right_at_each(program, model, make, params=None):
        for size in TestBatchSizes.SIZES:
            x = make(size)
            y = rand(size, 3, seed=size)
            proves(program, x, y)
            fresh = fxkfac.trace(model, x, params)
            same(fxkfac.kfac(program, MSE(), (x, y)), fxkfac.kfac(fresh, MSE(), (x, y)))

    def test_a_size_that_python_reads(self):
        model = seeded(Recurrent)
        make = lambda n: rand(n, 2, 4, seed=n)  # noqa: E731
        self.right_at_each(fxkfac.trace(model, make(5)), model, make)

    def test_a_size_that_is_baked_in(self):
        """vmap writes the size of the example into what it expands."""

        def model(params, x):
            def one(z):
                return torch.tanh(z @ params["W"]) @ params["V"]

            return torch.func.vmap(one)(x) + params["b"].expand(len(x), 3)

        params = {"W": rand(4, 3), "V": rand(3, 3), "b": rand(3)}
        program = fxkfac.trace(model, rand(5, 4), params)
        self.right_at_each(program, model, lambda n: rand(n, 4, seed=n), params)

    def test_a_graph_that_is_bound_to_its_size(self):
        """A number that a loop counts to: each size is another graph."""

        def model(params, x):
            rows = [torch.tanh(x[k] @ params["W"]) for k in range(len(x))]
            return torch.stack(rows) @ params["V"]

        params = {"W": rand(4, 3), "V": rand(3, 3)}
        program = fxkfac.trace(model, rand(3, 4), params)
        assert not program.tapped.dynamic
        assert "traced anew for each batch size" in str(program)
        for size in self.SIZES:
            proves(program, rand(size, 4, seed=size), rand(size, 3))
            assert len(program.run(rand(size, 4)).prediction) == size

    def test_slices_in_which_no_parameter_enters_are_good_for_any_size(self):
        def net(params, x):
            y = torch.tanh(x @ params["W"])
            return torch.cat([y[:5], 2 * y[5:]])

        assert fxkfac.trace(net, rand(8, 4), {"W": rand(4, 3)}).tapped.dynamic

    def test_a_loop_over_slices_is_bound_to_its_size(self):
        """Its graph is the model's for fewer data, too: there the last slices are empty."""

        def plain(params, x):
            return torch.tanh(x @ params["W"] + params["b"])

        def sliced(params, x):
            return torch.cat([plain(params, x[k : k + 1]) for k in range(len(x))])

        params = {"W": rand(4, 3), "b": rand(3)}
        program, expected = (fxkfac.trace(f, rand(4, 4), params) for f in (sliced, plain))
        assert not program.tapped.dynamic
        for size in (4, 2):
            data = rand(size, 4), rand(size, 3)
            same(fxkfac.kfac(program, MSE(), data), fxkfac.kfac(expected, MSE(), data))

    def test_a_branch_that_depends_on_the_size(self):
        """The example and the trials are all in one branch, the next batch is not."""

        def model(params, x):
            y = x @ params["W"]
            return torch.tanh(y) if len(x) > 5 else y

        params = {"W": rand(4, 3)}
        program = fxkfac.trace(model, rand(2, 4), params)
        for size in (2, 7, 4, 6):
            x = rand(size, 4, seed=size)
            close(program.run(x).prediction, model(params, x))
            proves(program, x, rand(size, 3))

    def test_several_sizes_in_one_pass(self):
        model = seeded(Recurrent)
        x, y = rand(7, 2, 4, seed=1), rand(7, 3, seed=2)
        program = fxkfac.trace(model, x[:4])
        split = fxkfac.kfac(program, MSE(), [(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 6), (6, 7))])
        same(split, fxkfac.kfac(program, MSE(), (x, y)))

    @pytest.mark.parametrize("as_module", [True, False])
    def test_an_example_of_one_datum(self, as_module):
        def function(params, x):
            return torch.tanh(x @ params["W"]) @ params["V"]

        params = None if as_module else {"W": rand(4, 3), "V": rand(3, 3)}
        model = seeded(lambda: nn.Linear(4, 3)) if as_module else function
        program = fxkfac.trace(model, X[:1], params)
        assert program.tapped.dynamic
        for size in (1, 5):
            found = fxkfac.kfac(program, MSE(), (X[:size], Y[:size]), sharing="reduce")
            fresh = fxkfac.trace(model, X, params)
            same(found, fxkfac.kfac(fresh, MSE(), (X[:size], Y[:size]), sharing="reduce"))

    def test_another_shape_of_a_datum(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
        program = fxkfac.trace(model, rand(5, 4))
        x, y = rand(5, 6, 4, seed=1), rand(5, 6, 3, seed=2)
        proves(program, x, y)
        fresh = fxkfac.trace(model, x)
        for sharing in ("expand", "reduce"):
            found = fxkfac.kfac(program, MSE(), (x, y), sharing=sharing)
            same(found, fxkfac.kfac(fresh, MSE(), (x, y), sharing=sharing))


class TestInPlace:
    @pytest.mark.parametrize("act", ["relu_", "tanh_", "mul_", "index"])
    def test_after_the_layer(self, act):
        def change(h):
            if act == "mul_":
                return h.mul_(3.0).add_(1.0)
            if act == "index":
                h[:, 0] = h[:, 1].exp()
                return h
            return getattr(h, act)()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.last(change(self.first(x)))

        def function(params, x):
            return change(x @ params["W"] + params["b"]) @ params["V"]

        params = {"W": rand(4, 3), "b": rand(3), "V": rand(3, 3)}
        for model, tensors in ((seeded(Model), None), (function, params)):
            program = fxkfac.trace(model, X, tensors)
            proves(program, X, Y)
            names = ["first.weight", "first.bias"] if tensors is None else ["W", "b"]
            data = X[:1], Y[:1]
            close(
                fxkfac.kfac(program, MSE(), data).dense(*names),
                exact.ggn(model, MSE(), data, names, tensors),
            )

    def test_on_the_input_itself(self):
        """As by an in-place activation that comes first: the data are the user's."""

        def model(params, x):
            return x.mul_(2.0) @ params["W"]

        x, W = X.clone(), rand(4, 3)
        program = fxkfac.trace(model, x, {"W": W})
        found = fxkfac.kfac(program, MSE(), (x, Y))
        assert torch.equal(x, X)
        close(found["W"].A, 2 / 15 * 4 * X.T @ X)

    def test_an_activation_on_the_input_itself(self):
        model = seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)))
        x = X.clone()
        program = fxkfac.trace(model, x)
        found = fxkfac.kfac(program, MSE(), (x, Y))
        proves(program, x, Y)
        assert torch.equal(x, X)
        close(found["1.weight"].A[:-1, :-1], 2 / 15 * X.relu().T @ X.relu())


PARAMS = {"W": rand(4, 3), "b": rand(3, seed=1), "V": rand(3, 1, seed=2)}


def net(params, x):
    return torch.tanh(x @ params["W"] + params["b"]) @ params["V"]


def by_jvp(params, x):
    return torch.func.jvp(lambda z: net(params, z), (x,), (torch.ones_like(x),))[1]


def by_nested_jvp(params, x):
    """Second derivative along a direction."""

    def slope(z):
        return torch.func.jvp(lambda u: net(params, u), (z,), (torch.ones_like(z),))[1]

    return torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1]


def by_grad(params, x):
    return torch.func.grad(lambda z: net(params, z).square().sum())(x)[:, :1]


def by_vmap(params, x):
    return torch.func.vmap(lambda z: net(params, z))(x)


def by_vmap_of_grad(params, x):
    slope = torch.func.grad(lambda z: net(params, z).sum())
    return torch.func.vmap(slope)(x).sum(1, keepdim=True)


def by_autograd(params, x):
    z = x.detach().requires_grad_()
    y = net(params, z)
    (g,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    return y + g.square().sum(1, keepdim=True)


def by_laplacian(params, x):
    def one(z):
        return torch.func.hessian(lambda u: net(params, u).squeeze())(z).trace()

    return torch.func.vmap(one)(x).unsqueeze(1)


class TestDerivativesInside:
    FUNCTIONS = (
        by_jvp,
        by_nested_jvp,
        by_grad,
        by_vmap,
        by_vmap_of_grad,
        by_autograd,
        by_laplacian,
    )

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_is_captured_and_right(self, function):
        program = fxkfac.trace(function, X, PARAMS)
        for size in (5, 3):
            x, y = rand(size, 4, seed=size), rand(size, 1, seed=7)
            close(program.run(x).prediction, function(PARAMS, x))
            proves(program, x, y)
            for name in "WV":
                assert name in fxkfac.kfac(program, MSE(), (x, y))

    @pytest.mark.parametrize("function", [by_nested_jvp, by_autograd])
    def test_under_no_grad(self, function):
        with torch.no_grad():
            program = fxkfac.trace(function, X, PARAMS)
            proves(program, X, Y[:, :1])


STOPPED = {"W": rand(4, 3), "U": rand(4, 3, seed=1), "V": rand(3, 3, seed=2)}


class TestStoppedGradients:
    """The user's own detach stops the gradient; one that autograd puts there does not."""

    SPELLINGS = ("detached", "no_grad", "frozen_use", "whole_numbers")

    @staticmethod
    def detached(params, x):
        h = torch.tanh(x @ params["W"])
        return (h + 2 * h.detach()) @ params["V"] + (x @ params["U"]).detach()

    @staticmethod
    def no_grad(params, x):
        h = torch.tanh(x @ params["W"])
        with torch.no_grad():
            still = torch.exp(h) + x @ params["U"]
        return (h + still) @ params["V"]

    @staticmethod
    def frozen_use(params, x):
        """The same weight, once with and once without gradient."""
        return torch.tanh(x @ params["W"]) @ params["V"] + x @ params["W"].detach()

    @staticmethod
    def whole_numbers(params, x):
        """Which code of a table is nearest, and which of two products is larger."""
        z = torch.tanh(x @ params["W"])
        code = params["V"][torch.cdist(z, params["V"]).argmin(-1)]
        larger = x @ params["U"] > x @ params["U"].exp()
        return z + (code - z).detach() + larger * code

    @staticmethod
    def inside_a_derivative(params, x):
        """Here autograd saves tensors by detaching them, next to the user's own detach."""

        def f(z):
            h = torch.tanh(z @ params["W"])
            return (h * h.detach() + z @ params["U"]) @ params["V"]

        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    @pytest.mark.parametrize("name", [*SPELLINGS, "inside_a_derivative"])
    def test_of_a_function(self, name):
        function = getattr(self, name)
        program = fxkfac.trace(function, X, STOPPED)
        proves(program, X, Y)

    @pytest.mark.parametrize("name", SPELLINGS)
    def test_of_a_module(self, name):
        function, tensors = getattr(self, name), STOPPED

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                for key, value in tensors.items():
                    self.register_parameter(key, nn.Parameter(value.clone()))

            def forward(self, x):
                return function({key: getattr(self, key) for key in tensors}, x)

        model = Model()
        program = fxkfac.trace(model, X)
        proves(program, X, Y)
        both = fxkfac.trace(function, X, tensors)
        same(
            fxkfac.kfac(program, MSE(), (X, Y)),
            fxkfac.kfac(both, MSE(), (X, Y)),
        )

    @pytest.mark.parametrize("name", ["detached", "no_grad"])
    def test_what_is_behind_it_has_no_curvature(self, name):
        program = fxkfac.trace(getattr(self, name), X, STOPPED)
        factors = fxkfac.kfac(program, MSE(), (X, Y))
        assert torch.equal(factors.dense("U"), torch.zeros(12, 12, dtype=F64))
        assert factors.dense("V").any()

    def test_the_frozen_use_does_not_count(self):
        program = fxkfac.trace(self.frozen_use, X, STOPPED)
        data = X[:1], Y[:1]
        close(
            fxkfac.kfac(program, MSE(), data).dense("W"),
            exact.ggn(self.frozen_use, MSE(), data, "W", STOPPED),
        )


class TestAttention:
    """Inside, tokens come first or are one axis with the data."""

    @staticmethod
    def traced(batch_first):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0]

        model = seeded(Model)
        x = rand(3, 2, 4, seed=1)  # (N, T, d)
        inputs = x if batch_first else x.transpose(0, 1)
        return model, fxkfac.trace(model, inputs, batch_axis=0 if batch_first else 1), inputs

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_the_batch_axis_is_found_and_printed(self, batch_first):
        _, program, inputs = self.traced(batch_first)
        lines = [line for line in str(program).splitlines() if "attention." in line]
        assert {line.split()[0] for line in lines} == set(program.parameters)
        for use, line in zip(program.uses, lines, strict=True):
            assert use.batch is not None
            assert "unknown" not in line
            # tokens come first inside, so that each one's data lie side by side
            assert str(use.batch) in ("N", "2·N")
            assert str(use.batch) == "N" or "(2·N)" in line
        proves(program, inputs, rand(*inputs.shape, seed=2))

    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_both_ways_are_the_same_model(self, sharing):
        y = rand(3, 2, 4, seed=2)
        found = []
        for batch_first in (True, False):
            _, program, inputs = self.traced(batch_first)
            target = y if batch_first else y.transpose(0, 1)
            found.append(fxkfac.kfac(program, MSE(), (inputs, target), sharing=sharing))
        same(*found)

    def test_reduce_puts_the_tokens_of_one_datum_together(self):
        _, program, x = self.traced(batch_first=True)
        factors = fxkfac.kfac(program, MSE(), (x, rand(3, 2, 4)), sharing="reduce")
        mean = torch.cat([x.mean(1), torch.ones(3, 1, dtype=F64)], dim=1)
        close(factors["attention.in_proj_weight"].A, 2 / 24 * mean.T @ mean)


class TestAmbiguousAxes:
    def test_zeros_fit_every_layout(self):
        """Neither a zero state nor a zero gradient tells (N, 2) from (2, N)."""

        def model(params, x):
            state = x.new_zeros(2 * len(x), 3) @ params["U"]
            return x @ params["W"] + 0 * state[: len(x)]

        program = fxkfac.trace(model, X, {"W": rand(4, 3), "U": rand(3, 3)})
        found = {use.parameter: use.batch for use in program.uses}
        assert str(found["W"]) == "N"
        assert found["U"] is None
        assert not fxkfac.kfac(program, MSE(), (X, Y)).dense("U").any()
        with pytest.raises(BatchAxisError, match="U enters"):
            fxkfac.kfac(program, MSE(), (X, Y), sharing="reduce")


class Cell(nn.Module):
    """One parameter per spelling, for the printed table."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.W = nn.Parameter(torch.empty(4, 6))

    def forward(self, x):
        h = torch.tanh(x @ self.W[:, :3])  # HERE: slice
        return self.head(h)  # HERE: head


@pytest.fixture(scope="module")
def cell():
    model = seeded(Cell)
    with torch.no_grad():
        model.W.copy_(rand(4, 6, seed=3))
    return fxkfac.trace(model, X)


class TestPrinted:
    @staticmethod
    def row(program, name):
        lines = str(program).splitlines()
        (line,) = (line for line in lines if re.match(rf"{re.escape(name)}\s", line))
        return re.split(r"\s{2,}", line.strip())

    def test_header(self, cell):
        lines = str(cell).splitlines()
        assert lines[0].startswith("3 parameters in 3 uses, captured by torch.export")
        assert "any batch size" in lines[0]
        expected = ["parameter", "op", "view", "orientation", "x", "y", "batch axis", "source"]
        assert re.split(r"\s{2,}", lines[1].strip()) == expected

    def test_without_print_there_is_the_header_alone(self, cell):
        assert repr(cell) == f"Program({str(cell).splitlines()[0]})"

    def test_a_view_of_a_parameter(self, cell):
        row = self.row(cell, "W")
        assert row[0] == "W"
        assert row[1] in ("matmul", "mm", "linear")
        assert row[2].startswith("slice")
        assert row[3:7] == ["i o", "N×4", "N×3", "0"]
        assert row[7] == f"test_capture.py:{line_of('slice')}"

    def test_a_layer_and_its_bias(self, cell):
        at = f"test_capture.py:{line_of('head')}"
        weight, bias = self.row(cell, "head.weight"), self.row(cell, "head.bias")
        assert weight == ["head.weight", "linear", "–", "o i", "N×3", "N×3", "0", at]
        assert bias == ["head.bias", "linear", "–", "o (joined)", "1", "N×3", "0", at]

    def test_every_use_names_its_source(self, cell):
        for use in cell.uses:
            assert use.source.file == __file__
            assert use.source.function == "forward"
            assert use.source.code in (
                "h = torch.tanh(x @ self.W[:, :3])  # HERE: slice",
                "return self.head(h)  # HERE: head",
            )

    def test_the_source_of_a_function(self):
        def model(params, x):
            h = torch.tanh(x @ params["W"])  # HERE: function
            return helper(params, h)

        def helper(params, h):
            return h @ params["V"]  # HERE: helper

        program = fxkfac.trace(model, X, {"W": rand(4, 3), "V": rand(3, 3)})
        assert self.row(program, "W")[7] == f"test_capture.py:{line_of('function')}"
        assert self.row(program, "V")[7] == f"test_capture.py:{line_of('helper')}"

    def test_the_source_in_a_function_with_derivatives(self):
        def model(params, x):
            def f(z):
                return torch.tanh(z @ params["W"]).sum(1)  # HERE: derivative

            return torch.func.jvp(f, (x,), (x,))[1]

        program = fxkfac.trace(model, X, {"W": rand(4, 3)})
        at = f"test_capture.py:{line_of('derivative')}"
        lines = [line for line in str(program).splitlines() if re.match(r"W\s", line)]
        assert lines
        assert all(line.endswith(at) for line in lines), str(program)

    def test_refusals_are_kept_and_printed(self):
        program = fxkfac.trace(by_nested_jvp, X, PARAMS)
        refusals = program.tapped.refusals
        assert "torch.export" in refusals
        assert program.tapped.captured.front_end not in refusals
        for front_end, reason in refusals.items():
            assert len(reason) > 20
            assert f"refused by {front_end}: {reason}" in str(program)

    def test_no_refusal_where_the_first_does(self, cell):
        assert not cell.tapped.refusals
        assert "refused" not in str(cell)


WEIGHTS = {"W": rand(4, 3), "V": rand(3, 3)}


class TestInputs:
    """One tensor, a tuple, a dict; nested, and with Python numbers among them."""

    @staticmethod
    def scaled(params, x, z, scale=1.0):
        return torch.tanh(x @ params["W"] * scale) @ params["V"] + z

    def test_a_tuple_a_list_and_a_dict_are_the_same(self):
        found = []
        for inputs in ((X, Y), [X, Y], {"x": X, "z": Y}, {"z": Y, "x": X}):
            program = fxkfac.trace(self.scaled, inputs, WEIGHTS)
            proves(program, inputs, Y)
            found.append(fxkfac.kfac(program, MSE(), [(inputs, Y)]))
        for other in found[1:]:
            same(other, found[0])

    def test_a_list_where_the_example_was_a_tuple(self):
        """As a DataLoader hands it out."""
        program = fxkfac.trace(self.scaled, (X, Y), WEIGHTS)
        same(
            fxkfac.kfac(program, MSE(), [([X, Y], Y)]),
            fxkfac.kfac(program, MSE(), [((X, Y), Y)]),
        )

    def test_keywords_of_a_module(self):
        class Model(nn.Linear):
            def forward(self, x, shift=None):
                y = super().forward(x)
                return y if shift is None else y + shift

        model = seeded(lambda: Model(4, 3))
        program = fxkfac.trace(model, {"x": X, "shift": Y})
        proves(program, {"x": X, "shift": Y}, Y)
        close(program.run({"x": X, "shift": Y}).prediction, model(X, Y))

    def test_nested_inputs(self):
        def model(params, batch):
            return batch["a"]["x"] @ params["W"] + batch["b"][0]

        inputs = ({"a": {"x": X}, "b": [Y]},)
        program = fxkfac.trace(model, inputs, {"W": rand(4, 3)})
        proves(program, inputs, Y)

    def test_python_numbers(self):
        program = fxkfac.trace(self.scaled, (X, Y, 2.0), WEIGHTS)
        proves(program, (X, Y, 2.0), Y)
        close(program.run((X, Y, 2.0)).prediction, self.scaled(WEIGHTS, X, Y, 2.0))

    def test_another_python_number(self):
        """It is in the graph as a constant, so that another one needs another graph."""
        program = fxkfac.trace(self.scaled, (X, Y, 2.0), WEIGHTS)
        for scale in (3.0, 2.0, 0.5):
            close(program.run((X, Y, scale)).prediction, self.scaled(WEIGHTS, X, Y, scale))
            proves(program, (X, Y, scale), Y)
            fresh = fxkfac.trace(self.scaled, (X, Y, scale), WEIGHTS)
            same(
                fxkfac.kfac(program, MSE(), [((X, Y, scale), Y)]),
                fxkfac.kfac(fresh, MSE(), [((X, Y, scale), Y)]),
            )

    def test_an_input_without_batch_axis(self):
        def model(params, x, mask):
            return (x * mask) @ params["W"]

        mask = torch.tensor([1.0, 0.0, 1.0, 0.5], dtype=F64)
        for batch_axis in (0, (0, None)):
            program = fxkfac.trace(model, (X, mask), {"W": rand(4, 3)}, batch_axis=batch_axis)
            for size in (5, 3):
                data = (X[:size], mask), Y[:size]
                proves(program, *data)
                rows = X[:size] * mask
                close(fxkfac.kfac(program, MSE(), [data])["W"].A, 2 / (3 * size) * rows.T @ rows)

    def test_integers_that_are_indices(self):
        model = seeded(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)))
        tokens = classes(5, 2, C=7)
        program = fxkfac.trace(model, tokens)
        proves(program, tokens, classes(5), CE())
        counts = tokens.flatten().bincount(minlength=7).to(F64)
        close(fxkfac.kfac(program, CE(), (tokens, classes(5)))["0.weight"].A, counts / 5)

    def test_a_wrong_type_is_refused_by_name(self):
        with pytest.raises(FxkfacError, match="no tensor among the inputs"):
            fxkfac.trace(self.scaled, "no tensors at all", WEIGHTS)


class TestTheFrontEndThatCoversMost:
    """An op that one front end keeps whole and that has no rule is taken apart by another one."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    @pytest.mark.parametrize("policy", ["error", "diagonal"])
    def test_lstm(self, policy):
        model = seeded(self.Recurrent)
        program = fxkfac.trace(model, rand(5, 6, 4), unsupported=policy)
        assert program.uncovered == ()
        assert {"lstm.weight_hh_l0", "lstm.bias_hh_l0"} <= set(program.parameters)
        proves(program, rand(3, 6, 4, seed=1), rand(3, 3))

    def test_the_diagonal_of_a_graph_that_asks_for_lengths(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.gain = nn.Linear(2, 3), nn.Parameter(rand(3))

            def forward(self, x):
                h = self.first(x.view(len(x), 2, 2)) * self.gain
                return h.reshape(x.shape[0], 6)

        model = seeded(Model)
        program = fxkfac.trace(model, X, unsupported="diagonal")
        found = fxkfac.kfac(program, MSE(), (X, rand(len(X), 6)))["gain"].diagonal
        close(found, exact.ggn(model, MSE(), (X, rand(len(X), 6)), "gain").diagonal())
