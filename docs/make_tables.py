"""Write the tables of what is supported, from the code: docs/rules.md and the README's.

Run `python docs/make_tables.py`; a test fails where a table is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from fxkfac.graph.decompositions import DECOMPOSITIONS
from fxkfac.graph.front_ends.capture import FRONT_ENDS
from fxkfac.graph.rules import RULES
from fxkfac.graph.uses.view import LAYOUT_OPS
from fxkfac.likelihoods.backpropagation import FISHERS
from fxkfac.likelihoods.losses import TORCH_LOSSES

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by docs/make_tables.py -->", "<!-- end -->"


def op_names(overloads: list[str]) -> str:
    """`aten.conv2d.default` as `conv2d`, without repetition."""
    return ", ".join(dict.fromkeys(f"`{name.split('.')[1]}`" for name in overloads))


def rules_table() -> str:
    """One line per rule: its ops, and the first line of its docstring."""
    by_rule: dict[object, list[str]] = {}
    for overload, rule in RULES.items():
        by_rule.setdefault(rule, []).append(str(overload))
    lines = ["| ops | as one einsum |", "| --- | --- |"]
    for rule, overloads in by_rule.items():
        says = (inspect.getdoc(rule) or "").splitlines()[0]
        lines.append(f"| {op_names(overloads)} | {says} |")
    return "\n".join(lines)


def layout_ops() -> str:
    """The layout ops that a parameter may go through before it is used."""
    return ", ".join(dict.fromkeys(f"`{name}`" for name in LAYOUT_OPS.values() if name))


def decomposed() -> str:
    """The ops that are rewritten before rules are looked up."""
    names = sorted(str(overload) for overload in DECOMPOSITIONS)
    inner = ("aten._", "aten.native_", "aten.cudnn_")  # the same ops, as backends spell them
    return op_names([name for name in names if not name.startswith(inner)])


OWN_RULE = """A custom op wants [a rule of your own](how_to/rule.md).

"""


def support() -> str:
    """The README's summary."""
    losses = ", ".join(f"`{kind.__name__}`" for kind in TORCH_LOSSES)
    ops = op_names([str(overload) for overload in RULES])
    return "\n".join(
        [
            f"- **Ops**, with the parameter in any operand: {ops}.",
            f"- **Taken apart first**: {decomposed()}.",
            f"- **Between a parameter and its op**: {layout_ops()}.",
            f"- **Losses**: {losses}, and any `fxkfac.Likelihood` of your own.",
            f"- **Fishers**: {', '.join(f'`{name}`' for name in FISHERS)}.",
            f"- **Front ends**, in the order in which they are tried: {', '.join(FRONT_ENDS)}.",
        ]
    )


def rules_page() -> str:
    """docs/rules.md."""
    return (
        "# Rules\n\n"
        "Every op below is reduced to `y[g, rows, o] = Σ_i W[g, i, o] · x[g, rows, i]`. A "
        "parameter that enters another op is refused by name, or gets the exact diagonal of its "
        "block with `trace(..., unsupported='diagonal')`.\n\n"
        f"{rules_table()}\n\n"
        f"Ops that do two things with a parameter are taken apart first: {decomposed()}.\n\n"
        f"A parameter may go through these layout ops first: {layout_ops()}.\n\n"
        f"{OWN_RULE}"
        "This page is made from the code by `python docs/make_tables.py`.\n"
    )


def with_support(readme: str) -> str:
    """The README with its summary made anew."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{support()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    (ROOT / "docs" / "rules.md").write_text(rules_page())
    readme = ROOT / "README.md"
    readme.write_text(with_support(readme.read_text()))
