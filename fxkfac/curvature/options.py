"""What the user asked for -> settings: refuses what does not exist, or does not go together."""

from __future__ import annotations

from typing import Any

from fxkfac.curvature.settings import Settings
from fxkfac.curvature.sharing import SHARINGS
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program
from fxkfac.graph.structure import EXACT, NONE
from fxkfac.likelihoods.backpropagation import require_fisher
from fxkfac.likelihoods.losses import loss_text
from fxkfac.ranges import require_count, require_flag


def settings_of(
    program: Program,
    loss: Any,
    fisher: str,
    sharing: str,
    mc_samples: int,
    separate_weight_and_bias: bool,
    masked: bool,
) -> Settings:
    """How factors are computed. Raises `OptionError`."""
    require_program(program)
    require_fisher(fisher)
    mc_samples = require_count("mc_samples", mc_samples)
    separate = require_flag("separate_weight_and_bias", separate_weight_and_bias)
    if sharing not in SHARINGS:
        raise OptionError(f"sharing={sharing!r}; expected 'expand' or 'reduce'.")
    parameters, structures = program.tapped.once(
        ("structures", fisher), lambda: _structures(program, fisher)
    )
    return Settings(
        fisher,
        sharing,
        mc_samples,
        separate,
        masked,
        loss_text(loss),
        parameters,
        structures,
    )


def require_program(program: Any) -> None:
    """Raise `OptionError` unless it is one: a model is easily passed in its place."""
    if not isinstance(program, Program):
        raise OptionError(
            f"program is of type {type(program).__name__}; expected what fxkfac.trace(model, "
            "inputs) returns."
        )


def settings_again(program: Program, loss: Any, had: Settings, masked: bool) -> Settings:
    """What a program and loss say now, for the arguments of other settings."""
    return settings_of(
        program,
        loss,
        had.fisher,
        had.sharing,
        had.mc_samples,
        had.separate_weight_and_bias,
        masked,
    )


def _structures(program: Program, fisher: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every parameter that gets a block, and its structure."""
    chosen = {name: c for name, c in program.structures.items() if c.structure not in NONE}
    structures = {name: c.structure for name, c in chosen.items()}
    if fisher == "forward-only":
        free = {name for name, c in chosen.items() if c.is_scale or c.is_free}
        lost = [n for n, c in chosen.items() if c.structure in EXACT and n not in free]
        if lost:
            raise OptionError(
                f"fisher='forward-only' sends nothing back, but the blocks of {lost[:4]} are made "
                "of gradients; expected Kronecker factors. Leave them out, or use another fisher."
            )
        structures |= {n: "kronecker" for n, c in chosen.items() if c.is_scale}
    shapes = program.shapes
    return {name: shapes[name] for name in structures}, structures
