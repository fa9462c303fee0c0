"""Many workers: two and three real processes give what one gives, bit for bit on all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick import quick
from ranks import CASES, cases_of
from torch import Tensor

import fxkfac.distributed
from fxkfac.distributed import assignment
from fxkfac.distributed.agree import common_inputs
from fxkfac.errors import RankError

ROOT = Path(__file__).parent.parent
PATIENCE = 400  # seconds, then every rank is stopped
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "GLOO_SOCKET_IFNAME": "lo",
}

EQUAL = [  # cases that have found what they expected
    *(name for name in CASES if ":" in name),
    "a_sampler_that_pads",
    "every_kth_datum",
    "accumulated_by_hand",
    "what_draws_labels",
    "a_likelihood_with_a_function",
    "eigenvalues",
    "fewer_matrices_than_ranks",
]


@dataclass(frozen=True)
class Ranks:
    """What every rank has found: for each a dict by case."""

    found: list[dict[str, dict[str, Any]]]

    def __getitem__(self, case: str) -> list[dict[str, Any]]:
        """What came out of a case, rank by rank."""
        failed = {k: f[case]["failed"] for k, f in enumerate(self.found) if "failed" in f[case]}
        assert not failed
        return [f[case] for f in self.found]


@cache
def run(world: int) -> Ranks:
    """Run all cases with so many ranks, once."""
    with TemporaryDirectory() as folder:
        script = str(ROOT / "tests" / "ranks.py")
        started = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(world), folder],
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            said = [process.communicate(timeout=PATIENCE)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * world, "\n".join(
            s[-2000:] for s in said
        )
        return Ranks([torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)])


@pytest.fixture(params=quick([2, 3], (2).__eq__), ids=["two ranks", "three ranks"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return run(request.param)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to the rounding of float64, in numbers that are about one."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        precise = not isinstance(value, Tensor) or value.dtype != torch.float32
        by = 1e-12 if precise else 1e-5
        torch.testing.assert_close(
            found[key], value, rtol=by, atol=by, msg=lambda m, k=key: f"{k}: {m}"
        )


def assert_same_bits(outcomes: list[dict[str, Any]]) -> None:
    first, *others = (o["found"] for o in outcomes)
    assert first
    for other in others:
        assert first.keys() == other.keys()
        for key, value in first.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


EVERY = [(world, name) for world in (2, 3) for name in EQUAL if name in cases_of(world)]


@pytest.mark.parametrize(("world", "case"), quick(EVERY, lambda each: each[0] == 2))
def test_all_ranks_have_what_one_process_has(world: int, case: str) -> None:
    outcomes = run(world)[case]
    for outcome in outcomes:
        assert_same(outcome["found"], outcome["expected"])
    assert_same_bits(outcomes)


def test_every_case_is_looked_at() -> None:
    assert set(CASES) == {*EQUAL, *REFUSED, *OTHERS}


OTHERS = {"in_a_smaller_group", "each_one_once", "the_page"}


def test_the_sampler_has_padded(ranks: Ranks) -> None:
    """Else the case would say nothing: with three ranks nine data need no padding."""
    assert {o["data"] for o in ranks["a_sampler_that_pads"]} == {10 if len(ranks.found) == 2 else 9}


def test_an_input_that_terms_share_stays_one(ranks: Ranks) -> None:
    for case in ("kfac: shared inputs", "kfac, an empty shard: shared inputs"):
        assert all(0 < o["inputs"] < len(o["found"]) // 4 + 1 for o in ranks[case]), case


def test_groups_have_rows_of_their_own(ranks: Ranks) -> None:
    for case in ("kfac: experts", "kfac, an empty shard: experts"):
        rows = [v for o in ranks[case] for k, v in o["found"].items() if "rows" in k]
        assert any(isinstance(r, Tensor) and r.numel() > 1 for r in rows)


def test_parts_are_not_changed(ranks: Ranks) -> None:
    assert all(o["unchanged"] for o in ranks["accumulated_by_hand"])


def test_ranks_draw_apart(ranks: Ranks) -> None:
    assert all(o["apart"] for o in ranks["what_draws_labels"])


def test_a_group_of_some_ranks(ranks: Ranks) -> None:
    *outside, first, last = ranks["in_a_smaller_group"]
    assert all(o["error"] == "RankError" and "not in the group" in o["message"] for o in outside)
    assert_same(first["found"], first["expected"])
    assert_same_bits([first, last])


REFUSED = {
    "another_fisher": (
        "MergeError",
        ["rank 1 has fisher = 'empirical'", "rank 0 has fisher = 'type-2'"],
    ),
    "another_width": ("MergeError", ["rank 1 has", "(4, 4)", "rank 0 has", "(5, 4)"]),
    "another_dtype": ("MergeError", ["rank 1 has", "float32", "rank 0 has", "float64"]),
    "a_step_and_factors": (
        "MergeError",
        ["rank 1 has result = Step", "rank 0 has result = Factors"],
    ),
    "no_data_anywhere": ("NoDataError", ["no rank", "expected at least one"]),
    "no_target_anywhere": ("NoDataError", ["divide by 0.0", "ignored"]),
    "other_matrices": ("MergeError", ["rank 1 has ('experts'", "'one'", "rank 0"]),
    "no_square_matrix": ("OptionError", ["matrices['A']", "(4,)", "embedding"]),
    "wrong_data_on_one_rank": ("DataError", ["7"]),
    "an_average_on_one_rank": ("OptionError", ["RunningAverage", "expected the Factors"]),
    "a_model_on_one_rank": ("OptionError", ["program is of type", "fxkfac.trace"]),
    "a_matrix_without_inverse": ("_LinAlgError", ["cholesky"]),
    "a_matrix_without_numbers": ("NonFiniteError", ["shape (4, 4)", "NaN or Inf"]),
}
ON_ONE_RANK = (
    "wrong_data_on_one_rank",
    "an_average_on_one_rank",
    "a_model_on_one_rank",
    "a_matrix_without_inverse",
    "a_matrix_without_numbers",
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_on_every_rank(ranks: Ranks, case: str) -> None:
    kind, said = REFUSED[case]
    outcomes = ranks[case]
    for rank, outcome in enumerate(outcomes):
        if case in ON_ONE_RANK and rank != 1:
            assert outcome["error"] == "RankError"
            assert "rank 1 failed" in outcome["message"]
            assert kind in outcome["message"]
        else:
            assert outcome["error"] == kind
    texts = [o["message"] for o in outcomes]
    assert all(piece in text for text in texts for piece in said), texts


def test_each_matrix_is_computed_once(ranks: Ranks) -> None:
    outcomes = ranks["each_one_once"]
    seen = sorted(d for o in outcomes for d in o["seen"])
    assert seen == [2, 5, 6, 9]
    expected = {2: [1, 0, 1, 1], 3: [2, 0, 2, 1]}[
        len(ranks.found)
    ]  # 729 | 216 + 125 + 8; 729 | 216 | ..
    assert all(o["by"] == expected for o in outcomes)


def test_eigenvectors_are_laid_out_alike(ranks: Ranks) -> None:
    """Or else products with them would be rounded in another way on each rank."""
    first, *others = (o["strides"] for o in ranks["eigenvalues"])
    assert all(other == first for other in others)


def test_the_page(ranks: Ranks) -> None:
    outcomes = ranks["the_page"]
    assert all(o["blocks"] >= 3 for o in outcomes)
    assert_same_bits(outcomes)


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 5))
def test_assignment_is_fair(costs: list[int], workers: int) -> None:
    owners = assignment(costs, workers)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == w) for w in range(workers)]
    assert sum(load) == sum(costs)
    shortest = max([sum(costs) / workers, *costs])  # or longer
    assert max(load) <= 2 * shortest
    if len(costs) <= 6:
        assert max(load) <= 4 / 3 * best(costs, workers) + 1e-9


def best(costs: list[int], workers: int) -> int:
    """The shortest time of any assignment, by trying all."""
    loads = {(0,) * workers}
    for cost in costs:
        loads = {
            tuple(sorted(x + cost * (k == w) for k, x in enumerate(load)))
            for load in loads
            for w in range(workers)
        }
    return min(max(load) for load in loads)


def test_assignment_longest_first_and_first_come_first() -> None:
    assert assignment([1, 8, 5, 4], 2) == [0, 0, 1, 1]
    assert assignment([2, 2, 2], 3) == [0, 1, 2]
    assert assignment([], 3) == []


def test_inputs_are_one_only_where_all_ranks_say_so() -> None:
    assert common_inputs([(0, 0, 2, 2), (0, 0, 2, 3)]) == [0, 0, 2, 3]
    assert common_inputs([(0, 1, 1), (0, 0, 1)]) == [0, 1, 2]


def test_without_a_group_there_are_no_ranks() -> None:
    with pytest.raises(RankError, match="torchrun"):
        fxkfac.distributed.eigh([torch.eye(2)])


@pytest.mark.slow
def test_the_example() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    example = str(ROOT / "examples" / "distributed.py")
    done = subprocess.run(
        [*command, example],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *_, last = map(float, re.findall(r"loss ([\d.]+) of 301 images", done.stdout))
    assert last < 0.1 * first
    assert "bit for bit: True" in done.stdout
