"""What one does with a model, as numbers that are the same on every device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import CE, Entry, rand

import fxkfac
from fxkfac import operators
from fxkfac.optim import KFAC, Preconditioner

DAMPING = 1e-2


def on(device: str, tree: Any) -> Any:
    """The same tensors there; those of one storage still are."""
    storages: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}  # tied ones are one object

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or id(t) in tensors:
            return tensors.get(id(t), t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.to(device=device)
        there = storages[storage.data_ptr()]
        placed = torch.empty(0, dtype=t.dtype, device=device)
        tensors[id(t)] = placed.set_(there, t.storage_offset(), t.shape, t.stride())
        return tensors[id(t)]

    return pytree.tree_map(moved, tree)


def traced(entry: Entry, model: Any, params: Any, data: Any) -> fxkfac.Program:
    options = dict(entry.trace_options) | ({} if params is None else {"params": params})
    return fxkfac.trace(model, data[0], **options)


def digits_like(n: int = 24) -> tuple[Tensor, Tensor]:
    return rand(n, 2, 5, 5, seed=3), torch.arange(n) % 3


def network() -> nn.Module:
    """Convolutions of both strides, norms, a linear layer, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        return net.double().eval()


# --- what is done with a model, as numbers to be compared ---


def of_factors(factors: Any) -> dict[str, Tensor]:
    return {name: block.dense() for name, block in factors.items()}


def kfac(model: nn.Module, data: Any, **options: Any) -> dict[str, Tensor]:
    return of_factors(fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data, **options))


def corrected(model: nn.Module, data: Any, correct: Callable[..., Any]) -> dict[str, Tensor]:
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, CE, data, fisher="type-2")
    return of_factors(correct(program, CE, data, factors))


def step(model: nn.Module, data: Any) -> dict[str, Tensor]:
    found = fxkfac.step(fxkfac.trace(model, data[0]), CE, data, fisher="empirical")
    return of_factors(found.factors) | {f"∇ {k}": g for k, g in found.gradients.items()}


def optimized(model: nn.Module, data: Any, **options: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    options = {"lr": 0.1, "damping": DAMPING, "fisher": "type-2", "lm_interval": 2} | options
    optimizer = KFAC(fxkfac.trace(model, data[0]), CE, **options)
    losses = [optimizer.step(*data) for _ in range(3)]
    return dict(model.state_dict()) | {"loss": torch.stack(losses)}


def preconditioned(model: nn.Module, data: Any) -> dict[str, Tensor]:
    preconditioner = Preconditioner(
        fxkfac.trace(model, data[0]), CE, damping=DAMPING, fisher="type-2"
    )
    preconditioner.update(*data)
    return preconditioner.solve({k: p.detach() for k, p in model.named_parameters()})


def influence(model: nn.Module, data: Any) -> dict[str, Tensor]:
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, CE, data, fisher="type-2")
    return {"scores": fxkfac.influence(program, CE, factors, data, data, damping=DAMPING)}


def laplace(model: nn.Module, data: Any) -> dict[str, Tensor]:
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, CE, data, fisher="type-2")
    posterior = fxkfac.laplace.posterior(factors, prior_precision=0.5)
    draws = {name: (mean + 0.01).unsqueeze(0) for name, mean in posterior.mean.items()}
    linear = fxkfac.laplace.linearised(posterior, draws, data[0])
    return {"linear": linear, "evidence": fxkfac.laplace.log_evidence(posterior, 0.1)}


def products(model: nn.Module, data: Any) -> dict[str, Tensor]:
    factors = fxkfac.kfac(fxkfac.trace(model, data[0]), CE, data, fisher="type-2")
    found = {}
    for name, block in factors.items():
        damped = operators.damped(block.operator, operators.Damping(DAMPING))
        v = operators.diagonal(damped)
        found |= {
            f"{name} solve": operators.solve(damped, v),
            f"{name} root": operators.product(operators.power(damped, -0.25), v),
            f"{name} logdet": operators.logdet(damped),
            f"{name} spectrum": operators.eigenvalues(damped).sort().values,
        }
    return found


def with_ignored_targets(model: nn.Module, data: Any) -> dict[str, Tensor]:
    targets = data[1].clone()
    targets[1] = -100
    return kfac(model, (data[0], targets), fisher="type-2")


CAPABILITIES: dict[str, Callable[[nn.Module, Any], dict[str, Tensor]]] = {
    "empirical": lambda m, d: kfac(m, d, fisher="empirical"),
    "type-2": lambda m, d: kfac(m, d, fisher="type-2"),
    "type-1": lambda m, d: kfac(m, d, fisher="type-1"),
    "forward-only": lambda m, d: kfac(m, d, fisher="forward-only"),
    "reduce": lambda m, d: kfac(m, d, fisher="type-2", sharing="reduce"),
    "one vector at a time": lambda m, d: kfac(m, d, fisher="type-2", memory=0),
    "ignored targets": with_ignored_targets,
    "EKFAC": lambda m, d: corrected(m, d, fxkfac.ekfac),
    "KFOC": lambda m, d: corrected(m, d, fxkfac.kfoc),
    "step": step,
    "optimizer": optimized,
    "optimizer, EKFAC": lambda m, d: optimized(m, d, ekfac=True, damp="block"),
    "preconditioner": preconditioned,
    "influence": influence,
    "Laplace": laplace,
    "operators": products,
}


@cache
def on_the_cpu(name: str) -> dict[str, Tensor]:
    return CAPABILITIES[name](network(), digits_like())


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], device: str, tolerance: float = 1e-9
) -> None:
    assert found.keys() == expected.keys()
    for key, t in found.items():
        assert t.device.type == device, key
        scale = max(expected[key].abs().max().item(), 1e-12)
        error = (t.cpu() - expected[key]).abs().max().item() / scale
        assert error < tolerance, (key, error)
