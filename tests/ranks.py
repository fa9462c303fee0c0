"""One rank of a real group of processes: runs every case, and writes what came out of each.

    python tests/ranks.py RANK WORLD FOLDER

`test_distributed.py` starts the ranks, and reads FOLDER/RANK.pt: for every case a dict.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zoo_wide  # noqa: F401 - registers its entries
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from zoo import ZOO, Entry, ints, rand

import fxkfac
import fxkfac.distributed
from fxkfac.errors import NoDataError

DOCS = Path(__file__).parent.parent / "docs" / "distributed.md"
F64 = torch.float64
N = 9
# How many data each rank has, by the number of ranks.
UNEVEN = {2: (7, 2), 3: (4, 2, 3)}

Case = Callable[[int, int], dict[str, Any]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def numbers(result: Any) -> dict[str, Any]:
    """All numbers of factors, or of a step, by name."""
    if isinstance(result, fxkfac.Step):
        gradients = {f"gradient of {name}": g for name, g in result.gradients.items()}
        return {**numbers(result.factors), "loss": result.loss, **gradients}
    found: dict[str, Any] = {"n": result.n, "count": result.count, "R": result.reduction}
    for name, block in result.items():
        if not isinstance(block, fxkfac.Block):
            found[name] = block.dense()
            continue
        for k, term in enumerate(block.terms):
            found |= {f"{name}, A {k}": term.A, f"{name}, B {k}": term.B}
            found[f"{name}, rows {k}"] = result.products[name][k].rows
    return found


def shard(rank: int, world: int, sizes: tuple[int, ...] | None = None) -> range:
    sizes = sizes or UNEVEN[world]
    return range(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def batches(entry: Entry, data: Any, of: range, size: int = 4) -> list[Any]:
    return [entry.take(data, list(of[k : k + size])) for k in range(0, len(of), size)]


# --- all data, from one process and from many ---


@dataclass(frozen=True)
class Model:
    """An entry of the zoo, and what is done with it.

    Attributes:
        entry: Its name.
        options: Arguments of `fxkfac.kfac`.
        loss: One that is not the entry's.
        structure: Pairs of patterns and structures.
    """

    entry: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: nn.Module | None = None
    structure: tuple[tuple[str, str], ...] = ()


MODELS = {
    "mlp": Model("sequential"),
    "sum": Model("sequential", loss=nn.MSELoss(reduction="sum")),
    "classes": Model("nested_modules", {"fisher": "empirical"}),
    "classes, sum": Model("nested_modules", loss=nn.CrossEntropyLoss(reduction="sum")),
    "apart": Model("sequential", {"separate_weight_and_bias": True}),
    "forward only": Model("sequential", {"fisher": "forward-only"}),
    "dense": Model("sequential", structure=(("0.*", "dense"), ("2.weight", "identity"))),
    "shared inputs": Model("split_qkv", {"sharing": "reduce"}),
    "tied": Model("tied_autoencoder"),
    "norm": Model("layer_norm"),
    "cnn": Model("conv_stride_padding"),
    "groups": Model("conv_groups"),
    "embedding": Model("embedding_padding"),
    "experts": Model("top_two_of_stacked"),
}


@cache  # tracing is what takes time
def traced(name: str, structure: tuple[tuple[str, str], ...]) -> fxkfac.Program:
    entry = ZOO[name]
    asked = {"structure": dict(structure)} if structure else {}
    entry = replace(entry, trace_options={**entry.trace_options, **asked})
    return entry.trace(*entry.build(), 4)


def of_model(
    run: str, model: Model, rank: int, world: int, sizes: tuple[int, ...] | None = None
) -> dict[str, Any]:
    entry, program = ZOO[model.entry], traced(model.entry, model.structure)
    data, loss = entry.data(N), model.loss or entry.loss
    own = batches(entry, data, shard(rank, world, sizes))
    distributed, alone = (getattr(at, run) for at in (fxkfac.distributed, fxkfac))
    options = {"fisher": "type-2", **model.options}
    found = distributed(program, loss, own, **options)
    return {
        "found": numbers(found),
        "expected": numbers(alone(program, loss, data, **options)),
        "inputs": count_inputs(found.factors if run == "step" else found),
    }


def count_inputs(factors: fxkfac.Factors) -> int:
    """How many tensors hold an A."""
    return len({id(p.A) for products in factors.products.values() for p in products})


EMPTY = {2: (0, N), 3: (4, 0, 5)}


def register(run: str, name: str) -> None:
    """A model with shards of any length, and with an empty one."""
    model = MODELS[name]
    CASES[f"{run}: {name}"] = partial(of_model, run, model)
    if name in ("mlp", "dense", "shared inputs", "experts"):
        CASES[f"{run}, an empty shard: {name}"] = lambda rank, world: of_model(
            run, model, rank, world, EMPTY[world]
        )


for name in MODELS:
    register("kfac", name)
for name in ("mlp", "classes, sum", "dense", "experts"):
    register("step", name)


# --- data sets, samplers, and shards that say nothing ---

LOSS = nn.CrossEntropyLoss(ignore_index=2)
X, Y = rand(N, 4, seed=3), ints(N, high=2, seed=4)


def mlp(width: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


@cache
def program(width: int = 5) -> fxkfac.Program:
    return fxkfac.trace(mlp(width), X[:4])


@case
def a_sampler_that_pads(rank: int, world: int) -> dict[str, Any]:
    """`DistributedSampler` gives some data twice, to make shards equally long: N = 9, 2 ranks."""
    dataset = TensorDataset(X, Y)
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=1)
    found = fxkfac.distributed.kfac(program(), LOSS, DataLoader(dataset, 2, sampler=sampler))
    drawn = [k for r in range(world) for k in DistributedSampler(dataset, world, r, seed=1)]
    whole = fxkfac.kfac(program(), LOSS, (X[drawn], Y[drawn]))
    return {"found": numbers(found), "expected": numbers(whole), "data": len(drawn)}


@case
def every_kth_datum(rank: int, world: int) -> dict[str, Any]:
    own = Subset(TensorDataset(X, Y), range(rank, N, world))
    found = fxkfac.distributed.kfac(program(), LOSS, DataLoader(own, batch_size=2))
    return {"found": numbers(found), "expected": numbers(fxkfac.kfac(program(), LOSS, (X, Y)))}


def without_targets(run: str, loss: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """No target of the first rank's counts; the others have some that do not, too."""
    of = shard(rank, world)
    y = Y.clone()
    y[list(shard(0, world))] = 2
    y[-1] = 2
    own = (X[list(of)], y[list(of)])
    found = getattr(fxkfac.distributed, run)(program(), loss, own, fisher="type-2")
    whole = getattr(fxkfac, run)(program(), loss, (X, y), fisher="type-2")
    return {"found": numbers(found), "expected": numbers(whole)}


WEIGHTS = torch.tensor([0.5, 2.0, 0.0], dtype=F64)  # rows of the last class count for A
for run in ("kfac", "step"):
    for name, loss in {
        "ignored": LOSS,
        "ignored, sum": nn.CrossEntropyLoss(ignore_index=2, reduction="sum"),
        "weightless": nn.CrossEntropyLoss(WEIGHTS),
        "smoothed": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
    }.items():
        CASES[f"{run}, a rank without targets: {name}"] = lambda rank, world, run=run, loss=loss: (
            without_targets(run, loss, rank, world)
        )


def matrices_of(part: fxkfac.Factors) -> dict[str, Tensor]:
    return {k: v for k, v in numbers(part).items() if isinstance(v, Tensor)} if part.n else {}


@case
def accumulated_by_hand(rank: int, world: int) -> dict[str, Any]:
    """`all_reduce` of a sum of parts, and of a rank that has none."""
    own = program()
    try:
        if rank == 1:
            fxkfac.kfac(own, LOSS, [])
        part = fxkfac.kfac(own, LOSS, (X[:2], Y[:2])) + fxkfac.kfac(own, LOSS, (X[2:], Y[2:]))
    except NoDataError as error:
        part = error.part
    before = {k: v.clone() for k, v in matrices_of(part).items()}
    found = fxkfac.distributed.all_reduce(part)
    again = matrices_of(part)
    times = world - 1  # every other rank has all of the data
    whole = fxkfac.kfac(own, LOSS, (X.repeat(times, 1), Y.repeat(times)))
    return {
        "found": numbers(found),
        "expected": numbers(whole),
        "unchanged": all(torch.equal(before[k], again[k]) for k in before),
    }


@case
def in_a_smaller_group(rank: int, world: int) -> dict[str, Any]:
    """The last two ranks of the world."""
    members = [world - 2, world - 1]
    group = dist.new_group(members)
    if rank not in members:
        return refused(lambda: fxkfac.distributed.kfac(program(), LOSS, (X, Y), group=group))
    of = list(shard(rank - members[0], 2))
    own = program()
    found = fxkfac.distributed.kfac(own, LOSS, (X[of], Y[of]), group=group)
    eigen = fxkfac.distributed.eigh([b.B for b in found.values()], group=group)
    products = [(Q * L) @ Q.mT for L, Q in eigen]
    return {
        "found": {**numbers(found), **dict(enumerate(products))},
        "expected": {
            **numbers(whole := fxkfac.kfac(own, LOSS, (X, Y))),
            **dict(enumerate(b.B for b in whole.values())),
        },
    }


@case
def what_draws_labels(rank: int, world: int) -> dict[str, Any]:
    """Ranks that are seeded alike draw apart: each one's part is the one of its own generator."""
    own = program()
    own.generator.manual_seed(5)
    state = own.generator.get_state()
    found = fxkfac.distributed.kfac(own, LOSS, (X, Y), fisher="mc")
    seeds = torch.Generator()
    seeds.set_state(state)
    first = int(torch.randint(2**62, (), generator=seeds))
    parts = [
        fxkfac.kfac(
            own, LOSS, (X, Y), fisher="mc", generator=torch.Generator().manual_seed(first + r)
        )
        for r in range(world)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return {
        "found": numbers(found),
        "expected": numbers(total),
        "apart": not torch.equal(parts[0]["0.weight"].B, parts[1]["0.weight"].B),
    }


# --- what is refused, on every rank ---


def refused(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


@case
def another_fisher(rank: int, world: int) -> dict[str, Any]:
    fisher = "empirical" if rank == 1 else "type-2"
    return refused(lambda: fxkfac.distributed.kfac(program(), LOSS, (X, Y), fisher=fisher))


@case
def another_width(rank: int, world: int) -> dict[str, Any]:
    own = program(width=4 if rank == 1 else 5)
    return refused(lambda: fxkfac.distributed.kfac(own, LOSS, (X, Y)))


@case
def another_dtype(rank: int, world: int) -> dict[str, Any]:
    model, x = (mlp().float(), X.float()) if rank == 1 else (mlp(), X)
    own = fxkfac.trace(model, x)
    return refused(lambda: fxkfac.distributed.kfac(own, LOSS, (x, Y)))


@case
def a_step_and_factors(rank: int, world: int) -> dict[str, Any]:
    run = fxkfac.distributed.step if rank == 1 else fxkfac.distributed.kfac
    return refused(lambda: run(program(), LOSS, (X, Y), fisher="type-2"))


@case
def wrong_data_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    y = torch.full_like(Y, 7) if rank == 1 else Y
    return refused(lambda: fxkfac.distributed.kfac(program(), LOSS, (X, y)))


@case
def an_average_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    part: Any = fxkfac.kfac(program(), LOSS, (X, Y))
    if rank == 1:
        average = fxkfac.RunningAverage()
        average.update(part)
        part = average
    return refused(lambda: fxkfac.distributed.all_reduce(part))


@case
def a_model_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    own: Any = mlp() if rank == 1 else program()
    return refused(lambda: fxkfac.distributed.kfac(own, LOSS, (X, Y)))


@case
def no_data_anywhere(rank: int, world: int) -> dict[str, Any]:
    return refused(lambda: fxkfac.distributed.kfac(program(), LOSS, []))


@case
def no_target_anywhere(rank: int, world: int) -> dict[str, Any]:
    return refused(lambda: fxkfac.distributed.step(program(), LOSS, (X, torch.full_like(Y, 2))))


@case
def a_likelihood_with_a_function(rank: int, world: int) -> dict[str, Any]:
    """Its address is another one on every rank; it is the same loss."""
    loss = fxkfac.Likelihood.from_distribution(lambda f: torch.distributions.Poisson(f.exp()))
    of, y = list(shard(rank, world)), ints(N, 3, high=4, seed=8).double()
    found = fxkfac.distributed.kfac(program(), loss, (X[of], y[of]))
    return {"found": numbers(found), "expected": numbers(fxkfac.kfac(program(), loss, (X, y)))}


# --- functions of matrices ---


def symmetric(*shape: int, seed: int = 0) -> Tensor:
    M = rand(*shape, shape[-1], seed=seed)
    return M @ M.mT


MATRICES = {
    "small": symmetric(3, seed=1),
    "large": symmetric(12, seed=2),
    "single": symmetric(7, seed=3).float(),
    "one": symmetric(1, seed=4),
    "experts": symmetric(4, 5, seed=5),
    "none": torch.zeros(0, 3, 3, dtype=F64),
}


def tensors(named: Any) -> dict[str, Tensor]:
    items = named.items() if isinstance(named, dict) else enumerate(named)
    return {
        f"{key}, {k}": t
        for key, value in items
        for k, t in enumerate(value if isinstance(value, tuple) else (value,))
    }


@case
def eigenvalues(rank: int, world: int) -> dict[str, Any]:
    found = fxkfac.distributed.eigh(MATRICES)
    listed = fxkfac.distributed.eigh(list(MATRICES.values()))
    assert all(
        torch.equal(a, b)
        for f, g in zip(found.values(), listed, strict=True)
        for a, b in zip(f, g, strict=True)
    )
    return {
        "found": tensors(found),
        "expected": tensors({key: tuple(torch.linalg.eigh(M)) for key, M in MATRICES.items()}),
        "strides": [t.stride() for t in tensors(found).values()],
    }


@case
def fewer_matrices_than_ranks(rank: int, world: int) -> dict[str, Any]:
    M = MATRICES["small"]
    assert fxkfac.distributed.spread(torch.linalg.inv, []) == []
    found = fxkfac.distributed.spread(torch.linalg.inv, [M])
    return {"found": tensors(found), "expected": tensors([torch.linalg.inv(M)])}


@case
def each_one_once(rank: int, world: int) -> dict[str, Any]:
    seen = []

    def function(M: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(M.shape[-1])
        return M.diagonal().clone(), torch.tensor(rank)

    found = fxkfac.distributed.spread(function, [symmetric(d) for d in (2, 9, 5, 6)])
    return {"seen": seen, "by": [int(by) for _, by in found]}


@case
def a_matrix_without_inverse(rank: int, world: int) -> dict[str, Any]:
    matrices = {"large": MATRICES["large"], "zero": torch.zeros(4, 4, dtype=F64)}
    return refused(lambda: fxkfac.distributed.spread(torch.linalg.cholesky, matrices))


@case
def a_matrix_without_numbers(rank: int, world: int) -> dict[str, Any]:
    matrices = {"large": MATRICES["large"], "none": torch.full((4, 4), torch.nan, dtype=F64)}
    return refused(lambda: fxkfac.distributed.eigh(matrices))


@case
def other_matrices(rank: int, world: int) -> dict[str, Any]:
    matrices = {key: M for key, M in MATRICES.items() if rank != 1 or key != "one"}
    return refused(lambda: fxkfac.distributed.eigh(matrices))


@case
def no_square_matrix(rank: int, world: int) -> dict[str, Any]:
    return refused(lambda: fxkfac.distributed.eigh({"A": rand(4), "B": symmetric(3)}))


# --- the page ---


@case
def the_page(rank: int, world: int) -> dict[str, Any]:
    """What docs/distributed.md says, from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"distributed.md, block {number}", "exec"), namespace)
    return {"blocks": len(blocks), "found": numbers(namespace["factors"]), "expected": {}}


def cases_of(world: int) -> list[str]:
    """All for two ranks; for more, one of many models, which differ in nothing that ranks do."""
    few = ("mlp", "shared inputs", "experts")
    alike = [f"{run}: {name}" for run in ("kfac", "step") for name in MODELS if name not in few]
    return [name for name in CASES if world == 2 or name not in alike]


def outcomes(rank: int, world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in cases_of(world):
        run = CASES[name]
        try:
            yield name, run(rank, world)
        except Exception as error:
            yield name, {"failed": f"{type(error).__name__}: {error}"}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # what waits for nobody fails, rather than hangs
    )
    torch.save(dict(outcomes(rank, world)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
