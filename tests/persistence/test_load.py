"""Factors come back bit for bit, to the program that they are of and to no other."""

import copy
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from drawn import classes, generator, rand, seeded
from quick import one_in, quick
from test_resume import assert_same_bits
from torch import nn
from zoo import ZOO

import fxkfac
from fxkfac.errors import FileError, FxkfacError, MergeError
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.persistence.container import read

CE, MSE = nn.CrossEntropyLoss, nn.MSELoss
X, Y = rand(6, 4), classes(6)


def header_of(path, kind="factors"):
    return read(path, (kind,), torch.device("cpu"))[0]


@pytest.mark.parametrize(
    "name",
    [
        *("sequential", "embedding_tied", "einsum_groups"),
        *quick(["tied_autoencoder", "embedding_head", "conv_groups", "bmm_experts"], one_in(4)),
    ],
)
@pytest.mark.parametrize(
    ("fisher", "sharing", "apart"),
    quick(
        [("type-2", "expand", False), ("mc", "reduce", True), ("forward-only", "expand", True)],
        lambda how: how[0] == "mc",
    ),
)
def test_the_zoo_and_its_parts(tmp_path, name, fisher, sharing, apart):
    """What was saved is loaded into another trace; and parts that were saved add up."""
    entry = ZOO[name]
    program, other = (entry.trace(*entry.build(), 4) for _ in range(2))
    how = {"fisher": fisher, "sharing": sharing, "separate_weight_and_bias": apart}
    data, source = entry.data(7), generator()
    parts = [entry.take(data, index) for index in ([0, 1, 2], [3, 4], [5, 6])]
    saved = [fxkfac.kfac(program, entry.loss, p, generator=source, **how) for p in parts]
    for k, factors in enumerate(saved):
        fxkfac.save(factors, tmp_path / str(k))
    loaded = [fxkfac.load(tmp_path / str(k), other, entry.loss) for k in range(3)]
    for found, expected in zip(loaded, saved, strict=True):
        assert found.settings == expected.settings
        assert_same_bits(found, expected)
        assert torch.equal(found.dense(), expected.dense())
    whole = fxkfac.kfac(other, entry.loss, parts, generator=generator(), **how)
    total = loaded[0] + loaded[1] + loaded[2]
    assert (total.n, total.count) == (whole.n, whole.count)
    torch.testing.assert_close(total.dense(), whole.dense(), rtol=1e-12, atol=1e-14)


def test_exact_blocks_and_identities(tmp_path):
    layers = [nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)]
    structure = {"0.weight": "dense", "2.bias": "identity", "0.bias": "skip"}
    program = fxkfac.trace(seeded(lambda: nn.Sequential(*layers)), X, structure=structure)
    factors = fxkfac.kfac(program, CE(), (X, Y))
    fxkfac.save(factors, tmp_path / "x")
    found = fxkfac.load(tmp_path / "x", program, CE())
    assert_same_bits(found, factors)
    assert torch.equal(found.dense(), factors.dense())
    assert {type(b) for b in found.values()} == {fxkfac.Block, fxkfac.Diagonal, fxkfac.Dense}


def test_factors_of_a_step(tmp_path):
    program = fxkfac.trace(seeded(lambda: nn.Linear(4, 3)).bfloat16(), X.bfloat16())
    factors = fxkfac.step(program, CE(), (X.bfloat16(), Y)).factors
    fxkfac.save(factors, tmp_path / "x")
    assert_same_bits(fxkfac.load(tmp_path / "x", program, CE()), factors)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(40, 3) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


def test_equal_inputs_have_one_factor(tmp_path):
    x = rand(50, 40)
    program = fxkfac.trace(seeded(Heads), x)
    factors = fxkfac.kfac(program, CE(), (x, classes(50)))
    fxkfac.save(factors, tmp_path / "x")
    found = fxkfac.load(tmp_path / "x", program, CE())
    q, k, v = (found.products[f"{name}.weight"][0].A for name in "qkv")
    assert q is k is v
    assert os.path.getsize(tmp_path / "x") < 2 * factors["q.weight"].A.nbytes


def test_averages_of_what_was_loaded(tmp_path):
    """Where nothing comes back, many B are equal, and stored once; but they are not one."""

    def model(params, x):
        return x @ params["W"] @ params["V"] * params["on"]

    params = {"W": rand(4, 3), "V": rand(3, 3)}
    program = fxkfac.trace(lambda p, x, on: model({**p, "on": on}, x), (X, rand(6, 1)), params)
    kept = fxkfac.RunningAverage(0.5), fxkfac.RunningAverage(0.5)
    for on in (torch.zeros(6, 1), torch.ones(6, 1), torch.ones(6, 1) / 2):
        factors = fxkfac.kfac(program, MSE(), ((X, on.double()), rand(6, 3)))
        fxkfac.save(factors, tmp_path / "x")
        loaded = fxkfac.load(tmp_path / "x", program, MSE())
        assert len({p.B.data_ptr() for (p,) in loaded.products.values()}) == 2
        for average, seen in zip(kept, (factors, loaded), strict=True):
            average.update(seen)
    assert torch.equal(kept[0].dense(), kept[1].dense())
    assert kept[0]["W"].B.any()


# --- what must be equal ---


def saved(tmp_path, model, x=X, loss=None, params=None, y=Y, trace=None, **how):
    program = fxkfac.trace(model, x, params, **(trace or {}))
    loss = loss or CE()
    path = tmp_path / "saved"
    fxkfac.save(fxkfac.kfac(program, loss, (x, y), **how), path)
    return path


def refused(path, program, *said, loss=None):
    with pytest.raises(MergeError) as info:
        fxkfac.load(path, program, loss or CE())
    for part in said:
        assert part in str(info.value), f"{part!r} is not in:\n{info.value}"


def mlp(width=5, out=3):
    return lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, out))


def test_other_names_and_shapes(tmp_path):
    path = saved(tmp_path, seeded(mlp()))
    named = nn.Sequential()
    for name, part in zip("abc", seeded(mlp()), strict=True):
        named.add_module(name, part)
    only = "only there is a parameter '0.weight', '0.bias', '2.weight', '2.bias'"
    refused(path, fxkfac.trace(named, X), only, "only here is a parameter 'a.weight'")
    wider = fxkfac.trace(seeded(mlp(7)), X)
    refused(path, wider, "the parameter '0.weight' has shape [5, 4] there and [7, 4] here")
    fewer = fxkfac.trace(seeded(mlp()), X, ["0.*"])
    refused(path, fewer, "only there is a parameter '2.weight', '2.bias'")


def test_other_losses(tmp_path):
    weight = torch.tensor([1.0, 2.0, 3.0])
    path = saved(tmp_path, seeded(mlp()), loss=CE(weight=weight))
    program = fxkfac.trace(seeded(mlp()), X)
    refused(path, program, "loss is", "weight=[1.0, 2.0, 3.0]")
    refused(path, program, "loss is", "MSELoss", loss=MSE())
    fxkfac.load(path, program, CE(weight=weight.clone()))


def test_other_structures(tmp_path):
    path = saved(tmp_path, seeded(mlp()))
    dense = fxkfac.trace(seeded(mlp()), X, structure={"2.bias": "dense"})
    refused(path, dense, "'2.bias' has structure kronecker there and dense here")


def test_other_dtypes(tmp_path):
    path = saved(tmp_path, seeded(mlp()))
    single = fxkfac.trace(seeded(mlp()).float(), X.float())
    refused(path, single, "dtype is 'float64' there and 'float32' here")


def test_another_orientation(tmp_path):
    """Of square weights, nothing but the place of the entries says which it is."""
    params = {"W": rand(4, 4)}
    path = saved(tmp_path, lambda p, x: x @ p["W"], params=params, y=classes(6, C=4))
    transposed = fxkfac.trace(lambda p, x: x @ p["W"].T, X, params)
    refused(path, transposed, "the block of 'W' has its entries in another order")


def test_other_uses(tmp_path):
    params = {"W": rand(4, 4)}
    tied = fxkfac.trace(lambda p, x: (x @ p["W"]).tanh() @ p["W"].T, X, params)
    path = saved(tmp_path, lambda p, x: (x @ p["W"]).tanh() @ p["W"], params=params)
    refused(path, tied, "the block of 'W' has 1 terms there and 2 here")
    path = saved(
        tmp_path,
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]),
        params={"W": rand(4, 4), "b": rand(4)},
    )
    half = fxkfac.trace(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"] / 2), X, {"W": rand(4, 4), "b": rand(4)}
    )
    refused(path, half, "has scales [[1.0]] there and [[0.5]] here")


def test_another_batch_axis(tmp_path):
    model, x = seeded(lambda: nn.Linear(4, 3)), rand(5, 6, 4)
    path = saved(tmp_path, model, x, loss=MSE(), y=rand(5, 6, 3), sharing="reduce")
    other = fxkfac.trace(model, x, batch_axis=1)
    refused(path, other, "has batch axes", loss=MSE())


def recurrent(params, x):
    h = torch.zeros_like(x[:, 0])
    for k in range(x.shape[1]):
        h = torch.tanh(h @ params["W"].T + x[:, k])
    return h


def test_longer_sequences_are_of_the_same_program(tmp_path):
    """They have more uses, in the same way."""
    params = {"W": rand(4, 4)}
    path = saved(tmp_path, recurrent, rand(6, 3, 4), params=params, sharing="reduce")
    longer = fxkfac.trace(recurrent, rand(6, 5, 4), params)
    assert fxkfac.load(path, longer, CE()).n == 6


def test_a_graph_of_another_shape_is_found(tmp_path):
    """The factors are those of the graph that the data had, not of the one of the example."""
    params = {"W": rand(4, 4), "V": rand(4, 4)}

    def model(p, x):
        return x @ p["W"] if x.shape[1] == 1 else (x @ p["V"].T) @ p["W"].T

    def factors(program):
        return fxkfac.kfac(program, MSE(), (rand(6, 2, 4), rand(6, 2, 4)))

    program = fxkfac.trace(model, rand(6, 1, 4), params, structure={"V": "skip"})
    fxkfac.save(factors(program), tmp_path / "x")
    assert_same_bits(fxkfac.load(tmp_path / "x", program, MSE()), factors(program))
    fresh = fxkfac.trace(model, rand(6, 1, 4), params, structure={"V": "skip"})
    refused(tmp_path / "x", fresh, "'W' has its entries in another order", loss=MSE())


def poisson(f):
    return torch.distributions.Poisson(f.exp())


def test_likelihoods_of_ones_own(tmp_path):
    """A function has another address in every process, and the same name."""
    loss = fxkfac.Likelihood.from_distribution(poisson)
    path = saved(tmp_path, seeded(mlp()), loss=loss, y=rand(6, 3).exp().round(), fisher="mc")
    text = header_of(path)["of"]["settings"]["loss"]
    assert "poisson" in text
    assert " at 0x" not in text
    program = fxkfac.trace(seeded(mlp()), X)
    fxkfac.load(path, program, fxkfac.Likelihood.from_distribution(poisson))
    refused(path, program, "loss is", loss=fxkfac.Likelihood.from_distribution(lambda f: f))


# --- between processes ---

PROGRAM = """
import sys, torch
sys.path[:0] = {paths}
from test_load import elsewhere
elsewhere(sys.argv[1])
"""


def elsewhere(path):
    """Save what another process will save as well."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)))
    x = rand(5, 2, 4, 4)
    program = fxkfac.trace(model, x)
    fxkfac.save(
        fxkfac.kfac(program, CE(), (x, classes(5)), fisher="mc", generator=generator()), path
    )


def test_two_processes_write_the_same_file(tmp_path):
    elsewhere(tmp_path / "here")
    code = PROGRAM.format(paths=[p for p in sys.path if p])
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    header = header_of(tmp_path / "here")
    assert re.fullmatch("[0-9a-f]{64}", header["fingerprint"])
    assert header["torch"] == torch.__version__
    assert not re.search("0x[0-9a-f]{6}", json.dumps(header))


def test_a_damaged_file_is_named(tmp_path):
    path = saved(tmp_path, seeded(mlp()))
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FileError, match=r"damaged: the tensor '.*' is not what was written"):
        fxkfac.load(path, fxkfac.trace(seeded(mlp()), X), CE())


def test_the_likelihood_is_that_of_the_loss(tmp_path):
    path = saved(tmp_path, seeded(mlp()), loss=CE(reduction="sum"))
    found = fxkfac.load(path, fxkfac.trace(seeded(mlp()), X), CE(reduction="sum"))
    assert found.reduction == likelihood_of(CE(reduction="sum")).reduction_factor(6) == 1.0


# --- running averages ---


def batch_factors(program, loss, seed):
    return fxkfac.kfac(program, loss, seeded_batch(seed), fisher="empirical")


def seeded_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


class Experts(nn.Module):
    """Query and key read one input; of the experts, a batch may leave one out; a scale."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts, self.norm = nn.Parameter(torch.randn(2, 3, 3)), nn.LayerNorm(3)

    def forward(self, x):
        h = self.query(x) * self.key(x)
        chosen = self.experts[(x[:, 0] > 0).long()]
        return self.norm(torch.bmm(h.unsqueeze(1), chosen).squeeze(1))


def test_a_running_average_goes_on_where_it_was(tmp_path):
    model = seeded(Experts)
    program, loss = fxkfac.trace(model, seeded_batch(0)[0]), CE()
    average = fxkfac.RunningAverage(0.9, decay_B=0.7)
    average.update(batch_factors(program, loss, 1))
    average.update(batch_factors(program, loss, 2), "A")
    fxkfac.save(average, tmp_path / "average")
    again = fxkfac.load(tmp_path / "average", fxkfac.trace(model, seeded_batch(0)[0]), loss)
    assert (again.decay, again.decay_B) == (0.9, 0.7)
    numbers = average.updates["B"]
    assert any(isinstance(n, torch.Tensor) for n in numbers)  # groups have numbers of their own
    assert torch.equal(again.dense(), average.dense())
    for seed in (3, 4):
        factors = batch_factors(program, loss, seed)
        average.update(factors)
        again.update(factors)
    assert torch.equal(again.dense(), average.dense())
    assert not torch.equal(average.dense(), batch_factors(program, loss, 4).dense())


def test_a_running_average_of_another_program_or_of_nothing_is_refused(tmp_path):
    x, y = seeded_batch(0)
    program = fxkfac.trace(nn.Linear(4, 3).double(), x)
    average = fxkfac.RunningAverage()
    with pytest.raises(fxkfac.errors.OptionError, match="has had no update"):
        fxkfac.save(average, tmp_path / "average")
    average.update(fxkfac.kfac(program, CE(), (x, y)))
    fxkfac.save(average, tmp_path / "average")
    with pytest.raises(MergeError, match="another program"):
        fxkfac.load(tmp_path / "average", fxkfac.trace(nn.Linear(4, 2).double(), x), CE())
    with pytest.raises(FileError, match=r"holds a running average; .* Use fxkfac\.load"):
        fxkfac.resume(tmp_path / "average", program, CE())


def test_pickling_names_the_way_to_save():
    program = fxkfac.trace(seeded(lambda: nn.Linear(4, 3)), X)
    accumulation = fxkfac.Accumulation(program, CE())
    accumulation.add(X, Y)
    factors = fxkfac.kfac(program, CE(), (X, Y))
    average = fxkfac.RunningAverage(0.9)
    average.update(factors)
    for what in (program, factors, factors["weight"], average, accumulation):
        with pytest.raises(FxkfacError, match=r"fxkfac\.save .* fxkfac\.load"):
            torch.save(what, io.BytesIO())
    assert torch.equal(copy.deepcopy(factors).dense(), factors.dense())
    again = fxkfac.kfac(copy.deepcopy(program), CE(), (X, Y))
    assert torch.equal(again.dense(), factors.dense())


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_pickling_names_the_way_to_save_where_pickle_knows_no_name_of_the_function(structure):
    params = {"W": torch.ones(4, 3, dtype=X.dtype)}
    program = fxkfac.trace(lambda p, x: x @ p["W"], X, params, structure={"W": structure})
    factors = fxkfac.kfac(program, CE(), (X, Y))
    for what in (
        program,
        factors,
        fxkfac.sum_of(factors),
        fxkfac.ekfac(program, CE(), (X, Y), factors),
    ):
        with pytest.raises(FxkfacError, match=r"fxkfac\.save .* fxkfac\.load"):
            torch.save(what, io.BytesIO())
        for copied in (copy.copy(what), copy.deepcopy(what)):
            assert type(copied) is type(what)
    assert torch.equal(copy.copy(factors).dense(), factors.dense())
