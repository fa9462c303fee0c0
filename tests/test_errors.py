"""Every error that a user can meet: its class, and what it says was found, wanted and to do."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import fxkfac
from fxkfac import errors, laplace, operators
from fxkfac.errors import (
    BatchAxisError,
    BlockError,
    CaptureError,
    DataError,
    FxkfacError,
    LossError,
    MergeError,
    NoDataError,
    NonFiniteError,
    OptionError,
    ParameterError,
    TapMismatch,
    UnknownParameter,
    UnsupportedUse,
)
from fxkfac.likelihoods.base import Likelihood

F64 = torch.float64
MSE, CE, BCE = nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=3, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


@contextmanager
def refuses(kind, *said):
    """Expect an error of exactly this class whose message says all of this."""
    with pytest.raises(FxkfacError) as info:
        yield info
    assert type(info.value) is kind, f"{type(info.value).__name__}: {info.value}"
    for part in said:
        assert part in str(info.value), f"{part!r} is not in:\n{info.value}"


def test_an_error_of_the_models_own_says_at_which_batch():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, y = torch.randn(9, 4), torch.randint(0, 2, (9,))
    program = fxkfac.trace(model, x)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    with pytest.raises(ValueError, match="more than 1 value per channel") as info:
        fxkfac.kfac(program, nn.CrossEntropyLoss(), batches, fisher="mc")
    assert "That was batch 1." in info.value.__notes__


def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


X, Y = rand(5, 4, seed=5), classes(5)


@pytest.fixture(scope="module")
def program():
    return fxkfac.trace(seeded(mlp), X)


@pytest.fixture(scope="module")
def factors(program):
    return fxkfac.kfac(program, CE(), (X, Y))


def line_of(code):
    """Where in this file the one line is that ends in the comment `# HERE: code`."""
    with open(__file__) as file:
        found = [k for k, line in enumerate(file, 1) if line.rstrip().endswith(f"# HERE: {code}")]
    (line,) = found
    return line


def test_all_errors_are_one_family():
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    assert len(kinds) > 10
    assert all(issubclass(kind, FxkfacError) for kind in kinds)


def test_factors_of_blocks_that_have_none_or_several():
    def there_and_back(params, x):
        return torch.tanh(x @ params["W"]) @ params["W"].T * params["c"]

    x = torch.randn(5, 4, dtype=F64)
    params = {"W": torch.randn(4, 3, dtype=F64), "c": torch.randn(4, dtype=F64)}
    factors = fxkfac.kfac(fxkfac.trace(there_and_back, x, params), nn.MSELoss(), (x, x))
    for name, text in {
        "c": "of kind Diagonal, .* a Block",
        "W": "sum of 2 .* `block.terms`",
    }.items():
        assert not hasattr(factors[name], "A")
        with pytest.raises(BlockError, match=f"block of {name} is .*{text}"):
            _ = factors[name].B


def test_an_unknown_name_is_a_key_error_that_prints_well():
    assert issubclass(UnknownParameter, KeyError)
    assert str(UnknownParameter("no 'such' name")) == "no 'such' name"


class TestCapture:
    FRONT_ENDS = ("torch.export", "make_fx (symbolic)", "make_fx (real)")

    def test_control_flow_that_depends_on_data(self):
        def positive_only(params, x):
            y = x @ params["W"]
            return y if y.sum().item() > 0 else -y.flip(1)

        with refuses(CaptureError, "positive_only", *self.FRONT_ENDS, "trace a function around"):
            fxkfac.trace(positive_only, X, {"W": rand(4, 3)})

    def test_values_that_come_through_numpy(self):
        """In a graph they would be constants: those of the example."""

        def through_numpy(params, x):
            return x @ params["W"] + float(np.mean(x.numpy()))

        with refuses(CaptureError, "through_numpy", *self.FRONT_ENDS, "numpy"):
            fxkfac.trace(through_numpy, X, {"W": rand(4, 3)})

    def test_a_module_that_goes_through_numpy(self):
        class ThroughNumpy(nn.Linear):
            def forward(self, x):
                return super().forward(torch.from_numpy(np.tanh(x.numpy())))

        with refuses(CaptureError, "ThroughNumpy", *self.FRONT_ENDS):
            fxkfac.trace(seeded(lambda: ThroughNumpy(4, 4)), X)

    def test_each_front_end_gives_a_reason(self):
        def branches(params, x):
            y = x @ params["W"]
            return y if float(y[0, 0]) > 0 else y.flip(1)

        with refuses(CaptureError) as info:
            fxkfac.trace(branches, X, {"W": rand(4, 3)})
        lines = str(info.value).splitlines()
        for front_end in self.FRONT_ENDS:
            (line,) = (line for line in lines if line.startswith(f"  {front_end}: "))
            assert len(line.removeprefix(f"  {front_end}: ")) > 20

    def test_a_model_that_returns_several_tensors(self):
        def pair(params, x):
            y = x @ params["W"]
            return y, y.exp()

        with refuses(FxkfacError, "tuple", "2 tensors", "expected one", "Wrap the model"):
            fxkfac.trace(pair, X, {"W": rand(4, 3)})

    def test_a_model_that_returns_no_floats(self):
        def labels(params, x):
            return (x @ params["W"]).argmax(1)

        with refuses(CaptureError, "int64", "expected floating"):
            fxkfac.trace(labels, X, {"W": rand(4, 3)})


def exponential(params, x):
    scale = params["log_scale"].exp()  # HERE: exp
    return x @ params["W"] * scale


def divided(params, x):
    return (x @ params["W"]) / params["gain"]  # HERE: div


class Exponential(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.log_scale.exp()  # HERE: module


class TestUnsupportedUse:
    REMEDY = ("unsupported='diagonal'", "unsupported='skip'", "params")

    def test_module_in_the_users_own_line(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), Exponential()))
        at = f"{__file__}:{line_of('module')} in forward"
        with refuses(UnsupportedUse, "1.log_scale", "aten.exp", at, *self.REMEDY):
            fxkfac.trace(model, X)

    def test_module_of_torchs(self):
        model = seeded(lambda: nn.EmbeddingBag(5, 3, mode="max"))
        with refuses(UnsupportedUse, "weight", "embedding_bag", *self.REMEDY):
            fxkfac.trace(model, torch.arange(4).view(2, 2))

    @pytest.mark.parametrize(
        ("f", "name", "op"), [(exponential, "log_scale", "exp"), (divided, "gain", "div")]
    )
    def test_function(self, f, name, op):
        params = {"W": rand(4, 3), name: rand(3)}
        at = f"{__file__}:{line_of(op)} in {f.__name__}"
        with refuses(UnsupportedUse, name, f"aten.{op}", at, *self.REMEDY) as info:
            fxkfac.trace(f, X, params)
        assert "W enters" not in str(info.value)

    def test_all_uses_are_listed(self):
        def f(params, x):
            return (x @ params["W"]) / params["gain"] + params["shift"].exp()

        with refuses(UnsupportedUse, "2 uses", "gain enters", "shift enters"):
            fxkfac.trace(f, X, {"W": rand(4, 3), "gain": rand(3), "shift": rand(3)})

    def test_an_output_that_is_the_same_for_all_data(self):
        """A product of two parameters: no datum has its own part of the gradient there."""

        def low_rank(params, x):
            return x @ (params["U"] @ params["V"])

        with refuses(UnsupportedUse, "U", "V", "aten.m", *self.REMEDY):
            fxkfac.trace(low_rank, X, {"U": rand(4, 2), "V": rand(2, 3)})


class TestNames:
    def test_in_trace(self):
        with refuses(UnknownParameter, "'0.wieght'", "Did you mean", "'0.weight'"):
            fxkfac.trace(seeded(mlp), X, params=["0.wieght"])

    def test_patterns_in_trace(self):
        with refuses(UnknownParameter, "'encoder.*'", "0.weight"):
            fxkfac.trace(seeded(mlp), X, params=["encoder.*"])

    def test_in_factors(self, factors):
        with refuses(UnknownParameter, "'0.weights'", "Did you mean", "'0.weight'"):
            factors["0.weights"]

    def test_in_dense(self, factors):
        with refuses(UnknownParameter, "'2.bais'", "Did you mean", "'2.bias'"):
            factors.dense("0.weight", "2.bais")

    def test_a_name_of_a_bias_that_has_joined(self, factors):
        """It has no block of its own; the one that holds it is named."""
        with refuses(UnknownParameter, "'0.bias'", "'0.weight'"):
            factors["0.bias"]

    def test_in_kfac(self, program):
        with refuses(UnknownParameter, "'1.weight'", "'0.weight'"):
            fxkfac.kfac(program, CE(), (X, Y), params={"1.weight": rand(3, 4)})

    def test_in_check(self, program):
        with refuses(UnknownParameter, "'1.weight'", "'0.weight'"):
            fxkfac.check(program, CE(), (X, Y), params={"1.weight": rand(3, 4)})

    def test_in_solve(self, factors):
        with refuses(UnknownParameter, "0.bias", "0.weight", "pass them all"):
            factors.solve({"0.weight": rand(3, 4)}, damping=1.0)

    def test_nothing_to_solve(self, factors):
        with refuses(UnknownParameter, "'1.weight'"):
            factors.solve({"1.weight": rand(3, 4)}, damping=1.0)


class TestParameters:
    def test_a_function_without(self):
        def f(params, x):
            return x @ params["W"]

        with refuses(ParameterError, "params", "found None", "nested dicts", "params={"):
            fxkfac.trace(f, X)

    def test_a_function_with_a_list_of_names(self):
        with refuses(ParameterError, "params['0']", "str", "expected a tensor"):
            fxkfac.trace(lambda params, x: x @ params["W"], X, ["W"])

    def test_what_is_no_tensor(self):
        params = {"layer": {"W": rand(4, 3), "rate": 0.5}}
        with refuses(ParameterError, "'layer.rate'", "float", "expected a tensor", "closure"):
            fxkfac.trace(lambda p, x: x @ p["layer"]["W"], X, params)

    def test_none_requires_gradients(self):
        model = seeded(mlp).requires_grad_(False)
        with refuses(ParameterError, "4 parameters", "Sequential", "params=['*']"):
            fxkfac.trace(model, X)

    def test_different_dtypes(self):
        model = seeded(mlp)
        model[2].float()
        with refuses(ParameterError, "different dtypes", "float64", "float32", "2.weight"):
            fxkfac.trace(model, X)

    def test_different_devices(self):
        model = seeded(mlp)
        model[2].to("meta")
        with refuses(ParameterError, "different devices", "cpu", "meta", "2.weight"):
            fxkfac.trace(model, X)

    def test_another_shape_in_trace(self):
        params = {"0.weight": rand(3, 5)}
        with refuses(ParameterError, "'0.weight'", "(3, 5)", "(3, 4)"):
            fxkfac.trace(seeded(mlp), X, params)

    def test_another_shape_in_kfac(self, program):
        with refuses(ParameterError, "'0.weight'", "(4, 3)", "(3, 4)", "trace anew"):
            fxkfac.kfac(program, CE(), (X, Y), params={"0.weight": rand(4, 3)})

    def test_another_shape_in_check(self, program):
        with refuses(ParameterError, "'2.bias'", "(1,)", "(3,)", "trace anew"):
            fxkfac.check(program, CE(), (X, Y), params={"2.bias": rand(1)})

    def test_another_dtype_in_kfac(self, program):
        with refuses(ParameterError, "'0.weight'", "float32", "float64"):
            fxkfac.kfac(program, CE(), (X, Y), params={"0.weight": rand(3, 4).float()})


class TestData:
    def test_no_batches(self, program):
        with refuses(NoDataError, "no batch", "at least one") as info:
            fxkfac.kfac(program, CE(), [])
        assert issubclass(NoDataError, DataError)
        assert (info.value.part.n, len(info.value.part.products)) == (0, 0)

    def test_an_iterator_used_up(self, program):
        pairs = iter([(X, Y)])
        assert fxkfac.kfac(program, CE(), pairs).n == 5
        with refuses(NoDataError, "no batch", "iterator used up"):
            fxkfac.kfac(program, CE(), pairs)

    def test_an_empty_batch(self, program):
        with refuses(DataError, "(0, 4)", "at least one"):
            fxkfac.kfac(program, CE(), (X[:0], Y[:0]))

    @pytest.mark.parametrize("call", [fxkfac.kfac, fxkfac.step, fxkfac.check])
    @pytest.mark.parametrize(
        ("axis", "inputs"), [(0, X[0, 0]), (1, X[0])], ids=["a number", "a vector"]
    )
    def test_inputs_without_the_batch_axis(self, call, axis, inputs):
        def f(params, x):
            return x.movedim(axis, 0) @ params["W"]

        program = fxkfac.trace(f, X.movedim(0, axis), {"W": rand(4, 3)}, batch_axis=axis)
        with refuses(DataError, f"{[tuple(inputs.shape)]}", f"batch axes [{axis}]", "at least one"):
            call(program, CE(), (inputs, Y))

    def test_an_empty_example(self):
        with refuses(DataError, "(0, 4)", "at least one"):
            fxkfac.trace(seeded(mlp), X[:0])

    def test_no_tensor_in_the_example(self):
        with refuses(DataError, "no tensor among the inputs", "expected a batch"):
            fxkfac.trace(seeded(mlp), ())

    @pytest.mark.parametrize("call", [fxkfac.kfac, fxkfac.check])
    @pytest.mark.parametrize("loss", [CE(), MSE(), BCE()], ids=str)
    def test_another_number_of_targets(self, program, call, loss):
        targets = Y[:4] if isinstance(loss, CE) else rand(4, 3).sigmoid()
        with refuses(DataError, "targets", f"{tuple(targets.shape)}", "(5, 3)", "expected"):
            call(program, loss, (X, targets))

    def test_targets_that_would_broadcast(self, program):
        with refuses(DataError, "(5, 1)", "(5, 3)", "broadcast"):
            fxkfac.kfac(program, MSE(), (X, rand(5, 1)))

    @pytest.mark.parametrize("wrong", [3, -1])
    def test_class_out_of_range(self, program, wrong):
        targets = Y.clone()
        targets[2] = wrong
        with refuses(DataError, "1 of 5", f"[{wrong}]", "0..2", "Renumber"):
            fxkfac.kfac(program, CE(), (X, targets))

    def test_classes_as_floats(self, program):
        with refuses(DataError, "float64", "(5,)", "(5, 3)"):
            fxkfac.kfac(program, CE(), (X, Y.double()))

    def test_targets_outside_of_probabilities(self, program):
        with refuses(DataError, "15 of 15", "[0, 1]", "[2.0]"):
            fxkfac.kfac(program, BCE(), (X, torch.full((5, 3), 2.0, dtype=F64)))

    def test_targets_not_finite(self, program):
        targets = rand(5, 3)
        targets[3, 1] = float("nan")
        with refuses(DataError, "1 of 15", "(3, 1)", "expected finite"):
            fxkfac.kfac(program, MSE(), (X, targets))

    def test_every_target_ignored(self, program):
        with refuses(NoDataError, "divide by 0", "ignored"):
            fxkfac.kfac(program, CE(), (X, torch.full((5,), -100)))

    @pytest.mark.parametrize("run", [fxkfac.kfac, fxkfac.step])
    def test_without_a_target_that_counts_they_are_a_part_of_more(self, program, run):
        """Their inputs are among all inputs, although no target of theirs has a weight."""
        loss, y = CE(weight=torch.tensor([1.0, 2.0, 0.0], dtype=F64)), torch.tensor([0, 1, 1, 2, 2])
        with refuses(NoDataError, "divide by 0") as info:
            run(program, loss, (X[3:], y[3:]))
        part = info.value.part
        if run is fxkfac.step:
            assert not any(g.any() for g in part.gradients.values())
            assert part.loss == 0
            part = part.factors
        whole = part + fxkfac.kfac(program, loss, (X[:3], y[:3]), fisher=part.settings.fisher)
        expected = fxkfac.kfac(program, loss, (X, y), fisher="type-2")
        torch.testing.assert_close(whole["0.weight"].A, expected["0.weight"].A)

    def test_one_batch_whose_targets_are_all_ignored(self, program):
        """Nothing is wrong with the data set: the mean is over both batches."""
        ignored = torch.full((5,), -100)
        split = fxkfac.kfac(program, CE(), [(X, Y), (X + 1, ignored)])
        whole = fxkfac.kfac(program, CE(), (torch.cat([X, X + 1]), torch.cat([Y, ignored])))
        torch.testing.assert_close(split.dense(), whole.dense())

    def test_what_is_no_pair(self, program):
        for data in ([X], X, X[0, 0]):
            with refuses(DataError, "a batch is of type Tensor", "pair (inputs, targets)"):
                fxkfac.kfac(program, CE(), data)
        with refuses(DataError, "a batch is of type tuple", "pair (inputs, targets)"):
            fxkfac.kfac(program, CE(), [(X, Y, Y)])
        with refuses(DataError, "which has targets of type dict", "pair (inputs, targets)"):
            fxkfac.kfac(program, CE(), (X, {"y": Y}))

    def test_a_batch_in_the_middle_that_is_no_pair(self, program):
        with refuses(DataError, "a batch is of type dict", "pair (inputs, targets)"):
            fxkfac.kfac(program, CE(), [(X, Y), {"x": X}])

    def test_what_is_no_data(self, program):
        with refuses(DataError, "data is of type int", "pair"):
            fxkfac.kfac(program, CE(), 5)

    @pytest.mark.parametrize("data", [X, 5, (X, Y, Y)], ids=["tensor", "int", "triple"])
    def test_what_is_no_pair_in_check(self, program, data):
        with refuses(DataError, "pair (inputs, targets)"):
            fxkfac.check(program, CE(), data)

    @pytest.mark.parametrize("inputs", [{"x": X}, (X, X), [[X]]], ids=["dict", "pair", "deeper"])
    def test_inputs_nested_differently(self, program, inputs):
        with refuses(DataError, "nested as", "traced with", "same structure"):
            fxkfac.kfac(program, CE(), [(inputs, Y)])

    def test_inputs_of_different_length(self):
        def f(params, x, z):
            return (x + z) @ params["W"]

        params = {"W": rand(4, 3)}
        program = fxkfac.trace(f, (X, X), params)
        with refuses(DataError, "(5, 4)", "(4, 4)", "same number of data", "batch_axis"):
            fxkfac.kfac(program, CE(), ((X, X[:4]), Y))

    def test_a_batch_axis_that_does_not_fit(self):
        with refuses(DataError, "batch_axis=(0, None)", "expected", "torch.vmap"):
            fxkfac.trace(seeded(mlp), X, batch_axis=(0, None))

    def test_a_batch_axis_that_is_not_there(self):
        with refuses(DataError, "axis 2", "(5, 4)", "batch_axis"):
            fxkfac.trace(seeded(mlp), X, batch_axis=2)

    def test_no_input_has_a_batch_axis(self):
        with refuses(DataError, "(5, 4)", "[None]", "batch_axis"):
            fxkfac.trace(seeded(mlp), X, batch_axis=None)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_inputs_not_finite(self, program, value):
        wrong = X.clone()
        wrong[1, 2] = value
        with refuses(DataError, "input tensor 0", "(5, 4)", "1 values", "NaN", "expected finite"):
            fxkfac.kfac(program, CE(), (wrong, Y))

    def test_example_not_finite(self):
        with refuses(DataError, "input tensor 0", "20 values", "expected finite"):
            fxkfac.trace(seeded(mlp), X / 0)


class TestNotFinite:
    def test_prediction(self):
        def f(params, x):
            return (x @ params["W"]).exp()

        program = fxkfac.trace(f, X / 10, {"W": rand(4, 3)})
        pairs = [(X / 10, X[:, :3]), (X * 1e5, X[:, :3])]
        with refuses(NonFiniteError, "prediction", "batch 1", "NaN or Inf", "parameters"):
            fxkfac.kfac(program, MSE(), pairs)

    def test_parameter(self):
        model = seeded(mlp)
        program = fxkfac.trace(model, X)
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with refuses(NonFiniteError, "prediction", "batch 0"):
            fxkfac.kfac(program, CE(), (X, Y))

    def test_input_factor(self):
        """Squares of the layer's input overflow, while the prediction stays finite."""
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Tanh()))
        program = fxkfac.trace(model, X)
        assert model(X * 1e200).isfinite().all()
        with refuses(NonFiniteError, "factor A", "'0.weight'", "batch 2", "wider dtype"):
            fxkfac.kfac(program, CE(), [(X, Y), (X, Y), (X * 1e200, Y)])

    def test_output_factor(self):
        def f(params, x):
            return x @ params["U"] @ params["V"]

        program = fxkfac.trace(f, X, {"U": rand(4, 3), "V": rand(3, 3)})
        large = {"U": rand(4, 3) * 1e-200, "V": rand(3, 3) * 1e200}
        with refuses(NonFiniteError, "factor B", "'U'", "batch 0"):
            fxkfac.kfac(program, CE(), (X, Y), params=large)

    def test_diagonal(self):
        def f(params, x):
            return (x * params["gain"]) @ params["V"]

        params = {"gain": rand(4), "V": rand(4, 3)}
        program = fxkfac.trace(f, X, params, unsupported="diagonal")
        large = {"gain": rand(4) * 1e-200, "V": rand(4, 3) * 1e200}
        with refuses(NonFiniteError, "'gain'", "batch 0"):
            fxkfac.kfac(program, CE(), (X, Y), params=large)


class Concave(Likelihood):
    def nll(self, prediction, target):
        return -(prediction - target).square().sum(1)


class Convex(Likelihood):
    def nll(self, prediction, target):
        return (prediction - target).square().sum(1)


class TestLoss:
    def test_without_likelihood(self, program):
        with refuses(LossError, "L1Loss", "nn.MSELoss", "Likelihood", "nll"):
            fxkfac.kfac(program, nn.L1Loss(), (X, rand(5, 3)))

    def test_a_function(self, program):
        with refuses(LossError, "cross_entropy", "nn.CrossEntropyLoss"):
            fxkfac.kfac(program, nn.functional.cross_entropy, (X, Y))

    @pytest.mark.parametrize("kind", [MSE, CE, BCE])
    def test_without_reduction(self, program, kind):
        with refuses(LossError, kind.__name__, "'none'", "'mean' or 'sum'"):
            fxkfac.kfac(program, kind(reduction="none"), (X, Y))

    def test_in_check(self, program):
        with refuses(LossError, "L1Loss", "nn.MSELoss"):
            fxkfac.check(program, nn.L1Loss(), (X, rand(5, 3)))

    @pytest.mark.parametrize("fisher", ["type-2", "curvature-propagation"])
    def test_not_convex(self, program, fisher):
        with refuses(LossError, "Concave", "not convex", "row 0", "'mc' or 'empirical'"):
            fxkfac.kfac(program, Concave(), (X, rand(5, 3)), fisher=fisher)

    def test_not_convex_where_that_does_not_matter(self, program):
        found = fxkfac.kfac(program, Concave(), (X, rand(5, 3)), fisher="empirical")
        assert found.dense().isfinite().all()

    def test_without_distribution(self, program):
        with refuses(LossError, "Concave", "distribution", "'type-2'"):
            fxkfac.kfac(program, Concave(), (X, rand(5, 3)), fisher="mc")

    def test_labels_that_cannot_be_enumerated(self, program):
        with refuses(LossError, "Gaussian", "cannot be enumerated", "'mc'"):
            fxkfac.kfac(program, MSE(), (X, rand(5, 3)), fisher="type-1")

    @pytest.mark.parametrize(
        ("nll", "found"),
        [
            (lambda self, f, y: None, "returned NoneType"),
            (lambda self, f, y: 3.0, "returned float"),
            (lambda self, f, y: (f - y).square(), "shape (5, 3)"),
        ],
        ids=["None", "number", "entries"],
    )
    def test_an_nll_without_a_value_for_each_row(self, program, nll, found):
        loss = type("Own", (Likelihood,), {"nll": nll})()
        with refuses(LossError, "Own.nll", found, "one value for each row"):
            fxkfac.kfac(program, loss, (X, rand(5, 3)), fisher="empirical")

    @pytest.mark.parametrize(
        ("fisher", "formula"),
        [
            ("empirical", {"gradient": lambda self, f, y: (f - y)[:, :1]}),
            ("mc", {"gradient": lambda self, f, y: (f - y)[:, :1], "sample": lambda _, f, g: f}),
            ("type-2", {"hessian_sqrt": lambda self, f, y, v: v[:, :1]}),
            ("curvature-propagation", {"hessian_sqrt": lambda self, f, y, v: v[:, :1]}),
            (
                "type-2",
                {
                    "event_axes": lambda self, f: (),
                    "hessian_columns": lambda self, f, y: iter([f.new_ones(5, 1)]),
                },
            ),
        ],
        ids=["empirical", "mc", "type-2", "curvature-propagation", "several sites"],
    )
    def test_a_formula_of_another_shape(self, program, fisher, formula):
        """That of several sites would be broadcast to them."""
        formula["nll"] = lambda self, f, y: (f - y).square().sum(1) / 2
        with refuses(LossError, "a formula of Own", "(5, 1)", "(5, 3)"):
            loss = type("Own", (Likelihood,), formula)()
            fxkfac.kfac(program, loss, (X, rand(5, 3)), fisher=fisher)

    @pytest.mark.parametrize("value", [None, torch.ones(2)], ids=["None", "several"])
    def test_a_count_that_is_no_number(self, program, value):
        loss = type("Own", (Convex,), {"count": lambda self, f, y: value})()
        data = X, rand(5, 3)
        for call in (
            lambda: fxkfac.kfac(program, loss, data),
            lambda: fxkfac.step(program, loss, data, fisher="empirical"),
            lambda: fxkfac.exact.ggn(seeded(mlp), loss, data),
        ):
            with refuses(LossError, "Own.count returned", "expected a number"):
                call()

    def test_one_sampled_label_for_all_data(self, program):
        class Own(Likelihood):
            def nll(self, f, y):
                return (f - y).square().sum(1) / 2

            def sample(self, f, generator):
                return torch.randn(3, dtype=F64, generator=generator)

        with refuses(LossError, "Own.sample", "(3,)", "each of 5 data"):
            fxkfac.kfac(program, Own(), (X, rand(5, 3)), fisher="mc")

    def test_class_weights_of_another_number(self, program):
        with refuses(LossError, "(2,)", "3 classes", "expected one each"):
            fxkfac.kfac(program, CE(weight=torch.ones(2, dtype=F64)), (X, Y))


class TestOptions:
    def test_fisher(self, program):
        with refuses(OptionError, "'type2'", "Did you mean 'type-2'", "'empirical'"):
            fxkfac.kfac(program, CE(), (X, Y), fisher="type2")

    def test_sharing(self, program):
        with refuses(OptionError, "'expanded'", "'expand' or 'reduce'"):
            fxkfac.kfac(program, CE(), (X, Y), sharing="expanded")

    @pytest.mark.parametrize("samples", [0, -1, 1.5, True])
    @pytest.mark.parametrize("fisher", ["mc", "type-2"])
    def test_mc_samples(self, program, samples, fisher):
        with refuses(OptionError, f"mc_samples={samples}", "at least 1"):
            fxkfac.kfac(program, CE(), (X, Y), fisher=fisher, mc_samples=samples)

    def test_unsupported(self):
        with refuses(OptionError, "unsupported='ignore'", "error, diagonal, dense, identity, skip"):
            fxkfac.trace(seeded(mlp), X, unsupported="ignore")

    def test_negative_damping(self, factors):
        with refuses(OptionError, "damping=-0.5", "zero or a positive"):
            factors.solve({"0.weight": rand(3, 4), "0.bias": rand(3)}, damping=-0.5)
        with refuses(OptionError, "damping=-0.5", "zero or a positive"):
            factors["0.weight"].solve(rand(15), damping=-0.5)

    def test_a_singular_block(self, factors):
        """Cross-entropy's Hessian is singular along equal logits."""
        with refuses(OptionError, "singular", "positive damping"):
            factors.solve({"2.weight": rand(3, 3), "2.bias": rand(3)}, damping=0)

    def test_a_singular_sum(self):
        def tied(params, x):
            return torch.tanh(x @ params["W"]) @ params["W"].T

        program = fxkfac.trace(tied, X, {"W": rand(4, 3)})
        zero = {"W": torch.zeros(4, 3, dtype=F64)}
        factors = fxkfac.kfac(program, MSE(), (X, X), params=zero)
        assert len(factors["W"].terms) == 2
        with refuses(OptionError, "singular", "positive damping"):
            factors.solve({"W": rand(4, 3)}, damping=0)
        with refuses(OptionError, "damping=-1", "zero or a positive"):
            factors["W"].solve(rand(12), damping=-1.0)

    def test_a_singular_diagonal(self):
        def f(params, x):
            return (x * params["gain"]) @ params["V"]

        params = {"gain": rand(4), "V": rand(4, 3)}
        program = fxkfac.trace(f, X, params, unsupported="diagonal")
        without = {"V": torch.zeros(4, 3, dtype=F64)}
        factors = fxkfac.kfac(program, MSE(), (X, rand(5, 3)), params=without)
        with refuses(OptionError, "singular", "positive damping"):
            factors.solve({"gain": rand(4)}, damping=0)
        with refuses(OptionError, "damping=-1", "zero or a positive"):
            factors["gain"].solve(rand(4), damping=-1.0)


class TestOtherKinds:
    """What is of another kind than expected is named, wherever it is passed."""

    @pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(4, 3)]], ids=repr)
    def test_a_model(self, model):
        with refuses(ParameterError, "the model is", "expected a module", "f(params, x)"):
            fxkfac.trace(model, X)

    def test_inputs_without_a_tensor(self):
        with refuses(DataError, "ndarray", "expected a batch", "torch.as_tensor"):
            fxkfac.trace(seeded(mlp), X.numpy())

    @pytest.mark.parametrize(
        ("option", "kind"),
        [
            ({"params": 3}, ParameterError),
            ({"structure": "diagonal"}, OptionError),
            ({"structure": {0: "diagonal"}}, ParameterError),
            ({"apart": 4}, OptionError),
            ({"dense_limit": "many"}, OptionError),
            ({"batch_axis": "0"}, DataError),
            ({"batch_axis": True}, DataError),
            ({"batch_axis": (-3,)}, DataError),
            ({"batch_axis": -3}, DataError),
        ],
        ids=repr,
    )
    def test_what_a_trace_is_asked_for(self, option, kind):
        with refuses(kind, "expected"):
            fxkfac.trace(seeded(mlp), X, **option)

    def test_targets_in_the_place_of_parameters(self, program):
        with refuses(ParameterError, "params is of type Tensor", "(inputs, targets)"):
            fxkfac.kfac(program, CE(), X, Y)
        with refuses(ParameterError, "params is of type Tensor", "(inputs, targets)"):
            fxkfac.step(program, CE(), X, Y)

    def test_a_name_that_is_none(self, factors):
        with refuses(UnknownParameter, "no parameter matches 0", "There are"):
            factors[0]

    def test_a_bias_that_has_joined_a_weight(self, program, factors):
        with refuses(UnknownParameter, "'0.bias' has no block of its own", "that of '0.weight'"):
            factors["0.bias"]
        with refuses(UnknownParameter, "'0.bias' has no block of its own", "that of '0.weight'"):
            fxkfac.ekfac(program, CE(), (X, Y), factors)["0.bias"]

    @pytest.mark.parametrize("value", ["0.1", None, torch.ones(2)], ids=["text", "None", "several"])
    def test_a_number(self, program, factors, value):
        C = operators.damped(factors.operator(), operators.Damping(1.0))
        gradients = {name: torch.zeros(shape) for name, shape in factors.shapes.items()}
        own = (CE(), factors, (X, Y), (X, Y))
        for call in (
            lambda: factors.solve(gradients, value),
            lambda: laplace.posterior(factors, value),
            lambda: laplace.log_evidence(laplace.posterior(factors), value),
            lambda: operators.power(C, value),
            lambda: operators.scaled(C, value),
            lambda: operators.damped(C, value),
            lambda: fxkfac.influence(program, *own, damping=value),
            lambda: fxkfac.influence(program, *own, damping=0.1, memory=value),
            lambda: fxkfac.kfoc(program, CE(), (X, Y), factors, tolerance=value),
            lambda: fxkfac.RunningAverage(value),
        ):
            with refuses(OptionError, "expected"):
                call()

    def test_numbers_of_numpy_and_of_tensors_count(self, program, factors, tmp_path):
        gradients = {name: torch.ones(shape) for name, shape in factors.shapes.items()}
        steps = [
            factors.solve(gradients, δ)
            for δ in (0.5, np.float32(0.5), torch.tensor(0.5, dtype=F64))
        ]
        for step in steps[1:]:
            torch.testing.assert_close(step, steps[0])
        sampled = fxkfac.kfac(program, CE(), (X, Y), fisher="mc", mc_samples=np.int64(2))
        fxkfac.save(sampled, tmp_path / "f")
        assert fxkfac.load(tmp_path / "f", program, CE()).settings.mc_samples == 2
        memory = np.int64(2**20)
        fxkfac.save(fxkfac.Accumulation(program, CE(), memory=memory), tmp_path / "a")
        assert fxkfac.resume(tmp_path / "a", program, CE()).over.memory == memory

    def test_numbers_of_numpy_in_the_state_of_an_optimizer_are_pythons(self, tmp_path):
        program = fxkfac.trace(seeded(mlp), X, structure={"2.bias": "skip"})  # which Adam moves
        options = {"momentum": np.float32(0.5), "decoupled": np.bool_(True)}
        optimizer = fxkfac.optim.KFAC(
            program, CE(), lr=np.float32(0.5), damping=np.float64(0.1), **options
        )
        torch.save(optimizer.state_dict(), tmp_path / "state")
        groups = torch.load(tmp_path / "state", weights_only=True)["param_groups"]
        assert [group["momentum"] for group in groups] == [0.5, 0.5]
        assert groups[0]["lr"] == 0.5

    def test_a_flag_of_numpys_counts(self, program, tmp_path):
        apart = fxkfac.kfac(program, CE(), (X, Y), separate_weight_and_bias=np.bool_(True))
        fxkfac.save(apart, tmp_path / "f")
        assert fxkfac.load(tmp_path / "f", program, CE()).settings == apart.settings

    @pytest.mark.parametrize("value", ["no", 1, None, [True]], ids=repr)
    def test_a_flag(self, program, value, tmp_path):
        for call in (
            lambda: fxkfac.kfac(program, CE(), (X, Y), separate_weight_and_bias=value),
            lambda: fxkfac.kfac(program, CE(), (X, Y), progress=value),
            lambda: fxkfac.optim.Preconditioner(program, CE(), damp="block", ekfac=value),
            lambda: fxkfac.optim.KFAC(program, CE(), lr=0.1, decoupled=value),
            lambda: program.draw(tmp_path / "p.gv", fold=value),
        ):
            with refuses(OptionError, f"={value!r}", "True or False"):
                call()

    def test_tensors_that_are_not_floating(self, program, factors):
        """Natural gradients in whole numbers would be truncated."""
        whole = {name: torch.ones(shape).int() for name, shape in factors.shapes.items()}
        with refuses(ParameterError, "'0.weight' is torch.int32", "floating"):
            factors.solve(whole, 0.1)
        with refuses(ParameterError, "'0.weight' is torch.int32", "floating"):
            operators.product(factors.operator(), whole)
        preconditioner = fxkfac.optim.Preconditioner(program, CE())
        preconditioner.update(X, Y)
        with refuses(ParameterError, "'0.weight' is torch.int32", "floating"):
            preconditioner.solve(whole)
        with refuses(OptionError, "dtype=torch.int64", "floating"):
            operators.to_dtype(factors.operator(), torch.int64)

    def test_tensors_without_names(self, factors):
        with refuses(ParameterError, "of type list", "expected a mapping"):
            factors.solve([rand(3, 4)], 0.1)
        with refuses(ParameterError, "of type list", "expected a mapping"):
            operators.product(factors.operator(), [rand(3, 4)])
        posterior = laplace.posterior(factors)
        with refuses(ParameterError, "of type Tensor", "tensors by name"):
            laplace.predictions(posterior, rand(2, 3), X)
        with refuses(ParameterError, "of type dict", "tensors by name"):
            laplace.predictions(posterior, dict.fromkeys(posterior.mean, 1.0), X)

    def test_a_mask(self, program):
        with refuses(OptionError, "mask is of type int", "keyword of an input", "function"):
            fxkfac.Accumulation(program, CE(), mask=5)

    def test_operators_and_generators(self, factors):
        C = operators.damped(factors.operator(), operators.Damping(1.0))
        with refuses(ParameterError, "of type dict", "fxkfac.operators"):
            operators.product({}, C)
        with refuses(OptionError, "generator=0", "torch.Generator"):
            operators.sample(C, 2, 0)
        with refuses(OptionError, "generator=0", "torch.Generator"):
            fxkfac.exact.mc_fisher(seeded(mlp), CE(), (X, Y), ["0.bias"], generator=0)
        with refuses(DataError, "cotangent is list", "(5, 3)"):
            fxkfac.exact.vector_jacobian_product(seeded(mlp), X, [1.0])

    def test_one_block_in_the_place_of_all(self, factors):
        with refuses(OptionError, "of type Block", "fxkfac.kfac"):
            fxkfac.spectra(factors["0.weight"])

    def test_a_function_that_returns_no_distribution(self, program):
        with refuses(LossError, "returns Tensor", "torch.distributions"):
            loss = Likelihood.from_distribution(lambda f: f)
            fxkfac.kfac(program, loss, (X, rand(5, 3)))

    def test_a_distribution_in_the_place_of_its_function(self):
        with refuses(LossError, "got a Normal", "expected a function", "lambda f"):
            Likelihood.from_distribution(torch.distributions.Normal(0.0, 1.0))

    def test_a_state_that_is_none(self, program):
        with refuses(OptionError, "a state of NoneType"):
            fxkfac.optim.KFAC(program, CE(), lr=0.1).load_state_dict(None)

    def test_groups_that_are_none(self, program):
        with refuses(OptionError, "groups is 3", "a list of dicts"):
            fxkfac.optim.KFAC(program, CE(), lr=0.1, groups=3)


class TestBatchAxis:
    def test_a_prediction_that_is_a_mean_over_the_data(self):
        def mean(params, x):
            return torch.tanh(x @ params["W"]).mean()

        program = fxkfac.trace(mean, X, {"W": rand(4, 3)})
        target = torch.tensor(0.0, dtype=F64)
        with pytest.raises((BatchAxisError, DataError), match=r"prediction .*\(\).*expected"):
            fxkfac.kfac(program, MSE(), (X, target))

    def test_likewise_of_a_single_row(self):
        def mean(params, x):
            return torch.tanh(x @ params["W"]).mean(0, keepdim=True)

        program = fxkfac.trace(mean, X, {"W": rand(4, 3)})
        with refuses(BatchAxisError, "no one axis", "prediction (1, 3)", "one part for each"):
            fxkfac.kfac(program, MSE(), (X, rand(1, 3)))

    def test_a_prediction_in_which_the_data_are_mixed(self):
        def mixed(params, x):
            return torch.cumsum(torch.tanh(x @ params["W"]), dim=0)

        program = fxkfac.trace(mixed, X, {"W": rand(4, 3)})
        with refuses(BatchAxisError, "no one axis", "prediction (5, 3)", "one part for each"):
            fxkfac.kfac(program, MSE(), (X, rand(5, 3)))

    @pytest.fixture(scope="class")
    @classmethod
    def pairwise(cls):
        def pairwise(params, x):
            pairs = x[:, None] + x[None, :]
            return torch.tanh(pairs @ params["W"]).sum(1)  # HERE: pairwise

        return fxkfac.trace(pairwise, X, {"W": rand(4, 3)})

    def test_a_use_on_pairs_of_data(self, pairwise):
        at = f"{__file__}:{line_of('pairwise')}"
        remedy = "sharing='expand'"
        with refuses(BatchAxisError, "W enters", "aten.m", at, "no one axis", remedy):
            fxkfac.kfac(pairwise, MSE(), (X, rand(5, 3)), sharing="reduce")

    def test_expand_needs_no_batch_axis(self, pairwise):
        found = fxkfac.kfac(pairwise, MSE(), (X, rand(5, 3)), sharing="expand")
        assert found.dense().isfinite().all()

    def test_diagonal_of_data_that_are_coupled(self):
        def make():
            return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))

        program = fxkfac.trace(seeded(make).train(), X, structure={"1.weight": "diagonal"})
        with refuses(BatchAxisError, "by itself", "batch norm", "model.eval()"):
            fxkfac.kfac(program, CE(), (X, Y))


class TestMerge:
    @pytest.mark.parametrize(
        "other",
        [
            {"fisher": "empirical"},
            {"sharing": "reduce"},
            {"mc_samples": 2},
            {"separate_weight_and_bias": True},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_other_settings(self, program, factors, other):
        second = fxkfac.kfac(program, CE(), (X, Y), **other)
        with refuses(MergeError, next(iter(other)), "one computation"):
            _ = factors + second

    @pytest.mark.parametrize(
        ("loss", "y", "named"),
        [(CE(reduction="sum"), Y, "'sum'"), (MSE(), rand(5, 3), "MSELoss")],
        ids=["reduction", "kind"],
    )
    def test_another_loss(self, program, factors, loss, y, named):
        second = fxkfac.kfac(program, loss, (X, y))
        with refuses(MergeError, named, "CrossEntropyLoss", "one computation"):
            _ = factors + second

    @pytest.mark.parametrize(
        "option",
        [{"weight": torch.tensor([1.0, 2.0, 3.0], dtype=F64)}, {"label_smoothing": 0.2}],
        ids=["weight", "label_smoothing"],
    )
    def test_another_option_of_the_loss(self, program, factors, option):
        second = fxkfac.kfac(program, CE(**option), (X, Y))
        with refuses(MergeError, "one computation"):
            _ = factors + second

    def test_another_ignored_class(self, program, factors):
        second = fxkfac.kfac(program, CE(ignore_index=1), (X, Y))
        with refuses(MergeError, "one computation"):
            _ = factors + second

    def test_a_likelihood_made_anew_is_the_same_loss(self, program):
        """As after a restart, or in another worker."""
        a, b = (fxkfac.kfac(program, Convex(), (X[s], X[s, :3])) for s in (slice(2), slice(2, 5)))
        whole = fxkfac.kfac(program, Convex(), (X, X[:, :3]))
        torch.testing.assert_close((a + b).dense(), whole.dense())

    def test_other_parameters(self, factors):
        program = fxkfac.trace(seeded(mlp), X, params=["0.*"])
        with refuses(MergeError, "2.weight", "one computation"):
            _ = factors + fxkfac.kfac(program, CE(), (X, Y))

    def test_another_shape_of_the_same_name(self, factors):
        make = lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))  # noqa: E731
        program = fxkfac.trace(seeded(make), X)
        with refuses(MergeError, "one computation"):
            _ = factors + fxkfac.kfac(program, CE(), (X, Y))


class Sharp(nn.Tanh):
    slope = 1.0

    def forward(self, x):
        return super().forward(self.slope * x)


class TestTapMismatch:
    def test_an_attribute_of_a_class_that_was_changed_after_tracing(self, monkeypatch):
        """Of which no trace hears."""
        model = seeded(mlp)
        model[1] = Sharp()
        program = fxkfac.trace(model, X)
        monkeypatch.setattr(Sharp, "slope", 3.0)
        with refuses(TapMismatch, "0.weight", "0.bias", "autograd", "Trace it anew") as info:
            fxkfac.check(program, CE(), (X, Y))
        assert "e+" in str(info.value) or "e-" in str(info.value)  # the relative errors

    def test_a_model_that_has_not_changed(self, program):
        assert max(fxkfac.check(program, CE(), (X, Y)).values()) < 1e-12


class TestInterrupted:
    """Whatever stops the iteration keeps its class and carries what was accumulated."""

    PAIRS = tuple((X[k : k + 1], Y[k : k + 1]) for k in range(5))

    @staticmethod
    def stops(pairs, error):
        yield from pairs
        raise error

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a broken worker")])
    @pytest.mark.parametrize("loss", [CE(), CE(reduction="sum")], ids=str)
    def test_in_the_third_batch(self, program, error, loss):
        first, rest = self.PAIRS[:2], self.PAIRS[2:]
        with pytest.raises(type(error)) as info:
            fxkfac.kfac(program, loss, self.stops(first, error))
        assert info.value is error
        kept = info.value.factors
        expected = fxkfac.kfac(program, loss, first)
        assert (kept.n, kept.count, kept.reduction) == (2, expected.count, expected.reduction)
        assert torch.equal(kept.dense(), expected.dense())
        whole = kept + fxkfac.kfac(program, loss, rest)
        torch.testing.assert_close(whole.dense(), fxkfac.kfac(program, loss, self.PAIRS).dense())
        assert any("first 2 data" in note for note in info.value.__notes__)

    def test_an_error_of_ours_carries_them_too(self, program):
        wrong = (X[:2], torch.tensor([0, 7]))
        with refuses(DataError, "[7]") as info:
            fxkfac.kfac(program, CE(), itertools.chain(self.PAIRS[:3], [wrong]))
        expected = fxkfac.kfac(program, CE(), self.PAIRS[:3])
        assert torch.equal(info.value.factors.dense(), expected.dense())

    def test_nothing_to_carry_in_the_first_batch(self, program):
        with pytest.raises(KeyboardInterrupt) as info:
            fxkfac.kfac(program, CE(), self.stops((), KeyboardInterrupt()))
        assert not hasattr(info.value, "factors")


def test_a_model_that_gives_nan():
    model = seeded(mlp)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with refuses(NonFiniteError, "the model's own prediction", "expected finite"):
        fxkfac.trace(model, X)
