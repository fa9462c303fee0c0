"""Large factors, whose rows begin where lines of memory do: gaps between them change nothing."""

import pytest
import torch
from drawn import generator, rand, seeded
from torch import nn

import fxkfac
from fxkfac.linalg.triangle import pack_symmetric, packed_shape, unpack_symmetric

N, IN, OUT = 30, 400, 370


@pytest.fixture(scope="module")
def factors():
    model = seeded(lambda: nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 3))).float()
    batches = [(rand(N, IN, seed=k).float(), torch.arange(N) % 3) for k in (1, 2)]
    program = fxkfac.trace(model, batches[0][0])
    loss, found = nn.CrossEntropyLoss(), []
    for data in (*batches, batches):
        found.append(fxkfac.kfac(program, loss, data, fisher="empirical"))
    return program, batches, found


def test_rows_begin_where_lines_do(factors):
    block = factors[2][2]["0.weight"]
    assert (block.A.shape, block.A.stride()) == ((IN + 1, IN + 1), (416, 1))
    assert (block.B.shape, block.B.stride()) == ((OUT, OUT), (384, 1))


def test_they_are_what_rows_say(factors):
    _, batches, (*_, found) = factors
    rows = torch.cat([torch.cat([x, x.new_ones(N, 1)], 1) for x, _ in batches]).double()
    A = rows.T @ rows / (2 * N)
    torch.testing.assert_close(found["0.weight"].A.double(), A, rtol=1e-5, atol=1e-5)


def test_parts_add_up(factors):
    first, second, both = factors[2]
    for name, block in (first + second).items():
        for mine, other in ((block.A, both[name].A), (block.B, both[name].B)):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_they_are_written_and_read(factors, tmp_path):
    program, _, (*_, found) = factors
    fxkfac.save(found, tmp_path / "factors")
    read = fxkfac.load(tmp_path / "factors", program, nn.CrossEntropyLoss())
    for name, block in found.items():
        assert torch.equal(read[name].A, block.A)
        assert torch.equal(read[name].B, block.B)


def test_an_accumulation_goes_on_from_a_file(factors, tmp_path):
    program, batches, _ = factors
    loss, (first, second) = nn.CrossEntropyLoss(), batches
    results = []
    for is_saved in (False, True):
        accumulation = fxkfac.Accumulation(program, loss, fisher="mc", generator=generator())
        for x, y in (first, second) * 9:  # more rows than wait
            accumulation.add(x, y)
        if is_saved:
            fxkfac.save(accumulation, tmp_path / "sums")
            accumulation = fxkfac.resume(tmp_path / "sums", program, loss)
        accumulation.add(*first)
        results.append(accumulation.factors())
    for name, block in results[0].items():
        assert torch.equal(results[1][name].A, block.A)
        assert torch.equal(results[1][name].B, block.B)


def test_one_triangle_is_sent(factors):
    A = factors[2][2].products["0.weight"][0].A
    packed = A.new_empty(1, *packed_shape(IN + 1))
    pack_symmetric(A, packed)
    assert torch.equal(unpack_symmetric(packed), A)
