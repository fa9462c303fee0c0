"""The optimizer and the preconditioner: every formula against one written out here, in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxkfac
from fxkfac import Program
from fxkfac.errors import (
    DataError,
    FxkfacError,
    MergeError,
    NonFiniteError,
    OptionError,
    ParameterError,
    UnknownParameter,
    UnsupportedUse,
)
from fxkfac.optim import KFAC, Preconditioner
from fxkfac.optim.basis import Basis
from fxkfac.optim.policies import kl_factor, next_damping, predicted_change

MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
Gradients = dict[str, Tensor]


def mlp(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).double()


def batch(seed: int = 1, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def values(model: nn.Module) -> Gradients:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(found: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        error = (found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-300)
        assert error < tolerance, f"{name}: {error:.1e}"


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# --- what a step is ---


def test_one_step_lands_on_the_minimum_of_least_squares() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, MSE, lr=1.0, momentum=0.0, fisher="type-2", damping=1e-13)
    optimizer.step(x, y)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), y).solution
    assert_close(values(model), {"weight": best[:4].T, "bias": best[4]}, 1e-5)


def test_a_step_in_a_deep_linear_net_solves_the_exact_blocks() -> None:
    """There the factors are the GGN's own blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    before, expected = values(model), {}
    loss = MSE(model(x), y)
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    for k in ("0", "1"):
        names = [f"{k}.weight", f"{k}.bias"]
        block = fxkfac.exact.ggn(model, MSE, (x, y), names)
        flat = torch.cat([gradients[n].flatten() for n in names])
        step = torch.linalg.solve(block + 1e-2 * torch.eye(len(block)).double(), flat)
        parts = step.split([before[n].numel() for n in names])
        expected |= {
            n: before[n] - 0.5 * s.view_as(before[n]) for n, s in zip(names, parts, strict=True)
        }
    program = fxkfac.trace(model, x)
    optimizer = KFAC(
        program, MSE, lr=0.5, momentum=0.0, fisher="type-2", damping=1e-2, damp="block"
    )
    found = optimizer.step(x, y)
    assert torch.allclose(found, loss, rtol=1e-12)
    assert_close(values(model), expected)


def test_a_function_of_nested_parameters_is_trained_in_place() -> None:
    torch.manual_seed(0)
    params = {
        "hidden": {"W": torch.randn(4, 5).double(), "b": torch.zeros(5).double()},
        "head": [torch.randn(3, 5).double()],
    }

    def model(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["hidden"]["W"] + p["hidden"]["b"]) @ p["head"][0].T

    x, y = batch()
    program = fxkfac.trace(model, x, params)
    generator = torch.Generator().manual_seed(3)
    expected = fxkfac.step(program, CE, (x, y), generator=generator)
    natural = expected.factors.solve(expected.gradients, 1e-2)
    W, head = params["hidden"]["W"].clone(), params["head"][0].clone()
    options = {"generator": torch.Generator().manual_seed(3), "damping": 1e-2, "damp": "block"}
    KFAC(program, CE, lr=0.1, **options).step(x, y)
    assert torch.allclose(params["hidden"]["W"], W - 0.1 * natural["hidden.W"], rtol=1e-12)
    assert torch.allclose(params["head"][0], head - 0.1 * natural["head.0"], rtol=1e-12)


def test_training_a_net_fits_it() -> None:
    model, (x, y) = mlp(), batch(n=64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.3, damping=1e-2, kl_clip=1e-1)
    losses = [optimizer.step(x, y).item() for _ in range(60)]
    assert losses[0] > 0.8
    assert losses[-1] < 0.05


# --- the preconditioner ---


@pytest.mark.parametrize(
    "structure",
    [{}, {"0.weight": "dense", "3.bias": "diagonal"}, {"*": "diagonal"}],
    ids=["kronecker", "mixed", "diagonal"],
)
def test_solve_is_that_of_the_factors(structure: dict[str, str]) -> None:
    model, (x, y) = mlp(), batch()
    program = fxkfac.trace(model, x, structure=structure)
    found = fxkfac.step(program, CE, (x, y), fisher="type-2")
    p = Preconditioner(program, CE, damping=1e-2, damp="block", fisher="type-2")
    p.update(x, y)
    assert_close(p.solve(found.gradients), found.factors.solve(found.gradients, 1e-2))


def test_split_damping_has_room_for_factors_of_very_different_size() -> None:
    """π is a number that float32 holds; its square is none."""
    Q = torch.eye(3).unsqueeze(0)
    λ, μ = torch.tensor([[1e21, 2e21, 3e21]]), torch.tensor([[3e-20, 1e-20, 2e-20]])
    found = Basis(Q, Q, λ, μ).inverses(0.1)
    exact = Basis(Q.double(), Q.double(), λ.double(), μ.double()).inverses(0.1)
    torch.testing.assert_close(found.left.double(), exact.left, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.right.double(), exact.right, rtol=1e-5, atol=0)


def test_split_damping_is_that_of_martens_and_grosse_and_may_change_at_any_step() -> None:
    model, (x, y) = mlp(), batch()
    program = fxkfac.trace(model, x)
    found = fxkfac.step(program, CE, (x, y), fisher="type-2")
    p = Preconditioner(program, CE, fisher="type-2")
    p.update(x, y)
    for λ in (1e-2, 1e-4):
        p.damping, expected = λ, {}
        for k in ("0", "3"):
            A, B = found.factors[f"{k}.weight"].A, found.factors[f"{k}.weight"].B
            π = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
            A = A + π * λ**0.5 * torch.eye(len(A)).double()
            B = B + λ**0.5 / π * torch.eye(len(B)).double()
            W, b = found.gradients[f"{k}.weight"], found.gradients[f"{k}.bias"]
            step = torch.linalg.inv(B) @ torch.cat([W, b.unsqueeze(1)], 1) @ torch.linalg.inv(A)
            expected |= {f"{k}.weight": step[:, :-1], f"{k}.bias": step[:, -1]}
        assert_close(p.solve(found.gradients), expected)


class Tied(nn.Module):
    """An embedding that is the head as well: a sum of two Kronecker products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.table[tokens]) @ self.table.T


@pytest.mark.parametrize(("damp", "of_factors"), [("split", "factors"), ("block", "block")])
def test_sums_of_two_products_are_inverted_exactly(damp: str, of_factors: str) -> None:
    torch.manual_seed(0)
    model, x, y = Tied().double(), torch.randint(6, (9,)), torch.randint(6, (9,))
    program = fxkfac.trace(model, x)
    found = fxkfac.step(program, CE, (x, y), fisher="type-2")
    p = Preconditioner(program, CE, damping=1e-2, damp=damp, fisher="type-2")
    p.update(x, y)
    expected = found.factors.solve(found.gradients, 1e-2, damp=of_factors)
    assert_close(p.solve(found.gradients), expected)


def test_a_tied_head_with_a_bias_is_inverted_where_the_bias_is_apart() -> None:
    """Joined, its product has entries that the embedding's has not; the error says what to do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 100), nn.Tanh(), nn.Linear(100, 200))
    model[2].weight = model[0].weight
    x = torch.randint(200, (9,))
    program = fxkfac.trace(model, x)
    with pytest.raises(OptionError, match="by separate_weight_and_bias=True"):
        fxkfac.optim.KFAC(program, CE, lr=0.1).step(x, x)
    optimizer = fxkfac.optim.KFAC(program, CE, lr=0.1, separate_weight_and_bias=True)
    optimizer.step(x, x)
    assert optimizer.preconditioner.bases["0.weight"].left.shape == (1, 200, 200)


def test_the_diagonal_factor_of_an_embedding_is_never_written_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randint(7, (12,)), torch.randint(3, (12,))
    program = fxkfac.trace(model, x)
    found = fxkfac.step(program, CE, (x, y), fisher="type-2")
    p = Preconditioner(program, CE, damping=1e-2, damp="block", fisher="type-2")
    p.update(x, y)
    assert p.bases["0.weight"].left is None
    assert_close(p.solve(found.gradients), found.factors.solve(found.gradients, 1e-2))


def test_groups_and_images_are_solved_like_their_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)
    ).double()
    x, y = torch.randn(8, 4, 3, 3).double(), torch.randint(3, (8,))
    program = fxkfac.trace(model, x)
    found = fxkfac.step(program, CE, (x, y), fisher="type-2")
    p = Preconditioner(program, CE, damping=1e-2, damp="block", fisher="type-2")
    p.update(x, y)
    assert len(p.bases["0.weight"].left) == 2
    assert_close(p.solve(found.gradients), found.factors.solve(found.gradients, 1e-2))


def _flipped(p: Any, x: Tensor) -> Tensor:
    return x @ p["W"].flip(0)


def _joined(p: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, torch.cat([p["Q"], p["K"]]), p["b"])


LAID_OUT: dict[str, tuple[Any, Any, Tensor, bool]] = {  # model, parameters, inputs, is a box
    "linear": (nn.Linear(4, 3), None, torch.randn(5, 4), True),
    "separate": (nn.Linear(4, 3, bias=False), None, torch.randn(5, 4), True),
    "groups": (nn.Conv1d(4, 6, 3, groups=2), None, torch.randn(5, 4, 3), True),
    "transposed": (nn.ConvTranspose2d(2, 3, 2), None, torch.randn(5, 2, 3, 3), True),
    "joined": (
        _joined,
        {"Q": torch.randn(3, 4), "K": torch.randn(2, 4), "b": torch.randn(5)},
        torch.randn(5, 4),
        True,
    ),
    "flipped": (_flipped, {"W": torch.randn(4, 3)}, torch.randn(5, 4), False),
    "a part": (lambda p, x: x @ p["W"][:, :2], {"W": torch.randn(4, 3)}, torch.randn(5, 4), False),
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_a_block_reads_gradients_by_its_table_with_or_without_strides(case: str) -> None:
    model, params, x, is_box = LAID_OUT[case]
    program = fxkfac.trace(model, x, params)
    layout, *_ = Preconditioner(program, MSE)._layouts.values()
    assert (layout.boxes is not None) == is_box
    gradients = {n: torch.randn(s) for n, s in zip(layout.params, layout.shapes, strict=True)}
    flat = torch.cat([g.flatten() for g in gradients.values()])
    found = layout.matrix(
        {n: g.mT.clone().mT if g.ndim > 1 else g for n, g in gradients.items()}, torch.float64
    )
    assert torch.equal(found, flat[layout.entries].double())
    back = layout.parameters(found.float(), gradients, damping=0.5)
    inside = torch.zeros(len(flat)).index_fill(0, layout.entries.flatten(), 1.0)
    expected = torch.where(inside > 0, flat, flat / 0.5)
    assert torch.equal(torch.cat([g.flatten() for g in back.values()]), expected)


linear, conv1d = nn.functional.linear, nn.functional.conv1d
SHARED: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {  # model, shapes of its parameters
    "twice": (lambda p, x: x @ torch.cat([p["W"], p["W"]], 1), {"W": (4, 3)}),
    "one kernel": (
        lambda p, x: conv1d(x.unsqueeze(1), p["W"].expand(6, 1, 4)).flatten(1),
        {"W": (1, 1, 4)},
    ),
    "its own bias": (lambda p, x: linear(x, p["W"], p["W"][:, 0]), {"W": (6, 4)}),
    "diagonals": (lambda p, x: x @ p["W"].as_strided((4, 6), (1, 1)), {"W": (9,)}),
    "a part": (lambda p, x: x @ p["W"][:4], {"W": (7, 6)}),
    "parts": (lambda p, x: x @ p["W"][:4] + x[:, :3] @ p["W"][4:], {"W": (7, 6)}),
}


@pytest.mark.parametrize("damp", ["split", "block"])
@pytest.mark.parametrize("case", SHARED)
def test_entries_that_come_twice_or_never_are_solved_as_those_of_the_block(
    case: str, damp: str
) -> None:
    torch.manual_seed(0)
    model, shapes = SHARED[case]
    params = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    x, y = torch.randn(10, 4).double(), torch.randn(10, 6).double()
    program = fxkfac.trace(model, x, params)
    gradients = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    p = Preconditioner(program, MSE, damping=0.1, damp=damp, fisher="type-2")
    p.update(x, y)
    factors = fxkfac.kfac(program, MSE, (x, y))
    if damp == "split" and case == "a part":
        expected = factors.solve(gradients, 0.1, damp="pi")
    else:
        C = factors.dense() + 0.1 * torch.eye(params["W"].numel()).double()
        expected = {"W": torch.linalg.solve(C, gradients["W"].flatten()).view(shapes["W"])}
    assert_close(p.solve(gradients), expected)


def test_averages_have_their_bias_corrected() -> None:
    model, data = mlp(), [batch(k) for k in range(3)]
    program = fxkfac.trace(model, data[0][0])
    p = Preconditioner(program, CE, decay=0.9, fisher="type-2")
    for x, y in data:
        p.update(x, y)
    weights = torch.tensor([0.81, 0.9, 1.0]).double()
    for name in ("0.weight", "3.weight"):
        for what in ("A", "B"):
            of_batch = [getattr(fxkfac.kfac(program, CE, d)[name], what) for d in data]
            expected = sum(w * m for w, m in zip(weights, of_batch, strict=True)) / weights.sum()
            assert torch.allclose(getattr(p.average[name], what), expected, rtol=1e-12)


def test_the_eigenbasis_mode_divides_by_second_moments() -> None:
    model, data = mlp(), [batch(k) for k in range(3)]
    program = fxkfac.trace(model, data[0][0])
    options = {"damping": 1e-2, "damp": "block", "decay": 0.7, "fisher": "type-2"}
    p = Preconditioner(program, CE, ekfac=True, inverse_interval=2, **options)
    matrix = None  # the matrix that the basis and the moments stand for
    for k, (x, y) in enumerate(data):
        found = fxkfac.step(program, CE, (x, y), fisher="type-2")
        p.update(x, y)
        solved = p.solve(found.gradients)
        basis = p.bases["3.weight"]
        Q = torch.kron(basis.right[0], basis.left[0])  # (W b) row by row
        W, b = found.gradients["3.weight"], found.gradients["3.bias"]
        g = torch.cat([W, b.unsqueeze(1)], 1).flatten()
        if k == 0:
            A, B = p.average["3.weight"].A, p.average["3.weight"].B
            matrix = torch.kron(B, A)
        s = (Q.T @ matrix @ Q).diagonal()  # in a new basis: the diagonal of what it was
        s = 0.7 * s + 0.3 * (Q.T @ g).square() / (1 / len(x))
        matrix = Q @ torch.diag(s) @ Q.T
        expected = Q @ ((Q.T @ g) / (s + 1e-2))
        step = torch.cat([solved["3.weight"], solved["3.bias"].unsqueeze(1)], 1).flatten()
        assert torch.allclose(step, expected, rtol=1e-9)


def test_precondition_replaces_the_gradients_there_are() -> None:
    model, (x, y) = mlp(), batch()
    program = fxkfac.trace(model, x, structure={"3.*": "skip"})
    p = Preconditioner(program, CE, fisher="type-2")
    CE(model(x), y).backward()
    p.update(x, y)
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = {name: g.clone() for name, g in held.items()}
    expected = p.solve(before)
    p.precondition()
    for name, parameter in model.named_parameters():
        assert parameter.grad is held[name]
    assert_equal(held, expected)
    assert torch.equal(held["3.weight"], before["3.weight"])
    assert not torch.equal(held["0.weight"], before["0.weight"])
    model[0].bias.grad = None
    with pytest.raises(UnknownParameter, match=r"0\.bias"):
        p.precondition()


def test_factors_and_decompositions_come_at_their_intervals() -> None:
    model, (x, y) = mlp(), batch()
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, CE, lr=0.01, factor_interval=2, inverse_interval=3)
    p, updates, bases = optimizer.preconditioner, [], []
    for _ in range(7):
        optimizer.step(x, y)
        updates.append(p.average.updates["A"])
        bases.append(p.bases["0.weight"])
    new_bases = [k for k in range(7) if k == 0 or bases[k] is not bases[k - 1]]
    assert updates == [1, 1, 2, 2, 3, 3, 4]  # at steps 0, 2, 4 and 6
    assert new_bases == [0, 3, 6]


def test_a_step_without_factors_has_the_same_loss_and_gradients() -> None:
    runs = []
    for interval in (1, 5):
        model, (x, y) = mlp(dropout=0.3), batch()
        generator = torch.Generator().manual_seed(0)
        optimizer = KFAC(
            fxkfac.trace(model, x), CE, lr=0.0, factor_interval=interval, generator=generator
        )
        optimizer.step(x, y)
        generator.manual_seed(7)
        runs.append((optimizer.step(x, y), optimizer))
    assert torch.allclose(runs[0][0], runs[1][0], rtol=1e-12)
    moved = [torch.cat([s["momentum"].flatten() for s in o.state.values()]) for _, o in runs]
    assert moved[0].norm() > 0


# --- options of the optimizer, against a step written out ---


class Reference:
    """KFAC with exact damping of a batch's own factors."""

    def __init__(self, model: nn.Module, program: fxkfac.Program, momentum: float):
        self.model, self.program, self.momentum = model, program, momentum
        self.moved: Gradients = {}

    def step(
        self,
        data: Any,
        lr: Callable[[str], float],
        change: Callable[[Gradients], Gradients] = lambda g: g,
        decay: Callable[[str], float] = lambda name: 0.0,
        scale: Callable[[Gradients, Gradients], float] = lambda v, g: 1.0,
    ) -> None:
        found = fxkfac.step(self.program, CE, data, fisher="type-2")
        gradients = change(found.gradients)
        natural = found.factors.solve(gradients, 1e-2)
        ν = scale(natural, gradients)
        with torch.no_grad():
            for name, θ in self.model.named_parameters():
                self.moved[name] = self.momentum * self.moved.get(name, 0) + ν * natural[name]
                θ.copy_((1 - lr(name) * decay(name)) * θ - lr(name) * self.moved[name])


OPTIONS: dict[str, Any] = {
    "damping": 1e-2,
    "damp": "block",
    "decay": 0.0,
    "inverse_interval": 1,
    "fisher": "type-2",
}


def pair(**options: Any) -> tuple[nn.Module, KFAC, Reference]:
    model, twin = mlp(), mlp()
    x, _ = batch()
    optimizer = KFAC(fxkfac.trace(model, x), CE, **{"lr": 0.1, **OPTIONS, **options})
    return model, optimizer, Reference(twin, fxkfac.trace(twin, x), options.get("momentum", 0.9))


def test_momentum_groups_and_a_scheduler() -> None:
    groups = [{"params": "*.bias", "lr": 0.05, "weight_decay": 0.1}]
    model, optimizer, reference = pair(momentum=0.5, groups=groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for k in range(3):
        optimizer.step(*batch(k))
        schedule.step()
        reference.step(
            batch(k),
            lambda name, k=k: (0.05 if "bias" in name else 0.1) * 0.5**k,
            decay=lambda name: 0.1 if "bias" in name else 0.0,
        )
    assert_close(values(model), values(reference.model))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05 / 8, 0.1 / 8]


def test_weight_decay_that_is_not_decoupled_is_part_of_the_gradient() -> None:
    model, optimizer, reference = pair(weight_decay=0.3, decoupled=False)

    def with_decay(gradients: Gradients) -> Gradients:
        held = dict(reference.model.named_parameters())
        return {name: g + 0.3 * held[name].detach() for name, g in gradients.items()}

    for k in range(2):
        optimizer.step(*batch(k))
        reference.step(batch(k), lambda name: 0.1, with_decay)
    assert_close(values(model), values(reference.model))


def test_gradients_are_clipped_as_by_torch() -> None:
    model, optimizer, reference = pair(max_norm=0.05)

    def clip(gradients: Gradients) -> Gradients:
        leaves = [nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
        for leaf, g in zip(leaves, gradients.values(), strict=True):
            leaf.grad = g.clone()
        norm = nn.utils.clip_grad_norm_(leaves, 0.05)
        assert norm > 0.05
        return {name: leaf.grad for name, leaf in zip(gradients, leaves, strict=True)}

    optimizer.step(*batch())
    reference.step(batch(), lambda name: 0.1, clip)
    assert_close(values(model), values(reference.model))


@pytest.mark.parametrize("κ", [1e-4, 1e4])
def test_natural_gradients_are_clipped_by_the_divergence(κ: float) -> None:
    groups = [{"params": "0.*", "lr": 0.2}]
    model, optimizer, reference = pair(kl_clip=κ, groups=groups)

    def lr(name: str) -> float:
        return 0.2 if name.startswith("0") else 0.1

    def scale(natural: Gradients, gradients: Gradients) -> float:
        total = sum(lr(n) ** 2 * (natural[n] * gradients[n]).sum() for n in natural)
        return min(1.0, float((κ / total) ** 0.5))

    optimizer.step(*batch())
    reference.step(batch(), lr, scale=scale)
    assert_close(values(model), values(reference.model))


@pytest.mark.parametrize("seed", range(4))
def test_a_bias_that_goes_against_its_gradient_takes_from_the_divergence(seed: int) -> None:
    """vᵀg is positive for a block; for one of its parameters it may not be."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4).double() + 1, torch.randint(3, (6,))
    program = fxkfac.trace(model, x)
    options = {"damping": 0.01, "damp": "block", "fisher": "type-2", "decay": 0.0}
    optimizer = KFAC(program, CE, lr=0.5, momentum=0.0, kl_clip=1e-3, **options)
    before = values(model)
    g = dict(
        zip(before, torch.autograd.grad(CE(model(x), y), list(model.parameters())), strict=True)
    )
    v = fxkfac.kfac(program, CE, (x, y)).solve(g, 0.01)
    ν = (1e-3 / (0.25 * sum((v[n] * g[n]).sum() for n in g))) ** 0.5
    optimizer.step(x, y)
    assert_close(values(model), {n: before[n] - 0.5 * ν * v[n] for n in g})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_kl_divergence_that_half_precision_does_not_hold_is_clipped(dtype: torch.dtype) -> None:
    small = torch.full((4, 25), 2.0**-10, dtype=dtype)
    total = (1e-3 * 2.0**-10) ** 2 * 200
    found = kl_factor([(1e-3, small, small), (1e-3, small, small)], total / 100)
    assert float(found) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("v", "g"), [(1e21, 1e18), (1e-25, 1e-20), (0.0, 1e-20), (0.0, 0.0)])
def test_a_kl_divergence_that_single_precision_does_not_hold_is_clipped(v: float, g: float) -> None:
    steps = [(0.1, torch.tensor([v]), torch.tensor([g])), (0.1, torch.ones(0), torch.ones(0))]
    expected = min(1.0, (1e-3 / (0.1**2 * v * g)) ** 0.5) if v else 1.0
    assert float(kl_factor(steps, 1e-3)) == pytest.approx(expected, rel=1e-6, abs=0.0)


def test_a_kl_divergence_of_parameters_of_very_different_size_is_clipped() -> None:
    steps = [(1.0, torch.tensor([v]), torch.tensor([1 / v])) for v in (1e30, 1e-25)]
    assert float(kl_factor(steps, 1e-3)) == pytest.approx((1e-3 / 2) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_that_half_precision_does_not_hold_is_foretold(dtype: torch.dtype) -> None:
    def foretold(dtype: torch.dtype) -> float:
        model = nn.Linear(4, 3, bias=False).to(dtype)
        nn.init.constant_(model.weight, 0.25)
        data = torch.full((6, 4), 0.5, dtype=dtype), torch.full((6, 3), 0.53125, dtype=dtype)
        before = {"weight": model.weight.detach()}
        step = {"weight": torch.full((3, 4), 2.0**-13, dtype=dtype)}
        (slope,) = torch.autograd.grad(MSE(model(data[0]), data[1]), [model.weight])
        program = fxkfac.trace(model, data[0])
        return predicted_change(program.model, MSE, data, before, {"weight": slope}, step)

    assert foretold(dtype) == pytest.approx(foretold(torch.float64), rel=1e-2)


def test_several_batches_are_one() -> None:
    (x, y), runs = batch(n=12), []
    for data in (
        [(x, y)],
        [(x[:2], y[:2]), (x[2:], y[2:])],
        iter([(x[:9], y[:9]), (x[9:], y[9:])]),
    ):
        model = mlp()
        optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1, **OPTIONS)
        loss = optimizer.step(data)
        runs.append({**values(model), "loss": loss})
    assert_close(runs[1], runs[0])
    assert_close(runs[2], runs[0])


@pytest.mark.parametrize("structure", ["skip", "identity"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_without_curvature_it_is_adam(structure: str, decoupled: bool) -> None:
    model, twin = mlp(), mlp()
    program = fxkfac.trace(model, batch()[0], structure={"*": structure})
    common = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = KFAC(program, CE, lr=1.0, adam_lr=0.02, decoupled=decoupled, **common)
    adam = torch.optim.Adam(twin.parameters(), lr=0.02, decoupled_weight_decay=decoupled, **common)
    for k in range(4):
        x, y = batch(k)
        optimizer.step(x, y)
        adam.zero_grad()
        CE(twin(x), y).backward()
        adam.step()
    assert_close(values(model), values(twin), 1e-12)


def test_each_parameter_has_its_method() -> None:
    model, (x, _) = mlp(), batch()
    program = fxkfac.trace(model, x, structure={"3.weight": "skip"})
    groups = [{"params": ["0.*"], "lr": 0.3}]
    optimizer = KFAC(program, CE, lr=0.1, adam_lr=0.01, groups=groups)
    found = [(g["method"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    assert found == [
        ("kfac", 0.3, ["0.weight", "0.bias"]),
        ("kfac", 0.1, ["3.bias"]),
        ("adam", 0.01, ["3.weight"]),
    ]


def test_parameters_of_a_derived_weight_have_adam() -> None:
    torch.manual_seed(0)
    params = {"U": torch.randn(4, 1).double(), "V": torch.randn(1, 3).double()}

    def model(p: Any, x: Tensor) -> Tensor:
        return x @ (p["U"] @ p["V"])

    x, y = batch()
    program = fxkfac.trace(model, x, params, structure={"*": "derived"})
    optimizer = KFAC(program, CE, lr=0.1)
    assert [g["method"] for g in optimizer.param_groups] == ["adam"]
    before = params["U"].clone()
    optimizer.step(x, y)
    assert not torch.equal(before, params["U"])


@pytest.mark.parametrize("separate", [False, True])
def test_a_bias_that_has_joined_a_derived_weight_goes_with_it(separate: bool) -> None:
    params = {"W": torch.ones(3, 4).double(), "b": torch.ones(3).double()}
    program = fxkfac.trace(
        lambda p, x: nn.functional.linear(x, p["W"].exp(), p["b"]),
        batch()[0],
        params,
        structure={"W": "derived"},
    )
    optimizer = KFAC(program, CE, lr=0.1, separate_weight_and_bias=separate)
    methods = {name: g["method"] for g in optimizer.param_groups for name in g["param_names"]}
    assert methods == {"W": "adam", "b": "kfac" if separate else "adam"}


# --- damping that adapts ---


def test_damping_falls_where_the_quadratic_model_is_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, MSE, lr=0.5, momentum=0.0, damping=0.1, lm_interval=5)
    seen = []
    for _ in range(11):
        optimizer.step(x, y)
        seen.append(optimizer.preconditioner.damping)
    assert seen[:4] == [0.1] * 4
    assert seen[4] == pytest.approx(0.1 * (19 / 20) ** 5)
    assert seen[9] == pytest.approx(0.1 * (19 / 20) ** 10)


def test_damping_rises_where_a_step_is_too_long() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, MSE, lr=5.0, momentum=0.0, damping=0.1, lm_interval=1)
    optimizer.step(x, y)
    assert optimizer.preconditioner.damping == pytest.approx(0.1 / (19 / 20))


def test_a_step_to_nowhere_is_a_bad_one_and_the_next_one_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = 100 * torch.randn(20, 4).double(), 100 * torch.randn(20, 3).double()
    optimizer = KFAC(fxkfac.trace(model, x), MSE, lr=1e307, damping=0.1, lm_interval=1)
    optimizer.step(x, y)
    assert optimizer.preconditioner.damping == pytest.approx(0.1 / (19 / 20))
    before = values(model)
    with pytest.raises(NonFiniteError, match="the prediction"):
        optimizer.step(x, y)
    assert_equal(values(model), before)


def test_the_prediction_of_the_quadratic_model_is_exact_for_least_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    params = {"a": {"W": torch.randn(4, 3).double()}}
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    program = fxkfac.trace(lambda p, x: x @ p["a"]["W"], x, params)
    seen = []
    monkeypatch.setattr(
        "fxkfac.optim.optimizer.next_damping",
        lambda damping, actual, predicted, interval: seen.append((actual, predicted)) or damping,
    )
    optimizer = KFAC(program, MSE, lr=0.7, lm_interval=1, max_norm=0.1)
    optimizer.step([(x[:5], y[:5]), (x[5:], y[5:])])
    ((actual, predicted),) = seen
    assert actual < 0
    assert actual == pytest.approx(predicted, rel=1e-10)


def lengths_and_options() -> tuple[Any, Any]:
    def model(p: Any, x: Tensor, scale: float) -> Tensor:
        return scale * (x @ p["W"]).mean(0)

    sizes = [(7, 6, 1.0), (5, 4, 2.0)]
    data = [((torch.randn(T, n, 4).double(), s), torch.randn(n, 3).double()) for T, n, s in sizes]
    params = {"W": torch.randn(4, 3).double()}
    return fxkfac.trace(model, data[0][0], params, batch_axis=(1, None)), data


def statistics_of_a_batch() -> tuple[Any, Any]:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).double()
    data = [(k + torch.randn(5, 4).double(), torch.randn(5, 3).double()) for k in range(2)]
    return fxkfac.trace(model, data[0][0]), data


@pytest.mark.parametrize("case", [lengths_and_options, statistics_of_a_batch])
def test_the_quadratic_model_is_of_batches_as_they_come(
    monkeypatch: pytest.MonkeyPatch, case: Callable[[], tuple[Any, Any]]
) -> None:
    torch.manual_seed(0)
    program, data = case()
    seen = []
    monkeypatch.setattr(
        "fxkfac.optim.optimizer.next_damping",
        lambda damping, actual, predicted, interval: seen.append((actual, predicted)) or damping,
    )
    KFAC(program, MSE, lr=0.7, lm_interval=1, max_norm=0.1).step(data)
    ((actual, predicted),) = seen
    assert actual == pytest.approx(predicted, rel=1e-10)


def test_the_quadratic_model_is_of_all_batches_of_which_some_have_no_labels() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(6, 3).double()
    y = torch.tensor([-100, -100, -100, 0, 1, 2])
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1, lm_interval=5)
    optimizer.step([(x[:3], y[:3]), (x[3:], y[3:])])
    assert optimizer.preconditioner.steps == 1


def test_a_model_without_a_quadratic_one_is_refused_before_anything_moves() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)).double()
    x, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1, lm_interval=5)
    before = values(model)
    with pytest.raises(UnsupportedUse, match=r"_embedding_bag_backward.* in the place of"):
        optimizer.step(x, y)
    assert_equal(values(model), before)
    assert optimizer.preconditioner.steps == 0


def test_losses_and_quadratic_model_are_under_one_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    seen = []
    monkeypatch.setattr(
        "fxkfac.optim.optimizer.next_damping",
        lambda damping, actual, predicted, interval: seen.append((actual, predicted)) or damping,
    )
    optimizer = KFAC(fxkfac.trace(model, x), MSE, lr=0.7, lm_interval=1, max_norm=0.1)
    for _ in range(3):
        optimizer.step(x, y)
    for actual, predicted in seen:
        assert actual < 0
        assert actual == pytest.approx(predicted, rel=1e-10)


@pytest.mark.parametrize(
    ("actual", "predicted", "factor"),
    [(-0.9, -1.0, 0.9025), (-0.5, -1.0, 1.0), (-0.1, -1.0, 1 / 0.9025), (0.1, 0.1, 1 / 0.9025)],
)
def test_damping_by_the_reduction_ratio(actual: float, predicted: float, factor: float) -> None:
    assert next_damping(2.0, actual, predicted, 2) == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_loss_with_other_options_is_refused_until_an_optimizer_is_made_with_it(
    interval: int,
) -> None:
    model, (x, y), loss = mlp(), batch(), nn.CrossEntropyLoss(label_smoothing=0.1)
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, loss, lr=0.1, factor_interval=interval)
    optimizer.step(x, y)
    loss.label_smoothing = 0.0
    before = values(model)
    with pytest.raises(MergeError, match=r"smoothing=0\.0.* now, and was .*=0\.1.*; expected the"):
        optimizer.step(x, y)
    assert_equal(values(model), before)
    anew = KFAC(program, loss, lr=0.1, factor_interval=interval)
    anew.load_state_dict(optimizer.state_dict())
    expected = loss(model(x), y)
    torch.testing.assert_close(anew.step(x, y), expected.detach())


# --- state ---


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "mc", "factor_interval": 2, "inverse_interval": 3},
        {"damp": "block", "ekfac": True, "inverse_interval": 3, "lm_interval": 2},
        {"kl_clip": 1e-3, "weight_decay": 0.1, "groups": [{"params": "*.bias", "lr": 0.3}]},
    ],
    ids=["intervals", "eigenbasis", "groups"],
)
def test_a_state_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    structure = {"3.bias": "diagonal", "0.bias": "skip"}

    def start(model: nn.Module) -> KFAC:
        program = fxkfac.trace(model, batch()[0], structure=structure)
        generator = torch.Generator().manual_seed(5)
        return KFAC(program, CE, lr=0.1, generator=generator, **options)

    def train(optimizer: KFAC, steps: range) -> None:
        for k in steps:
            optimizer.step(*batch(k))

    model = mlp(dropout=0.2)
    optimizer = start(model)
    train(optimizer, range(4))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(optimizer, range(4, 9))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed_model = mlp(seed=9, dropout=0.2)
    resumed_model.load_state_dict(weights)
    resumed = start(resumed_model)
    resumed.load_state_dict(state)
    train(resumed, range(4, 9))
    assert_equal(values(resumed_model), values(model))
    assert resumed.preconditioner.damping == optimizer.preconditioner.damping


def test_a_state_of_before_the_first_step_can_be_loaded() -> None:
    model, twin = mlp(), mlp()
    first, second = (KFAC(fxkfac.trace(m, batch()[0]), CE, lr=0.1) for m in (model, twin))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step(*batch())
    second.step(*batch())
    assert_equal(values(model), values(twin))


def test_a_state_of_another_program_is_refused() -> None:
    x, y = batch()
    first = KFAC(fxkfac.trace(mlp(), x), CE, lr=0.1)
    first.step(x, y)
    other = KFAC(fxkfac.trace(mlp(), x, structure={"0.weight": "diagonal"}), CE, lr=0.1)
    with pytest.raises(OptionError, match=r"the state is of the blocks .*0\.bias"):
        other.load_state_dict(first.state_dict())


def test_nothing_else_of_the_users_changes() -> None:
    model, (x, _) = mlp(dropout=0.2), batch()
    model[0].bias.requires_grad_(False)
    program = fxkfac.trace(model, x, ["*"])
    model[3].weight.grad = torch.ones(3, 5).double()
    optimizer = KFAC(program, CE, lr=0.1, lm_interval=2, factor_interval=2)
    tensors, state = [id(p) for p in model.parameters()], torch.get_rng_state()
    drawn = program.generator.get_state()
    for k in range(4):
        optimizer.step(*batch(k))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(program.generator.get_state(), drawn)
    assert torch.equal(model[3].weight.grad, torch.ones(3, 5).double())
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.is_leaf for p in model.parameters())
    assert [id(p) for p in model.parameters()] == tensors
    assert model.training


def test_averages_of_batch_norm_follow_the_data() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    model, twin = net(), net()
    (x, y), (z, t) = batch(1), batch(2)
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.0)
    optimizer.step(x, y)
    optimizer.step([(z, t), (x, y)])
    with torch.no_grad():
        for data in (x, z, x):
            twin(data)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert torch.equal(model[1].running_var, twin[1].running_var)
    model.eval()
    fxkfac_step = KFAC(fxkfac.trace(model, x), CE, lr=0.0)
    fxkfac_step.step(x, y)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)


class Heads(nn.Module):
    """One of two heads, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.nowhere = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.heads[which](x)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("structure", [{}, {"*": "skip"}], ids=["kfac", "adam"])
def test_what_no_batch_uses_stays_as_it_is(structure: dict[str, str], decoupled: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = Heads().double(), batch()
    program = fxkfac.trace(model, {"x": x, "which": 0}, structure=structure)
    optimizer = KFAC(program, CE, lr=0.1, adam_lr=0.1, weight_decay=0.1, decoupled=decoupled)
    before = values(model)
    optimizer.step({"x": x, "which": 0}, y)
    after = values(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"heads.0.weight", "heads.0.bias"}


def test_heads_in_turn_are_trained_as_by_torch() -> None:
    """A head that a batch does not use has no gradient, and neither moves on nor decays."""
    torch.manual_seed(0)
    model, (x, y) = Heads().double(), batch()
    twin = copy.deepcopy(model)
    program = fxkfac.trace(model, {"x": x, "which": 0}, structure={"*": "skip"})
    optimizer = KFAC(program, CE, lr=0.1, adam_lr=0.1, weight_decay=0.1)
    torchs = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.1)
    for which in (0, 1, 1, 0):
        optimizer.step({"x": x, "which": which}, y)
        torchs.zero_grad()
        CE(twin(x, which), y).backward()
        torchs.step()
        assert_close(values(model), values(twin), 1e-12)
    both = [({"x": x, "which": which}, y) for which in (0, 1)]
    before = values(model)
    optimizer.step(both)
    kept = {name for name, θ in values(model).items() if torch.equal(θ, before[name])}
    assert kept == {"nowhere"}


class Range(nn.Module):
    """The largest input so far, as an observer of quantisation keeps it."""

    def __init__(self, write: str):
        super().__init__()
        self.write, self.map = write, nn.Linear(4, 3)
        self.register_buffer("top", torch.full((), 10.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            top = torch.maximum(self.top, x.detach().abs().max())
            if self.write == "assign":
                self.top = top
            else:
                self.top.copy_(top)
        return self.map(x / self.top)


@pytest.mark.parametrize("write", ["in place", "assign"])
def test_a_buffer_that_a_first_batch_leaves_as_it_was_follows_the_next_ones(write: str) -> None:
    model, (x, y) = Range(write).double(), batch()
    twin = copy.deepcopy(model)
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.0)
    for scale in (1.0, 100.0, 1.0):
        found = optimizer.step(scale * x, y)
        assert torch.allclose(found, CE(twin(scale * x), y), rtol=1e-12)
        assert torch.equal(model.top, twin.top)
    assert model.top > 10


class Constant(nn.Module):
    """Holds a buffer that nothing writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.runs = nn.Linear(4, 3), 0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.map(x * self.scale)


def test_a_module_that_writes_into_no_buffer_does_not_run_again() -> None:
    model, (x, y) = Constant().double(), batch()
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1)
    optimizer.step(x, y)
    runs = model.runs
    optimizer.step(x, y)
    assert model.runs == runs


def test_buffers_follow_the_tensors_in_the_place_of_the_modules_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = batch()
    params = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin, own = copy.deepcopy(model), values(model)
    twin.load_state_dict({**twin.state_dict(), **params})
    optimizer = KFAC(fxkfac.trace(model, x, params), CE, lr=0.1)
    optimizer.step(x, y)
    twin(x)
    for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)
    assert_equal(values(model), own)


# --- what is refused ---


def test_another_tensor_in_the_model_is_refused_and_an_optimizer_made_anew_goes_on() -> None:
    model, (x, y) = mlp(), batch()
    program = fxkfac.trace(model, x)
    optimizer = KFAC(program, CE, lr=0.1)
    optimizer.step(x, y)
    model.load_state_dict(values(mlp(seed=3)))  # in place: the same tensors
    optimizer.step(x, y)
    model.load_state_dict(values(mlp(seed=4)), assign=True)
    before = values(model)
    with pytest.raises(ParameterError, match=r"another tensor as '0\.weight'"):
        optimizer.step(x, y)
    assert optimizer.preconditioner.steps == 2
    again = KFAC(program, CE, lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    again.step(x, y)
    assert all(not torch.equal(now, before[name]) for name, now in values(model).items())


def test_a_parameter_that_was_frozen_since_is_refused() -> None:
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1)
    model[0].bias.requires_grad_(False)
    before = values(model)
    with pytest.raises(ParameterError, match=r"'0\.bias' was frozen"):
        optimizer.step(x, y)
    KFAC(fxkfac.trace(model, x), CE, lr=0.1).step(x, y)
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_state_with_groups_in_another_order_is_refused() -> None:
    torch.manual_seed(0)
    x, y = batch()
    groups = [{"params": "3.*", "lr": 0.2}, {"params": "0.*"}]

    def made(groups: list[dict[str, Any]]) -> KFAC:
        return KFAC(fxkfac.trace(mlp(), x), CE, lr=0.1, groups=groups)

    first, other = made(groups), made(groups[::-1])
    first.step(x, y)
    with pytest.raises(OptionError, match=r"of the parameters 3\.weight, 3\.bias; 0\.weight"):
        other.load_state_dict(first.state_dict())
    assert other.preconditioner.steps == 0
    assert not other.state
    made(groups).load_state_dict(first.state_dict())
    with pytest.raises(OptionError, match="in this order"):
        made([]).load_state_dict(first.state_dict())


def test_a_sparse_gradient_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randint(7, (5, 2)), torch.randint(3, (5,))
    p = Preconditioner(fxkfac.trace(model, x), CE)
    CE(model(x), y).backward()
    p.update(x, y)
    refused = pytest.raises(OptionError, match=r"gradient of '0\.weight' .* sparse=False")
    with refused:
        p.precondition()
    with refused:
        p.average.solve({name: θ.grad for name, θ in model.named_parameters()}, 1e-2)


@pytest.mark.parametrize("structure", [{}, {"0.weight": "diagonal"}, {"0.*": "dense"}])
def test_a_gradient_of_another_shape_is_refused_by_name(structure: dict[str, str]) -> None:
    """Of a batch the first one alone was solved for, and a transposed one was read as stored."""
    model, (x, y) = mlp(), batch()
    p = Preconditioner(fxkfac.trace(model, x, structure=structure), CE)
    p.update(x, y)
    g = values(model)
    for wrong in (g["0.weight"].mT, g["0.weight"].expand(2, 5, 4), g["0.weight"][0]):
        with pytest.raises(ParameterError, match=r"gradient of '0\.weight' .* expected .*\(5, 4\)"):
            p.solve({**g, "0.weight": wrong})


def test_factors_with_other_blocks_are_refused(traced_mlp: Program) -> None:
    data = batch()
    other = fxkfac.trace(mlp(), data[0], structure={"0.weight": "diagonal"})
    for factors, what in (
        (fxkfac.kfac(traced_mlp, CE, data, separate_weight_and_bias=True), "separate_weight"),
        (fxkfac.kfac(other, CE, data), "structures"),
    ):
        p = Preconditioner(traced_mlp, CE)
        with pytest.raises(MergeError, match=rf"computed with {what}.* expected"):
            p.advance(factors)
        assert p.steps == 0


def test_a_group_that_is_added_later_is_refused() -> None:
    optimizer = KFAC(fxkfac.trace(mlp(), batch()[0]), CE, lr=0.1)
    with pytest.raises(OptionError, match="by `groups`"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})


@pytest.fixture(scope="module")
def traced_mlp() -> Program:
    return fxkfac.trace(mlp(), batch()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr=-0\.1; expected zero or a positive"),
        ({"lr": None}, "lr=None; expected zero or a positive"),
        ({"damping": "0.1"}, "damping='0.1'; expected a positive"),
        ({"momentum": None}, "momentum=None; expected a number in"),
        ({"adam_lr": -0.1}, r"adam_lr=-0\.1"),
        ({"momentum": 1.0}, r"momentum=1\.0; expected a number in"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas=1\.0"),
        ({"betas": 0.9}, r"betas=0\.9; expected two numbers"),
        ({"betas": (0.9, 0.9, 0.9)}, r"expected two numbers"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"damping": 0.0}, r"damping=0\.0; expected a positive"),
        ({"damping": float("nan")}, r"damping=nan"),
        ({"damp": "both"}, r"damp='both'; expected 'split' or 'block'"),
        ({"ekfac": True}, r"ekfac=True .* damp='block'"),
        ({"decay": 1.0}, r"decay=1\.0; expected a number in"),
        ({"decay": "0.9"}, r"decay='0\.9'; expected a number in"),
        ({"factor_interval": 0}, r"factor_interval=0; expected a whole number"),
        ({"inverse_interval": 1.5}, r"inverse_interval=1\.5"),
        ({"lm_interval": 0}, r"lm_interval=0"),
        ({"max_norm": 0.0}, r"max_norm=0\.0"),
        ({"kl_clip": -1.0}, r"kl_clip=-1\.0"),
        ({"fisher": "type-3"}, "type-3"),
        ({"generator": 5}, "generator=5; expected a torch.Generator"),
        ({"memory": -1}, "memory=-1; expected a whole number of bytes"),
        ({"backend": "x"}, "backend='x'; expected 'eager' or 'inductor'"),
        ({"mask": 5}, "mask is of type int; expected the keyword"),
        ({"groups": [{"params": "*", "lr": -1.0}]}, r"lr=-1\.0"),
        ({"groups": [{"params": "*", "rate": 1.0}]}, r"the options \['rate'\]; there are: .*'lr'"),
        ({"groups": [{"lr": 1.0}]}, r"expected 'params'"),
        ({"groups": {"params": "*"}}, r"a group is 'params'; expected a list of dicts"),
        (
            {"groups": [{"params": "0.*"}, {"params": "*.weight"}]},
            r"\['0\.weight'\] are in two of the groups",
        ),
    ],
)
def test_options_out_of_their_range_are_named(
    traced_mlp: Program, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        KFAC(traced_mlp, CE, **{"lr": 0.1, **options})


def test_a_group_of_unknown_parameters_is_refused() -> None:
    program = fxkfac.trace(mlp(), batch()[0], ["0.*"])
    with pytest.raises(UnknownParameter, match="head"):
        KFAC(program, CE, lr=0.1, groups=[{"params": "head.*"}])
    with pytest.raises(OptionError, match="none of the parameters that were selected"):
        KFAC(program, CE, lr=0.1, groups=[{"params": "3.*"}])


def test_damping_that_is_set_is_looked_at(traced_mlp: Program) -> None:
    p = Preconditioner(traced_mlp, CE)
    p.damping = 2e-3
    for damping in (0.0, -1e-2):
        with pytest.raises(OptionError, match="expected a positive number"):
            p.damping = damping
    assert p.damping == 2e-3
    with pytest.raises(OptionError, match="mc_samples=0"):
        Preconditioner(traced_mlp, CE, mc_samples=0)


def test_there_are_no_natural_gradients_before_the_first_update() -> None:
    p = Preconditioner(fxkfac.trace(mlp(), batch()[0]), CE)
    with pytest.raises(FxkfacError, match="call `update"):
        p.solve({})


def test_a_batch_that_fails_changes_no_parameter() -> None:
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(fxkfac.trace(model, x), CE, lr=0.1)
    before = values(model)
    with pytest.raises(DataError):
        optimizer.step(x, y[:5])
    assert_equal(values(model), before)
    assert optimizer.preconditioner.steps == 0


# --- what is wrong is named, and changes nothing ---


class Length(nn.Module):
    """Whose slope at zero is not a number."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h.square().sum(1, keepdim=True).sqrt(), h.tanh()], 1)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_gradient_whose_square_overflows_second_moments_changes_nothing(interval: int) -> None:
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3), nn.MSELoss(reduction="sum")
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    options = {"damp": "block", "ekfac": True, "fisher": "type-2", "factor_interval": interval}
    optimizer = KFAC(fxkfac.trace(model, x), loss, lr=0.1, **options)
    optimizer.step(x, y)
    p = optimizer.preconditioner
    before, moments = values(model), p.bases["weight"].values.clone()
    with pytest.raises(NonFiniteError, match=r"'weight' has entries up to .*e\+20.* overflow"):
        optimizer.step(1e10 * x, 1e10 * y)
    with pytest.raises(NonFiniteError, match=r"'weight' has entries up to 1e\+20"):
        p.solve({"weight": torch.full((3, 4), 1e20), "bias": torch.ones(3)})
    assert_equal(values(model), before)
    assert p.steps == 1
    assert torch.equal(p.bases["weight"].values, moments)
    optimizer.step(1e8 * x, 1e8 * y)
    assert p.bases["weight"].values.isfinite().all()


@pytest.mark.parametrize("structure", [{}, {"0.weight": "skip"}, {"0.weight": "identity"}])
def test_a_gradient_without_numbers_changes_no_parameter(structure: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), Length(), nn.Linear(6, 3)).double()
    x, y = batch()
    program = fxkfac.trace(model, x, structure=structure)
    optimizer = KFAC(program, CE, lr=0.1, factor_interval=2)
    optimizer.step(x, y)
    before = values(model)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"the gradient in '0\.weight'"):
            optimizer.step(torch.zeros_like(x), y)
    assert_equal(values(model), before)
    with pytest.raises(NonFiniteError):
        fxkfac.step(program, CE, (torch.zeros_like(x), y))


def test_a_first_batch_without_a_parameter_is_refused_and_forgotten() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.even = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.all(x) if len(x) % 2 else self.all(x) + self.even(x)

    x, y = batch()
    optimizer = KFAC(fxkfac.trace(Even().double(), x), CE, lr=0.1)
    with pytest.raises(MergeError, match=r"no \['even\.weight'\]"):
        optimizer.step(x[:7], y[:7])
    assert optimizer.preconditioner.average.averages is None
    optimizer.step(x, y)


class Positions(nn.Module):
    """With other entries of a table, or another orientation, for sequences of other lengths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table, self.head, self.kind = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        T, W = x.shape[1], self.table
        short = {"first": x + W[:T], "other": x @ W[4:], "turned": x @ W[:4].T}[self.kind]
        return self.head((short if T < 8 or self.kind == "first" else x @ W[:4]).tanh()).mean(1)


def sequences(T: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, T, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("kind", ["first", "other", "turned"])
@pytest.mark.parametrize("damp", ["split", "block"])
def test_sequences_of_another_length_than_the_traces_are_solved_by_their_entries(
    kind: str, damp: str
) -> None:
    torch.manual_seed(0)
    model, (x, y) = Positions(kind).double(), sequences(5)
    program = fxkfac.trace(model, sequences(8)[0])
    p = Preconditioner(program, CE, damping=0.1, damp=damp, fisher="type-2")
    p.update(x, y)
    gradients = {name: torch.randn_like(t) for name, t in model.named_parameters()}
    factors = fxkfac.kfac(program, CE, (x, y))
    expected = factors.solve(gradients, 0.1, damp="pi" if damp == "split" else "block")
    assert_close(p.solve(gradients), expected)
    if damp == "block":
        C = factors.dense("table") + 0.1 * torch.eye(32).double()
        solved = torch.linalg.solve(C, gradients["table"].flatten()).view(8, 4)
        assert_close({"table": p.solve(gradients)["table"]}, {"table": solved})


def test_a_state_of_other_entries_is_refused_and_goes_on_where_they_are_those_of_the_trace() -> (
    None
):
    def made(T: int) -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = Positions("other").double()
        return model, KFAC(fxkfac.trace(model, sequences(T)[0]), CE, lr=0.1)

    model, optimizer = made(8)
    optimizer.step(*sequences(5))
    state, trained = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    with pytest.raises(OptionError, match=r"other entries of \['table'\]"):
        made(8)[1].load_state_dict(state)
    again, resumed = made(5)
    again.load_state_dict(trained)
    resumed.load_state_dict(state)
    for one in (optimizer, resumed):
        one.step(*sequences(5, seed=3))
    assert_equal(values(again), values(model))
    optimizer.load_state_dict(state)  # its program has met sequences of this length
    model.load_state_dict(trained)
    optimizer.step(*sequences(5, seed=3))
    assert_equal(values(again), values(model))


@pytest.mark.parametrize("options", [{"max_norm": 1e-3}, {"weight_decay": 9.0, "decoupled": False}])
def test_second_moments_are_those_of_the_loss(options: dict[str, Any]) -> None:
    """Not of what is clipped, or decays."""
    found = []
    for chosen in ({}, options):
        fixed = {"lr": 0.0, "decay": 0.0, "damp": "block", "ekfac": True, "fisher": "empirical"}
        optimizer = KFAC(fxkfac.trace(mlp(), batch()[0]), CE, **fixed, **chosen)
        optimizer.step(*batch())
        found.append(optimizer.preconditioner.bases["0.weight"].values)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_second_moments_are_over_the_reduction_of_their_own_batch() -> None:
    """Also where that batch is smaller than the last one with factors."""
    fixed = {"damp": "block", "ekfac": True, "fisher": "empirical", "decay": 0.0}
    found = []
    for interval in (1, 2):
        model = mlp()
        optimizer = KFAC(
            fxkfac.trace(model, batch()[0]), CE, lr=0.0, factor_interval=interval,
            inverse_interval=100, **fixed,
        )  # fmt: skip
        optimizer.step(*batch(n=64))
        optimizer.step(*batch(n=4))
        found.append(optimizer.preconditioner.bases["0.weight"].values)
    torch.testing.assert_close(*found)


def test_states_that_do_not_fit_are_refused() -> None:
    def stepped(width: int = 5, **options: Any) -> KFAC:
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
        made = KFAC(fxkfac.trace(model, batch()[0]), CE, lr=0.1, **options)
        made.step(*batch())
        return made

    block, ekfac = {"damp": "block"}, {"damp": "block", "ekfac": True}
    wider, of_torch = stepped(6), torch.optim.SGD(mlp().parameters(), lr=1.0)
    for optimizer, state, message in (
        (wider, stepped().state_dict(), r"\(5, 5\) entries; expected \(5, 6\)"),
        (stepped(**block), stepped().state_dict(), "another damp="),
        (stepped(**block), stepped(**ekfac).state_dict(), "another damp= or ekfac="),
        (stepped(), {}, "expected one of this class"),
        (stepped(), of_torch.state_dict(), "expected one of this class"),
    ):
        with pytest.raises(OptionError, match=message):
            optimizer.load_state_dict(state)
        optimizer.step(*batch())
    after = stepped(**ekfac)
    after.load_state_dict(stepped(**block).state_dict())
    after.step(*batch())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_what_moves_a_model_is_not_copied(copied: Callable[[Any], Any]) -> None:
    program = fxkfac.trace(mlp(), batch()[0])
    for what in (KFAC(program, CE, lr=0.1), Preconditioner(program, CE)):
        with pytest.raises(FxkfacError, match="state_dict"):
            copied(what)


def test_schedulers_cycle_the_momentum() -> None:
    optimizer = KFAC(fxkfac.trace(mlp(), batch()[0]), CE, lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["momentum"])
        optimizer.step(*batch())
        scheduler.step()
    assert seen[0] > seen[1] > seen[2]
