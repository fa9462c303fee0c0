"""An accumulation <-> a file, from which it goes on as if nothing had been.

The same bits need the same sums in the same order. So everything that decides it is kept: rows
that wait for others, which triangle of a sum is there, strides, and the generator's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.accumulated import Accumulated, same_objects
from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.options import require_program
from fxkfac.curvature.padding import Mask
from fxkfac.curvature.schedule import Schedule
from fxkfac.errors import MergeError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.linalg import checksum
from fxkfac.persistence.container import Header, StrPath, read
from fxkfac.persistence.description import MOST, describe, matching
from fxkfac.persistence.factors import heading, pack_number, unpack_number

KIND = "an accumulation"
Tensors = dict[str, Tensor]


def packed_accumulation(accumulation: Accumulation) -> tuple[Header, Tensors]:
    """The header and the tensors of an accumulation."""
    over, tensors = accumulation.over, Tensors()
    over.require_whole()
    schedule = over.schedule
    tensors["generator"] = over.generator.get_state()
    header = {
        **heading(KIND, describe(over.settings, schedule.blocks, over.program.like)),
        "batches": over.batches,
        "n": accumulation.n,
        "backend": over.backend,
        "memory": over.memory,
        "generator": str(over.generator.device),
        "state": {name: checksum(t) for name, t in over.state.items()},
        "total": None if over.total is None else _packed(over.total, tensors),
    }
    return header, tensors


def _packed(total: Accumulated, tensors: Tensors) -> Header:
    names, same = _names(total.schedule), same_objects(total.inputs)
    for name, block in total.exact.items():
        tensors[f"{name}/exact"] = block
    return {
        "count": total.count,
        "same inputs": same,
        "inputs": {
            names[k]: _packed_inputs(total.inputs[k], f"{names[k]}/A", tensors)
            for k in sorted(set(same))
        },
        "outputs": {
            name: _packed_moment(moment, f"{name}/B", tensors)
            for name, moment in zip(names, total.outputs, strict=True)
        },
        "exact": list(total.exact),
    }


def _names(schedule: Schedule) -> list[str]:
    """A name for every term."""
    return [f"{block.name}/{k}" for block in schedule.blocks for k in range(len(block.terms))]


def _packed_inputs(sums: InputSums, name: str, tensors: Tensors) -> Header:
    if sums.counts is not None:
        tensors[f"{name}/counts"] = sums.counts
    return {
        "rows": pack_number(sums.rows, f"{name}/rows", tensors),
        "counts": sums.counts is not None,
        "moments": [
            _packed_moment(moment, f"{name}/{k}", tensors)
            for k, moment in enumerate(sums.moments.values())
        ],
    }


def _packed_moment(moment: Moment, name: str, tensors: Tensors) -> Header:
    gram = moment.gram
    if gram is not None:
        tensors[f"{name}/total"] = moment.cleared()
    if moment.sums is not None:
        tensors[f"{name}/sums"] = moment.sums
    for k, rows in enumerate(moment.waiting):
        tensors[f"{name}/waiting/{k}"] = rows
    return {
        "name": name,
        "scales": list(moment.scales),
        "count": pack_number(moment.count, f"{name}/count", tensors),
        "sums": moment.sums is not None,
        # Rows are multiplied as they lie, and another order in memory may round otherwise.
        "waiting": [list(rows.stride()) for rows in moment.waiting],
        "gram": gram and {"is_empty": gram.is_empty, "scale": gram.scale},
    }


def resume(
    path: StrPath,
    program: Program,
    loss: Any,
    params: Params | None = None,
    mask: Mask | None = None,
) -> Accumulation:
    """An accumulation that `fxkfac.save` wrote, which goes on where it stopped.

    With the same batches, in the same order, its factors are those of an accumulation that was
    never interrupted, bit for bit on the same machine, with as many threads. What it was told when
    it was made, `fisher` and the like, `backend`, `memory`, and the generator, whose state goes
    on, is in the file.

    Args:
        path: The file.
        program: A trace of the same model, in this process, with the same parameters.
        loss: The same loss.
        params: The same tensors in the place of the model's own parameters, if there were some.
        mask: The same mask, if there was one. The file knows that, but not which it was.

    Returns:
        The accumulation; its `batches` says how many it has.

    Raises:
        FileError: There is no such file, it is damaged or no whole file, or holds something else.
        MergeError: It is of another program or loss, of other values of the parameters or buffers,
            or has a mask and there is none here, or the reverse; the message says what differs.
    """
    require_program(program)
    header, tensors = read(path, (KIND,), program.like.device)
    settings, schedule = matching(program, loss, header["of"], mask is not None)
    generator = torch.Generator(header["generator"])
    generator.set_state(tensors["generator"].cpu())
    accumulation = Accumulation(
        program,
        loss,
        params,
        settings.fisher,
        settings.mc_samples,
        settings.sharing,
        settings.separate_weight_and_bias,
        mask,
        generator,
        header["backend"],
        header["memory"],
    )
    over = accumulation.over
    _require_same_state(header["state"], over.state)
    over.batches = header["batches"]
    if header["total"] is not None:
        over.total = _unpacked(header, schedule, tensors)
        over.mark()
    return accumulation


def _require_same_state(there: Mapping[str, str], here: Mapping[str, Tensor]) -> None:
    differ = [n for n in there if n not in here or checksum(here[n]) != there[n]]
    differ += [name for name in here if name not in there]
    if differ:
        more = f" and {len(differ) - MOST} more" if len(differ) > MOST else ""
        raise MergeError(
            f"the parameters or buffers {', '.join(map(repr, differ[:MOST]))}{more} are not those "
            "that the accumulation was computed with; expected the same values. Load the "
            "checkpoint of the model that belongs to it, or pass them as `params`."
        )


def _unpacked(header: Header, schedule: Schedule, tensors: Tensors) -> Accumulated:
    total, names = header["total"], _names(schedule)
    inputs: list[InputSums] = []
    for k, first in enumerate(total["same inputs"]):
        packed = total["inputs"][names[first]]
        own = inputs[first] if first < k else _unpacked_inputs(packed, f"{names[k]}/A", tensors)
        inputs.append(own)
    outputs = [_unpacked_moment(total["outputs"][name], tensors) for name in names]
    exact = {name: tensors[f"{name}/exact"].clone() for name in total["exact"]}
    return Accumulated(schedule, header["n"], total["count"], inputs, outputs, exact)


def _unpacked_inputs(packed: Header, name: str, tensors: Tensors) -> InputSums:
    moments = [_unpacked_moment(m, tensors) for m in packed["moments"]]
    return InputSums(
        {moment.scales: moment for moment in moments},
        tensors[f"{name}/counts"].clone() if packed["counts"] else None,
        unpack_number(packed["rows"], tensors),
    )


def _unpacked_moment(packed: Header, tensors: Tensors) -> Moment:
    """Sums are changed in place, so that each has memory of its own."""
    name, scales = packed["name"], tuple(packed["scales"])
    waiting = []
    for k, stride in enumerate(packed["waiting"]):
        rows = tensors[f"{name}/waiting/{k}"]
        laid_out = torch.empty_strided(rows.shape, stride, dtype=rows.dtype, device=rows.device)
        waiting.append(laid_out.copy_(rows))
    moment = Moment(scales, count=unpack_number(packed["count"], tensors), waiting=waiting)
    if packed["gram"] is not None:
        held = tensors[f"{name}/total"]
        gram = moment.room(len(held), held.shape[-1] - len(scales), held)
        gram.is_empty, gram.scale = packed["gram"]["is_empty"], packed["gram"]["scale"]
        assert moment.total is not None
        moment.total.copy_(held)
    if packed["sums"]:
        moment.sums = tensors[f"{name}/sums"].clone()
    return moment
