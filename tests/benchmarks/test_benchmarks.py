"""The harness at tiny sizes, untimed: adapters agree, and table, JSON and picture come out."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.compare import distance
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS
from benchmarks.suite import DIFFERS, TIMED, Settings, compared

INSTALLED = tuple(name for name, peer in PEERS.items() if peer.version is not None)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_who_does_a_problem_has_the_same_factors(problem):
    rows = compared(problem, "empirical", Settings((problem,), ("empirical",), INSTALLED))
    status = {row.library: row.status for row in rows}
    assert status["fxkfac"] == status["hooks"] == TIMED
    assert DIFFERS not in status.values()


@pytest.mark.parametrize("flavour", ["type-2", "mc"])
def test_so_it_is_for_other_flavours(flavour):
    rows = compared("mlp", flavour, Settings(("mlp",), (flavour,), INSTALLED))
    assert {row.library for row in rows if row.status == TIMED} >= {"fxkfac", "hooks"}
    assert DIFFERS not in {row.status for row in rows}


def test_a_wrong_factor_is_seen():
    torch.manual_seed(0)
    A, B = torch.rand(4, 4), torch.rand(3, 3)
    assert distance({"layer": (2 * A, B / 2)}, {"layer": (A, B)}) < 1e-6
    assert distance({"layer": (2 * A, B)}, {"layer": (A, B)}) == pytest.approx(1)
    assert distance({"layer": (A[:3, :3], B)}, {"layer": (A, B)}) < 1e-6  # the bias apart
    assert distance({"layer": (A, B + torch.eye(3))}, {"layer": (A, B)}) > 0.1


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
