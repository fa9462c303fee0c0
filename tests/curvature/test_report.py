"""The report of factors, against the matrices of their blocks put together by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from drawn import F64, classes, rand, seeded
from factor_cases import (
    CE,
    apart,
    embedding,
    exact_blocks,
    grouped,
    matrix,
    mlp,
    one_slice,
    overlapping_slices,
    three_losses,
    three_slices,
    tied,
    tied_embedding,
    whole,
)
from torch import nn

import fxkfac
from fxkfac.curvature.report import block_name, readable

close = torch.testing.assert_close
INFINITE = float("inf")


KINDS = [
    grouped,
    exact_blocks,
    tied_embedding,
    three_slices,
    overlapping_slices,
    one_slice,
    three_losses,
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def factors(request):
    return request.param()


def condition(C):
    """By singular values, and ∞ where the rank is not full."""
    singular = torch.linalg.matrix_rank(C, hermitian=True) < len(C)
    return INFINITE if singular else torch.linalg.cond(C).item()


def written_out(factor):
    """A factor as one matrix."""
    if factor.ndim == 1:
        return torch.diag(factor)
    return factor if factor.ndim == 2 else torch.block_diag(*factor)


def agree(row, C):
    """A row with what a matrix is."""
    assert row.numel == len(C)
    assert row.spectrum.rank == torch.linalg.matrix_rank(C, hermitian=True)
    close(row.trace, C.trace().item())
    close(row.condition, condition(C), rtol=1e-6, atol=0)
    close(row.spectrum.largest, torch.linalg.matrix_norm(C, 2).item())
    close(row.spectrum.effective_rank, (C.trace() ** 2 / C.square().sum()).item())


def test_every_row_is_its_block(factors):
    report = factors.report()
    assert len(report.rows) == len(factors)
    for row, block in zip(report, factors.values(), strict=True):
        assert row.params == block.params
        assert row.note == ""
        agree(row, matrix(block))
        terms = getattr(block, "terms", ())
        assert len(row.parts) == len(terms)
        for part, term in zip(row.parts, terms, strict=True):
            assert (tuple(term.A.shape), tuple(term.B.shape)) == (part.A, part.B)
            close(part.condition_A, condition(written_out(term.A)), rtol=1e-6, atol=0)
            close(part.condition_B, condition(written_out(term.B)), rtol=1e-6, atol=0)


def test_the_total_is_the_whole_and_shares_sum_to_one(factors):
    report = factors.report()
    C, names = whole(factors)
    agree(report.total, C)
    assert list(report.total.params) == names
    close(sum(row.share for row in report), 1.0)
    for row in report:
        close(row.share, row.trace / C.trace().item())


def test_plain_data_is_what_the_report_says(factors):
    report = factors.report()
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["n"] == report.n
    for row, plain in zip([*report, report.total], [*found["rows"], found["total"]], strict=True):
        assert float(plain["condition"]) == row.condition
        assert plain["trace"] == row.trace
        assert plain["rank"] == row.spectrum.rank
        for part, there in zip(row.parts, plain["parts"], strict=True):
            assert float(there["condition_A"]) == part.condition_A
            assert tuple(there["B"]) == part.B


def test_what_is_printed_is_a_line_for_each_product(factors):
    report = factors.report()
    title, header, _, *lines = str(report).splitlines()
    assert f"{len(report.rows)} block" in title
    assert header.split()[:4] == ["block", "kind", "A", "B"]
    assert len(lines) == 1 + sum(max(1, len(row.parts)) for row in report)
    assert lines[-1].startswith("all ")
    assert lines[0].startswith(block_name(report.rows[0].params))


def test_what_the_table_says_by_word():
    lines = str(apart().report()).splitlines()
    assert lines[0] == "4 parameters in 4 blocks, over 5 data"
    cells = [line.split() for line in lines]
    assert cells[3][:5] == ["0.weight", "kronecker", "4×4", "3×3", "5"]
    assert cells[4][6:10] == ["∞", "9", "6", "3.1"]  # B of the last layer is singular: Σ p = 1
    assert cells[-1][-3:] == ["100.0%", "504", "B"]


def test_every_kind_by_name():
    kinds = {row.params[0]: row.kind for row in exact_blocks().report()}
    assert kinds == {
        "2.weight": "kronecker",
        "1.bias": "kronecker",
        "2.bias": "diagonal",
        "1.weight": "diagonal",
        "0.weight": "dense",
        "0.bias": "identity",
    }
    assert [row.kind for row in tied().report()] == ["kronecker sum"]


def test_memory_counts_equal_inputs_once():
    """Three heads of one input have one A."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x).tanh() + self.v(x)

    model, x = seeded(Heads), rand(6, 4)
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.MSELoss(), (x, rand(6, 3)))
    report = factors.report()
    assert [row.memory for row in report] == [8 * (25 + 9)] * 3
    assert report.total.memory == 8 * (25 + 3 * 9)


def test_counts_are_data_and_rows():
    x = rand(6, 7, 4)  # every datum is a sequence of 7
    program = fxkfac.trace(lambda p, x: x @ p["W"], x, {"W": rand(4, 3)})
    report = fxkfac.kfac(program, nn.MSELoss(), (x, rand(6, 7, 3))).report()
    assert report.n == 6
    assert [part.rows for row in report for part in row.parts] == [42]


def test_corrected_blocks():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    data = rand(9, 4), classes(9)
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, CE, data)
    for correct, kind in ((fxkfac.ekfac, "eigenbasis"), (fxkfac.kfoc, "kronecker")):
        corrected = correct(program, CE, data, factors)
        report = corrected.report()
        assert report.n == 9
        for row, block in zip(report, corrected.values(), strict=True):
            C = block.dense()
            assert row.kind == kind
            assert [part.rows for part in row.parts] == [9]
            close(row.trace, C.trace().item())
            close(row.spectrum.squares, C.square().sum().item())
            assert row.spectrum.rank == torch.linalg.matrix_rank(C, hermitian=True)
            close(row.condition, condition(C), rtol=1e-6, atol=0)


def test_averages_know_no_counts():
    average = fxkfac.RunningAverage(0.9)
    average.update(mlp())
    report = average.report()
    assert report.n is None
    assert {part.rows for row in report for part in row.parts} == {None}
    assert "–" in str(report)
    agree(report.rows[0], average["0.weight"].dense())


def spoiled(factors, name, change):
    """The same factors with another B."""
    (product,) = factors.products[name]
    other = replace(product, B=change(product.B.clone()))
    return replace(factors, products={**factors.products, name: (other,)})


class TestWhatIsNotKnown:
    def test_what_is_not_finite(self):
        factors = spoiled(mlp(), "0.weight", lambda B: B.index_fill_(1, torch.tensor(0), INFINITE))
        report = factors.report()
        bad, good = report.rows
        assert bad.spectrum is bad.trace is bad.condition is None
        assert "NaN or Inf" in bad.note
        assert bad.parts[0].condition_B is None
        assert bad.parts[0].condition_A < INFINITE
        agree(good, matrix(factors["2.weight"]))
        assert good.share is report.total.trace is report.total.condition is None
        assert "0.weight + bias: a factor or entry is NaN or Inf" in str(report)
        json.dumps(report.as_dict(), allow_nan=False)

    def test_what_is_not_semi_definite(self):
        factors = spoiled(mlp(), "0.weight", lambda B: B - 10 * torch.eye(3, dtype=F64))
        row = factors.report().rows[0]
        assert row.spectrum is None
        close(row.trace, matrix(factors["0.weight"]).trace().item())
        assert "positive semi-definite" in row.note

    def test_what_is_too_large(self, monkeypatch):
        monkeypatch.setattr("fxkfac.linalg.operators.spectra.LARGEST_DENSE", 100)
        factors = tied()
        (row,) = factors.report().rows
        assert row.spectrum is None
        assert row.share == 1.0
        close(row.trace, matrix(factors["W"]).trace().item())
        assert "expected at most 100" in row.note
        assert row.parts[0].condition_A < INFINITE

    def test_zero_curvature(self):
        factors = spoiled(mlp(), "0.weight", torch.zeros_like)
        zero, other = factors.report().rows
        assert (zero.spectrum.rank, zero.trace, zero.share) == (0, 0.0, 0.0)
        assert zero.condition == INFINITE
        assert zero.spectrum.effective_rank == 0.0
        assert other.share == 1.0

    def test_nothing_but_zeros_has_no_shares(self):
        factors = mlp()
        for name in list(factors):
            factors = spoiled(factors, name, torch.zeros_like)
        report = factors.report()
        assert {row.share for row in report} == {None}
        assert report.total.trace == 0.0

    def test_a_parameter_without_entries(self):
        program = fxkfac.trace(
            lambda p, x: x @ p["W"] + x[:, :0] @ p["none"], rand(5, 4), {"W": rand(4, 3),
            "none": rand(0, 3)},
        )  # fmt: skip
        factors = fxkfac.kfac(program, nn.MSELoss(), (rand(5, 4), rand(5, 3)))
        rows = {row.params[0]: row for row in factors.report()}
        assert rows["none"].condition is None
        assert rows["none"].trace == 0.0
        assert "no entries" in rows["none"].note
        close(factors.report().total.condition, rows["W"].condition)

    def test_entries_that_no_token_has_seen_are_singular(self):
        row = embedding().report().rows[0]
        assert row.parts[0].condition_A == INFINITE
        assert row.spectrum.rank < row.numel


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**45, "32.0 TiB")],
)
def test_readable_sizes(size, text):
    assert readable(size) == text


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (("a.0.weight", "a.0.bias"), "a.0.weight + bias"),
        (("W", "b"), "W + b"),
        (("a.weight", "b.bias"), "a.weight + b.bias"),
        (("a.weight", "a.b.bias"), "a.weight + a.b.bias"),
    ],
)
def test_a_module_is_named_once(params, name):
    assert block_name(params) == name
