"""The model, or what it is called with, is no longer what was traced: noticed, never silent."""

import enum

import numpy as np
import pytest
import torch
from drawn import rand, seeded
from torch import nn

import fxkfac
from fxkfac.errors import DataError
from fxkfac.graph.constants import constant_key

MSE = nn.MSELoss
close = torch.testing.assert_close
X, Y = rand(5, 4, seed=5), rand(5, 3, seed=6)


class Made(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def layer():
    return nn.Linear(4, 3)


def called(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def follows(program, model, inputs=(X,)):
    """Loss and gradients are the model's, as it is now."""
    found = fxkfac.step(program, MSE(), (inputs, Y))
    loss = MSE()(called(model, inputs), Y)
    names = list(found.gradients)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    close(found.loss, loss.detach())
    for name, g in zip(names, expected, strict=True):
        close(found.gradients[name], torch.zeros_like(parameters[name]) if g is None else g)


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Config:
    """Says nothing of what it holds."""

    def __init__(self, scale):
        self.scale = scale

    def __repr__(self):
        return "Config"


class TestConstants:
    """Leaves of the inputs that are no tensors are in the graph: others need another one."""

    def test_an_array_in_which_one_number_is_another(self):
        """Far inside, where it does not print."""
        a = np.zeros(2000)
        b = a.copy()
        b[1000] = 1
        model = seeded(lambda: Made(lambda m, x, c: m.a(x) * (1 + float(c.sum())), a=layer()))
        program = fxkfac.trace(model, (X, a))
        for c in (b, a.copy()):
            follows(program, model, (X, c))
        assert len(program.graphs) == 2

    def test_objects_that_print_alike(self):
        model = seeded(lambda: Made(lambda m, x, c: m.a(x) * c.scale, a=layer()))
        config = Config(1.0)
        program = fxkfac.trace(model, (X, config))
        follows(program, model, (X, Config(2.0)))
        config.scale = 3.0
        follows(program, model, (X, config))
        follows(program, model, (X, config))
        assert len(program.graphs) == 3

    @pytest.mark.parametrize(
        ("value", "other"),
        [
            (1, True),
            (1, 1.0),
            (0.0, -0.0),
            (None, "None"),
            ("1", 1),
            (b"a", "a"),
            (Colour.RED, Colour.BLUE),
            (torch.float32, torch.float64),
            (torch.device("cpu"), torch.device("meta")),
            (slice(1, 2), slice(1, 3)),
            ([1], (1,)),
            ({1: [2]}, {1: [3]}),
            ({1, 2}, {1, 3}),
            (np.float32(1), np.float64(1)),
            (np.zeros(3), np.zeros((3, 1))),
            (np.zeros(1, "f4"), np.zeros(1, "i4")),
            (np.array([1, "a"], object), np.array([1, "b"], object)),
            (Config(1), Config(1)),
            (len, min),
        ],
    )
    def test_equal_keys_are_equal_values(self, value, other):
        assert constant_key(value) != constant_key(other)
        assert hash(constant_key(value)) == hash(constant_key(value))
        assert constant_key(value) == constant_key(value)

    def test_equal_values_have_equal_keys(self):
        for make in (
            lambda: np.arange(3),
            lambda: slice(None, 3),
            lambda: {"a": [1.5, float("nan")]},
        ):
            assert constant_key(make()) == constant_key(make())
        endless = []
        endless.append(endless)
        assert constant_key(endless) == constant_key(endless)


class TestTensorsAndConstants:
    """Which inputs are tensors is the trace's: their batch axes are known, and no others'."""

    @pytest.fixture(scope="class")
    @staticmethod
    def traced():
        def either(m, left=None, right=None):
            return m.a(left) if right is None else m.b(right).tanh()

        model = seeded(lambda: Made(either, a=layer(), b=layer()))
        return model, fxkfac.trace(model, {"left": X, "right": None})

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ({"left": None, "right": X}, "inputs['left'] is of type NoneType, but was of type Ten"),
            ({"left": X, "right": X}, "inputs['right'] is of type Tensor, but was of type NoneTyp"),
            ({"left": 2.0, "right": None}, "inputs['left'] is of type float, but was of type Tens"),
        ],
    )
    def test_refused(self, traced, inputs, said):
        _, program = traced
        with pytest.raises(DataError) as info:
            fxkfac.kfac(program, MSE(), (inputs, Y))
        assert said in str(info.value)
        assert "trace anew" in str(info.value)

    def test_another_constant_is_not(self, traced):
        model, program = traced
        follows(program, model, {"left": X, "right": None})

    def test_a_tensor_and_a_number_that_change_places(self):
        model = seeded(lambda: Made(lambda m, x, u, v: m.a(x) * u + v, a=layer()))
        program = fxkfac.trace(model, (X, 2.0, Y))
        with pytest.raises(DataError, match=r"inputs\[1\] is of type Tensor, .* of type float"):
            fxkfac.step(program, MSE(), ((X, Y, 2.0), Y))

    def test_keywords_have_no_order(self):
        model = seeded(lambda: Made(lambda m, x, z, by=1.0: m.a(x) * z * by, a=layer()))
        program = fxkfac.trace(model, {"x": X, "z": Y, "by": 2.0})
        follows(program, model, {"by": 2.0, "z": Y, "x": X})
        assert len(program.graphs) == 1
        follows(program, model, {"by": 3.0, "z": Y, "x": X})
        nested = fxkfac.trace(
            Made(lambda m, d: m.a(d["x"]) * d["z"], a=model.a), ({"x": X, "z": Y},)
        )
        with pytest.raises(DataError, match="nested as"):
            nested.run(({"z": Y, "x": X},))


def buffered():
    """A scale and a shift that only their names tell apart."""
    model = Made(lambda m, x: m.a(x) * m.t + m.u, a=layer())
    model.register_buffer("t", torch.rand(3))
    model.register_buffer("u", torch.rand(3))
    return model


class TestBuffers:
    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    def test_in_another_order(self, backend):
        model = seeded(buffered)
        program = fxkfac.trace(model, X)
        t = model.t
        del model.t
        model.register_buffer("t", t)
        found = fxkfac.step(program, MSE(), (X, Y), backend=backend)
        close(found.loss, MSE()(model(X), Y).detach())
        assert max(fxkfac.check(program, MSE(), (X, Y)).values()) < 1e-12

    def test_exact_blocks_of_the_graph_too(self):
        """Those of parameters without normal form come from the captured graph under vmap."""
        model = seeded(buffered)
        model.function = lambda m, x: m.a(x) * m.t.exp() * m.w.exp() + m.u
        model.w = nn.Parameter(rand(3))
        program = fxkfac.trace(model, X, ["w"], unsupported="dense")
        t = model.t
        del model.t
        model.register_buffer("t", t)
        found = fxkfac.kfac(program, MSE(), (X, Y), fisher="empirical")
        expected = fxkfac.kfac(
            fxkfac.trace(model, X, ["w"], unsupported="dense"), MSE(), (X, Y), fisher="empirical"
        )
        close(found.dense(), expected.dense())
