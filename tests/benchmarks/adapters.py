"""The other libraries' own ways to the factors; each is imported by its adapter alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hooks import draw
from benchmarks.interface import Factors, Prepared
from benchmarks.problems import Problem

SEEDS = itertools.count(1)


def curvlinops_factors(problem: Problem, flavour: str) -> Prepared:
    """By `KFACLinearOperator`, without the inverses."""
    from curvlinops import KFACLinearOperator

    def call() -> Any:
        operator = KFACLinearOperator(
            problem.model,
            problem.loss,
            problem.params,
            problem.batches,
            check_deterministic=False,
            seed=next(SEEDS),
            fisher_type=flavour,
            num_data=problem.n,
            num_per_example_loss_terms=problem.terms // problem.n,
            separate_weight_and_bias=not problem.joint,
        )
        operator.compute_kronecker_factors()
        return operator._input_covariances, operator._gradient_covariances

    def read(result: Any) -> Factors:
        return {name: (result[0][name], result[1][name]) for name in problem.layers}

    return Prepared(call, read)


def backpack_factors(problem: Problem, flavour: str) -> Prepared:
    """By the extensions KFAC and KFLR of a backward pass."""
    from backpack import backpack, extend
    from backpack.extensions import KFAC, KFLR

    model, loss = extend(problem.model), extend(deepcopy(problem.loss))
    extension = KFAC(mc_samples=1) if flavour == "mc" else KFLR()
    field = extension.savefield

    def call() -> Any:
        total: dict[str, list[Tensor]] = {}
        for x, y in problem.batches:
            with backpack(extension):
                loss(model(x), y).backward()
            for name, layer in problem.layers.items():
                share = len(x) / problem.n
                parts = [share * factor for factor in getattr(layer.weight, field)]
                total[name] = (
                    [a + b for a, b in zip(total[name], parts, strict=True)]
                    if (name in total)
                    else parts
                )
            _forget(problem.params, field)
        return total

    return Prepared(call, lambda total: {name: (A, B) for name, (B, A) in total.items()})


def _forget(params: list[Tensor], field: str) -> None:
    for param in params:
        param.grad = None
        delattr(param, field)


class _Counted(torch.utils.data.Sampler):
    """Numbers of batches; its length is the number of data."""

    def __init__(self, batches: int, data: int) -> None:
        self.batches, self.data = batches, data

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.batches))

    def __len__(self) -> int:
        return self.data


def nngeometry_factors(problem: Problem, flavour: str) -> Prepared:
    """By `PMatKFAC`."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    model, layers = problem.model, LayerCollection()
    for layer in problem.layers.values():
        layers.add_layer_from_model(model, layer)
    loader = torch.utils.data.DataLoader(
        problem.batches, batch_size=None, sampler=_Counted(len(problem.batches), problem.n)
    )

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none").view(len(x), -1).sum(1)

    def call() -> Any:
        if flavour == "empirical":
            backend = TorchHooksJacobianBackend(model, losses, layer_collection=layers)
            return PMatKFAC(generator=backend, examples=loader)
        function = FIM_MonteCarlo if flavour == "mc" else FIM
        return function(model, loader, PMatKFAC, layer_collection=layers)

    return Prepared(call, lambda result: {name: result.data[name] for name in problem.layers})


def kronfluence_factors(problem: Problem, flavour: str) -> Prepared:
    """By `fit_covariance_matrices_with_loader`."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    names = list(problem.layers)

    class Fit(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            y = draw(logits) if sample else batch[1]
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    task = Fit()
    model = prepare_model(problem.model, task)
    arguments = FactorArguments(use_empirical_fisher=flavour == "empirical")
    state = State(cpu=problem.batches[0][0].device.type == "cpu")

    def call() -> Any:
        _, sums = fit_covariance_matrices_with_loader(
            model, state, task, problem.batches, arguments, names, disable_tqdm=True
        )
        return sums

    def read(sums: Any) -> Factors:
        a, b = sums["activation_covariance"], sums["gradient_covariance"]
        rows = sums["num_gradient_covariance_processed"]
        return {name: (a[name] / problem.terms, b[name] / rows[name]) for name in names}

    return Prepared(call, read)


def asdl_factors(problem: Problem, flavour: str) -> Prepared:
    """By a Fisher maker, with the shape `kron`."""
    from asdl import FisherConfig, get_fisher_maker

    kind = {"mc": "fisher_mc", "empirical": "fisher_emp", "type-2": "fisher_exact"}[flavour]
    norms = [nn.BatchNorm2d, nn.LayerNorm, nn.Embedding]
    config = FisherConfig(
        kind, ["kron"], "cross_entropy", ignore_modules=norms, data_size=problem.terms
    )
    maker = get_fisher_maker(problem.model, config)

    def call() -> Any:
        for number, (x, y) in enumerate(problem.batches):
            output = maker.setup_model_call(problem.model, x)
            maker.setup_logits_repr(output.movedim(1, -1))
            maker.setup_loss_call(F.cross_entropy, output, y, reduction="sum")
            maker.forward_and_backward(accumulate=number > 0)
        problem.model.zero_grad(set_to_none=True)
        factors = {name: layer.fisher.kron for name, layer in problem.layers.items()}
        maker.zero_fisher()  # or they are held until the next call, and count as held before it
        return factors

    return Prepared(call, lambda result: {name: (k.A, k.B) for name, k in result.items()})
