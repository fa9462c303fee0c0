"""The page of a program: what it holds, and in a browser, how one moves, searches and clicks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from pictured import PROGRAMS, Positions, mlp, of_kind, partly
from torch import nn

import fxkfac
from fxkfac.errors import NonFiniteError, OptionError, UnknownParameter
from fxkfac.graph.drawing.drawn import drawn

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def page_of(program, folder, **options):
    path = program.draw(folder / "program.html", **options)
    return Path(path).read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.fixture(scope="module")
def layers():
    """Three residual layers and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3)), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    program = fxkfac.trace(model, x)
    return program, fxkfac.kfac(program, nn.MSELoss(), (x, y))


@pytest.mark.parametrize("build", PROGRAMS)
def test_page_holds_every_node_and_parameter(build, tmp_path):
    program = build()
    network, data = drawn(program), data_of(page_of(program, tmp_path))
    keys = {key for key, node in network.nodes(data=True) if node["kind"] != "parameter"}
    assert {node["key"] for node in data["nodes"]} - {"no use"} == keys
    names = {parameter["name"] for parameter in data["parameters"].values()}
    assert names == set(of_kind(network, "parameter"))
    chips = {key for node in data["nodes"] for key in node["parameters"]}
    assert chips == set(data["parameters"])
    order = {node["key"]: k for k, node in enumerate(data["nodes"])}
    assert all(order[u] < order[v] for u, v, _ in data["edges"])
    assert all(box in data["boxes"] for node in data["nodes"] for box in node["boxes"])


def test_page_is_one_file_by_itself(tmp_path):
    page = page_of(mlp(), tmp_path)
    links = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert links == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    assert not re.search(r"\bsrc=|<link|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    assert "{{" not in page.split('id="data"')[0]


def test_names_cannot_end_the_script(tmp_path):
    name = "</script><b>&amp;"
    program = fxkfac.trace(lambda p, x: x @ p[name], torch.randn(4, 3), {name: torch.randn(3, 2)})
    page = page_of(program, tmp_path)
    assert "</script><b>" not in page
    assert [p["name"] for p in data_of(page)["parameters"].values()] == [name]


def test_details_are_texts_and_falling_curves(tmp_path):
    spectrum = torch.tensor([1.0, 3.0, 0.0, 2.0])
    details = {"0.weight": {"note": "wide", "trace": 6, "λ": spectrum}, "2.bias": {"share": 0.125}}
    data = data_of(page_of(mlp(), tmp_path, details=details))
    of = {p["name"]: p["details"] for p in data["parameters"].values()}
    assert of["0.weight"] == [
        {
            "name": "0.weight",
            "facts": [
                {"name": "note", "text": "wide"},
                {"name": "trace", "text": "6"},
                {"name": "λ", "curve": [3.0, 2.0, 1.0], "count": 4, "lost": 1},
            ],
        }
    ]
    assert of["2.bias"][0]["facts"] == [{"name": "share", "text": "0.125"}]
    assert of["2.weight"] == []


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    details = {"0.weight": {"λ": [float(k) for k in range(1, 5001)]}}
    data = data_of(page_of(mlp(), tmp_path, details=details))
    (fact,) = next(p["details"] for p in data["parameters"].values() if p["details"])[0]["facts"]
    assert (len(fact["curve"]), fact["count"]) == (400, 5000)
    assert (fact["curve"][0], fact["curve"][-1]) == (5000, 1)


@pytest.mark.parametrize(
    ("details", "error", "message"),
    [
        ({"1.weight": {"trace": 1}}, UnknownParameter, "1.weight"),
        ({"0.weight": 1.0}, OptionError, "of type float; expected a mapping"),
        (["0.weight"], OptionError, "details is of type list; expected a mapping"),
        ({"0.weight": {"trace": object()}}, OptionError, "expected a number, a text or a sequence"),
        ({"0.weight": {"λ": [1.0, float("nan")]}}, NonFiniteError, "1 of 2 numbers"),
    ],
)
def test_wrong_details_are_named(tmp_path, details, error, message):
    with pytest.raises(error, match=message):
        mlp().draw(tmp_path / "p.html", details=details)
    assert not list(tmp_path.iterdir())


def test_folded_page_has_its_layers_once(layers, tmp_path):
    data = data_of(page_of(layers[0], tmp_path, fold=True))
    assert [box["count"] for box in data["boxes"].values()] == [1, 3]
    names = [parameter["name"] for parameter in data["parameters"].values()]
    assert "0…2.up.weight" in names


# In a browser.

STEPS = """
<script>
const wrong = [];
window.addEventListener("error", (event) => wrong.push(event.message));
</script>
"""
ACTIONS = """
<script>
const result = {};
const rows = () => [...document.querySelectorAll("#rows .row")];
const texts = () => rows().map((row) => row.textContent);
const press = (id) => document.getElementById(id).click();
const transform = () => document.getElementById("world").style.transform;
const panel = () => document.getElementById("chosen").textContent;
result.rows = texts();
result.lines = document.querySelectorAll("#lanes path.data").length;
result.gradients = document.querySelectorAll("#lanes path.gradient").length;
rows().find((row) => row.textContent.startsWith("linear")).click();
result.panel = panel();
result.curves = [...document.querySelectorAll("#chosen polyline")].map(
  (line) => line.getAttribute("points").split(" ").length);
result.chosen = rows().filter((row) => row.classList.contains("chosen")).length;
result.hash = location.hash;
document.querySelector(".parameter").click();
result.parameter = panel();
search("DOWN.weight");
result.found = document.getElementById("found").textContent;
result.hits = rows().filter((row) => row.classList.contains("hit")).length;
nextHit(); nextHit();
result.next = [document.getElementById("found").textContent, chosen];
search("nothing of this name");
result.none = document.getElementById("found").textContent;
press("close");
result.closed = texts();
choose("linear_1");
result.opened = texts().length;
press("close");
press("open");
result.open = texts().length;
const before = transform();
const plane = document.getElementById("view");
const turn = { deltaY: -300, ctrlKey: true, clientX: 9, clientY: 9 };
plane.dispatchEvent(new WheelEvent("wheel", turn));
result.scaled = view.scale;
plane.dispatchEvent(new PointerEvent("pointerdown", { clientX: 100, clientY: 100 }));
const start = [view.x, view.y];
window.dispatchEvent(new PointerEvent("pointermove", { clientX: 130, clientY: 140 }));
window.dispatchEvent(new PointerEvent("pointerup", {}));
result.moved = [view.x - start[0], view.y - start[1]];
result.changed = before !== transform();
press("fit");
result.fits = view.height * view.scale <= plane.clientHeight;
const { rows: lines, at } = rowsOf(data, new Set());
const edges = edgesOf(data, at), { lanes } = lanesOf(lines.length, edges);
result.crossed = edges.filter(({ from, to }) => lines.some((_, row) =>
  row > from && row < to && lanes[row] === lanes[from])).length;
result.wrong = wrong;
document.body.append(Object.assign(document.createElement("pre"),
  { id: "result", textContent: JSON.stringify(result) }));
</script>
"""


def browse(path, *more):
    """The document of a page after its scripts have run."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,800",
            "--virtual-time-budget=2000", *more, f"file://{path}",
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    return done.stdout.decode()


def acted(page, path):
    """What the steps above found in a page."""
    path.write_text(
        page.replace("<body>", f"<body>{STEPS}").replace("</body>", f"{ACTIONS}</body>")
    )
    return json.loads(
        unescape(re.search(r'id="result">(.*?)</pre>', browse(path, "--dump-dom"), re.S)[1])
    )


@pytest.fixture(scope="module")
def seen(layers, tmp_path_factory):
    program, factors = layers
    folder = tmp_path_factory.mktemp("page")
    page = page_of(program, folder, details=fxkfac.spectra(factors))
    return acted(page, folder / "acted.html"), drawn(program)


@needs_browser
def test_every_node_has_a_row_and_every_edge_a_line(seen):
    result, network = seen
    assert result["wrong"] == []
    kinds = [node["kind"] for _, node in network.nodes(data=True)]
    boxes = 1 + 3  # the model and its layers; the modules of one op have none
    assert len(result["rows"]) == len(kinds) - kinds.count("parameter") + boxes
    edges = [e["gradient"] for *_, e in network.edges(data=True) if e["kind"] == "data"]
    assert (result["lines"], result["gradients"]) == (len(edges), sum(edges))
    assert result["crossed"] == 0  # no line leads through another node's dot


@needs_browser
def test_a_click_on_a_tap_shows_shapes_source_and_spectrum(seen):
    result, _ = seen
    for text in ("0.up", "xN×4", "yN×5", "A5×5", "B5×5", "tap0", "test_page.py:", "self.up(x)"):
        assert text in result["panel"], text
    assert "A: 5 numbers" in result["panel"]
    assert result["curves"] == [5, 5]
    assert result["chosen"] == 1
    assert result["hash"] == "#linear"
    assert result["parameter"].startswith("0.up.weight")
    assert "5×4" in result["parameter"]


@needs_browser
def test_search_finds_and_leads_there(seen):
    result, _ = seen
    assert (result["found"], result["hits"]) == ("3 found", 3)
    assert result["next"] == ["2 of 3", "linear_3"]
    assert result["none"] == "0 found"


@needs_browser
def test_boxes_close_and_open(seen):
    result, _ = seen
    closed = [row for row in result["closed"] if row.startswith("▸")]
    assert [row.split("Layer")[-1] for row in closed] == ["2 taps inside"] * 3
    assert len(result["closed"]) < result["opened"] < result["open"] == len(result["rows"])


@needs_browser
def test_the_plane_moves_and_scales(seen):
    result, _ = seen
    assert result["scaled"] > 1
    assert result["moved"] == pytest.approx([30, 40])
    assert result["changed"]
    assert result["fits"]


@needs_browser
def test_pages_without_taps_below_or_with_odd_parameters_open(tmp_path):
    for number, model in enumerate((partly(), fxkfac.trace(Positions(), torch.randint(7, (4, 5))))):
        page = page_of(model, tmp_path, fold=True, colour={model.parameters[0]: 1.0})
        path = tmp_path / f"{number}.html"
        path.write_text(page.replace("<body>", f"<body>{STEPS}"))
        document = browse(path, "--dump-dom")
        shown = document.split('id="rows"')[1].split('id="panel"')[0]
        for parameter in data_of(page)["parameters"].values():
            assert parameter["label"] in shown
