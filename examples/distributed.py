"""Many workers: handwritten digits learned by natural gradients, with data and matrices shared out.

Every step, each rank runs its share of the batch; one sum gives all ranks the loss, the gradients
and the factors of the whole batch; then each rank takes some of the eigendecompositions.

Run it with `torchrun --nproc-per-node 2 examples/distributed.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxkfac
import fxkfac.distributed

STEPS, BATCH, LEARNING_RATE, DAMPING = 30, 301, 0.1, 1e-2


def network() -> nn.Module:
    """Pixels -> ten logits."""
    return nn.Sequential(
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def natural_gradients(step: fxkfac.Step) -> dict[str, Tensor]:
    """(B ⊗ A + damping · I)⁻¹ ∇L of every parameter, by eigenvalues that the ranks share out."""
    factors = {key: side for name, b in step.factors.items() for key, side in sides(name, b)}
    eigen = fxkfac.distributed.eigh(factors)
    found = {}
    for name, block in step.factors.items():
        (a, Q_A), (b, Q_B) = eigen[name, "A"], eigen[name, "B"]
        weight, bias = block.params
        G = torch.cat(
            [step.gradients[weight], step.gradients[bias].unsqueeze(1)], dim=1
        )  # W̃ = (W b)
        G = Q_B @ ((Q_B.T @ G @ Q_A) / (b.outer(a) + DAMPING)) @ Q_A.T
        found |= {weight: G[:, :-1], bias: G[:, -1]}
    return found


def sides(name: str, block: fxkfac.Block) -> list[tuple[tuple[str, str], Tensor]]:
    """A and B of a block, by name."""
    return [((name, "A"), block.A), ((name, "B"), block.B)]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Natural-gradient steps, which leave all ranks with the same parameters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    program, loss = fxkfac.trace(model, images[:8]), nn.CrossEntropyLoss()
    order = torch.Generator().manual_seed(1)  # the same batches on every rank
    for number in range(STEPS):
        batch = torch.randperm(len(images), generator=order)[:BATCH]
        mine = batch[rank::world]  # an odd number of images: shards differ in length
        step = fxkfac.distributed.step(program, loss, (images[mine], labels[mine]))
        with torch.no_grad():
            for name, direction in natural_gradients(step).items():
                model.get_parameter(name).sub_(direction, alpha=LEARNING_RATE)
        if rank == 0 and number % 10 in (0, 9):
            print(f"  step {number + 1:>2}: loss {step.loss:.4f} of {step.factors.n} images")


def same_everywhere(model: nn.Module) -> bool:
    """Whether all ranks hold the same parameters, bit for bit."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return all(torch.equal(mine, other) for other in theirs)


def main() -> None:
    """Train, and say whether all ranks have come to the same net."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same parameters on every rank
    model, (images, labels) = network(), digits()
    if dist.get_rank() == 0:
        print(f"Training on {len(images)} digits with {dist.get_world_size()} ranks")
    train(model, images, labels)
    same, right = same_everywhere(model), (model(images).argmax(1) == labels).float().mean()
    if dist.get_rank() == 0:
        print(f"accuracy {right:.3f}; the same parameters on all ranks, bit for bit: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
