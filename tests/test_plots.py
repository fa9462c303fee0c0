"""Every picture draws what it was given: the data of its artists, not its pixels."""

from __future__ import annotations

import sys
from dataclasses import replace

import matplotlib
import pytest
import torch
from drawn import F64, classes, rand, seeded
from matplotlib.figure import Figure
from torch import nn

import fxkfac
from fxkfac import plots
from fxkfac.comparison import METHODS, LayerError, LayerErrors
from fxkfac.curvature.report import block_name, readable
from fxkfac.errors import FxkfacError, NonFiniteError, OptionError
from fxkfac.plots.layers import FACTORS, SHIFT

close = torch.testing.assert_close
CE = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def factors():
    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3))

    model, data = seeded(make), (rand(9, 4), classes(9))
    return fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data)


@pytest.fixture(scope="module")
def report(factors):
    return factors.report()


def lines(ax):
    """Lines that have a label, by it."""
    return {str(line.get_label()): line for line in ax.lines}


def labels(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def names(report):
    return [block_name(row.params) for row in report]


class TestSpectra:
    def test_eigenvalues_over_the_largest_in_falling_order(self, factors):
        block = factors["0.weight"]
        found = lines(plots.spectra(block))
        assert list(found) == ["A", "B", "A ⊗ B"] or "zero" in " ".join(found)
        for label, C in (("A", block.A), ("B", block.B), ("A ⊗ B", block.dense())):
            (line,) = (v for k, v in found.items() if k.split(" (")[0] == label)
            λ = torch.linalg.eigvalsh(C).flip(0)
            count = len(line.get_xdata())
            assert count == torch.linalg.matrix_rank(C, hermitian=True)
            close(torch.tensor(line.get_ydata()), (λ / λ[0])[:count], rtol=1e-8, atol=1e-14)
            places = (torch.arange(count) + 0.5) / len(C)
            close(torch.tensor(line.get_xdata()), places.double(), rtol=1e-6, atol=0)

    def test_zeros_are_counted(self, factors):
        """The gradients of softmax sum up to zero, and so B of the last layer is singular."""
        found = list(lines(plots.spectra(factors["2.weight"])))
        assert found[1] == "B (1 of 3 are zero)"

    def test_an_exact_block_has_one_line(self, factors):
        (line,) = plots.spectra(factors["1.weight"]).lines
        λ = factors["1.weight"].diagonal.sort(descending=True).values
        assert line.get_label() == "block"
        close(torch.tensor(line.get_ydata()), λ / λ[0])

    def test_many_eigenvalues_are_thinned_out(self):
        diagonal = torch.linspace(1, 2, 10_000, dtype=F64)
        (line,) = plots.spectra(fxkfac.Diagonal(("w",), ((10_000,),), diagonal)).lines
        assert len(line.get_ydata()) == 2000
        assert line.get_ydata()[0] == 1.0
        assert line.get_ydata()[-1] == 0.5

    def test_what_has_no_spectrum(self, factors):
        with pytest.raises(OptionError, match="no entries"):
            plots.spectra(fxkfac.Diagonal(("w",), ((0,),), torch.zeros(0)))
        with pytest.raises(NonFiniteError):
            plots.spectra(fxkfac.Diagonal(("w",), ((2,),), torch.tensor([1.0, float("nan")])))


class TestLayers:
    def test_condition_numbers(self, report):
        ax = plots.condition_numbers(report)
        assert labels(ax) == names(report)
        found = [line for line in ax.lines if line.get_marker() in ("o", "s", "D")]
        edge = max(x for line in found for x in line.get_xdata())
        drawn = {}
        for line in found:
            kind = next(k for k, (colour, _) in FACTORS.items() if colour == line.get_color())
            singular = line.get_fillstyle() == "none"
            shift = SHIFT * (list(FACTORS).index(kind) - 1)
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                assert not singular or x == edge
                drawn.setdefault((kind, round(y - shift)), []).append("inf" if singular else x)
        for y, row in enumerate(report):
            expected = {"block": [row.condition]}
            if row.parts:
                expected["A"] = [part.condition_A for part in row.parts]
                expected["B"] = [part.condition_B for part in row.parts]
            for kind, conditions in expected.items():
                assert [float(c) for c in drawn.pop((kind, y))] == conditions
        assert not drawn
        assert ax.get_xticklabels()[-1].get_text() == "∞"
        assert ax.get_xscale() == "log"

    def test_an_unknown_condition_is_said_by_the_name(self, report):
        row = replace(report.rows[0], spectrum=None)
        ax = plots.condition_numbers(replace(report, rows=(row, *report.rows[1:])))
        assert labels(ax)[0] == f"{names(report)[0]} (unknown)"

    def test_long_names_leave_room_for_the_plot(self, report):
        name = "bert.encoder.layer.11.attention.output.a_projection_of_all_heads.dense.weight"
        long = replace(report, rows=tuple(replace(row, params=(name,)) for row in report))
        ax = plots.condition_numbers(long)
        ax.figure.draw_without_rendering()
        assert ax.get_window_extent().width > 300  # of 100 pixels an inch
        assert all(text.get_window_extent().x0 > 0 for text in ax.get_yticklabels())

    def test_dollars_are_no_mathematics(self, report):
        rows = tuple(replace(row, params=(r"a$\no$.weight",)) for row in report)
        ax = plots.memory(replace(report, rows=rows))
        ax.figure.draw_without_rendering()
        assert labels(ax) == [r"a\$\no\$.weight"] * len(rows)

    def test_trace_shares(self, report):
        ax = plots.trace_shares(report)
        assert labels(ax) == names(report)
        widths = [bar.get_width() for bar in ax.patches]
        close(widths, [100 * row.share for row in report])
        close(sum(widths), 100.0)

    def test_memory(self, report):
        ax = plots.memory(report)
        assert labels(ax) == names(report)
        assert [bar.get_width() for bar in ax.patches] == [row.memory for row in report]
        assert [text.get_text() for text in ax.texts] == [readable(row.memory) for row in report]

    def test_layer_errors(self):
        rows = tuple(
            LayerError((f"{k}.weight", f"{k}.bias"), 9, 2.0, dict(zip(METHODS, d, strict=True)))
            for k, d in enumerate(((0.4, 0.3, 0.2, 0.9), (0.0, 0.0, 0.0, 1.0)))
        )
        zero = replace(rows[0], params=("lost",), norm=0.0)
        total = replace(rows[0], params=())
        ax = plots.layer_errors(LayerErrors("type-2", (*rows, zero), total))
        found = lines(ax)
        for k, method in enumerate(METHODS):
            expected = [row.errors[method] for row in (*rows, total)]  # zero has none
            assert list(found[method].get_xdata()) == expected
            close(list(found[method].get_ydata()), [y + SHIFT * (k - 1.5) for y in (0, 1, 3)])
        assert labels(ax)[2:] == ["lost (zero)", "all"]

    def test_what_has_no_shares_or_no_rows(self, report):
        empty = replace(report, rows=())
        for draw in (plots.condition_numbers, plots.trace_shares, plots.memory):
            with pytest.raises(OptionError, match="no blocks"):
                draw(empty)
        row = replace(report.rows[0], share=None)
        with pytest.raises(OptionError, match="have no shares"):
            plots.trace_shares(replace(report, rows=(row, *report.rows[1:])))
        with pytest.raises(OptionError, match="no layers"):
            plots.layer_errors(LayerErrors("type-2", (), LayerError((), 0, 0.0, {})))


def test_factors_in_the_place_of_what_is_made_of_them(factors, report):
    for draw in (plots.condition_numbers, plots.trace_shares, plots.memory):
        with pytest.raises(OptionError, match=r"Factors .* a Report, which factors.report\(..\)"):
            draw(factors)
    with pytest.raises(OptionError, match=r"Report .* a LayerErrors, which fxkfac.layer_errors"):
        plots.layer_errors(report)
    with pytest.raises(OptionError, match="block is of type Factors; expected one block"):
        plots.spectra(factors)


class TestHeatmap:
    def test_absolute_values_with_lines_between_blocks(self):
        C = rand(7, 7)
        C[0, 1] = 0
        ax = plots.heatmap(C, sizes=[2, 4, 1])
        (image,) = ax.images
        close(torch.as_tensor(image.get_array()), C.abs())
        largest = C.abs().max().item()
        close(list(image.get_clim()), [largest * 1e-4, largest])
        assert image.norm(0.0) == 0.0  # zeros have a colour, that of the lowest
        horizontal = [line.get_ydata()[0] for line in ax.lines[::2]]
        vertical = [line.get_xdata()[0] for line in ax.lines[1::2]]
        assert horizontal == vertical == [1.5, 5.5]

    def test_several_with_one_scale(self):
        (image,) = plots.heatmap(rand(3, 3), largest=50.0).images
        assert image.get_clim()[1] == 50.0

    def test_a_zero_matrix_can_be_drawn(self):
        plots.heatmap(torch.zeros(3, 3)).figure.canvas.draw()

    @pytest.mark.parametrize(
        ("matrix", "options", "message"),
        [
            (torch.zeros(3, 2), {}, r"shape \(3, 2\); expected a square one"),
            ([[1.0]], {}, "the matrix is of type list; expected a tensor"),
            (torch.zeros(3), {}, r"shape \(3,\); expected a square one"),
            (torch.zeros(3, 3), {"sizes": [2, 2]}, "have 4 rows, and the matrix 3"),
            (torch.zeros(3, 3), {"largest": -1.0}, "largest=-1.0; expected a positive number"),
        ],
    )
    def test_refusals(self, matrix, options, message):
        with pytest.raises(OptionError, match=message):
            plots.heatmap(matrix, **options)

    def test_what_is_not_finite(self):
        with pytest.raises(NonFiniteError):
            plots.heatmap(torch.tensor([[float("inf")]]))


class TestConvergence:
    def test_distances_and_their_rate(self):
        samples = [1, 4, 16]
        ax = plots.convergence(samples, [3.0, 1.5, 0.75])
        points, rate = ax.lines
        assert list(points.get_xdata()) == samples
        assert list(points.get_ydata()) == [3.0, 1.5, 0.75]
        close(list(rate.get_ydata()), [3.0, 0.75])  # exactly 3/√M here
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")

    @pytest.mark.parametrize(
        ("samples", "distances"), [([], []), ([1, 2], [1.0]), ([0], [1.0]), ([1], [0.0])]
    )
    def test_refusals(self, samples, distances):
        with pytest.raises(OptionError, match="all positive"):
            plots.convergence(samples, distances)


def test_the_callers_axes_are_drawn_on(factors, report):
    for draw, what in (
        (plots.spectra, factors["0.weight"]),
        (plots.condition_numbers, report),
        (plots.trace_shares, report),
        (plots.memory, report),
        (plots.heatmap, rand(2, 2)),
    ):
        ax = Figure().add_subplot()
        assert draw(what, ax=ax) is ax
        ax.figure.canvas.draw()


def test_nothing_global_is_changed(report):
    before = dict(matplotlib.rcParams)
    plots.condition_numbers(report)
    plots.heatmap(torch.eye(2)).figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_is_said_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FxkfacError, match="pip install matplotlib"):
        plots.memory(report)


def test_lines_of_a_sums_terms_can_be_told_apart():
    weight = torch.randn(4, 4, dtype=torch.float64)
    x, y = (torch.randn(9, 4, dtype=torch.float64) for _ in range(2))
    program = fxkfac.trace(lambda p, x: torch.tanh(x @ p["W"]) @ p["W"].T, x, {"W": weight})
    lines = plots.spectra(fxkfac.kfac(program, nn.MSELoss(), (x, y))["W"]).get_lines()
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(looks) == len(lines) == 5


def test_infinity_is_the_last_tick():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    report = fxkfac.kfac(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y)).report()
    ax = plots.condition_numbers(report)
    ticks, texts = ax.get_xticks(), [t.get_text() for t in ax.get_xticklabels()]
    assert texts[-1] == "∞"
    assert list(ticks) == sorted(ticks)
    assert ticks[-2] <= ticks[-1] / 10  # ten times the largest that is finite
