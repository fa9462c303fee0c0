"""The network of a program: its nodes, edges and attributes, and how it is folded."""

from __future__ import annotations

import re

import networkx as nx
import pytest
import torch
from pictured import (
    PROGRAMS,
    Detach,
    cnn,
    functional,
    mlp,
    of_kind,
    partly,
    positions,
    tied,
    uses,
)
from torch import nn

import fxkfac
from fxkfac.graph.drawing.fold import folded


class LastOfLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.o(self.r(x)[0][:, -1])


def test_mlp_has_parameters_ops_taps_and_factor_sizes():
    network = mlp().to_networkx()
    parameters, ops = of_kind(network, "parameter"), of_kind(network, "op")
    assert list(parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert parameters["0.weight"]["shape"] == "10×16"
    assert parameters["0.weight"]["numel"] == 160
    assert {p["status"] for p in parameters.values()} == {"covered"}
    assert [(o["op"], o["module"], o["tap"]) for o in ops.values()] == [
        ("linear", "0", 0),
        ("linear", "2", 1),
    ]
    first = ops["linear"]
    assert (first["x"], first["y"], first["batch"]) == ("N×16", "N×10", "N")
    assert (first["A"], first["B"], first["orientation"]) == ("17×17", "10×10", "o i")
    assert (first["group"], first["d_in"], first["d_out"]) == (1, 17, 10)
    assert [q["op"] for q in of_kind(network, "quiet").values()] == ["relu"]
    assert list(of_kind(network, "input")) == ["input"]
    assert of_kind(network, "prediction")["prediction"]["shape"] == "N×3"


def test_mlp_flows_from_input_to_prediction():
    network = mlp().to_networkx()
    data = [(u, v) for u, v, kind in network.edges(data="kind") if kind == "data"]
    assert data == [
        ("input_0", "linear"),
        ("linear", "relu"),
        ("relu", "linear_1"),
        ("linear_1", "output"),
    ]


def test_only_the_data_are_n_where_all_sizes_are_symbols():
    program = fxkfac.trace(LastOfLSTM(), torch.randn(5, 3, 3), structure={"r.*": "dense"})
    assert program.tapped.captured.front_end == "make_fx (symbolic)"
    network = program.to_networkx()
    assert of_kind(network, "input")["input"]["shape"] == "N×3×3"
    assert of_kind(network, "prediction")["prediction"]["shape"] == "N×2"
    shapes = {node["shape"] for node in of_kind(network, "quiet").values()}
    assert {"1×N×16", "N×3×4"} <= shapes


def test_gradient_passes_between_taps_and_prediction_only():
    network = mlp().to_networkx()
    passing = [(u, v) for u, v, gradient in network.edges(data="gradient") if gradient]
    assert passing == [("linear", "relu"), ("relu", "linear_1"), ("linear_1", "output")]


def test_gradient_stops_at_detach():
    model = nn.Sequential(nn.Linear(4, 4), Detach(), nn.Linear(4, 2))
    network = fxkfac.trace(model, torch.randn(3, 4)).to_networkx()
    passing = [(u, v) for u, v, gradient in network.edges(data="gradient") if gradient]
    assert passing == [("linear_1", "output")]


def test_no_gradient_passes_a_comparison_that_a_decomposition_wrote():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))
    network = fxkfac.trace(model, torch.randn(3, 4)).to_networkx()
    ops = {key: node["op"] for key, node in network.nodes(data=True) if "op" in node}
    passing = {ops.get(k) for *ends, g in network.edges(data="gradient") if g for k in ends}
    assert "gt" in ops.values()
    assert "gt" not in passing
    assert "where" in passing


def test_factors_have_sizes_where_a_block_has_factors():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 2))
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    structure = {"2.*": "diagonal", "3.weight": "dense"}
    program = fxkfac.trace(model, x, structure=structure)
    network = program.to_networkx()
    sizes = {name: e["A"] for name, _, e in uses(network) if "A" in e}
    factors = fxkfac.kfac(program, nn.CrossEntropyLoss(), (x, y))
    blocks = {name: b for name, b in factors.items() if isinstance(b, fxkfac.Block)}
    assert sizes == {name: f"{len(b.A)}×{len(b.A)}" for name, b in blocks.items()}
    assert list(sizes) == ["0.weight", "1.bias", "3.bias"]


def test_cnn_has_groups_and_patches():
    conv = of_kind(cnn().to_networkx(), "op")["conv2d"]
    assert (conv["group"], conv["d_in"], conv["d_out"]) == (2, 10, 2)  # 3·3 patches and the bias
    assert (conv["x"], conv["y"]) == ("N×2×8×8", "N×4×6×6")


def test_tied_weight_is_one_parameter_with_two_uses():
    network = tied().to_networkx()
    assert list(of_kind(network, "parameter")) == ["w", "b"]
    found = {(name, op): e["orientation"] for name, op, e in uses(network)}
    assert found == {("w", "linear"): "o i", ("b", "linear"): "o", ("w", "matmul"): "i o"}


def test_views_are_on_the_edge_and_are_no_nodes():
    network = functional().to_networkx()
    ((_, _, edge),) = [use for use in uses(network) if use[0] == "second.w"]
    assert edge["view"] == "T"
    assert all(q["op"] != "permute" for q in of_kind(network, "quiet").values())


def test_bias_added_later_names_the_weight_it_joins():
    network = functional().to_networkx()
    ((_, op, edge),) = [use for use in uses(network) if use[0] == "first.b"]
    assert network.nodes[op]["op"] == "add"
    assert edge["joins"] == "first.w"
    assert "A" not in edge
    assert of_kind(network, "op")["matmul"]["A"] == "5×5"


def test_every_status_of_a_parameter_is_told():
    network = partly().to_networkx()
    status = {name: p["status"] for name, p in of_kind(network, "parameter").items()}
    assert status == {
        "linear.weight": "covered",
        "linear.bias": "covered",
        "log_scale": "unsupported",
        "spare": "unused",
        "frozen.weight": "frozen",
        "frozen.bias": "frozen",
    }
    assert of_kind(network, "parameter")["log_scale"]["structure"] == "skip"
    (exp,) = of_kind(network, "unsupported").values()
    assert (exp["op"], "no rule" in exp["reason"]) == ("exp", True)
    assert list(of_kind(network, "buffer")) == ["mask"]


def test_structure_is_the_one_that_was_asked_for():
    network = partly("diagonal").to_networkx()
    assert of_kind(network, "parameter")["log_scale"]["structure"] == "diagonal"


def test_op_that_meets_no_data_says_where_it_is_tapped():
    network = positions().to_networkx()
    table = next(o for o in of_kind(network, "op").values() if o["module"] == "places")
    assert network.nodes[table["tapped"]]["op"] == "add"
    assert (table["A"], table["B"], table["y"]) == ("diagonal 5", "3×3", "N×5×3")


def test_weights_that_rows_choose_enter_where_they_are_chosen():
    """They are tapped at the product behind it."""

    def chosen(params, x, expert):
        return torch.bmm(params["w"][expert], x.unsqueeze(-1)).squeeze(-1)

    inputs = (torch.randn(5, 3), torch.randint(4, (5,)))
    network = fxkfac.trace(chosen, inputs, {"w": torch.randn(4, 2, 3)}).to_networkx()
    ((_, op, edge),) = uses(network)
    assert network.nodes[op]["op"] == "index"
    assert network.nodes[edge["tapped"]]["op"] == "bmm"
    assert (edge["group"], edge["A"], edge["B"]) == (4, "3×3", "2×2")


def test_ops_tell_the_line_of_the_user():
    op = of_kind(tied().to_networkx(), "op")["matmul"]
    assert op["code"] == "return torch.sigmoid(F.linear(x, self.w, self.b)) @ self.w"
    assert re.fullmatch(r"pictured\.py:\d+", op["source"])
    assert op["function"] == "forward"


def test_inputs_are_named_by_keyword_or_position():
    model = nn.Bilinear(2, 3, 4)
    inputs = {"input1": torch.randn(5, 2), "input2": torch.randn(5, 3)}
    network = fxkfac.trace(model, inputs, unsupported="skip").to_networkx()
    assert list(of_kind(network, "input")) == ["input1", "input2"]
    network = fxkfac.trace(model, tuple(inputs.values()), unsupported="skip").to_networkx()
    assert list(of_kind(network, "input")) == ["input 0", "input 1"]


@pytest.mark.parametrize("build", PROGRAMS)
def test_every_use_has_its_edge(build):
    program = build()
    taps = sorted(e["tap"] for *_, e in uses(program.to_networkx()) if "tap" in e)
    assert taps == sorted(use.tap for use in program.uses)


@pytest.mark.parametrize("build", PROGRAMS)
def test_network_is_written_as_graphml_and_read_back(build, tmp_path):
    network = build().to_networkx()
    nx.write_graphml(network, tmp_path / "network.graphml")
    again = nx.read_graphml(tmp_path / "network.graphml", force_multigraph=True)
    assert dict(again.nodes(data=True)) == dict(network.nodes(data=True))
    assert again.number_of_edges() == network.number_of_edges()


# Folding.


def test_chain_of_quiet_ops_is_folded_into_one():
    network = folded(cnn().to_networkx())
    assert [q["ops"] for q in of_kind(network, "quiet").values()] == ["relu · max_pool2d · flatten"]


def test_folding_keeps_every_way_between_the_other_nodes():
    for build in PROGRAMS:
        before = build().to_networkx()
        after = folded(before)
        kept = [k for k, n in after.nodes(data=True) if n["kind"] != "quiet"]
        ways = {(u, v) for u in kept for v in kept if nx.has_path(before, u, v)}
        assert ways == {(u, v) for u in kept for v in kept if nx.has_path(after, u, v)}
        assert nx.is_directed_acyclic_graph(after)


def test_ops_side_by_side_are_folded():
    def branches(params, x):
        h = x @ params["w"]
        return torch.stack([h.select(1, k).relu().neg() for k in range(3)], 1).sin()

    program = fxkfac.trace(branches, torch.randn(4, 3), {"w": torch.randn(3, 3)})
    (quiet,) = of_kind(folded(program.to_networkx()), "quiet").values()
    assert quiet["ops"] == "3 × (select · relu · neg) · stack · sin"


def test_what_has_no_part_in_the_curvature_is_not_drawn():
    names = {n["name"] for _, n in folded(partly().to_networkx()).nodes(data=True)}
    assert names.isdisjoint({"frozen.weight", "frozen.bias", "mask"})
    assert {"linear.weight", "log_scale", "spare"} <= names
