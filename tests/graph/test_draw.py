"""The picture of a program: what it shows, its formats, and what goes wrong with files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from golden import parse
from pictured import PROGRAMS, attention, functional, mlp, of_kind, partly, tied
from torch import nn

import fxkfac
from fxkfac.errors import FxkfacError, NonFiniteError, OptionError, UnknownParameter
from fxkfac.graph.drawing import draw as drawing
from fxkfac.graph.drawing import picture
from fxkfac.graph.drawing.colour import RAMP, blend, ink_on, scale_of
from fxkfac.graph.drawing.details import details_of
from fxkfac.graph.drawing.draw import FORMATS, draw
from fxkfac.graph.drawing.drawn import drawn
from fxkfac.graph.drawing.fold import folded


def dot_source(program):
    return picture.dot_source(program, drawn(program))


needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


def test_modules_are_nested_clusters_and_functions_of_functions():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    program = fxkfac.trace(nn.Sequential(layer), torch.randn(3, 5, 8), unsupported="skip")
    source = dot_source(program)
    clusters = re.findall(r'subgraph "?(cluster_[\w.]*)', source)
    assert {"cluster_", "cluster_0.self_attn", "cluster_0.linear1"} <= set(clusters)
    assert "MultiheadAttention" in source
    assert "two_layers" in dot_source(functional())


def test_fallback_is_named_on_the_parameter():
    assert "exact diagonal" in dot_source(partly("diagonal"))
    assert "left out" in dot_source(partly("skip"))


def test_legend_names_only_what_occurs():
    assert "without rule" not in dot_source(mlp())
    assert "without rule" in dot_source(partly())
    assert "without use" in dot_source(partly())


def test_a_parameter_without_use_is_in_no_other_modules_box():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    source = dot_source(fxkfac.trace(model, torch.randn(5, 3)))
    inside = source.partition("subgraph cluster_1 ")[2].partition("\n\t\t}")[0]
    assert "spare" in source
    assert "linear_1" in inside
    assert "spare" not in inside


def test_names_are_escaped(tmp_path):
    params = {'a<b> & "c"': torch.randn(3, 2)}
    program = fxkfac.trace(lambda p, x: x @ p['a<b> & "c"'], torch.randn(4, 3), params)
    assert "a&lt;b&gt; &amp; &quot;c&quot;" in dot_source(program)
    if shutil.which("dot"):
        assert Path(program.draw(str(tmp_path / "p.svg"))).suffix == ".svg"


@needs_dot
@pytest.mark.parametrize("build", PROGRAMS)
def test_svg_shows_every_drawn_parameter_and_op(build, tmp_path, recwarn):
    program = build()
    path = program.draw(str(tmp_path / "program.svg"))
    assert path == str(tmp_path / "program.svg")
    texts = "\n".join(ElementTree.parse(path).getroot().itertext())
    network = folded(program.to_networkx())
    for node in of_kind(network, "op").values():
        assert node["op"] in texts
        assert node["y"] in texts
    for name in of_kind(network, "parameter"):
        assert name.rpartition(".")[2] in texts
    assert "backpropagated vectors" in texts
    assert not recwarn.list


@needs_dot
def test_png_and_pdf_are_what_their_endings_say(tmp_path):
    program = mlp()
    assert Path(program.draw(str(tmp_path / "p.png"))).read_bytes()[:4] == b"\x89PNG"
    assert Path(program.draw(str(tmp_path / "p.PDF"))).read_bytes()[:4] == b"%PDF"


def test_gv_is_the_source_and_needs_no_dot(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    program = mlp()
    path = draw(program, tmp_path / "program.gv")
    assert path == str(tmp_path / "program.gv")
    assert Path(path).read_text(encoding="utf-8") == dot_source(program)


def test_without_dot_the_source_is_written_and_a_warning_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = str(tmp_path / "program.png")
    with pytest.warns(UserWarning, match="dot -Tpng") as caught:
        path = mlp().draw(asked)
    assert path == f"{asked}.gv"
    assert Path(path).read_text(encoding="utf-8").startswith("digraph")
    assert not Path(asked).exists()
    assert "nstall graphviz" in str(caught[0].message)
    assert caught[0].filename == __file__  # the warning points at the user's line


@pytest.mark.parametrize("name", ["program", "program.jpg", "program.svg.txt", ".png"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(OptionError) as error:
        mlp().draw(str(tmp_path / name))
    assert all(ending in str(error.value) for ending in FORMATS)
    assert not list(tmp_path.iterdir())


def test_unwritable_path_is_named(tmp_path):
    path = str(tmp_path / "missing" / "program.gv")
    with pytest.raises(FxkfacError, match=r"missing.program\.gv.*Make the folder"):
        mlp().draw(path)
    (tmp_path / "folder.gv").mkdir()
    with pytest.raises(FxkfacError, match=r"folder\.gv"):
        mlp().draw(str(tmp_path / "folder.gv"))


def test_drawing_is_the_same_every_time():
    assert dot_source(attention()) == dot_source(attention.__wrapped__())  # traced anew


@needs_dot
def test_an_svg_shows_all_of_itself(tmp_path):
    """Graphviz scales an SVG that has a resolution, but not its view box: browsers clip it."""
    root = ElementTree.parse(mlp().draw(str(tmp_path / "mlp.svg"))).getroot()
    width, height = (float(root.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    shown = [float(number) for number in root.attrib["viewBox"].split()]
    assert shown[:2] == [0, 0]
    assert shown[2:] == pytest.approx([width, height], abs=1)
    transform = root.find("{http://www.w3.org/2000/svg}g").attrib["transform"]
    assert "scale(1 1)" in transform


# Exactness: the drawing of three layers, word for word.


def test_three_layers_are_drawn_exactly():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)
    )
    found = parse(dot_source(fxkfac.trace(model, torch.randn(3, 4))))
    assert {name: box for name, (box, _) in found.boxes.items()} == {
        "": "", "cluster_": "", "cluster_0": "cluster_", "cluster_2": "cluster_",
        "cluster_4": "cluster_",
    }  # fmt: skip
    ops = {key: label for key, (_, label) in found.nodes.items() if "linear" in key}
    sizes = {key: words(label["label"]) for key, label in ops.items()}
    assert sizes == {
        "linear": "linear x N×4 y N×5 A 5×5 B 5×5",
        "linear_1": "linear x N×5 y N×6 A 6×6 B 6×6",
        "linear_2": "linear x N×6 y N×2 A 6×6 B 2×2",
    }
    data = [(u, v) for u, v, look in found.edges if ":" not in u and dict(look).get("dir") is None]
    assert sorted(data) == [
        ("input_0", "linear"), ("linear", "relu"), ("linear_1", "tanh"), ("linear_2", "output"),
        ("relu", "linear_1"), ("tanh", "linear_2"),
    ]  # fmt: skip
    back = {(u, v) for u, v, look in found.edges if dict(look).get("dir") == "back"}
    assert back == set(data) - {("input_0", "linear")}
    uses = sorted(v for u, v, _ in found.edges if ":" in u)
    assert uses == ["linear:w", "linear:w", "linear_1:w", "linear_1:w", "linear_2:w"]


def words(label):
    return " ".join(re.sub(r"<[^>]*>|&#8194;", " ", label[1:-1]).split())


def test_a_tie_is_one_parameter_with_several_arrows():
    found = parse(dot_source(tied()))
    sources = [u for u, v, _ in found.edges if "p_w" in u or "p0_w" in u]
    assert len(sources) >= 2
    boxes = re.findall(r'PORT="p\w*_w"', dot_source(tied()))
    assert len(boxes) == 1


def test_fallback_and_unsupported_parameters_have_colours_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    source = dot_source(fxkfac.trace(model, torch.randn(3, 4)))
    assert "parameter without factors" in source
    assert "parameter without factors" not in dot_source(mlp())
    colours = {picture.labels.PARAMETERS[key][1] for key in ("factors", "other", "unsupported")}
    assert len(colours) == 3
    assert all(colour in source + dot_source(partly()) for colour in colours)


# Colours.

VALUES = {"0.weight": 1.0, "0.bias": 10.0, "2.weight": 1000.0}


def coloured(program, values, name="condition number"):
    scale = scale_of(program, values, name)
    network = drawn(program, scale=scale)
    return network, picture.dot_source(program, network, scale)


def test_colours_say_how_large_a_number_is():
    network, source = coloured(mlp(), VALUES)
    fills = {name: node["fill"] for name, node in of_kind(network, "parameter").items()}
    assert fills == {
        "0.weight": RAMP[0],
        "0.bias": blend(1 / 3),  # 10 is a third of the way from 1 to 1000
        "2.weight": RAMP[-1],
        "2.bias": "#FFFFFF",
    }
    assert "colour of a parameter: condition number, logarithmic" in source
    assert "1e+03" in source
    assert f'BGCOLOR="{RAMP[-1]}"' in source


def test_numbers_that_lie_close_or_are_not_positive_have_a_linear_scale():
    network, source = coloured(mlp(), {"0.weight": -1.0, "0.bias": 0.0, "2.weight": 3.0})
    assert of_kind(network, "parameter")["0.bias"]["fill"] == blend(0.25)
    assert "logarithmic" not in source
    network, _ = coloured(mlp(), {"0.weight": torch.tensor(2.0)})  # one number has one colour
    assert of_kind(network, "parameter")["0.weight"]["fill"] == RAMP[2]


def test_text_is_legible_on_every_colour():
    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    greys = []
    for fill in [blend(k / 20) for k in range(21)]:
        light, dark = sorted((luminance(fill), luminance(ink_on(fill))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4  # WCAG asks for 3 in large text, 4.5 in small
        greys.append(luminance(fill))
    assert greys == sorted(greys, reverse=True)  # larger is darker, in print as well


def test_folded_layers_have_the_colour_of_the_largest():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    program = fxkfac.trace(model, torch.randn(3, 4))
    scale = scale_of(program, {"0.0.weight": 1.0, "1.0.weight": 3.0, "2.0.bias": 2.0}, "error")
    network = drawn(program, True, scale)
    weight = of_kind(network, "parameter")["0.0.weight"]
    assert (weight["value"], weight["fill"]) == ("1 … 3", RAMP[-1])
    source = picture.dot_source(program, network, scale)
    assert "of repeated layers the largest" in source
    assert "3 ×" in source


def test_a_tied_parameter_may_have_any_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    program = fxkfac.trace(model, torch.randn(3, 4))
    assert scale_of(program, {"2.weight": 1.0}, "").values == {"0.weight": 1.0}
    with pytest.raises(OptionError, match="names of one tied parameter"):
        scale_of(program, {"0.weight": 1.0, "2.weight": 9.0}, "")


def test_what_is_said_of_a_derived_weight_is_shown_at_its_parameters():
    def low_rank(params, x):
        summed = x @ (params["W"] + params["U"] @ params["V"].detach())
        return torch.tanh(summed) @ (2 * params["U"].mT @ params["W"]).sin()

    shapes = {"W": (4, 4), "U": (4, 4), "V": (4, 4)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    program = fxkfac.trace(low_rank, torch.randn(5, 4), params, structure={"[WUV]": "derived"})
    first, second = program.tapped.derived
    assert scale_of(program, {first: 1.0, second: 2.0}, "").values == {"W": 2.0, "U": 2.0}
    said = details_of(program, {first: {"A": [1.0, 2.0]}, second: {"trace": 3}})
    names = {parameter: [fact["name"] for fact in facts] for parameter, facts in said.items()}
    assert names == {key: [f"A of {first}", f"trace of {second}"] for key in ("W", "U")}


# What goes wrong.


@pytest.mark.parametrize(
    ("colour", "error", "message"),
    [
        ({"0.wieght": 1.0}, UnknownParameter, r"0\.wieght.*Did you mean '0\.weight'"),
        ({"0.weight": float("nan")}, NonFiniteError, r"0\.weight'\] is nan.*Leave"),
        ({"0.weight": float("inf")}, NonFiniteError, r"is inf.*finite"),
        ({"0.weight": "large"}, OptionError, r"str, 'large'; expected a number"),
        ({"0.weight": torch.ones(2)}, OptionError, r"of type Tensor.*expected a number"),
        ({}, OptionError, "empty mapping.*Leave it out"),
        ([1.0], OptionError, "list; expected a mapping"),
    ],
)
def test_wrong_colours_are_named(tmp_path, colour, error, message):
    with pytest.raises(error, match=message):
        mlp().draw(str(tmp_path / "p.svg"), colour=colour)
    assert not list(tmp_path.iterdir())


def test_details_are_for_pages(tmp_path):
    with pytest.raises(OptionError, match=r"'\.svg'; expected '\.html'"):
        mlp().draw(str(tmp_path / "p.svg"), details={"0.weight": {"trace": 1.0}})


def test_what_is_too_large_for_dot_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "LIMIT", 6)
    program = mlp()
    with pytest.raises(OptionError, match=r"9 nodes.*cross 7 levels.*at most 6.*fold=True.*html"):
        program.draw(str(tmp_path / "p.svg"))
    with pytest.raises(OptionError, match=r"Write a page"):
        program.draw(str(tmp_path / "p.svg"), fold=True)
    assert Path(program.draw(str(tmp_path / "p.gv"))).exists()
    assert Path(program.draw(str(tmp_path / "p.html"))).exists()


def test_an_op_whose_block_has_no_factors_says_what_comes_in_and_goes_out(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    path = tmp_path / "norm.gv"
    fxkfac.trace(model, torch.randn(6, 4)).draw(str(path))
    (label,) = (line for line in path.read_text().splitlines() if "<B>mul</B>" in line)
    assert "<I>x</I>" in label
    assert "<I>y</I>" in label
    assert "bias of" not in label
    assert "<B>A</B>" not in label
