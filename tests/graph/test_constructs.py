"""What no graph can hold is refused by its name, on the user's own line, with what to do."""

import sys

import pytest
import torch
from drawn import F64, StraightThroughEach, rand, seeded
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fxkfac
from fxkfac.errors import CaptureError

X, P = rand(5, 4), {"W": rand(4, 4), "V": rand(4, 3)}


def line_of(code):
    """Where in this file the one line is that ends in the comment `# HERE: code`."""
    with open(__file__) as file:
        found = [k for k, line in enumerate(file, 1) if line.rstrip().endswith(f"# HERE: {code}")]
    (line,) = found
    return line


def refused(model, inputs=X, params=None):
    """The message with which tracing is refused."""
    with pytest.raises(CaptureError) as info:
        fxkfac.trace(model, inputs, params)
    return str(info.value)


def cond(params, x):
    y = x @ params["W"]
    y = torch.cond(y.sum() > 0, torch.tanh, torch.sin, (y,))  # HERE: cond
    return y @ params["V"]


def scanned(params, x):
    def step(carry, row):
        carry = torch.tanh(row @ params["W"] + carry)
        return carry, carry.clone()

    last, _ = scan(step, torch.zeros_like(x), torch.stack([x, x]), dim=0)  # HERE: scan
    return last @ params["V"]


def looped(params, x):
    def more(k, y):
        return k < 3

    def step(k, y):
        return k + 1, torch.tanh(y)

    _, y = while_loop(more, step, (torch.tensor(0), x @ params["W"]))  # HERE: while_loop
    return y @ params["V"]


def branch(params, x):
    y = x @ params["W"]
    if y.sum() > 0:  # HERE: branch
        y = y.tanh()
    return y @ params["V"]


def through_numpy(params, x):
    return (x @ params["W"] + x.numpy().mean()) @ params["V"]  # HERE: numpy


@pytest.mark.parametrize(
    ("model", "line", "name", "remedy"),
    [
        (cond, "cond", "torch.cond", "torch.where"),
        (scanned, "scan", "scan", "Python loop"),
        (looped, "while_loop", "while_loop", "Python loop"),
        (branch, "branch", "__bool__", "torch.where"),
        (through_numpy, "numpy", "numpy", "no tensor"),
    ],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_control_flow_and_values(model, line, name, remedy, as_module):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.params = nn.ParameterDict({key: nn.Parameter(t.clone()) for key, t in P.items()})

        def forward(self, x):
            return model(self.params, x)

    said = refused(Model()) if as_module else refused(model, X, P)
    at = f"{name} at {__file__}:{line_of(line)} in {model.__name__}"
    assert at in said or f"by {at.replace(' at', ', at')}" in said
    assert remedy in said


def test_a_custom_function_is_named():
    def model(params, x):
        def one(x):
            return StraightThroughEach.apply(x @ params["W"]) @ params["V"]  # HERE: custom

        return torch.func.vmap(one)(x)

    said = refused(model, X, P)
    assert f"autograd.Function StraightThroughEach at {__file__}:{line_of('custom')} in one" in said
    assert "detach" in said
    assert "params=" in said


def test_the_remedy_for_a_custom_function_works():
    def by_detach(params, x):
        y = x @ params["W"]
        return (y + ((y > 0).to(y.dtype) - y).detach()) @ params["V"]

    program = fxkfac.trace(by_detach, X, P)
    assert max(fxkfac.check(program, nn.MSELoss(), (X, rand(5, 3))).values()) < 1e-12


def test_a_function_that_is_right_is_not_blamed_for_control_flow():
    """Where values are the matter, gradients are not; and the other way round."""

    def model(params, x):
        y = StraightThroughEach.apply(x) @ params["W"]
        if y.sum() > 0:
            y = y.tanh()
        return y @ params["V"]

    assert "StraightThroughEach" not in refused(model, X, P)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x, lengths):
        x = pack_padded_sequence(x, lengths, True, False)  # HERE: pack
        return self.head(self.rnn(x)[1][0][-1])


def test_lengths_in_a_list():
    """They would be constants of the graph: as a tensor, they are data."""
    said = refused(seeded(Packed), (rand(3, 6, 4), [6, 4, 1]))
    assert f"lengths are a list, at {__file__}:{line_of('pack')} in forward" in said
    assert "as a tensor" in said
    fxkfac.trace(seeded(Packed), (rand(3, 6, 4), torch.tensor([6, 4, 1])))


def test_reentrant_checkpoints():
    """PyTorch itself gives no `autograd.grad` through these."""

    def model(params, x):
        h = torch.tanh(x @ params["W"])
        return checkpoint(lambda h: h @ params["V"], h, use_reentrant=True)  # HERE: reentrant

    said = refused(model, X, P)
    assert f"use_reentrant=True) at {__file__}:{line_of('reentrant')} in model" in said
    assert "use_reentrant=False" in said


def test_scripted_parts():
    part = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    said = refused(nn.Sequential(nn.Linear(4, 4).to(F64), part))
    assert "1 is a RecursiveScriptModule of torch.jit" in said
    assert "1.0 is" not in said
    assert "Trace the Python module" in said


def test_a_profile_of_the_users_is_put_back():
    def own(frame, event, argument):
        pass

    before = sys.getprofile()
    sys.setprofile(own)
    try:
        refused(branch, X, P)
        assert sys.getprofile() is own
    finally:
        sys.setprofile(before)


def test_a_model_that_does_not_run_itself():
    """Then nothing is said of graphs."""

    def model(params, x):
        y = x @ params["W"]
        return y @ params["W"][:3]  # HERE: shapes

    said = refused(model, X, P)
    assert "own RuntimeError (mat1 and mat2 shapes cannot be multiplied (5x4 and 3x4))" in said
    assert f"at {__file__}:{line_of('shapes')} in model" in said
    assert "inputs with which the model runs" in said


def test_a_loop_whose_length_the_data_decide():
    """make_fx unrolls it for the example; data of other signs show that."""

    def model(params, x):
        h = torch.tanh(x @ params["W"])
        out, positive = h.clone(), (x[:, 0] > 0).nonzero()
        for k in range(positive.shape[0]):
            out = out.index_add(0, positive[k], h.index_select(0, positive[k]) @ params["V"])
        return out

    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (3, 4), "V": (4, 4)}
    params = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    with pytest.raises(CaptureError, match="depends on the data"):
        fxkfac.trace(model, x, params)
