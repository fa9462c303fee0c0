"""The examples run, say what they did, and write what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import quick
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fxkfac

ROOT = Path(__file__).parent.parent


@pytest.mark.slow  # and `make demo`
def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert after < before
    table = dict(re.findall(r"^  ([\w-]+) +(?:GGN|empirical Fisher) +([\d.]+)$", done.stdout, re.M))
    # All labels of a categorical can be listed: the exact expectation is the type-2 Fisher.
    assert table["type-1"] == table["type-2"]
    assert float(table["type-2"]) < float(table["forward-only"])
    assert (tmp_path / "exact-and-kfac.png").read_bytes().startswith(b"\x89PNG")
    drawn = list(tmp_path.glob("digits.svg*"))
    assert drawn, "neither the drawing nor, without dot, its source"


def test_poisson(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "poisson.py"))
    torch.manual_seed(0)
    points, params = example["draw_points"](), example["initial"]()
    training = example["train_kfac"](params, points)
    kfac = [example["loss"](p, points).item() for p in islice(training, 6)]
    assert kfac == sorted(kfac, reverse=True)
    assert kfac[-1] < 0.8 * kfac[0]
    adam = example["train_adam"](params, points, 1e-2)
    first, *_, last = [example["loss"](p, points).item() for p in islice(adam, 6)]
    assert kfac[-1] < last < first == kfac[0]
    curve, steps = example["run"](adam, 0.0)
    assert steps == 1
    assert len(curve) == 2
    example["draw"]({"KFAC": curve, "Adam": curve}, tmp_path / "poisson.svg")
    assert "relative L2 error" in (tmp_path / "poisson.svg").read_text()


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return runpy.run_path(str(ROOT / "examples" / "training.py"))


@pytest.mark.slow  # a minute or two, where others run, too
@pytest.mark.parametrize("key", ["digits", "text"])
def test_training(
    training: dict[str, Any],
    tmp_path: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what was found, and half of the steps, KFAC ends where Adam does.

    For digits that is below a tenth of its loss.
    """
    task = training["TASKS"][key]
    turns = training["in_turn"](task, task.found, 1)
    adam, kfac = turns[0]["Adam"], turns[0]["KFAC"]
    assert adam.losses[-1] < {"digits": 5e-3, "text": 1.75}[key]
    assert kfac.losses[-1] < {"digits": 0.1, "text": 1.0}[key] * adam.losses[-1]
    assert 2 * kfac.steps[-1] == adam.steps[-1] == task.steps
    training["report"](turns)
    at = kfac.reaches(adam.losses[-1])
    there = "does not reach" if at is None else f"is there after {kfac.steps[at]} steps"
    assert f"KFAC {there}" in capsys.readouterr().out
    training["draw"]({key: turns}, tmp_path / "training.svg")
    assert "seconds, tracing included" in (tmp_path / "training.svg").read_text()


class Flops(TorchDispatchMode):
    """Of products, and of decompositions. `FlopCounterMode` refuses `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_):
            self.total += 2 * args[1].numel() * args[2].shape[-1]
        elif packet is torch.ops.aten._linalg_eigh:
            self.total += 9 * args[0].numel() * args[0].shape[-1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("key", quick(["digits", "text"], "digits".__eq__))
def test_a_step_of_training_costs_less_than_the_steps_that_it_saves(
    training: dict[str, Any], key: str
) -> None:
    """In operations over one period of all intervals, decompositions among them."""
    task = training["TASKS"][key]
    period, flops = 8, {}
    data = list(task.batches(period, 0))
    for name, method in training["METHODS"].items():
        step = method(task, task.model(0), data[0][0][:8], period + 1, task.found[name])
        with Flops() as counter:
            for x, y in data:
                step(x, y)
        flops[name] = counter.total
    assert 1 < flops["KFAC"] / flops["Adam"] < 2


@pytest.mark.slow
def test_tuning(training: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    task = replace(training["TASKS"]["text"], steps=6)
    for name in ("KFAC", "Adam"):
        chosen = training["tune"](task, name, 2)
        said = re.findall(rf"^  {name}  (.*?)  +(\S+)$", capsys.readouterr().out, re.M)
        assert len(said) == 2
        best, _ = min(said, key=lambda pair: float(pair[1]))
        assert training["said"](chosen) == best


def test_influence(tmp_path: Path) -> None:
    """Without a digit, a net's losses change as its influence says: a correlation of 0.8 at least.

    With the Hessian it is nearly 1: what is trained again is at its minimum.
    """
    example = runpy.run_path(str(ROOT / "examples" / "influence.py"))
    fit, which = example["fit"]("net", 1000, 40, 2), example["drawn"](1000, 40)
    actual = example["retrained_changes"](fit, which)
    dense = example["dense_scores"](fit, fit.hessian)
    assert min(example["correlations"](-dense[which] / 1000, actual)) > 0.98
    for scores in fit.scores.values():
        assert scores.shape == (1000, 40)
        predicted = -scores[which] / 1000
        assert min(example["correlations"](predicted, actual)) > 0.8
    example["draw"](fit, predicted, actual, tmp_path / "influence.png")
    assert (tmp_path / "influence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_influence_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = runpy.run_path(str(ROOT / "examples" / "influence_of_tokens.py"))
    result = example["run"](12, 2, 20)
    assert result.scores.shape == (12, example["LENGTH"], 2)
    assert result.scores.isfinite().all()
    assert (result.scores.sum((0, 1)) < 0).all()  # code helps to predict code
    example["report"](result)
    assert len(re.findall(r"most of all", capsys.readouterr().out)) == 2 * example["SHOWN"]
    example["draw"](result, tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_laplace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "laplace.py"))
    (data, (x, y)), model = example["digits"](), example["network"]()
    everything, last = example["train"](model, data, rounds=3, steps=100)
    τ = everything.prior_precision
    grid = [replace(everything, prior_precision=τ * 2.0**k) for k in range(-5, 6)]
    loss = torch.nn.functional.cross_entropy(model(data[0]), data[1]).detach()
    evidence = [example["laplace"].log_evidence(p, loss).item() for p in grid]
    assert evidence == [*sorted(evidence[:6]), *sorted(evidence[6:], reverse=True)]
    assert evidence.index(max(evidence)) == 5

    found = example["evaluate"](model, {"last layer": last, "all layers": everything}, x)
    names = ["MAP", "last layer", "all layers"]
    assert (found[0]["MAP"].argmax(-1) == y).float().mean() > 0.94
    assert (found[0]["all layers"].argmax(-1) == y).float().mean() > 0.94
    for angle in (45, 60, 90):
        for score in (example["nll"], example["ece"]):
            scores = [score(found[angle][n], y) for n in names]
            assert scores == sorted(scores, reverse=True)
            assert scores[2] < 0.85 * scores[0]
    known = [example["auroc"](found[0][n], found[90][n]) for n in names]
    assert known == sorted(known)
    assert known[2] > known[0] + 0.15

    example["report"](found, y)
    said = capsys.readouterr().out
    assert re.search(rf"^  all layers +{known[2]:.3f}$", said, re.M)
    example["draw"](found, y, tmp_path / "laplace.svg")
    assert "Entropy of upright and turned digits" in (tmp_path / "laplace.svg").read_text()


def test_laplace_beside_posteriors(capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers by either, where there is only one answer."""
    pytest.importorskip("posteriors", reason="it comes with the extra 'examples'")
    example = runpy.run_path(str(ROOT / "examples" / "laplace_functional.py"))
    (x, y), _ = example["digits"]()
    data, params = (x[:100], y[:100]), example["mode"]((x, y), steps=20)
    for fisher, theirs in example["by_posteriors"](params, data).items():
        posterior = example["by_fxkfac"](params, data, "diagonal", fisher)
        ours = example["diagonal"](posterior)
        assert set(ours) == set(theirs) == set(params)
        assert example["difference"](ours, theirs) < 1e-12
    draws = example["draws_by_posteriors"](params, ours, 2000)
    for name, precision in ours.items():
        spread = (draws[name] - params[name]).square().mean(0) * precision
        assert abs(spread.mean().item() - 1) < 0.1


@pytest.mark.slow
def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "figures.py"))
    example["rosenbrock"](tmp_path / "rosenbrock.svg", points=20)
    model, data = example["synthetic"]()
    example["monte_carlo"](model, data, (1, 10), tmp_path / "monte-carlo.svg")
    example["exact_and_kfac"](model, data, "cvec", tmp_path / "kfac-cvec.svg")

    model, (x, y) = example["digit_net"](epochs=1)
    data, loss = (x[:8], y[:8]), torch.nn.CrossEntropyLoss()
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, loss, data)
    example["overview"](factors, "7.weight", tmp_path / "report.svg")
    example["layer_errors"](program, loss, data, factors, tmp_path / "layer-errors.svg")
    said = capsys.readouterr().out
    assert "over 8 data" in said
    for path in tmp_path.glob("*.svg"):
        assert f"Wrote {path}" in said
        assert "<svg" in path.read_text()
    assert len(list(tmp_path.glob("*.svg"))) == 5


@pytest.mark.slow
def test_figures_in_both_orders(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "figures.py"))
    model, data = example["synthetic"]()
    sizes = [p.numel() for p in model.parameters()]
    assert sizes == [20, 4, 16, 4, 12, 3]
    ggn = fxkfac.exact.ggn(model, torch.nn.MSELoss(), data)
    example["both_orders"](lambda vec: ggn, "GGN", sizes, tmp_path / "ggn.svg")
    example["fishers"](model, data, sizes, tmp_path / "fishers.svg")
    assert "GGN, cvec" in (tmp_path / "ggn.svg").read_text()
    assert "empirical, rvec" in (tmp_path / "fishers.svg").read_text()


def test_kfac_of_figures_9_and_10_is_a_kronecker_product_in_their_orders() -> None:
    """Of W̃ = (W b): A ⊗ B in column-major order, B ⊗ A in row-major order."""
    example = runpy.run_path(str(ROOT / "examples" / "figures.py"))
    model, data = example["synthetic"]()
    factors = fxkfac.kfac(fxkfac.trace(model, data[0]), torch.nn.MSELoss(), data)
    for vec in ("cvec", "rvec"):
        order = example["joined_order"](factors, vec)
        blocks = [(b.A, b.B) if vec == "cvec" else (b.B, b.A) for b in factors.values()]
        expected = torch.block_diag(*(torch.kron(*pair) for pair in blocks))
        torch.testing.assert_close(factors.dense()[order][:, order], expected)
