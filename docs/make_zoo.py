"""Write docs/zoo.md: the zoo under fxkfac and under the hooks of curvlinops, which this needs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxkfac

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import zoo_functional  # noqa: E402, F401  # registers more
import zoo_wide  # noqa: E402, F401  # and more
from zoo import ZOO, Entry  # noqa: E402

CURVLINOPS, N = "curvlinops-for-pytorch", 4  # data in a batch


class Unpacked(nn.Sequential):
    """A model of several inputs as a module of one dict, which is what curvlinops hands over."""

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Call the model with the dict's values; a numbered one is by position."""
        return self[0](*inputs.values()) if "0" in inputs else self[0](**inputs)


class Line(NamedTuple):
    """A row: its cells, whether fxkfac and the hooks cover all, and whether both are equal."""

    entry: Entry
    cells: tuple[str, ...]
    complete: bool
    hooked: bool | None  # None: a function
    equal: bool | None  # None: no numbers


@dataclass(frozen=True)
class Traced:
    """An entry, built and traced."""

    entry: Entry
    model: Any
    params: Any
    program: fxkfac.Program

    def matrix(self, data: Any, names: list[str]) -> Tensor:
        """fxkfac's type-2 KFAC-expand."""
        return fxkfac.kfac(self.program, self.entry.loss, data).dense(*names)

    def exact(self, names: list[str]) -> Tensor:
        """One datum's GGN, with zeros between the blocks that fxkfac's KFAC has."""
        data, loss = self.entry.data(1), self.entry.loss
        blocks = enumerate(fxkfac.kfac(self.program, loss, data).values())
        block = {name: number for number, b in blocks for name in b.params}
        sizes = torch.tensor([torch.Size(self.program.shapes[n]).numel() for n in names])
        number = torch.tensor([block.get(n, -1) for n in names]).repeat_interleave(sizes)
        ggn = fxkfac.exact.ggn(self.model, loss, data, names, self.params)
        return ggn * (number[:, None] == number)


def trace(entry: Entry) -> Traced:
    """Build and trace an entry."""
    model, params = entry.build()
    return Traced(entry, model, params, entry.trace(model, params, N))


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error, in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def hookable(model: nn.Module, names: list[str]) -> list[str]:
    """The parameters that curvlinops' modules have."""
    kinds = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    own = {id(p) for m in kinds for p in m.parameters(recurse=False)}
    return [n for n in names if id(model.get_parameter(n)) in own]


def hooked_matrix(at: Traced, n: int, names: list[str]) -> Tensor:
    """curvlinops' type-2 KFAC-expand of these parameters; raises what it raises."""
    from curvlinops import KFACLinearOperator

    X, y = at.entry.data(n)
    model, _ = at.entry.build()  # anew, as hooks stay on a model when curvlinops raises
    params = [model.get_parameter(name) for name in names]
    options: Any = dict.fromkeys(["check_deterministic", "separate_weight_and_bias"], False)
    if not isinstance(X, Tensor):
        model, options["batch_size_fn"] = Unpacked(model), lambda _: n
        X = X if isinstance(X, dict) else {str(k): x for k, x in enumerate(X)}
    K = KFACLinearOperator(model, at.entry.loss, params, [(X, y)], fisher_type="type-2", **options)
    return K @ torch.eye(sum(p.numel() for p in params), dtype=params[0].dtype)


def hooks(at: Traced) -> tuple[str, bool | None, bool | None]:
    """What becomes of the model under hooks: in words, complete or not, equal or not."""
    if not isinstance(at.model, nn.Module):
        return "function: no module", None, None
    every = list(at.program.parameters)
    names = hookable(at.model, every)
    if not names:
        return f"0 of {len(every)} parameters", False, None
    try:
        theirs, one = hooked_matrix(at, N, names), hooked_matrix(at, 1, names)
    except Exception as error:
        return f"raises {type(error).__name__}", False, None
    full = len(names) == len(every)
    says = "ok" if full else f"{len(names)} of {len(every)} parameters"
    if at.entry.random:
        return f"{says}, random: not compared", full, None
    ours = at.matrix(at.entry.data(N), names)
    error, c = off(theirs, ours), ((theirs * ours).sum() / ours.square().sum()).item()
    if error <= max(1e-6, at.entry.tolerance):
        return f"{says}, equal", full, True
    says += f", differs ({error:.1%}{f', {c:.3g} × ours' if off(theirs, c * ours) < 1e-6 else ''}"
    ggn, mine = at.exact(names), at.matrix(at.entry.data(1), names)
    alone = f"one datum: {off(one, ggn):.1%} off, fxkfac {off(mine, ggn):.1%}"
    return f"{says}; {alone})", full, False


def line(entry: Entry) -> Line:
    """All about one model."""
    at = trace(entry)
    check = max(fxkfac.check(at.program, entry.loss, entry.data(N)).values(), default=0.0)
    shares = at.program.coverage().shares()
    has = 1 - shares.pop("skip", 0.0)
    kinds = ", ".join(k if s > 0.9999 else f"{k} {s:.0%}" for k, s in shares.items())
    data, names = entry.data(1), list(at.program.parameters)
    exact = f"{off(at.matrix(data, names), at.exact(names)):.0e}" if entry.unshared else ""
    says, hooked, equal = hooks(at)
    cells = (f"{has:.0%}: {kinds}", f"{check:.0e}", exact, says)
    return Line(entry, cells, has > 0.9999, hooked, equal)


def refusal(entry: Entry) -> str:
    """The error of a model that is refused."""
    try:
        trace(entry)
    except fxkfac.errors.FxkfacError as error:
        return f"- `{entry.name}`: {entry.description} `{type(error).__name__}`"
    raise AssertionError(entry.name)


def summary(lines: list[Line]) -> str:
    """The counts."""
    hooked = [r.hooked for r in lines if r.hooked is not None]
    equal = [r.equal for r in lines if r.equal is not None]
    return (
        f"fxkfac covers {sum(r.complete for r in lines)} of {len(lines)} models completely, and "
        f"refuses those at the end of the page as it should; hooks cover "
        f"{sum(hooked)} of {len(hooked)} modules, and no function of {len(lines) - len(hooked)}. "
        f"Where hooks give numbers to compare, {sum(equal)} of {len(equal)} matrices are equal."
    )


def rows(lines: list[Line]) -> Iterator[str]:
    """The table, by group."""
    yield "| model | what it is | fxkfac covers | check | exact | curvlinops' hooks |"
    yield "| --- " * 6 + "|"
    for group in dict.fromkeys(r.entry.group for r in lines):
        yield f"| **{group}** | | | | | |"
        for e, cells in ((r.entry, r.cells) for r in lines if r.entry.group == group):
            cells = (f"`{e.name}`", e.description, *cells)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


INTRODUCTION = f"""\
*Covers*: the share of the parameters' entries with a block, and its structure. *Check*: the worst
relative error of gradients put together from the taps. *Exact*: that of one datum's type-2 KFAC
against the GGN's blocks, where nothing is shared. Last, curvlinops' `KFACLinearOperator`, type-2
expand with joint biases, on {N} data, for the parameters of `Linear` and `Conv2d`: *equal* to
fxkfac's to 1e-6, or how far off, and both against one datum's GGN (approximate under sharing)."""


def page(lines: list[Line], refused: list[str]) -> str:
    """docs/zoo.md."""
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "fxkfac", CURVLINOPS))
    footer = f"Made by `python docs/make_zoo.py` with Python {sys.version.split()[0]}, {used}."
    below = ["\n".join(rows(lines)), "## Refused by fxkfac, by name", "\n".join(refused), footer]
    return "\n\n".join(["# The zoo", summary(lines), INTRODUCTION, *below]) + "\n"


def main() -> None:
    """Make the page."""
    if importlib.util.find_spec("curvlinops") is None:
        sys.exit(f"The last column needs curvlinops: pip install {CURVLINOPS}==3.0.1")
    lines = [line(e) for e in ZOO.values() if e.expected != "refused"]
    refused = [refusal(e) for e in ZOO.values() if e.expected == "refused"]
    (ROOT / "docs" / "zoo.md").write_text(page(lines, refused))


if __name__ == "__main__":
    main()
