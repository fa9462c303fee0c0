"""The registry of rules: one rule per overload, under the overload's own name."""

from __future__ import annotations

import pytest
import torch
from drawn import rand
from torch import nn
from torch._ops import OpOverload

import fxkfac
from fxkfac import rules
from fxkfac.errors import CaptureError, OptionError, UnsupportedUse
from fxkfac.graph.form import BatchAxis, Form
from fxkfac.graph.rules import RULES, Call, Operand, registry, rule


def test_rules_are_registered_under_aten_overloads() -> None:
    assert len(RULES) >= 15
    assert all(isinstance(overload, OpOverload) for overload in RULES)
    assert all(function.__doc__ for function in RULES.values())


def test_registering_twice_is_an_error() -> None:
    def again(call: Call, operand: Operand) -> Form:
        raise AssertionError

    before = dict(RULES)
    with pytest.raises(ValueError, match=r"aten\.linear\.default has a rule already: linear"):
        rule(torch.ops.aten.linear.default)(again)
    assert before == RULES


def test_a_rule_of_the_same_name_takes_its_place() -> None:
    """As where the cell of a notebook runs again."""
    overload = torch.ops.aten.cummax.default
    for _ in range(2):

        @rule(overload)
        def mine(call: Call, operand: Operand) -> Form:
            raise AssertionError

    assert RULES[overload] is mine
    del RULES[overload]


@pytest.mark.parametrize("wrong", [torch.ops.aten.linear, "aten.linear", None])
def test_a_rule_is_for_an_overload(wrong: object) -> None:
    with pytest.raises(OptionError, match="expected an overload of an op"):
        rule(wrong)  # type: ignore[arg-type]


def test_a_form_tells_the_kinds_of_its_axes_from_where_their_names_occur() -> None:
    grouped = Form("(g o) i k", "n (g i) p k", "n (g o) p", sizes={"g": 2})
    assert (grouped.group, grouped.d_in, grouped.d_out) == (["g"], ["i", "k"], ["o"])
    assert grouped.rows == ["n", "p"]
    assert grouped.normal_weight == "(g o) i k -> (g) (i k) (o)"
    assert grouped.normal_y() == "n (g o) p -> (g) n p (o)"
    assert grouped.orientation() == "(g o) i i"


def test_the_batch_axis_is_split_off_and_the_rest_is_shared() -> None:
    form = Form("o i", "r0 r1 i", "r0 r1 o")
    at = BatchAxis("r1", outer=3, inner=1)
    assert form.normal_x(at) == (
        "r0 (r1_outer r1_batch r1_inner) i -> () r1_batch (r0 r1_outer r1_inner) (i)"
    )
    assert form.row_sizes(form.x, at) == {"r1_outer": 3, "r1_inner": 1}
    assert str(at) == "3·N"


def test_rows_that_an_input_lacks_have_length_one() -> None:
    lifted = Form("v d", "r0 v", "s0 r0 d")
    assert lifted.normal_x() == "r0 v -> () 1 r0 (v)"
    assert lifted.normal_x(BatchAxis("s0", 1, 1)) == "r0 v -> () 1 (r0) (v)"


@torch.library.custom_op("fxkfac_tests::scaled_product", mutates_args=())
def scaled_product(x: torch.Tensor, weight: torch.Tensor, factor: float) -> torch.Tensor:
    """An op of a user's: y = factor · x W."""
    return factor * (x @ weight)


@scaled_product.register_fake
def _(x, weight, factor):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.factor = inputs[2]


def _backward(ctx, g):
    x, weight = ctx.saved_tensors
    return ctx.factor * g @ weight.T, ctx.factor * x.T @ g, None


scaled_product.register_autograd(_backward, setup_context=_save)


@pytest.fixture
def own_rules(monkeypatch):
    """Rules that a test registers go with it."""
    monkeypatch.setattr(registry, "RULES", dict(RULES))
    monkeypatch.setattr("fxkfac.graph.uses.match.RULES", registry.RULES)


@pytest.mark.usefixtures("own_rules")
def test_a_wrong_rule_from_outside_is_named_as_a_cause():
    @rules.rule(torch.ops.fxkfac_tests.scaled_product.default)
    def rule(call, operand):
        return rules.Form("i o", "r i", "r o", call.args["x"])  # without its factor

    def model(params, x):
        return torch.tanh(scaled_product(x, params["W"], 2.0))

    with pytest.raises(CaptureError, match=r"relative errors W .*a rule of your own is wrong"):
        fxkfac.trace(model, rand(5, 4), {"W": rand(4, 3)})


@pytest.mark.usefixtures("own_rules")
def test_a_rule_from_outside():
    """As the page on rules shows it."""
    params, x = {"W": rand(4, 3), "V": rand(3, 2)}, rand(5, 4)

    def model(params, x):
        return torch.tanh(scaled_product(x, params["W"], 2.0)) @ params["V"]

    with pytest.raises(UnsupportedUse, match="scaled_product"):
        fxkfac.trace(model, x, params)

    @rules.rule(torch.ops.fxkfac_tests.scaled_product.default)
    def rule(call, operand):
        return rules.Form("i o", "r i", "r o", call.args["x"], scale=call.number("factor"))

    program = fxkfac.trace(model, x, params)
    data = x, rand(5, 2)
    assert max(fxkfac.check(program, nn.MSELoss(), data).values()) < 1e-9
    found = fxkfac.kfac(program, nn.MSELoss(), data)["W"]

    def plain(params, x):
        return torch.tanh(2.0 * x @ params["W"]) @ params["V"]

    expected = fxkfac.kfac(fxkfac.trace(plain, x, params), nn.MSELoss(), data)["W"]
    torch.testing.assert_close(found.dense(), expected.dense())
