"""Questions to the network, with answers that are known by hand or from another trace."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from pictured import cnn, functional, mlp, partly, positions, tied
from torch import nn

import fxkfac
from fxkfac.errors import OptionError, UnknownParameter
from fxkfac.graph import longest_path, saved_by_freezing, sharing_inputs, taps_below


class Attention(nn.Module):
    """Query, key and value from one input, a residual way, and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x):
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(x + self.out(y))


@pytest.fixture(scope="module")
def attention():
    return fxkfac.trace(Attention(), torch.randn(3, 6, 4)).to_networkx()


def tap_of(network, name):
    (tap,) = {
        edge["tap"] for u, _, edge in network.edges(data=True) if network.nodes[u]["name"] == name
    }
    return tap


def test_taps_below_are_those_of_the_layers_before(attention):
    q, k, v, out, first = (
        tap_of(attention, f"{name}.weight") for name in ("q", "k", "v", "out", "head.0")
    )
    assert taps_below(attention, "q.weight") == taps_below(attention, "v.bias") == []
    assert taps_below(attention, "out.weight") == sorted([q, k, v])
    assert taps_below(attention, "head.0.bias") == sorted([q, k, v, out])
    assert taps_below(attention, "head.2.weight") == sorted([q, k, v, out, first])


def test_a_tied_weight_has_its_own_lower_use_below_it():
    network = tied().to_networkx()
    assert taps_below(network, "b") == []
    assert taps_below(network, "w") == [0]


def test_a_parameter_is_where_its_output_meets_the_data():
    network = positions().to_networkx()  # words, and at the addition behind them the places
    assert taps_below(network, "places.weight") == [tap_of(network, "words.weight")]
    assert taps_below(network, "words.weight") == []


def test_parameters_without_tap_or_use_have_taps_below_them():
    network = partly().to_networkx()
    assert taps_below(network, "log_scale") == []  # exp of it comes from no data
    assert taps_below(network, "spare") == []


def test_longest_path_leads_through_most_tapped_ops(attention):
    modules = [attention.nodes[key].get("module") for key in longest_path(attention)]
    layers = [m for m in modules if m in ("q", "k", "v", "out", "head.0", "head.2")]
    assert layers[0] in ("q", "k", "v")
    assert layers[1:] == ["out", "head.0", "head.2"]
    path = longest_path(mlp().to_networkx())
    assert path == ["input_0", "linear", "relu", "linear_1", "output"]


def test_longest_path_counts_layers_and_no_additions_of_biases():
    def two_ways(params, x):
        short = torch.sin(torch.cos(torch.sin(x @ params["once"] + params["bias"])))
        return short + (x @ params["first"]) @ params["second"]

    params = {name: torch.randn(3, 3) for name in ("once", "first", "second")}
    params["bias"] = torch.randn(3)
    network = fxkfac.trace(two_ways, torch.randn(4, 3), params).to_networkx()
    ops = [network.nodes[key].get("op") for key in longest_path(network)]
    assert ops == [None, "matmul", "matmul", "add", None]


def test_weights_with_one_input(attention):
    assert sharing_inputs(attention) == [("q.weight", "k.weight", "v.weight")]
    assert sharing_inputs(cnn().to_networkx()) == []


def test_experts_share_an_input_with_those_that_also_have_the_same_choice():
    def experts(params, x):
        i, j = (x @ params["gate"]).argmax(-1), (x @ params["other gate"]).argmax(-1)
        y = act(params["a"], i, x) + act(params["b"], i, x) + act(params["c"], j, x)
        return act(params["above"], i, y + params["bias"][i])

    def act(W, i, x):
        return torch.tanh((W[i] @ x.unsqueeze(-1)).squeeze(-1))

    params = {name: torch.randn(3, 4, 4) for name in ("a", "b", "c", "above")}
    params |= {"gate": torch.randn(4, 3), "other gate": torch.randn(4, 3)}
    params |= {"bias": torch.randn(3, 4)}
    program = fxkfac.trace(experts, torch.randn(8, 4), params, structure={"*gate": "skip"})
    assert sharing_inputs(program.to_networkx()) == [("a", "b")]


def test_only_what_a_weight_multiplies_is_its_input():
    def added(params, x):
        h, (left, right) = x.sin(), x.chunk(2, -1)
        y = torch.addmm(h, x, params["a"]) + torch.addmm(x, h, params["b"]) + x @ params["c"]
        return y + left @ params["left"] + right @ params["right"]

    params = {name: torch.randn(4, 4) for name in "abc"}
    params |= {name: torch.randn(2, 4) for name in ("left", "right")}
    network = fxkfac.trace(added, torch.randn(8, 4), params).to_networkx()
    assert sharing_inputs(network) == [("a", "c")]


def test_frozen_layers_save_their_taps_and_the_way_to_them():
    network = mlp().to_networkx()
    saved = saved_by_freezing(network, ["0.weight", "0.bias"])
    assert saved.taps == (0,)
    assert saved.ops == ("relu", "linear_1")  # nothing asks for the gradient at their inputs
    assert saved.factors == (("0.weight", "17×17", "10×10"),)
    above = saved_by_freezing(network, ["2.weight", "2.bias"])
    assert (above.taps, above.ops) == ((1,), ())  # vectors still pass it
    assert saved_by_freezing(network, "0.weight").taps == ()  # its bias is tapped there


@pytest.mark.parametrize("frozen", ["q.*", "[qkv].*", "head.0.*"])
def test_what_freezing_saves_is_what_another_trace_lacks(attention, frozen):
    model = Attention()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names(model, frozen))
    without = fxkfac.trace(model, torch.randn(3, 6, 4)).to_networkx()
    saved = saved_by_freezing(attention, names(model, frozen))
    assert set(saved.ops) == passed(attention) - passed(without)
    kept = {
        attention.nodes[v]["module"] for _, v, e in tapped(attention) if e["tap"] not in saved.taps
    }
    assert kept == {without.nodes[v]["module"] for _, v, _ in tapped(without)}


def names(model, pattern):
    return [name for name, _ in model.named_parameters() if fnmatch(name, pattern)]


def passed(network):
    return {v for _, v, gradient in network.edges(data="gradient") if gradient}


def tapped(network):
    return [edge for edge in network.edges(data=True) if "tap" in edge[2]]


def test_unknown_names_are_refused_with_near_ones():
    network = functional().to_networkx()
    with pytest.raises(UnknownParameter, match=r"first\.w"):
        taps_below(network, "first.W")
    with pytest.raises(UnknownParameter, match=r"second\.w"):
        saved_by_freezing(network, ["second.x"])


@pytest.mark.parametrize(
    "ask",
    [
        lambda program: taps_below(program, "first.w"),
        longest_path,
        sharing_inputs,
        lambda program: saved_by_freezing(program, "first.w"),
    ],
)
def test_a_program_in_the_place_of_its_network_is_refused(ask):
    with pytest.raises(OptionError, match="to_networkx"):
        ask(functional())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        z = self.a(x)
        return self.c(self.b(x) * (z > 0)) + z


def test_taps_behind_a_gate_are_not_below():
    network = fxkfac.trace(Gated(), torch.randn(3, 4)).to_networkx()
    assert taps_below(network, "c.weight") == [tap_of(network, "b.weight")]
