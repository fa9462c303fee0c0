"""The model, or what it is called with, is no longer what was traced: noticed, never silent."""

import copy
import enum
import random
from functools import partial

import numpy as np
import pytest
import torch
from drawn import rand, seeded
from torch import nn
from torch.func import functional_call

import fxkfac
from fxkfac.curvature.inductor import code
from fxkfac.errors import CaptureError, DataError, ParameterError
from fxkfac.graph.front_ends.constants import constant_key

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


class Slotted:
    """Holds nothing in a dict, and in a class above it as well."""

    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


class Below(Slotted):
    __slots__ = "shift"


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

    @pytest.mark.parametrize("kind", [Config, Slotted, Below])
    def test_objects_that_print_alike(self, kind):
        model = seeded(lambda: Made(lambda m, x, c: m.a(x) * c.scale, a=layer()))
        config = kind(1.0)
        program = fxkfac.trace(model, (X, config))
        follows(program, model, (X, kind(2.0)))
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
    def test_in_another_order(self, backend, monkeypatch):
        monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)
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


def scaled(**parts):
    return Made(lambda m, x: m.a(x) * m.scale, a=layer(), **parts)


def dropping():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Held:
    """An object that holds a number and a module, and is called."""

    def __init__(self, module, scale=1.0):
        self.module, self.scale = module, scale

    def __call__(self, params, x):
        return functional_call(self.module, params, (x,)) * self.scale

    def method(self, params, x):
        return self(params, x)


class TestWhatTheModelReads:
    """Its attributes are in the graph, as far as it reads them: others need another graph."""

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (1.0, 2.0),
            (1, True),
            (torch.ones(3).double(), 2 * torch.ones(3).double()),
        ],
    )
    def test_an_attribute(self, before, after):
        model = seeded(lambda: scaled(scale=before))
        program = fxkfac.trace(model, X)
        for scale in (after, before):
            model.scale = scale
            follows(program, model)
        assert len(program.graphs) == 2

    @pytest.mark.parametrize("sparse", [False, True])
    def test_new_values_in_a_tensor(self, sparse):
        def neighbours(m, x):
            return torch.sparse.mm(m.graph, m.a(x))

        graph = rand(5, 5, seed=7).relu()
        graph = graph.to_sparse() if sparse else graph
        model = seeded(lambda: Made(neighbours, a=layer(), graph=graph))
        program = fxkfac.trace(model, X)
        model.graph.mul_(2)
        follows(program, model)
        if not sparse:
            model.graph.data = rand(5, 5, seed=8)
            follows(program, model)

    def test_a_sparse_tensor(self):
        def neighbours(m, x):
            return torch.sparse.mm(m.graph, m.a(x))

        graph = rand(5, 5, seed=7).relu().to_sparse()
        model = seeded(lambda: Made(neighbours, a=layer(), graph=graph))
        program = fxkfac.trace(model, X)
        model.graph = 2 * graph
        follows(program, model)
        assert len(program.graphs) == 2

    def test_inside_a_list_a_dict_and_an_object(self):
        def nested(m, x):
            return m.a(x) * m.listed[0] * m.named["by"] * m.config.scale

        model = seeded(
            lambda: Made(nested, a=layer(), listed=[1.0], named={"by": 1.0}, config=Config(1.0))
        )
        program = fxkfac.trace(model, X)
        model.listed[0] = 2.0
        follows(program, model)
        model.named["by"] = 3.0
        follows(program, model)
        model.config.scale = 4.0
        follows(program, model)
        assert len(program.graphs) == 4

    def test_the_class_is_hidden_by_an_attribute(self):
        class Scaled(nn.Linear):
            scale = 1.0

            def forward(self, x):
                return super().forward(x) * self.scale

        model = seeded(lambda: Scaled(4, 3))
        program = fxkfac.trace(model, X)
        model.scale = 2.0
        follows(program, model)

    def test_what_it_does_not_read_and_what_it_changes_itself_do_not_count(self):
        def counting(m, x):
            m.calls += 1
            m.kept = m.a(x)
            m.log.append(m.calls)
            return m.kept

        model = seeded(lambda: Made(counting, a=layer(), calls=0, log=[], epoch=0))
        program = fxkfac.trace(model, X)
        for epoch in range(3):
            model.epoch = epoch
            follows(program, model)
        assert len(program.graphs) == 1
        assert type(model) is Made

    def test_a_dict_that_is_read_whole(self):
        model = seeded(lambda: Made(lambda m, x: m.a(x) * m.__dict__["by"], a=layer(), by=1.0))
        program = fxkfac.trace(model, X)
        model.by = 2.0
        follows(program, model)

    def test_the_rate_of_dropout(self):
        model = seeded(dropping)
        program = fxkfac.trace(model, X)
        model[1].p = 0.0
        follows(program, model)

    def test_a_mode_that_comes_back_needs_no_third_graph(self):
        """Each mode reads attributes of its own."""
        model = seeded(lambda: Made(lambda m, x: m.a(x) * (m.u if m.training else m.v), a=layer()))
        model.u, model.v = 1.0, 2.0
        program = fxkfac.trace(model, X)
        for mode in (False, True, False):
            follows(program, model.train(mode))
        assert len(program.graphs) == 2
        model.v = 3.0
        follows(program, model.eval())
        follows(program, model.train())
        assert len(program.graphs) == 3

    @pytest.mark.parametrize(
        "registered",
        [
            lambda m: m.register_forward_hook(lambda *a: a[2] * 2),
            lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
        ],
    )
    def test_a_hook(self, registered):
        model = seeded(mlp)
        program = fxkfac.trace(model, X)
        hook = registered(model[0])
        follows(program, model)
        hook.remove()
        follows(program, model)
        assert len(program.graphs) == 2

    def test_another_module_in_its_place(self):
        model = seeded(mlp)
        program = fxkfac.trace(model, X)
        model[1] = nn.ReLU()
        follows(program, model)
        first, model[0] = model[0], seeded(lambda: nn.Linear(4, 8), seed=9)
        follows(program, model)
        model[0] = first
        follows(program, model)
        assert len(program.graphs) == 2

    def test_modules_that_change_places(self):
        model = seeded(lambda: Made(lambda m, x: m.act(m.a(x)) - m.other(x[:, :3]), a=layer()))
        model.act, model.other = nn.Tanh(), nn.Sigmoid()
        program = fxkfac.trace(model, X)
        model.act, model.other = model.other, model.act
        follows(program, model)

    def test_a_buffer_that_was_none(self):
        model = seeded(
            lambda: Made(lambda m, x: m.a(x) if m.u is None else m.a(x) + m.u, a=layer())
        )
        model.register_buffer("u", None)
        program = fxkfac.trace(model, X)
        for u in (rand(3), rand(1), None):
            model.u = u
            follows(program, model)
        assert len(program.graphs) == 3

    def test_parameters_of_another_dtype(self):
        model = seeded(mlp)
        program = fxkfac.trace(model, X)
        model.float()
        found = fxkfac.step(program, MSE(), (X.float(), Y.float()))
        close(found.loss, MSE()(model(X.float()), Y.float()).detach())


MODULE, SCALE = seeded(dropping), 1.0


def by_globals(params, x):
    def inner(x):
        return functional_call(MODULE, params, (x,)) * SCALE

    return inner(x)


class TestFunctions:
    """A function depends on what it names: modules and numbers in closures and as globals."""

    @staticmethod
    def ways(module):
        held = Held(module)

        def wrapped(call):
            return lambda params, x: call(params, x)

        def with_default(params, x, module=module):
            return functional_call(module, params, (x,))

        return {
            "closure": lambda params, x: functional_call(module, params, (x,)),
            "partial": partial(lambda m, params, x: functional_call(m, params, (x,)), module),
            "object": held,
            "method": held.method,
            "wrapped": wrapped(held),
            "default": with_default,
        }

    @pytest.mark.parametrize(
        "way", ["closure", "partial", "object", "method", "wrapped", "default"]
    )
    def test_the_mode_of_a_module(self, way):
        module = seeded(dropping)
        params = {name: p.detach() for name, p in module.named_parameters()}
        program = fxkfac.trace(self.ways(module)[way], X, params)
        module.eval()
        loss = fxkfac.step(program, MSE(), (X, Y)).loss
        close(loss, MSE()(module(X), Y).detach())

    def test_numbers_and_modules_that_are_global(self, monkeypatch):
        params = {name: p.detach() for name, p in MODULE.named_parameters()}
        program = fxkfac.trace(by_globals, X, params)
        monkeypatch.setitem(by_globals.__globals__, "SCALE", 2.0)
        monkeypatch.setitem(by_globals.__globals__, "MODULE", seeded(mlp))
        loss = fxkfac.step(program, MSE(), (X, Y)).loss
        close(loss, MSE()(by_globals(params, X), Y).detach())

    def test_what_a_closure_holds_now(self):
        scale, shift, held = 1.0, rand(3), Held(seeded(mlp))

        def model(params, x):
            return x @ params["W"] * scale * held.scale + shift

        params = {"W": rand(4, 3)}
        program = fxkfac.trace(model, X, params)

        def follows():
            loss = fxkfac.step(program, MSE(), (X, Y)).loss
            close(loss, MSE()(model(params, X), Y))

        scale = 2.0
        follows()
        shift = rand(3, seed=8)
        follows()
        held.scale = 3.0
        follows()

    def test_an_object_that_counts_its_calls(self):
        class Counting(Held):
            calls = 0

            def __call__(self, params, x):
                self.calls += 1
                return super().__call__(params, x)

        module = seeded(mlp)
        model, params = Counting(module), {n: p.detach() for n, p in module.named_parameters()}
        program = fxkfac.trace(model, X, params)
        model(params, X)
        program.run(X)
        assert len(program.graphs) == 1

    def test_buffers_of_a_module_that_a_function_calls(self):
        module = seeded(buffered)
        params = {name: p.detach() for name, p in module.named_parameters()}
        program = fxkfac.trace(lambda p, x: functional_call(module, p, (x,)), X, params)
        module.t = module.t * 2
        loss = fxkfac.step(program, MSE(), (X, Y)).loss
        close(loss, MSE()(module(X), Y).detach())


def tied():
    model = Made(lambda m, x: m.c(m.b(m.a(x).tanh())), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.c = layer()
    model.b.weight = model.a.weight
    return model


def untied():
    model = tied()
    model.b.weight = nn.Parameter(torch.randn(4, 4))
    return model


def tie(model):
    model.b.weight = model.a.weight


def untie(model):
    model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()}, assign=True)


def narrow(model):
    model[0], model[2] = seeded(lambda: nn.Linear(4, 6)), seeded(lambda: nn.Linear(6, 3))


CHANGES = {
    "untied": (tied, untie, "tied are [], and were [['a.weight', 'b.weight']]"),
    "tied": (untied, tie, "tied are [['a.weight', 'b.weight']], and were []"),
    "shape": (mlp, narrow, "'0.weight' has shape (6, 4), and had (8, 4)"),
    "gone": (mlp, lambda m: m[0].register_parameter("bias", None), "'0.bias' is gone"),
    "removed": (mlp, lambda m: m.__delitem__(2), "'2.weight' is gone"),
    "new": (mlp, lambda m: m.append(nn.Linear(3, 3).double()), "['3.bias', '3.weight'] are new"),
    "parametrized": (
        mlp,
        lambda m: nn.utils.parametrizations.weight_norm(m[0]),
        "'0.weight' is gone",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_parameters_are_refused(change):
    """Blocks and structures are those of the first trace."""
    make, how, said = CHANGES[change]
    model = seeded(make)
    program = fxkfac.trace(model, X)
    how(model)
    with pytest.raises(ParameterError) as info:
        fxkfac.kfac(program, MSE(), (X, Y))
    for part in ("the model has changed since it was traced", said, "race anew"):
        assert part in str(info.value)


class TestCopies:
    """The copy of a program has the graphs of the first, and looks at its own model."""

    def test_of_a_function_that_names_modules(self):
        def predicted(params, x):
            return head(torch.tanh(x @ params["W"]))

        head = seeded(layer)
        program = fxkfac.trace(predicted, X, {"W": rand(4, 4)})
        twin = copy.deepcopy(program)
        found, expected = (fxkfac.kfac(p, MSE(), (X, Y)).dense() for p in (twin, program))
        close(found, expected)
        assert len(twin.graphs) == 1
        head.weight = nn.Parameter(2 * head.weight)
        assert fxkfac.kfac(twin, MSE(), (X, Y)).dense().ne(expected).any()

    def test_of_a_module(self):
        model = seeded(lambda: Made(lambda m, x: m.factor * m.a(x), a=layer(), factor=2.0))
        program = fxkfac.trace(model, X)
        twin = copy.deepcopy(program)
        follows(twin, twin.model.model)
        assert len(twin.graphs) == 1
        twin.model.model.factor = 3.0
        follows(twin, twin.model.model)
        follows(program, model)
        assert (len(twin.graphs), len(program.graphs)) == (2, 1)


class TestOthersRandomness:
    @pytest.mark.parametrize(
        ("name", "draw"), [("random", random.random), ("numpy.random", np.random.rand)]
    )
    @pytest.mark.parametrize("by_trace", [True, False])
    def test_refused(self, name, draw, by_trace):
        """A graph would hold the one draw of the trace."""

        def dropped(m, x):
            return m.a(x) if m.training and draw() < 0.5 else m.a(x) + m.b(x).tanh()

        model = seeded(lambda: Made(dropped, a=layer(), b=layer())).train(by_trace)
        before, before_numpy = random.getstate(), np.random.get_state()[1].copy()
        program = None if by_trace else fxkfac.trace(model, X)
        model.train()
        with pytest.raises(CaptureError, match=f"draws from {name} while it runs"):
            fxkfac.trace(model, X) if by_trace else program.run(X)
        assert random.getstate() == before
        assert (np.random.get_state()[1] == before_numpy).all()


class TestRawErrors:
    """What PyTorch would refuse in its own words, or not at all."""

    def test_a_lazy_module(self):
        with pytest.raises(ParameterError, match=r"0\.weight.* no shape yet.*Run the model once"):
            fxkfac.trace(nn.Sequential(nn.LazyLinear(3)), X)

    def test_inference_mode(self):
        with torch.inference_mode(), pytest.raises(CaptureError, match="Leave inference mode"):
            fxkfac.trace(seeded(layer), X)

    @pytest.mark.parametrize("option", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}])
    def test_tables_whose_gradient_is_not_their_own(self, option):
        model = seeded(lambda: nn.Sequential(nn.Embedding(4, 3, **option), nn.Linear(3, 3)))
        before = model[0].weight.detach().clone()
        with pytest.raises(
            CaptureError, match=f"'0.weight' is of an Embedding with {next(iter(option))}"
        ):
            fxkfac.trace(model, torch.tensor([0, 1, 1]))
        assert torch.equal(model[0].weight, before)
