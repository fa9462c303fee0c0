"""The examples that use curvature: what they say of pruning and merging holds, in a smaller net."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def pruning() -> dict[str, Any]:
    """The example, with a net, its data and its decompositions."""
    example = runpy.run_path(str(EXAMPLES / "pruning.py"))
    torch.manual_seed(0)
    train, test = example["digits"]()
    model = example["trained"](16, 10, train)
    return example | {
        "model": model,
        "test": test,
        "ways": example["decompositions"](model, train),
    }


def test_every_way_of_pruning_starts_at_the_weights(pruning: dict[str, Any]) -> None:
    weights = dict(pruning["model"].named_parameters())
    for layers in pruning["ways"].values():
        assert set(layers) == {"0.weight", "2.weight", "4.weight"}
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight(), weights[name].detach())


def test_half_of_the_coordinates_go_those_of_least_saliency(pruning: dict[str, Any]) -> None:
    for layers in pruning["ways"].values():
        left = pruning["pruned"](layers, 0.5)
        mask = torch.cat([layer.C.flatten() != 0 for layer in left.values()])
        saliency = torch.cat([(x.C**2 * x.curvature).flatten() for x in layers.values()])
        assert int((~mask).sum()) == len(mask) // 2
        assert saliency[~mask].max() <= saliency[mask].min()


def test_numbers_that_are_stored(pruning: dict[str, Any]) -> None:
    C = torch.tensor([[1.0, 0, 0], [2.0, 0, 3.0]])
    layer = pruning["Layer"]
    assert layer(C, C, None).numbers() == 3
    assert layer(C, C, (torch.eye(2), torch.eye(3))).numbers() == 3 + 2 * 2 + 2 * 3


def test_the_eigenbasis_is_pruned_at_least_loss(pruning: dict[str, Any]) -> None:
    before, _ = pruning["evaluated"](
        pruning["model"], pruning["ways"]["magnitude"], pruning["test"]
    )
    rise = {}
    for name, layers in pruning["ways"].items():
        left = pruning["pruned"](layers, 0.5)
        rise[name] = pruning["evaluated"](pruning["model"], left, pruning["test"])[0] - before
    assert rise["eigenbasis of KFAC"] < 0.2 * rise["exact diagonal"]
    assert rise["exact diagonal"] < 0.9 * rise["magnitude"]
    left = pruning["pruned"](pruning["ways"]["eigenbasis of KFAC"], 0.7)
    still = pruning["evaluated"](pruning["model"], left, pruning["test"])[0] - before
    assert still < 0.2 * rise["exact diagonal"]


def test_the_report_of_pruning(
    pruning: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning["report"](pruning["model"], pruning["ways"], pruning["test"], tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 3 * len(pruning["FRACTIONS"]) + 1
    assert sum("eigenbasis of KFAC" in line for line in printed) == len(pruning["FRACTIONS"])
    assert "eigenbasis of KFAC" in (tmp_path / "pruning.svg").read_text()


@pytest.fixture(scope="module")
def merging() -> dict[str, Any]:
    """The example, with two nets, their curvatures and test data."""
    example = runpy.run_path(str(EXAMPLES / "merging.py"))
    torch.manual_seed(0)
    start, train, test = example["digits"]()
    common = example["trained"](example["initial"](12), start, 15)
    found = example["all_nets"](common, train, 15)
    nets = [found["trained on 0 to 4"], found["trained on 5 to 9"]]
    pairs = zip(nets, example["halves"](train), strict=True)
    return example | {
        "test": test,
        "found": found,
        "nets": nets,
        "factors": [example["curvature"](*pair) for pair in pairs],
    }


def test_a_merged_net_solves_the_dense_system(merging: dict[str, Any]) -> None:
    nets, factors, damping = merging["nets"], merging["factors"], 1e-3
    found = merging["merged"](nets, factors, damping)
    for k in (1, 2, 3):
        C = []
        for block in (f[f"W{k}"] for f in factors):
            A, B = (m + damping**0.5 * torch.eye(len(m)).double() for m in (block.A, block.B))
            C.append(torch.kron(B, A))  # acts on the rvec of (W b), W stored as (out, in)
        joint = [torch.cat([p[f"W{k}"], p[f"b{k}"].unsqueeze(1)], 1) for p in (*nets, found)]
        weighted = sum(c @ W.flatten() for c, W in zip(C, joint[:2], strict=True))
        expected = torch.linalg.solve(C[0] + C[1], weighted).view_as(joint[2])
        torch.testing.assert_close(joint[2], expected, rtol=1e-8, atol=1e-8)


def test_equal_nets_stay_and_large_damping_averages(merging: dict[str, Any]) -> None:
    nets, factors = merging["nets"], merging["factors"]
    same = merging["merged"]([nets[0], nets[0]], factors, 1e-3)
    far = merging["merged"](nets, factors, 1e16)
    for name, mean in merging["average"](nets).items():
        torch.testing.assert_close(same[name], nets[0][name], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(far[name], mean, rtol=1e-5, atol=1e-5)


def test_merging_by_kfac_knows_more_than_the_average(merging: dict[str, Any]) -> None:
    known: dict[str, list[tuple[float, float]]] = {}
    for name, params in merging["found"].items():
        loss, accuracy, *_ = merging["evaluated"](params, merging["test"])
        known.setdefault(name.split(",")[0], []).append((loss, accuracy))
    assert len(known["KFAC"]) == len(known["diagonals"]) == len(merging["DAMPINGS"])
    singles = [*known["trained on 0 to 4"], *known["trained on 5 to 9"]]
    order = [known["KFAC"], known["diagonals"], known["plain average"], singles]
    for better, worse in pairwise(order):
        assert max(loss for loss, _ in better) < 0.95 * min(loss for loss, _ in worse)
        assert min(right for _, right in better) > max(right for _, right in worse)


def test_the_report_of_merging(merging: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    merging["report"](merging["found"], merging["test"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["net", "test"]
    assert [line[:24].strip() for line in lines] == list(merging["found"])
