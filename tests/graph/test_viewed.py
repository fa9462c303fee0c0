"""What a reader remembers of a way to read tensors is what reading anew would give."""

import pytest
import torch

from fxkfac.graph.uses.viewed import Reader

F64 = torch.float64


def part(t, step):
    return t[1:, ::step].mT.unsqueeze(0).expand(3, -1, -1)


def halves(t, step):
    return t.flatten() / step


def positions(t, step):
    return t.shape, step


WIDE = torch.arange(60.0, dtype=F64).view(6, 10)
TENSORS = {
    "whole": WIDE,
    "again": WIDE + 1,
    "columns": WIDE[:, 2:8],
    "rows": WIDE[2:5],
    "turned": WIDE.mT,
    "steps": WIDE[::2, ::3],
    "single": WIDE.float(),
    "half": WIDE.half(),
    "integers": WIDE.long(),
    "empty": WIDE[:1, :0],
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("read", [part, halves])
def test_it_is_what_reading_gives(read, step):
    reader = Reader()
    for _ in range(2):
        for t in TENSORS.values():
            expected, found = read(t, step), reader(read, t, step)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_views_are_views():
    reader = Reader()
    for t in (WIDE.clone(), WIDE.clone()):
        reader(part, t, 2)[0, 1, 0] = -1.0
        assert t[1, 2] == -1.0


def test_what_is_no_tensor_is_read_anew():
    reader = Reader()
    assert [reader(positions, WIDE, k) for k in (1, 1, 2)] == [((6, 10), k) for k in (1, 1, 2)]


def test_gradients_and_transforms_see_every_step():
    reader = Reader()
    reader(part, WIDE, 2)
    x = WIDE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reader(part, x, 2).sum(), x)
    assert torch.equal(gradient.nonzero()[0], torch.tensor([1, 0]))
    assert gradient.max() == 3.0
    both = torch.func.vmap(lambda t: reader(part, t, 2))(torch.stack([WIDE, WIDE + 1]))
    assert torch.equal(both, torch.stack([part(WIDE, 2), part(WIDE + 1, 2)]))
