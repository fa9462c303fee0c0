"""Packed sequences: the lengths are data, and only real steps are rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import rand, seeded
from quick import quick
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.nn.utils.rnn import pad_packed_sequence as pad
from zoo import Made

import fxkfac
from fxkfac.errors import CaptureError, DataError
from fxkfac.graph import trace
from fxkfac.graph.front_ends import capture

T, MSE = 6, nn.MSELoss()
SOME, SORTED, OTHERS = torch.tensor([3, 1, 6, 2, 4]), torch.tensor([6, 4, 1]), torch.tensor([2, 6])
Model = Callable[..., Any]


def pack(x: Tensor, lengths: Tensor, **options: Any) -> PackedSequence:
    return pack_padded_sequence(x, lengths, True, **{"enforce_sorted": False, **options})


def made(forward: Model, rnn: nn.Module | None = None, d: int = 3, **parts: Any) -> nn.Module:
    """A model with a recurrent module `rnn` and a head on d entries."""
    rnn = rnn or nn.LSTM(4, 3)
    return seeded(lambda: Made(forward, rnn=rnn, head=nn.Linear(d, 2), **parts))


def last(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """The head on the last state of each sequence."""
    state = m.rnn(pack(x, lengths))[1]
    return m.head((state[0] if isinstance(state, tuple) else state)[-1])


def padded(m: Any, x: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """The head on all outputs, padded again."""
    return m.head(pad(m.rnn(pack(x, lengths))[0], True, **options)[0])


def data(model: nn.Module, *inputs: Any) -> tuple[Any, Tensor]:
    """Inputs and targets."""
    return inputs, rand(*model(*inputs).shape, seed=5)


def proven(model: nn.Module, *batches: tuple[Any, ...]) -> fxkfac.Program:
    """Traced on the first batch; one graph whose gradients are right on all."""
    program = fxkfac.trace(model, batches[0])
    for inputs in batches:
        assert max(fxkfac.check(program, MSE, data(model, *inputs)).values()) < 1e-12
    assert program.tapped.dynamic
    assert len(program._cache) == 1
    return program


KINDS = {
    "rnn": (nn.RNN(4, 3), 3),
    "rnn_relu": (nn.RNN(4, 3, 2, nonlinearity="relu", bias=False), 3),
    "gru": (nn.GRU(4, 3, 2, bidirectional=True), 6),
    "lstm": (nn.LSTM(4, 3, 2, bidirectional=True), 6),
    "projected": (nn.LSTM(4, 3, proj_size=2, bidirectional=True), 4),
    "eval": (nn.LSTM(4, 3, 2, dropout=0.5).eval(), 3),
}


@pytest.mark.parametrize("kind", quick(KINDS, {"gru", "projected"}.__contains__))
def test_recurrent_modules(kind):
    rnn, d = KINDS[kind]
    model = made(lambda m, x, n: padded(m, x, n, total_length=T), rnn, d)
    model.rnn.train(kind != "eval")
    proven(model, (rand(5, T, 4), SOME), (rand(2, T, 4), OTHERS), (rand(3, T, 4), SORTED))


def time_major(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return m.head(pad(m.rnn(packed)[0])[0])


def test_time_major():
    model = made(time_major)
    program = fxkfac.trace(model, (rand(T, 5, 4), SOME), batch_axis=(1, 0))
    for x, lengths in ((rand(T, 5, 4), SOME), (rand(T, 2, 4), OTHERS)):
        assert max(fxkfac.check(program, MSE, data(model, x, lengths)).values()) < 1e-12
    assert program.tapped.dynamic


def two_in_a_row(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return m.head(pad(m.second(m.rnn(pack(x, lengths))[0])[0], True, 2.0, T + 2)[0])


def shorter(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return padded(m, x, lengths.clamp(max=4), total_length=5)


def written_in_place(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return last(m, (x @ x.new_ones(4, 4)).sin_(), lengths)


def a_learned_state(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    state = tuple(m.state.expand(2, 1, x.shape[0], 3).unbind())
    return m.head(m.rnn(pack(x, lengths), state)[1][0][-1])


def lengths_of_the_data(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    is_real = (torch.arange(T) < lengths[:, None]).to(x.dtype)
    return last(m, x, is_real.sum(1).long().cpu())


STYLES = (two_in_a_row, shorter, written_in_place, a_learned_state, lengths_of_the_data)


@pytest.mark.parametrize(
    "forward", quick(STYLES, lambda style: style in (two_in_a_row, lengths_of_the_data))
)
def test_styles(forward):
    model = made(forward, second=nn.GRU(3, 3), state=(2, 1, 1, 3))
    used = ["rnn.*", "head.*", *["second.*"] * (forward is two_in_a_row)]
    used += ["state"] * (forward is a_learned_state)
    program = fxkfac.trace(model, (rand(5, T, 4), SOME), used)
    for inputs in ((rand(5, T, 4), SOME), (rand(2, T, 4), OTHERS)):
        assert max(fxkfac.check(program, MSE, data(model, *inputs)).values()) < 1e-12
    assert program.tapped.dynamic


RNNS = [nn.GRU(4, 3, bidirectional=True), nn.LSTM(4, 3, 2, proj_size=2)]


@pytest.mark.slow
@pytest.mark.parametrize("rnn", RNNS)
def test_factors_are_those_of_each_sequence_alone(rnn):
    """Without packing, without padding, and in batches of one."""
    d = 2 if rnn.proj_size else 6
    model = made(lambda m, x, n: padded(m, x, n, total_length=3).sum(1), rnn, d)
    model.head.bias = None  # which would be added to the padding, too
    alone = Made(lambda m, x: m.head(m.rnn(x.transpose(0, 1))[0]).sum(0), **model._modules)
    (x, lengths), y = data(model, rand(3, 3, 4), torch.tensor([2, 1, 3]))
    program = fxkfac.trace(model, (x, lengths), ["rnn.*"])
    unpacked = fxkfac.trace(alone, x, ["rnn.*"])
    singles = [(x[n : n + 1, :length], y[n : n + 1]) for n, length in enumerate(lengths)]
    for sharing in ("expand", "reduce"):
        found = fxkfac.kfac(program, MSE, ((x, lengths), y), sharing=sharing)
        expected = fxkfac.kfac(unpacked, MSE, singles, sharing=sharing)
        assert list(found) == list(expected)
        for name, block in found.items():
            assert block.params == expected[name].params
            torch.testing.assert_close(block.A, expected[name].A)
            torch.testing.assert_close(block.B, expected[name].B)
        rows = {product.rows for (product,) in found.products.values()}
        assert rows == {6 if sharing == "expand" else 3}


def test_whatever_stands_in_the_padding():
    model = made(last)
    (x, lengths), y = data(model, rand(5, T, 4), SOME)
    program = fxkfac.trace(model, (x, lengths))
    is_real = (torch.arange(T) < lengths[:, None]).unsqueeze(-1)
    found = fxkfac.kfac(program, MSE, ((torch.where(is_real, x, 1e9), lengths), y)).dense()
    torch.testing.assert_close(found, fxkfac.kfac(program, MSE, ((x, lengths), y)).dense())


def test_a_mask_for_what_comes_after():
    """The head is given the padding, too, by the model itself."""
    model = made(lambda m, x, n: padded(m, x, n, total_length=T))
    batch = data(model, rand(5, T, 4), SOME)
    program, real = fxkfac.trace(model, batch[0]), int(SOME.sum())
    for mask, rows in ((None, 5 * T), (lambda x, _: torch.arange(T) < x[1][:, None], real)):
        factors = fxkfac.kfac(program, MSE, batch, mask=mask)
        found = {name: product.rows for name, (product,) in factors.products.items()}
        assert found.pop("head.weight") == rows
        assert set(found.values()) == {real}


def test_exact_blocks_and_biases_apart():
    model = made(last, nn.GRU(4, 2), 2)
    batch = data(model, rand(5, T, 4), SOME)
    program = fxkfac.trace(model, batch[0], structure={"rnn.weight*": "dense"})
    factors = fxkfac.kfac(program, MSE, batch, separate_weight_and_bias=True)
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"):
        expected = fxkfac.exact.ggn(model, MSE, batch, [name])
        torch.testing.assert_close(factors.dense(name), expected)


def test_gates_apart():
    model = made(last)
    batch = data(model, rand(5, T, 4), SOME)
    whole = fxkfac.kfac(fxkfac.trace(model, batch[0]), MSE, batch)["rnn.weight_hh_l0"]
    program = fxkfac.trace(model, batch[0], apart={"rnn.weight*": 4})
    block = fxkfac.kfac(program, MSE, batch)["rnn.weight_hh_l0"]
    parts = whole.B.unflatten(0, (4, 3)).unflatten(2, (4, 3))
    torch.testing.assert_close(block.B, parts.diagonal(dim1=0, dim2=2).movedim(-1, 0))
    torch.testing.assert_close(block.A.expand(4, -1, -1), whole.A.expand(4, -1, -1))


def test_without_a_normal_form():
    """The exact diagonal of a scale under exp comes from the graph of one datum, under vmap."""
    model = made(lambda m, x, n: last(m, x * m.scale.exp(), n), scale=(4,))
    batch = data(model, rand(5, T, 4), SOME)
    program = fxkfac.trace(model, batch[0], unsupported="diagonal")
    found = fxkfac.kfac(program, MSE, batch).dense("scale")
    expected = fxkfac.exact.ggn(model, MSE, batch, ["scale"])
    torch.testing.assert_close(found.diagonal(), expected.diagonal())


def test_real_shapes_too(monkeypatch):
    only = {"make_fx (real)": capture.FRONT_ENDS["make_fx (real)"]}
    monkeypatch.setattr(trace, "FRONT_ENDS", only)
    model = made(last)
    batch = data(model, rand(5, T, 4), SOME)
    program = fxkfac.trace(model, batch[0])
    assert not program.tapped.dynamic
    assert max(fxkfac.check(program, MSE, batch).values()) < 1e-12


def test_the_table_says_it():
    table = str(fxkfac.trace(made(last), (rand(5, T, 4), SOME)))
    assert "0 (6·N) where real" in table
    assert "0 where real" in table


def test_modules_of_torch_stay_as_they_are():
    before = nn.LSTM.check_forward_args, nn.RNNBase.check_forward_args
    fxkfac.trace(made(last), (rand(5, T, 4), SOME))
    assert (nn.LSTM.check_forward_args, nn.RNNBase.check_forward_args) == before


# --- the lengths of trial data ---


def test_few_sorted_sequences():
    """The experiments need one more than there are: in order, too."""
    model = made(lambda m, x, n: m.head(m.rnn(pack(x, n, enforce_sorted=True))[1][0][-1]))
    proven(model, (rand(3, T, 4), SORTED), (rand(4, T, 4), torch.tensor([5, 5, 2, 1])))


def test_the_longest_sequence_is_among_the_trial_data():
    """It alone gives the prediction its shape."""
    lengths = torch.tensor([1, 2, 3, 2, 6])
    proven(made(padded), (rand(5, T, 4), lengths), (rand(2, T, 4), OTHERS))


# --- what is refused ---


def test_a_prediction_whose_shape_depends_on_the_lengths():
    model, x = made(padded), rand(5, T, 4)
    with pytest.raises(DataError, match=r"longest of the packed .* 4 steps.* total_length=6"):
        fxkfac.trace(model, (x, SOME.clamp(max=4)))
    program = fxkfac.trace(model, (x, SOME))
    for n in (5, 3):
        batch = (x[:n], SOME[:n].clamp(max=4)), rand(n, 4, 2)
        with pytest.raises(DataError, match=r"batch 0: the longest .* total_length=6"):
            fxkfac.kfac(program, MSE, batch)


@pytest.mark.parametrize("wrong", [0, 7])
def test_lengths_out_of_range(wrong):
    model, x = made(last), rand(5, T, 4)
    program = fxkfac.trace(model, (x, SOME))
    lengths = torch.where(SOME == 2, wrong, SOME)
    with pytest.raises(DataError, match="expected 1 to 6"):
        fxkfac.kfac(program, MSE, ((x, lengths), rand(5, 2)))


def of_a_list(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return last(m, x, [3, 1, 6, 2, 4])


def of_sequences(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return m.head(m.rnn(pack_sequence(list(x)))[1][0][-1])


def on_its_data(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack(x, lengths)
    packed = PackedSequence(packed.data.tanh(), *packed[1:])
    return m.head(m.rnn(packed)[1][0][-1])


def by_a_layer(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return m.head(m.rnn(pack(x, lengths))[0].data)


def on_its_sizes(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return last(m, x, lengths) * pack(x, lengths).batch_sizes.sum()


def on_its_order(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return last(m, x, lengths)[pack(x, lengths).sorted_indices]


def with_dropout(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return m.head(m.dropped(pack(x, lengths))[1][-1])


def under_vmap(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return torch.func.vmap(lambda x: last(m, x[None], lengths[:1])[0])(x)


def with_its_gradient(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(last(m, x, lengths).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    ("forward", "what", "remedy"),
    [
        (of_a_list, "whose lengths are a list", "their lengths as a tensor"),
        (of_sequences, "whose lengths are a list", "their lengths as a tensor"),
        (on_its_data, "data of a packed sequence, read by tanh", "before they are packed"),
        (by_a_layer, "data of a packed sequence, read by linear", "before they are packed"),
        (on_its_sizes, "sizes of a packed sequence, read by sum", "before they are packed"),
        (on_its_order, "order of packed sequences, read by __getitem__", "before they are packed"),
        (with_dropout, "dropout between the layers of packed", "call model.eval()"),
        (under_vmap, "packed sequences inside of a transform", "outside of it"),
    ],
)
def test_refused_by_name(forward, what, remedy):
    model = made(forward, dropped=nn.GRU(4, 3, 2, dropout=0.5))
    with pytest.raises(CaptureError) as info:
        fxkfac.trace(model, (rand(5, T, 4), SOME))
    said = next(line for line in str(info.value).splitlines() if "make_fx (symbolic)" in line)
    assert what in said
    assert f"{__file__}:" in said
    assert remedy in said


def test_gradients_inside_are_refused():
    with pytest.raises(CaptureError, match="gradients through packed sequences"):
        fxkfac.trace(made(with_its_gradient), (rand(5, T, 4), SOME))


def test_a_packed_input_is_refused():
    packed = pack(rand(5, T, 4), SOME)
    with pytest.raises(DataError, match="an input is a PackedSequence"):
        fxkfac.trace(made(lambda m, x: m.head(m.rnn(x)[1][0][-1])), (packed,))
