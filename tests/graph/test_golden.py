"""Ten drawings are what they were when somebody looked at them; `golden.py` makes them anew."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from golden import FOLDER, MODELS, parse, source_of


def stored(name):
    return (FOLDER / f"{name}.gv").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
def test_drawings_are_those_that_were_looked_at(name):
    expected, found = parse(stored(name)), parse(source_of(name))
    assert found.boxes == expected.boxes
    assert found.nodes == expected.nodes
    assert found.edges == expected.edges


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.iterdir()} == set(MODELS)


SOURCE = """digraph {
    graph [nodesep=0.3]
    subgraph cluster_ {
        graph [label=<<B>model</B> &gt;>]
        subgraph "cluster_a.b" {
            graph [label="a \\"b\\"" margin=10]
            x [label=<<TABLE><TR><TD PORT="p">1</TD></TR></TABLE>>]
            {
                graph [rank=same]
                rank=same
                x
                y [shape=plain]
            }
        }
        z
    }
    x:p:e -> y:w [color="#8F5F00"]
    y -> z
    y -> z [dir=back]
}
"""


def test_the_parser_reads_boxes_nodes_and_edges():
    """By hand: a parser that reads nothing would find all drawings equal."""
    drawing = parse(SOURCE)
    assert drawing.boxes["cluster_"][1] == {"label": "<<B>model</B> &gt;>"}
    box, attributes = drawing.boxes["cluster_a.b"]
    assert box == "cluster_"
    assert (attributes["label"], attributes["margin"]) == ('a "b"', "10")
    assert {key: box for key, (box, _) in drawing.nodes.items()} == {
        "x": "cluster_a.b",
        "y": "cluster_a.b",
        "z": "cluster_",
    }
    assert 'PORT="p"' in drawing.nodes["x"][1]["label"]
    assert drawing.edges == {
        ("x:p:e", "y:w", (("color", "#8F5F00"),)): 1,
        ("y", "z", ()): 1,
        ("y", "z", (("dir", "back"),)): 1,
    }


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_dot_renders_them(name):
    done = subprocess.run(
        ["dot", "-Tsvg"], input=stored(name).encode(), capture_output=True, check=True
    )
    assert b"</svg>" in done.stdout
