"""Data flow one way: an import points to an earlier floor, and files stay short enough to read."""

import ast
from pathlib import Path

import networkx as nx
import pytest

import fxkfac

ROOT = Path(fxkfac.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# floor -> the earlier floors that it may import
ALLOWED = {
    "errors": set(),
    "isolation": {"errors"},
    "precision": set(),
    "ranges": {"errors"},
    "parameters": {"errors"},
    "functional": {"errors", "isolation", "parameters"},
    "linalg": {"errors", "ranges", "precision"},
    "likelihoods": {"errors", "ranges", "isolation", "precision"},
    "taylor": {"errors"},
    "measure": set(),
    "reached": {"isolation"},
    "graph": {"errors", "ranges", "isolation", "parameters", "functional", "reached"},
    "curvature": {
        "errors",
        "ranges",
        "isolation",
        "precision",
        "parameters",
        "functional",
        "likelihoods",
        "graph",
        "linalg",
    },
    "exact": {
        "errors",
        "ranges",
        "parameters",
        "isolation",
        "functional",
        "reached",
        "linalg",
        "likelihoods",
    },
    "optim": {
        "errors",
        "ranges",
        "precision",
        "parameters",
        "isolation",
        "functional",
        "likelihoods",
        "linalg",
        "graph",
        "curvature",
        "exact",
    },
    "persistence": {
        "errors",
        "precision",
        "functional",
        "likelihoods",
        "linalg",
        "graph",
        "curvature",
    },
    "attribution": {
        "errors",
        "ranges",
        "precision",
        "isolation",
        "functional",
        "likelihoods",
        "graph",
        "linalg",
        "curvature",
    },
    "comparison": {
        "errors",
        "isolation",
        "parameters",
        "functional",
        "reached",
        "graph",
        "curvature",
        "exact",
    },
    "plots": {"errors", "linalg", "curvature", "comparison"},
    "laplace": {"errors", "ranges", "isolation", "functional", "linalg", "curvature", "exact"},
}
# room of the graph's floor -> the earlier rooms that it may import
ROOMS = {
    "rules": set(),
    "decompositions": set(),
    "uses": {"rules"},
    "front_ends": {"uses", "decompositions"},
    "experiments": {"uses", "front_ends"},
}
LEAVES = {"cli", "__main__", "distributed", "examples", "plots"}  # nobody imports these


def module_name(file):
    parts = ["fxkfac", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def base_of(file, level):
    """The package that `level` dots stand for in a file."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    return ".".join(package[: len(package) - level + 1])


def is_type_checking(node):
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def statements(tree, deferred):
    """Import statements; with `deferred` also those inside functions and for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif deferred or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        ):
            yield from statements(node, deferred)


def imported(file, deferred=True):
    """Every module that a file imports, by full name; `from package import module` is resolved."""
    found = set()
    for node in statements(ast.parse(file.read_text()), deferred):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            base = ".".join(filter(None, [base_of(file, node.level), node.module]))
        for alias in node.names:
            full = f"{base}.{alias.name}"
            found.add(full if full in MODULES else base)
    return found


def own(file, deferred=True):
    return {m for m in imported(file, deferred) if m.split(".")[0] in ("fxkfac", "examples")}


def floor(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def ids(files):
    return [str(file.relative_to(ROOT)) for file in files]


def test_the_reader_sees_every_kind_of_import():
    text = "\n".join(
        [
            "import a",
            "if TYPE_CHECKING:",
            "    import b",
            "def f():",
            "    import c",
            "try:",
            "    import d",
            "except ImportError:",
            "    import e",
        ]
    )
    tree = ast.parse(text)
    assert [n.names[0].name for n in statements(tree, deferred=False)] == ["a", "d", "e"]
    assert [n.names[0].name for n in statements(tree, deferred=True)] == list("abcde")


def test_the_reader_finds_the_imports_that_are_there():
    assert "fxkfac.errors" in own(ROOT / "functional.py")
    assert "fxkfac.graph.uses.ir" in own(ROOT / "graph" / "uses" / "match.py")
    assert "fxkfac.graph.program" in own(ROOT / "front.py")


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_imports_point_to_an_earlier_floor(file):
    here = floor(module_name(file))
    everything = {floor(m) for m in MODULES}  # for the package's front door, and the leaves
    allowed = ALLOWED[here] | {here} if here in ALLOWED else everything
    wrong = {m for m in own(file) if floor(m) not in allowed}
    assert not wrong, f"{here or 'fxkfac'} must not import {sorted(wrong)}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_graph_import_earlier_ones(room):
    files = [file for file in FILES if file.parent == ROOT / "graph" / room]
    asked = {m.split(".")[2] for file in files for m in own(file) if m.startswith("fxkfac.graph.")}
    assert files
    assert asked & ROOMS.keys() <= ROOMS[room] | {room}


def test_errors_import_nothing_of_ours():
    assert own(ROOT / "errors.py") == set()


def test_the_ground_truth_never_sees_a_graph():
    """Not even through what it imports: a ground truth that leans on the compiler proves less."""
    flow = import_graph(deferred=True)
    flow.remove_node("fxkfac")  # the package's front door imports everything
    starts = [m for m in MODULES if floor(m) == "exact"]
    assert starts
    reached = set().union(*(nx.descendants(flow, m) for m in starts))
    assert not {m for m in reached if floor(m) == "graph"}


def test_nobody_imports_a_leaf():
    """But `__main__`, which is there to start the command line."""
    others = [file for file in FILES if floor(module_name(file)) not in LEAVES]
    wrong = {(module_name(file), m) for file in others for m in own(file) if is_leaf(m)}
    assert not wrong


def is_leaf(module):
    return floor(module) in LEAVES or module.split(".")[0] == "examples"


def import_graph(deferred):
    flow = nx.DiGraph()
    flow.add_nodes_from(MODULES)
    flow.add_edges_from(
        (name, m)
        for name, file in MODULES.items()
        for m in own(file, deferred)
        if m in MODULES and m != name
    )
    return flow


def test_no_module_imports_itself_in_a_circle():
    cycles = [sorted(c) for c in nx.simple_cycles(import_graph(deferred=False))]
    assert not cycles


def test_no_floor_imports_itself_in_a_circle():
    flow = nx.DiGraph(
        (floor(a), floor(b)) for a, b in import_graph(deferred=True).edges if floor(a) != floor(b)
    )
    flow.remove_nodes_from([n for n in ("", "__main__") if n in flow])
    assert nx.is_directed_acyclic_graph(flow), list(nx.simple_cycles(flow))


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 300


def test_matplotlib_is_imported_where_it_is_needed_and_pyplot_nowhere():
    """It is an extra; and pyplot keeps figures that nobody else knows of."""
    for file in FILES:
        tree = ast.parse(file.read_text())
        assert not any("pyplot" in ast.unparse(s) for s in statements(tree, deferred=True)), file
        assert not any("matplotlib" in ast.unparse(s) for s in statements(tree, False)), file


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_nobody_inside_asks_the_front_door(file):
    """It imports everything when it is first asked, and so the one who asks, half imported."""
    found = list(statements(ast.parse(file.read_text()), deferred=True))
    asked = [s for s in found if isinstance(s, ast.ImportFrom) and s.module == "fxkfac"]
    assert not [ast.unparse(s) for s in asked if not s.level]
