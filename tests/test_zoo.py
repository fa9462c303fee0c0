"""Every model in the zoo: taps against autograd, batch sizes, batch axes, merges, spellings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from quick import one_in, quick
from torch import Tensor, nn
from zoo import SPELLINGS, ZOO, Entry

import fxkfac
from fxkfac import errors
from fxkfac.graph.flat import FlatModel
from fxkfac.likelihoods.losses import likelihood_of

TRACED = 4  # batch size at which everything is traced
RIGHT = {name: e for name, e in ZOO.items() if e.expected == "right"}
PLAIN = {name: e for name, e in RIGHT.items() if not e.coupled and not e.random}


def entries(chosen: Mapping[str, Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", quick(chosen, one_in(9)))


@dataclass(frozen=True)
class State:
    """All of the user's that must stay as it is."""

    tensors: dict[str, Tensor]
    flags: dict[str, Any]
    random: Tensor

    @staticmethod
    def of(model: Any, params: Any) -> State:
        named = dict(_named(model, params))
        flags: dict[str, Any] = {}
        for name, t in named.items():
            flags[name] = (id(t), t.requires_grad, t.grad, t.data_ptr(), t._version, t.is_leaf)
        if isinstance(model, nn.Module):
            flags |= {f"mode of {n}": m.training for n, m in model.named_modules()}
            flags |= {f"hooks of {n}": len(m._forward_hooks) for n, m in model.named_modules()}
        copies = {name: t.detach().clone() for name, t in named.items()}
        return State(copies, flags, torch.get_rng_state())

    def require_same(self, now: State) -> None:
        assert now.flags == self.flags
        assert now.tensors.keys() == self.tensors.keys()
        for name, t in self.tensors.items():
            assert torch.equal(t, now.tensors[name]), name
        assert torch.equal(self.random, now.random), "the global random state"


def _named(model: Any, params: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, nn.Module):
        yield from model.named_parameters()
        yield from model.named_buffers()
    for key, value in (params or {}).items():
        if isinstance(value, Mapping):
            yield from _named(None, value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Traced:
    """An entry, its model, its program, and the user's state before and after tracing."""

    entry: Entry
    model: Any
    params: Any
    program: fxkfac.Program
    before: State
    after: State

    def kfac(self, data: Any, **options: Any) -> fxkfac.Factors:
        return fxkfac.kfac(self.program, self.entry.loss, data, **options)

    def check(self, n: int) -> dict[str, float]:
        return fxkfac.check(self.program, self.entry.loss, self.entry.data(n))


@cache
def traced(name: str) -> Traced:
    entry = ZOO[name]
    model, params = entry.build()
    before = State.of(model, params)
    program = entry.trace(model, params, TRACED)
    return Traced(entry, model, params, program, before, State.of(model, params))


def assert_same(a: fxkfac.Factors, b: fxkfac.Factors) -> None:
    """The same A and B everywhere, or exact block, to ten digits of the largest entry."""
    assert list(a) == list(b)
    for name, block in a.items():
        if not isinstance(block, fxkfac.Block):
            assert_close(block.dense(), b[name].dense())
            continue
        for mine, other in zip(block.terms, b[name].terms, strict=True):
            assert_close(mine.A, other.A)
            assert_close(mine.B, other.B)


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)


def test_the_zoo_is_large_and_described():
    assert len(ZOO) >= 40
    assert all(e.description and "\n" not in e.description for e in ZOO.values())
    assert len({e.description for e in ZOO.values()}) == len(ZOO)


@entries(RIGHT)
def test_gradients_from_the_taps_are_autograds(name):
    at = traced(name)
    for n in (TRACED, 2, 7):
        found = at.check(n)
        assert set(found) == set(at.program.parameters)
        assert max(found.values()) < at.entry.tolerance, (n, found)


@entries({name: e for name, e in ZOO.items() if e.expected == "refused"})
def test_what_cannot_be_right_is_refused(name):
    model, params = ZOO[name].build()
    with pytest.raises((errors.CaptureError, errors.UnsupportedUse)):
        ZOO[name].trace(model, params, TRACED)


@entries(PLAIN)
def test_another_order_and_parts_of_the_data(name):
    at, data = traced(name), ZOO[name].data(7)
    take = at.entry.take
    whole = at.kfac(data)
    assert_same(at.kfac(take(data, [3, 0, 6, 2, 1, 5, 4])), whole)
    parts = [take(data, [0, 1, 2]), take(data, [3, 4, 5, 6])]
    assert_same(at.kfac(parts[0]) + at.kfac(parts[1]), whole)


@entries(PLAIN)
def test_a_step_has_the_gradients_and_the_factors(name):
    at, data = traced(name), ZOO[name].data(3)
    found = fxkfac.step(at.program, at.entry.loss, data, fisher="empirical")
    assert_same(found.factors, at.kfac(data, fisher="empirical"))
    gradients = gradients_of_the_model(at, data)
    assert found.gradients.keys() == gradients.keys()
    scale = max(g.norm() for g in gradients.values())
    for parameter, expected in gradients.items():
        error = (found.gradients[parameter] - expected).norm()
        assert error <= at.entry.tolerance * max(expected.norm(), 1e-3 * scale), parameter


def gradients_of_the_model(at: Traced, data: Any) -> dict[str, Tensor]:
    """By autograd on the model itself."""
    inputs, targets = data
    program, likelihood = at.program, likelihood_of(at.entry.loss)
    model = FlatModel(program.model, program.signature.with_constants(inputs))
    state, tensors = program.state(), program.signature.tensors(inputs)
    f = model.predict(state, tensors).detach()
    R = likelihood.reduction_factor(likelihood.count(f, targets))
    cotangent = R * likelihood.gradient(f, targets)
    return model.gradients(state, tensors, cotangent, program.asked.selected)


@entries({name: e for name, e in PLAIN.items() if e.reduce})
def test_the_batch_axis(name):
    """Reduce sums over the shared axes alone: right only where the batch axis is."""
    at, data = traced(name), ZOO[name].data(3)
    singles = [at.entry.take(data, [k]) for k in range(3)]
    assert_same(at.kfac(singles, sharing="reduce"), at.kfac(data, sharing="reduce"))


@entries({name: e for name, e in PLAIN.items() if not e.reduce})
def test_an_unknown_batch_axis_is_an_error(name):
    at = traced(name)
    with pytest.raises(errors.BatchAxisError):
        at.kfac(at.entry.data(5), sharing="reduce")


@entries({name: e for name, e in PLAIN.items() if e.unshared})
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_datum_without_sharing_is_the_ggn(name, sharing):
    at, data = traced(name), ZOO[name].data(1)
    factors = at.kfac(data, sharing=sharing)
    for block in factors.values():
        names = list(block.params)
        expected = fxkfac.exact.ggn(at.model, at.entry.loss, data, names, at.params)
        found = factors.dense(*names)
        assert (found - expected).norm() <= at.entry.tolerance * expected.norm()


@entries({n: e for n, e in PLAIN.items() if e.reduce and not e.trace_options.get("batch_axis")})
def test_exact_blocks_are_the_ggn(name):
    """A bias by itself is exact, and a scale's diagonal, whatever they are shared over."""
    at, data = traced(name), ZOO[name].data(3)
    factors = at.kfac(data, separate_weight_and_bias=True)
    for block in factors.values():
        if is_exact(block):
            names = list(block.params)
            expected = fxkfac.exact.ggn(at.model, at.entry.loss, data, names, at.params)
            if isinstance(block, fxkfac.Diagonal):
                expected = expected.diagonal().diag()
            error = (factors.dense(*names) - expected).norm()
            assert error <= at.entry.tolerance * expected.norm()


def is_exact(block: Any) -> bool:
    if isinstance(block, fxkfac.Block):
        return len(block.terms) == 1 and block.terms[0].plan.is_bias
    return True


@entries(RIGHT)
def test_nothing_of_the_users_changes(name):
    at = traced(name)
    at.before.require_same(at.after)
    before, data = State.of(at.model, at.params), at.entry.data(TRACED)
    at.kfac(data)
    at.kfac(data, fisher="mc")
    at.check(TRACED)
    before.require_same(State.of(at.model, at.params))


SPELLED = [(group, member) for group, s in SPELLINGS.items() for member in s.members]
MEMBERS = quick(SPELLED, one_in(6))
KINDS = [(s, apart) for s in ("expand", "reduce") for apart in (False, True)]


@cache
def curvatures(group: str, member: str) -> dict[tuple[str, bool], Tensor]:
    """Dense curvature in the common order, for both kinds of sharing, bias joined and apart."""
    spellings = SPELLINGS[group]
    model, params = spellings.build(member)
    data = spellings.inputs(5), spellings.targets(5)
    program = fxkfac.trace(model, data[0], params)
    order, sign = spellings.order(member, program.parameters)
    assert order.sort().values.tolist() == list(range(len(order)))
    found = {}
    for sharing, apart in KINDS:
        factors = fxkfac.kfac(
            program, nn.MSELoss(), data, sharing=sharing, separate_weight_and_bias=apart
        )
        dense = torch.zeros(len(order), len(order), dtype=torch.float64)
        dense[order[:, None], order] = sign[:, None] * factors.dense(*program.parameters) * sign
        found[sharing, apart] = dense
    return found


def first(group: str) -> str:
    return next(iter(SPELLINGS[group].members))


@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_spellings_are_the_same_map(group, member):
    spellings = SPELLINGS[group]
    inputs, predictions = spellings.inputs(3), []
    for name in (first(group), member):
        model, params = spellings.build(name)
        predictions.append(model(inputs) if params is None else model(params, inputs))
    assert_close(*predictions)


@pytest.mark.parametrize("apart", [False, True], ids=["joint", "apart"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_spellings_have_the_same_curvature(group, member, sharing, apart):
    if apart and member in WITHOUT_OWN_BIAS:
        pytest.skip("its bias is a column of the weight")
    expected = curvatures(group, first(group))[sharing, apart]
    assert_close(curvatures(group, member)[sharing, apart], expected)


WITHOUT_OWN_BIAS = {"part_of_larger"}
