"""Factors, and their running averages <-> a file, bit for bit."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.factors import Factors, Product
from fxkfac.curvature.options import require_program
from fxkfac.curvature.running import RunningAverage
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.persistence.container import FORMAT, Header, StrPath, read
from fxkfac.persistence.description import Description, describe, fingerprint, matching

KIND, AVERAGE = "factors", "a running average"


def heading(kind: str, description: Description) -> Header:
    """What the header of every kind begins with."""
    return {
        "format": FORMAT,
        "kind": kind,
        "fxkfac": _version(),
        "torch": torch.__version__,
        "fingerprint": fingerprint(description),
        "of": description,
    }


def _version() -> str:
    try:
        return metadata.version("fxkfac")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def packed_factors(factors: Factors) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of factors."""
    return _packed_as(KIND, factors)


def packed_average(average: RunningAverage) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a running average. Raises `OptionError` before any update."""
    if average.averages is None:
        raise OptionError(
            "the running average has had no update, so that nothing can be saved; expected one at "
            "least. Call `update(factors)` first."
        )
    header, tensors = _packed_as(AVERAGE, average.averages)
    updates = average.updates
    updates["B"] = [
        pack_number(number, f"updates/{k}", tensors) for k, number in enumerate(updates["B"])
    ]
    return {**header, "decay": [average.decay, average.decay_B], "updates": updates}, tensors


def _packed_as(kind: str, factors: Factors) -> tuple[Header, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    products = {
        name: [_packed(p, f"{name}/{k}", tensors) for k, p in enumerate(of_block)]
        for name, of_block in factors.products.items()
    }
    for name, block in factors.exact.items():
        tensors[f"{name}/exact"] = block
    header = {
        **heading(kind, describe(factors.settings, factors.plans.values(), factors.like)),
        "n": factors.n,
        "count": factors.count,
        "products": products,
        "exact": list(factors.exact),
    }
    return header, tensors


def _packed(product: Product, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[f"{name}/A"], tensors[f"{name}/B"] = product.A, product.B
    return {"name": name, "rows": pack_number(product.rows, f"{name}/rows", tensors)}


def load(path: StrPath, program: Program, loss: Any) -> Any:
    """Factors, or a running average, that `fxkfac.save` wrote.

    They are those that were saved, bit for bit: factors add up with further ones, and averages go
    on with the next update as if nothing had been in between.

    Args:
        path: The file.
        program: A trace of the same model, in this process.
        loss: The same loss.

    Returns:
        `Factors` or a `RunningAverage`, whichever the file holds, on the device of the program's
        parameters.

    Raises:
        FileError: There is no such file, it is damaged or no whole file, or holds something else.
        MergeError: It is of another program or loss; the message says what differs.
    """
    require_program(program)
    header, tensors = read(path, (KIND, AVERAGE), program.like.device)
    factors = _unpacked_factors(header, tensors, program, loss)
    if header["kind"] == KIND:
        return factors
    average, updates = RunningAverage(*header["decay"]), header["updates"]
    number_of_B = [unpack_number(number, tensors) for number in updates["B"]]
    average.restore(factors, {**updates, "B": number_of_B})
    return average


def _unpacked_factors(
    header: Header, tensors: dict[str, Tensor], program: Program, loss: Any
) -> Factors:
    _share_inputs_only(tensors)
    settings, schedule = matching(program, loss, header["of"], header["of"]["settings"]["masked"])
    return Factors(
        settings=settings,
        n=header["n"],
        count=header["count"],
        model=program.model,
        likelihood=likelihood_of(loss),
        plans={block.name: block for block in schedule.blocks},
        products={
            block.name: tuple(_unpacked(p, tensors) for p in header["products"][block.name])
            for block in schedule.blocks
        },
        exact={name: tensors[f"{name}/exact"] for name in header["exact"]},
    )


def _share_inputs_only(tensors: dict[str, Tensor]) -> None:
    """Equal inputs have one A; what else is equal is so by chance, and has memory of its own."""
    taken = {id(t) for name, t in tensors.items() if name.endswith("/A")}
    for name, t in tensors.items():
        if not name.endswith("/A"):
            tensors[name] = t.clone() if id(t) in taken else t
            taken.add(id(t))


def _unpacked(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Product:
    name = packed["name"]
    rows = unpack_number(packed["rows"], tensors)
    return Product(tensors[f"{name}/A"], tensors[f"{name}/B"], rows)


def pack_number(number: int | Tensor, name: str, tensors: dict[str, Tensor]) -> int | str:
    """A number as it is; one for each group as a tensor, by its name."""
    if not isinstance(number, Tensor):
        return int(number)
    tensors[name] = number
    return name


def unpack_number(packed: int | str, tensors: dict[str, Tensor]) -> int | Tensor:
    """Inverse of `pack_number`."""
    return tensors[packed] if isinstance(packed, str) else packed
