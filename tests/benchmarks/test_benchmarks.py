"""The harness at tiny sizes, untimed: adapters agree, and table, JSON and picture come out."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from quick import quick

import fxkfac
from benchmarks import profile, suite
from benchmarks.__main__ import main
from benchmarks.compare import distance, distance_of_slopes, distance_to, in_double, slope_of
from benchmarks.interface import Slope
from benchmarks.limits import limits
from benchmarks.own import INDUCTOR, absent
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, STEP
from benchmarks.suite import DIFFERS, TIMED, Settings, compared, run
from fxkfac.linalg import Gram, add_gram

INSTALLED = tuple(
    name for name, peer in PEERS.items() if peer.version is not None and name not in absent()
)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("problem", quick(PROBLEMS, "mlp".__eq__))
def test_who_does_a_problem_has_the_same_factors(problem):
    rows = compared(problem, "empirical", Settings((problem,), ("empirical",), INSTALLED))
    status = {row.library: row.status for row in rows}
    assert status["fxkfac"] == status["hooks"] == TIMED
    assert DIFFERS not in status.values()


@pytest.mark.parametrize("flavour", quick(["type-2", "mc"], "type-2".__eq__))
def test_so_it_is_for_other_flavours(flavour):
    rows = compared("mlp", flavour, Settings(("mlp",), (flavour,), INSTALLED))
    assert {row.library for row in rows if row.status == TIMED} >= {"fxkfac", "hooks"}
    assert DIFFERS not in {row.status for row in rows}


@pytest.mark.slow
def test_limits_of_the_arithmetic():
    """By hand, for the tiny MLP: 8, 12, 6 and 4 wide, 16 data."""
    found = limits(PROBLEMS["mlp"].make(tiny=True))
    forward = 16 * (8 * 12 + 12 * 6 + 6 * 4)
    to_the_taps = 16 * (12 * 6 + 6 * 4)
    triangles = 16 * (9**2 + 12**2 + 13**2 + 6**2 + 7**2 + 4**2) // 2
    gradient = 2 * forward + to_the_taps
    least = forward + to_the_taps + triangles
    assert found.mc.limit == pytest.approx(least / gradient, rel=1e-2)
    assert found.mc.counted > found.mc.limit  # so small factors are taken whole
    assert isinstance(found.mc.counted, float)  # and of no graph that was traced meanwhile
    with_gradient = least + to_the_taps + forward  # and one product for every weight
    assert found.step.limit == pytest.approx(with_gradient / gradient, rel=1e-2)
    assert found.step.counted > found.step.limit
    assert found.factors_mb == 4 * (81 + 144 + 169 + 36 + 49 + 16) / 2**20


def test_a_wrong_factor_is_seen():
    torch.manual_seed(0)
    A, B = torch.rand(4, 4), torch.rand(3, 3)
    assert distance({"layer": (2 * A, B / 2)}, {"layer": (A, B)}) < 1e-6
    assert distance({"layer": (2 * A, B)}, {"layer": (A, B)}) == pytest.approx(1)
    assert distance({"layer": (A[:3, :3], B)}, {"layer": (A, B)}) < 1e-6  # the bias apart
    assert distance({"layer": (A, B + torch.eye(3))}, {"layer": (A, B)}) > 0.1
    right, lost = (A, B), (A, torch.nan * B)
    assert not distance({"a": right, "b": lost}, {"a": right, "b": right}) < 1  # behind a number


def test_a_wrong_gradient_is_seen():
    expected = Slope(torch.tensor(2.0), {"a": torch.ones(3), "zero": torch.zeros(2)})
    assert distance_to(expected, expected) == 0
    for name in expected.gradients:
        wrong = expected.gradients | {name: expected.gradients[name] + 0.01}
        assert distance_to(Slope(expected.loss, wrong), expected) >= 0.0099
    assert distance_to(Slope(2.2 * torch.ones(()), expected.gradients), expected) > 0.09


@pytest.mark.parametrize("problem", [name for name, p in PROBLEMS.items() if STEP in p.flavours])
def test_a_step_by_hooks_has_the_gradients(problem):
    built = PROBLEMS[problem].make(True)
    prepared = PEERS["hooks"].prepare(built, STEP)
    assert distance_of_slopes(prepared.slope(prepared.call()), built) < 1e-5


@pytest.mark.parametrize("problem", ["mlp", "pinn"])
def test_the_same_in_double_precision(problem):
    built = PROBLEMS[problem].make(True)
    found = slope_of(in_double(built))
    assert all(g.dtype == torch.float64 for g in found.gradients.values())
    assert distance_of_slopes(found, built) < 1e-5
    wrong = {name: 1.01 * g for name, g in found.gradients.items()}
    assert distance_of_slopes(Slope(found.loss, wrong), built) > 0.009


class _Step(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    factors: fxkfac.Factors


def _step_with(error):
    """`fxkfac.step` as it may come, with an error in its gradients."""

    def step(program, loss, data, fisher="type-2"):
        model = program.model.model
        value = loss(model(data[0]), data[1])
        names, params = zip(*model.named_parameters(), strict=True)
        gradients = [error + g for g in torch.autograd.grad(value, params)]
        factors = kfac(program, loss, data, fisher=fisher)
        return _Step(value, dict(zip(names, gradients, strict=True)), factors)

    kfac = fxkfac.kfac
    return step


def _status(*, problem="mlp", flavour, library):
    words = (problem,), (flavour,), (library,)
    parts = run(Settings(*words, repeats=1, tiny=True, memory=False, threads=1), print)
    return [row.status for part in parts for row in part]


def test_what_fxkfac_does_not_have_is_left_out(monkeypatch, capsys):
    monkeypatch.delattr(fxkfac, "step", raising=False)
    monkeypatch.setattr(fxkfac, "kfac", lambda program, loss, data, fisher: None)
    assert _status(flavour=STEP, library="fxkfac") == []
    assert "step: not there" in capsys.readouterr().out
    assert _status(flavour="mc", library=INDUCTOR) == []
    assert "inductor: not there" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "status"), [(0, TIMED), (1e-2, DIFFERS)])
@pytest.mark.slow
def test_a_step_is_timed_if_its_gradients_are_right(monkeypatch, error, status):
    monkeypatch.setattr(fxkfac, "step", _step_with(error), raising=False)
    assert _status(flavour=STEP, library="fxkfac") == [status]


@pytest.mark.slow
def test_a_backend_is_timed_as_soon_as_there_is_one(monkeypatch):
    seen, kfac = [], fxkfac.kfac

    def with_backend(program, loss, data, fisher, backend="eager"):
        seen.append(backend)
        return kfac(program, loss, data, fisher=fisher)

    monkeypatch.setattr(fxkfac, "kfac", with_backend)
    assert _status(flavour="type-2", library=INDUCTOR) == [TIMED]
    assert {"eager", INDUCTOR} == set(seen)  # the first is what it is compared with


def test_mini_batches_are_one_call(monkeypatch):
    seen, kfac = [], fxkfac.kfac

    def counting(program, loss, data, **options):
        seen.append(len(data))
        return kfac(program, loss, data, **options)

    monkeypatch.setattr(fxkfac, "kfac", counting)
    built = PROBLEMS["batches"].make(True)
    PEERS["fxkfac"].prepare(built, "mc").call()
    assert seen == [len(built.batches)]


def test_the_profile_shows_products_and_the_outside(capsys):
    # All ops: which ones are the longest at this size, the rest of the machine decides.
    profile.main(["mlp", "mc", "--tiny", "--threads", "1", "--top", "1000"])
    printed = capsys.readouterr().out
    assert "outside" in printed
    assert "aten::mm" in printed or "aten::addmm" in printed


def test_sums_by_kernels_are_the_same_under_the_profile():
    x, total = torch.randn(1, 1024, 96), torch.empty(1, 96, 96)
    with profile._sums_recorded():
        sums = add_gram(Gram(total), x, summed=True)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.tril(), (x.mT @ x).tril(), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_what_was_measured_before_a_stop_is_kept(tmp_path: Path, monkeypatch):
    measured = suite._measured

    def stops(problem, flavour, *rest):
        if flavour == "empirical":
            raise KeyboardInterrupt
        return measured(problem, flavour, *rest)

    monkeypatch.setattr(suite, "_measured", stops)
    words = ["--quick", "--no-memory", "--problems", "mlp", "--flavours", "type-2", "empirical"]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--libraries", "fxkfac", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["flavour"] for row in saved["results"]] == ["type-2"]


@pytest.mark.slow
def test_table_json_and_picture_come_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    libraries = ["fxkfac", "hooks", "kronfluence"]
    words = ["--quick", "--problems", "mlp", "--flavours", "type-2", "--libraries", *libraries]
    main([*words, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "plain hooks" in printed
    assert f"torch {torch.__version__}" in printed
    saved = json.loads((tmp_path / "benchmarks.json").read_text())
    rows = {row["library"]: row for row in saved["results"]}
    assert rows["fxkfac"]["time"]["median"] > 0
    assert rows["fxkfac"]["first"]["first_peak_mb"] > 0
    assert rows["kronfluence"]["status"] == "refused"
    assert rows["kronfluence"]["reason"]
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    assert "| plain hooks |" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.svg").stat().st_size > 0
