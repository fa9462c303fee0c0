"""Repeated layers are drawn once: what is folded, how often it is there, and what is not folded."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from pictured import of_kind, partly, positions, tied
from torch import nn

import fxkfac
from fxkfac.graph.drawing.boxes import boxes, plain_scopes, scopes
from fxkfac.graph.drawing.drawn import drawn

DEPTH = 4


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self, width=4, hidden=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Layers(nn.Module):
    """Layers in a row; the head may read what some of them return."""

    def __init__(self, layers, read=(-1,), frozen=()):
        super().__init__()
        self.first, self.layers, self.head = nn.Linear(3, 4), nn.ModuleList(layers), nn.Linear(4, 2)
        self.read = read
        for k in frozen:
            self.layers[k].requires_grad_(False)

    def forward(self, x):
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        chosen = [found[k] for k in self.read]
        return self.head(torch.stack(chosen).sum(0) if len(chosen) > 1 else chosen[0])


def network_of(model, *, x=None, params=None):
    program = fxkfac.trace(model, torch.randn(5, 3) if x is None else x, params)
    return program, drawn(program, fold=True)


def counts(network):
    return [repeat.count for repeat in network.graph["repeats"].values()]


@pytest.fixture(scope="module")
def four():
    return network_of(Layers([Layer() for _ in range(DEPTH)]))


def test_equal_layers_are_drawn_once_with_their_count(four):
    _, network = four
    (repeat,) = network.graph["repeats"].values()
    assert (repeat.count, repeat.first, repeat.last) == (4, ("layers", "0"), ("layers", "3"))
    modules = [node["module"] for node in of_kind(network, "op").values()]
    assert modules == ["first", "layers.0.up", "layers.0.down", "head"]
    up = of_kind(network, "parameter")["layers.0.up.weight"]
    assert up["names"] == tuple(f"layers.{k}.up.weight" for k in range(DEPTH))
    inside = {key for key, node in network.nodes(data=True) if node["repeats"]}
    kinds = Counter(network.nodes[key]["kind"] for key in inside)
    assert kinds == {"op": 2, "quiet": 2, "parameter": 4}  # relu and add


def test_what_comes_behind_reads_the_folded_layers(four):
    _, network = four
    (head,) = (key for key, node in network.nodes(data=True) if node.get("module") == "head")
    (before,) = (u for u, _, kind in network.in_edges(head, data="kind") if kind == "data")
    assert network.nodes[before]["repeats"]
    assert network.edges[before, head, 0]["gradient"]
    assert sorted(network.successors(before)) == [head]  # not the layer that is no longer there


def test_the_box_is_named_by_its_first_and_last_layer(four):
    program, network = four
    places = scopes(network)
    tree = boxes(program, network, places, plain_scopes(network, places))
    (box,) = (inner for inner in tree.inner if inner.count > 1)
    assert (box.name, box.remark, box.count) == ("layers.0 … layers.3", "Layer", DEPTH)


def test_functions_fold_by_the_ops_that_they_call():
    def layer(p, x):
        return torch.tanh(x @ p["w"] + p["b"])

    def model(params, x):
        for p in params["layers"]:
            x = layer(p, x)
        return x @ params["out"]

    layers = [{"w": torch.randn(3, 3), "b": torch.randn(3)} for _ in range(DEPTH)]
    program, network = network_of(model, params={"layers": layers, "out": torch.randn(3, 2)})
    assert counts(network) == [DEPTH]
    assert of_kind(network, "parameter")["layers.0.b"]["names"][-1] == "layers.3.b"
    places = scopes(network)
    tree = boxes(program, network, places, set())
    assert [(box.name, box.count) for box in tree.inner] == [("layer", DEPTH)]


def test_one_weight_in_all_layers_stays_one():
    layer = Layer()
    _, network = network_of(Layers([layer] * DEPTH))
    assert counts(network) == [DEPTH]
    up = of_kind(network, "parameter")["layers.0.up.weight"]
    assert (up["names"], up["repeats"]) == (("layers.0.up.weight",), ())


def test_layers_inside_layers():
    inner = [nn.Sequential(*(Layer() for _ in range(2)), nn.Linear(4, 4)) for _ in range(3)]
    _, network = network_of(Layers(inner))
    assert sorted(counts(network)) == [2, 3]
    weights = of_kind(network, "parameter")
    assert len(weights["layers.0.0.up.weight"]["names"]) == 6
    assert len(weights["layers.0.2.weight"]["names"]) == 3
    assert len(weights["layers.0.0.up.weight"]["repeats"]) == 2
    assert len(weights["layers.0.2.weight"]["repeats"]) == 1


@pytest.mark.parametrize(
    ("layers", "read", "frozen", "expected"),
    [
        ([Layer() for _ in range(4)], (-1, 2), (), [2, 2]),  # the second is read alone
        ([Layer() for _ in range(3)], (1, 2, 3), (), [3]),  # all are, alike
        ([Layer(), Layer(), Layer(hidden=5), Layer(hidden=5)], (-1,), (), [2, 2]),
        ([Layer(), nn.Sequential(nn.Tanh(), Layer()), Layer()], (-1,), (), []),
        ([Layer() for _ in range(4)], (-1,), (0,), [3]),  # frozen ones are others
        ([Layer() for _ in range(4)], (-1,), (1,), [2]),
        ([Layer() for _ in range(2)], (0, -1), (), [2]),  # what is read is none of them
    ],
)
def test_only_equal_layers_fold(layers, read, frozen, expected):
    _, network = network_of(Layers(layers, read, frozen))
    assert counts(network) == expected


def test_frozen_layers_fold_and_ops_without_parameters_do_not():
    layers = [nn.Sequential(Layer(), nn.Tanh(), nn.ReLU(), nn.Tanh(), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))
    for layer in model[1:-1]:
        layer.requires_grad_(False)
    _, network = network_of(model)
    assert counts(network) == [3]


def test_ops_side_by_side_are_no_layers():
    def heads(params, x):
        return F.scaled_dot_product_attention(*(torch.tanh(x @ w) for w in params["heads"]))

    _, network = network_of(heads, params={"heads": [torch.randn(3, 3) for _ in range(3)]})
    assert counts(network) == []


@pytest.mark.parametrize("build", [tied, partly, positions])
def test_nothing_gets_lost(build, four):
    """Every parameter and every op is drawn by itself, or counted."""
    for program in (build(), four[0]):
        plain, once = drawn(program), drawn(program, fold=True)
        names = [n for node in of_kind(once, "parameter").values() for n in node["names"]]
        assert sorted(names) == sorted(of_kind(plain, "parameter"))
        assert ops(once) == ops(plain)


def ops(network):
    """How many ops with parameters there are of each kind."""
    found: Counter[str] = Counter()
    for _, node in network.nodes(data=True):
        if node["kind"] in ("op", "unsupported"):
            repeats = (network.graph["repeats"][name].count for name in node["repeats"])
            found[node["op"]] += math.prod(repeats)
    return found


@pytest.mark.slow
def test_gpt2_of_twelve_layers_is_one_page():
    transformers = pytest.importorskip("transformers", reason="the model is that of transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=12, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    program = fxkfac.trace(model, {"input_ids": torch.randint(60, (2, 8))})
    network = drawn(program, fold=True)
    assert counts(network) == [12]
    assert len(network) < 50 < 400 < len(drawn(program))
