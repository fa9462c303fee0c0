"""The picture of a program: what it shows, its formats, and what goes wrong with files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from pictured import PROGRAMS, attention, functional, mlp, of_kind, partly
from torch import nn

import fxkfac
from fxkfac.errors import FxkfacError, OptionError
from fxkfac.graph.drawing import picture
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
    assert dot_source(attention()) == dot_source(attention())


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
