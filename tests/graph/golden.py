"""Golden drawings of ten models of the zoo, and what is compared of them.

    python tests/graph/golden.py          # makes all of them anew
    dot -Tpng -O tests/graph/golden/*.gv  # look at them before they are kept

Compared is what a drawing says (boxes, nodes and their texts, edges and their looks), not how a
version of graphviz writes it. Lines of the zoo's own code are left out, since they move.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "golden"
# Name in the zoo, and whether repeated layers are folded.
MODELS = {
    "nested_modules": False,
    "residual": False,
    "tied_autoencoder": False,
    "unused_parameter": False,
    "sliced_qkv": False,
    "learned_positions": False,
    "conv_groups": False,
    "transformer_eval": True,
    "nested_params": False,
    "recurrent_by_hand": True,
}
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|->|[{}\[\]=;:]|[^\s{}\[\]=;:"<]+|<')


@dataclass
class Drawing:
    """What a source says.

    Attributes:
        nodes: Every node's box and attributes.
        boxes: Every box's own box and attributes.
        edges: How often each edge is there, with its ends and attributes.
    """

    nodes: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    boxes: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    edges: Counter[tuple[str, str, tuple[tuple[str, str], ...]]] = field(default_factory=Counter)


def source_of(name: str) -> str:
    """The drawing of one model, as it is now."""
    sys.path.insert(0, str(HERE.parent))
    import zoo_functional  # noqa: F401 - registers its models
    import zoo_wide  # noqa: F401
    from zoo import ZOO

    from fxkfac.graph.drawing.drawn import drawn
    from fxkfac.graph.drawing.picture import dot_source

    entry = ZOO[name]
    program = entry.trace(*entry.build(), 4)
    source = dot_source(program, drawn(program, MODELS[name]))
    return re.sub(r"(\w+\.py):\d+", r"\1", source)


def parse(source: str) -> Drawing:
    """Read a source; of the language of graphviz as much as drawings need."""
    drawing = Drawing()
    tokens = list(_tokens(source))
    stack, k = [""], tokens.index("{") + 1
    while k < len(tokens):
        token, after = tokens[k], tokens[k + 1] if k + 1 < len(tokens) else ""
        if token == "subgraph":
            stack.append(tokens[k + 1] if tokens[k + 1] != "{" else stack[-1])
            k += 2 if tokens[k + 1] == "{" else 3
            box = stack[-1]
            drawing.boxes.setdefault(box, (stack[-2], {}))
        elif token == "{":  # a row of nodes on one level
            stack.append(stack[-1])
            k += 1
        elif token == "}":
            stack.pop()
            k += 1
        elif after == "=":
            k += 3  # of a row: its rank
        else:
            ends, k = _ends(tokens, k)
            attributes, k = _attributes(tokens, k)
            _add(drawing, ends, attributes, stack[-1])
    return drawing


def _add(drawing: Drawing, ends: list[str], attributes: dict[str, str], box: str) -> None:
    if len(ends) == 2:
        drawing.edges[ends[0], ends[1], tuple(sorted(attributes.items()))] += 1
    elif ends[0] == "graph":
        drawing.boxes.setdefault(box, ("", {}))[1].update(attributes)
    elif ends[0] not in ("node", "edge"):
        at, before = drawing.nodes.get(ends[0], (box, {}))
        drawing.nodes[ends[0]] = (at if before else box, before | attributes)


def _ends(tokens: list[str], k: int) -> tuple[list[str], int]:
    """A node, or both ends of an edge with their ports."""
    ends = [tokens[k]]
    k += 1
    while k < len(tokens) and tokens[k] in ("->", ":"):
        if tokens[k] == "->":
            ends.append(tokens[k + 1])
        else:
            ends[-1] += ":" + tokens[k + 1]
        k += 2
    return ends, k


def _attributes(tokens: list[str], k: int) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    if k < len(tokens) and tokens[k] == "[":
        k += 1
        while tokens[k] != "]":
            found[tokens[k]] = tokens[k + 2]
            k += 3
        k += 1
    return found, k


def _tokens(source: str) -> Iterator[str]:
    """Words, strings without their quotes, labels between angle brackets as one, and signs."""
    place = 0
    while match := TOKEN.search(source, place):
        token, place = match.group(), match.end()
        if token == "<":
            depth, start = 1, match.start()
            while depth:
                depth += {"<": 1, ">": -1}.get(source[place], 0)
                place += 1
            yield source[start:place]
        elif token.startswith('"'):
            yield token[1:-1].replace('\\"', '"')
        elif token != ";":
            yield token


def remake() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        (FOLDER / f"{name}.gv").write_text(source_of(name), encoding="utf-8")
        print(FOLDER / f"{name}.gv")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    remake()
