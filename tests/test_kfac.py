"""The whole pipeline against autodiff, wherever KFAC is exact; and the laws of its results."""

import itertools

import pytest
import torch
import torch.distributions as D
from drawn import F64, classes, generator, rand, seeded
from torch import nn

import fxkfac
from fxkfac import exact
from fxkfac.errors import FxkfacError, NoDataError, OptionError
from fxkfac.likelihoods.base import Likelihood

MSE, CE, BCE = nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("one_thread")


def off(found, expected):
    """Relative error in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm()).item()


def joint(layer):
    return [f"{layer}.weight", f"{layer}.bias"]


def same_factors(found, expected, exactly=False):
    compare = torch.equal if exactly else lambda a, b: close(a, b) is None
    assert list(found) == list(expected)
    for name, block in found.items():
        for mine, other in zip(block.terms, expected[name].terms, strict=True):
            assert compare(mine.A, other.A), name
            assert compare(mine.B, other.B), name


def turned(block):
    """B ⊗ A of W̃ = (W b) in the order of `dense`: W's rows, then b."""
    d_out, d_in = block.shapes[0]
    number = torch.arange(d_out * (d_in + 1)).view(d_out, d_in + 1)
    order = torch.cat([number[:, :d_in].flatten(), number[:, d_in]])
    return torch.kron(block.B, block.A)[order][:, order]


@pytest.fixture(scope="module")
def mlp():
    """A net for the laws that hold for any model, its program, and five data."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    X = rand(5, 4, seed=5)
    return model, fxkfac.trace(model, X), X


class TestOneDatum:
    """Ground truth 1: one datum, no weight sharing (the paper's first test)."""

    ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU)
    LOSSES = tuple(kind(reduction=r) for kind in (MSE, CE) for r in ("mean", "sum"))

    @pytest.fixture(scope="class", params=ACTIVATIONS)
    @classmethod
    def traced(cls, request):
        act = request.param

        def make():
            first = nn.Linear(4, 3, bias=False)
            return nn.Sequential(first, act(), nn.Linear(3, 4), act(), nn.Linear(4, 3))

        model = seeded(make, seed=2)
        return model, fxkfac.trace(model, rand(4, 4, seed=9))

    @staticmethod
    def datum(loss):
        return rand(1, 4, seed=3), classes(1) if isinstance(loss, CE) else rand(1, 3, seed=4)

    @pytest.mark.parametrize("vec", ["rvec", "cvec"])
    @pytest.mark.parametrize("loss", LOSSES, ids=str)
    @pytest.mark.parametrize(
        ("fisher", "truth"), [("type-2", exact.ggn), ("empirical", exact.empirical_fisher)]
    )
    def test_block_is_the_dense_one(self, traced, fisher, truth, loss, vec):
        model, program = traced
        data = self.datum(loss)
        factors = fxkfac.kfac(program, loss, data, fisher=fisher)
        alone = factors["0.weight"]
        product = (alone.B, alone.A) if vec == "rvec" else (alone.A, alone.B)
        expected = truth(model, loss, data, "0.weight", vec=vec)
        assert expected.norm() > 1e-6
        close(torch.kron(*product), expected)
        for layer in ("2", "4"):
            block = factors[f"{layer}.weight"]
            # vec W̃ by columns is vec W by columns and then b
            found = turned(block) if vec == "rvec" else torch.kron(block.A, block.B)
            close(found, truth(model, loss, data, joint(layer), vec=vec))

    @pytest.mark.parametrize("traced", [nn.Tanh], indirect=True)  # one activation is enough here
    @pytest.mark.parametrize("loss", [MSE(), CE(reduction="sum")], ids=str)
    def test_mc_converges_to_it(self, traced, loss):
        model, program = traced
        data = self.datum(loss)
        factors = fxkfac.kfac(
            program, loss, data, fisher="mc", mc_samples=25_000, generator=generator()
        )
        for names in (["0.weight"], joint("2"), joint("4")):
            assert off(factors.dense(*names), exact.ggn(model, loss, data, names)) < 5e-2


class TestDeepLinear:
    """Ground truth 2: a deep linear net with the square loss (the paper's second test)."""

    N, LAYERS = 6, ("0", "1", "2")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)))

    @pytest.fixture(scope="class", params=[(), (5,)], ids=["no sequence", "sequence"])
    @classmethod
    def traced(cls, request, model):
        data = (
            rand(cls.N, *request.param, 4, seed=1),
            rand(cls.N, *request.param, 2, seed=2),
        )
        return model, fxkfac.trace(model, data[0]), data

    @pytest.fixture(params=["mean", "sum"])
    def loss(self, request):
        return MSE(reduction=request.param)

    def test_type2_is_the_ggn(self, traced, loss):
        model, program, data = traced
        factors = fxkfac.kfac(program, loss, data)
        for layer in self.LAYERS:
            expected = exact.ggn(model, loss, data, joint(layer))
            close(factors.dense(*joint(layer)), expected)

    def test_mc_converges_to_it(self, traced, loss):
        model, program, data = traced
        factors = fxkfac.kfac(
            program, loss, data, fisher="mc", mc_samples=2000, generator=generator()
        )
        for layer in self.LAYERS:
            expected = exact.ggn(model, loss, data, joint(layer))
            assert off(factors.dense(*joint(layer)), expected) < 5e-2

    def test_empirical_is_not_the_empirical_fisher(self, traced, loss):
        model, program, data = traced
        factors = fxkfac.kfac(program, loss, data, fisher="empirical")
        for layer in self.LAYERS:
            expected = exact.empirical_fisher(model, loss, data, joint(layer))
            assert off(factors.dense(*joint(layer)), expected) > 1e-2


class TestReduce:
    """Ground truth 3: a deep linear net that pools over the shared axis."""

    @pytest.fixture(scope="class", params=[torch.mean, torch.sum], ids=["mean", "sum"])
    @classmethod
    def traced(cls, request):
        class Pooled(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

            def forward(self, x):
                return request.param(self.last(self.first(x)), dim=1)

        model = seeded(Pooled)
        data = (rand(6, 5, 4, seed=1), rand(6, 2, seed=2))
        return model, fxkfac.trace(model, data[0]), data

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_reduce_is_the_ggn(self, traced, reduction):
        model, program, data = traced
        loss = MSE(reduction=reduction)
        factors = fxkfac.kfac(program, loss, data, sharing="reduce")
        for layer in ("first", "last"):
            close(factors.dense(*joint(layer)), exact.ggn(model, loss, data, joint(layer)))

    def test_expand_is_another_matrix(self, traced):
        model, program, data = traced
        factors = fxkfac.kfac(program, MSE(), data, sharing="expand")
        assert (
            off(factors.dense(*joint("first")), exact.ggn(model, MSE(), data, joint("first"))) > 0.1
        )

    def test_it_is_expand_where_nothing_is_shared(self, mlp):
        _, program, X = mlp
        data = X, classes(5)
        reduce = fxkfac.kfac(program, CE(), data, sharing="reduce")
        same_factors(reduce, fxkfac.kfac(program, CE(), data, sharing="expand"))


TARGETS = {MSE: rand(5, 3, seed=6), CE: classes(5), BCE: rand(5, 3, seed=6).sigmoid()}
all_losses = pytest.mark.parametrize("kind", [MSE, CE, BCE])


class TestFlavours:
    @pytest.mark.parametrize("kind", [CE, BCE])
    def test_type1_is_type2(self, mlp, kind):
        _, program, X = mlp
        data = X, TARGETS[kind]
        first = fxkfac.kfac(program, kind(), data, fisher="type-1")
        same_factors(first, fxkfac.kfac(program, kind(), data))

    @all_losses
    @pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
    def test_samples_converge_to_type2(self, mlp, fisher, kind):
        _, program, X = mlp
        data = X, TARGETS[kind]
        sampled = fxkfac.kfac(
            program, kind(), data, fisher=fisher, mc_samples=4000, generator=generator()
        )
        for name, block in fxkfac.kfac(program, kind(), data).items():
            assert off(sampled[name].B, block.B) < 5e-2
            close(sampled[name].A, block.A)

    @all_losses
    def test_forward_only_has_the_same_a_and_b_is_one(self, mlp, kind):
        _, program, X = mlp
        data = X, TARGETS[kind]
        forward = fxkfac.kfac(program, kind(), data, fisher="forward-only")
        for name, block in fxkfac.kfac(program, kind(), data).items():
            close(forward[name].A, block.A)
            close(forward[name].B, torch.eye(3, dtype=F64))

    @pytest.mark.parametrize("fisher", ["type-2", "type-1", "mc", "empirical"])
    @pytest.mark.parametrize("kind", [CE, BCE])
    def test_reduction_is_in_a_alone(self, mlp, fisher, kind):
        _, program, X = mlp
        data = X, TARGETS[kind]
        mean, total = (
            fxkfac.kfac(program, kind(reduction=r), data, fisher=fisher, generator=generator())
            for r in ("mean", "sum")
        )
        counted = 5 if kind is CE else 15
        assert (mean.count, mean.reduction, total.reduction) == (counted, 1 / counted, 1)
        for name, block in total.items():
            close(mean[name].A * counted, block.A)
            close(mean[name].B, block.B)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_square_loss_has_its_factor_two(self, mlp, reduction):
        _, program, X = mlp
        factors = fxkfac.kfac(program, MSE(reduction=reduction), (X, TARGETS[MSE]))
        assert factors.reduction == pytest.approx(2 / 15 if reduction == "mean" else 2)

    def test_empirical_b_is_that_of_the_gradients(self, mlp):
        model, program, X = mlp
        data = X, TARGETS[CE]
        logits = model(X).detach().requires_grad_()
        (g,) = torch.autograd.grad(CE(reduction="sum")(logits, data[1]), logits)
        factors = fxkfac.kfac(program, CE(), data, fisher="empirical")
        close(factors["2.weight"].B, g.T @ g / 5)  # B = (1/#rows) Σ g gᵀ


def sequence(params, x):
    """Logits (N, C, T) of a net that shares no weight over the positions."""
    return (torch.tanh(x @ params["W1"]) @ params["W2"]).reshape(-1, 3, 2)


def plain(params, x):
    return torch.tanh(x @ params["W1"]) @ params["W2"]


W3 = torch.tensor([0.5, 2.0, 1.5], dtype=F64)
SOFT = rand(1, 3, seed=8).softmax(1)
VARIANTS = {
    "class weights": (plain, CE(weight=W3), classes(1)),
    "class weights, sum": (plain, CE(weight=W3, reduction="sum"), classes(1)),
    "label smoothing": (plain, CE(label_smoothing=0.2), classes(1)),
    "smoothing and weights": (plain, CE(label_smoothing=0.2, weight=W3), classes(1)),
    "soft targets": (plain, CE(), SOFT),
    "soft targets and weights": (plain, CE(weight=W3), SOFT),
    "label dims": (sequence, CE(), classes(1, 2)),
    "label dims, sum": (sequence, CE(reduction="sum"), classes(1, 2)),
    "ignored position": (sequence, CE(), torch.tensor([[1, -100]])),
    "ignored class": (sequence, CE(ignore_index=1), torch.tensor([[1, 2]])),
    "all options": (
        sequence,
        CE(weight=W3, ignore_index=0, label_smoothing=0.1),
        torch.tensor([[0, 2]]),
    ),
    "pos_weight": (plain, BCE(pos_weight=W3), rand(1, 3, seed=9).sigmoid()),
    "weight and pos_weight": (plain, BCE(weight=W3.flip(0), pos_weight=W3), SOFT),
    "bce, label dims": (sequence, BCE(), rand(1, 3, 2, seed=9).sigmoid()),
}


@pytest.fixture(scope="module")
def functions():
    """The two functions above: (params, program)."""
    params = {plain: {"W1": rand(4, 3), "W2": rand(3, 3, seed=1)}}
    params[sequence] = {"W1": rand(4, 3), "W2": rand(3, 6, seed=1)}
    return {f: (p, fxkfac.trace(f, rand(4, 4), p)) for f, p in params.items()}


class TestLossVariants:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_block_is_the_ggn_for_one_datum(self, functions, variant):
        f, loss, y = VARIANTS[variant]
        params, program = functions[f]
        data = rand(1, 4, seed=7), y
        factors = fxkfac.kfac(program, loss, data)
        for name in ("W1", "W2"):
            expected = exact.ggn(f, loss, data, name, params)
            assert expected.norm() > 1e-6
            close(factors.dense(name), expected)
            # stored as (in, out): A ⊗ B is the row-major order
            close(torch.kron(factors[name].A, factors[name].B), expected)

    @pytest.mark.parametrize(
        "loss",
        [
            MSE(),
            CE(),
            CE(weight=W3),
            CE(weight=W3, ignore_index=2, label_smoothing=0.1),
            CE(reduction="sum"),
            BCE(pos_weight=W3),
        ],
        ids=["mse", "ce", "weights", "ignored", "sum", "bce"],
    )
    def test_the_reduction_belongs_to_all_data(self, mlp, loss):
        _, program, X = mlp
        y = torch.tensor([0, 1, 2, 1, 2]) if isinstance(loss, CE) else TARGETS[type(loss)]
        if getattr(loss, "ignore_index", -100) == 2:
            y = torch.tensor([0, 2, 1, 2, 1])  # the batches differ in how much is ignored
        split = fxkfac.kfac(program, loss, [(X[:4], y[:4]), (X[4:], y[4:])])
        whole = fxkfac.kfac(program, loss, (X, y))
        assert (split.n, split.count) == (whole.n, pytest.approx(whole.count))
        same_factors(split, whole)

    def test_a_likelihood_of_the_users_own(self, functions):
        params, program = functions[plain]
        loss = Likelihood.from_distribution(lambda f: D.Poisson(f.exp()))
        data = rand(1, 4, seed=7), torch.tensor([[0.0, 2.0, 3.0]], dtype=F64)
        factors = fxkfac.kfac(program, loss, data)
        for name in ("W1", "W2"):
            close(factors.dense(name), exact.ggn(plain, loss, data, name, params))
        sampled = fxkfac.kfac(
            program, loss, data, fisher="mc", mc_samples=4000, generator=generator()
        )
        assert off(sampled["W1"].B, factors["W1"].B) < 0.1


class TestMerge:
    @pytest.fixture(scope="class")
    @classmethod
    def parts(cls, mlp):
        _, program, X = mlp
        y, loss = classes(5), CE(weight=W3)
        cuts = itertools.pairwise([0, 2, 3, 5])
        parts = [fxkfac.kfac(program, loss, (X[a:b], y[a:b])) for a, b in cuts]
        return parts, fxkfac.kfac(program, loss, (X, y))

    def test_parts_add_up_to_the_whole(self, parts):
        (a, b, c), whole = parts
        same_factors(a + b + c, whole)
        same_factors(sum(parts[0]), whole)
        assert (a + b + c).n == 5
        assert (a + b + c).count == pytest.approx(whole.count)

    def test_addition_is_associative_and_commutes(self, parts):
        (a, b, c), _ = parts
        same_factors((a + b) + c, a + (b + c))
        same_factors(a + b, b + a)

    def test_parts_stay_as_they_are(self, parts):
        (a, b, _), _ = parts
        before = a["0.weight"].A.clone(), a.n
        _ = a + b
        assert torch.equal(a["0.weight"].A, before[0])
        assert a.n == before[1]

    def test_sampled_parts_add_up(self, mlp):
        _, program, X = mlp
        y, g = classes(5), generator(3)
        pairs = [(X[:2], y[:2]), (X[2:], y[2:])]
        a, b = (fxkfac.kfac(program, CE(), p, fisher="mc", generator=g) for p in pairs)
        whole = fxkfac.kfac(program, CE(), pairs, fisher="mc", generator=generator(3))
        same_factors(a + b, whole)  # from the same draws, but summed in another order

    def test_diagonals_add_up(self, normed):
        _, program, (X, y) = normed
        a, b = (fxkfac.kfac(program, CE(), (X[s], y[s])) for s in (slice(2), slice(2, None)))
        whole = fxkfac.kfac(program, CE(), (X, y))
        close((a + b)["norm.weight"].diagonal, whole["norm.weight"].diagonal)

    @pytest.mark.parametrize("structure", [{}, {"*": "diagonal"}])
    def test_a_part_without_a_batch_adds_nothing(self, mlp, structure):
        model, _, X = mlp
        program = fxkfac.trace(model, X, structure=structure)
        some = fxkfac.kfac(program, CE(), (X, classes(5)))
        with pytest.raises(NoDataError) as info:
            fxkfac.kfac(program, CE(), [])
        none = info.value.part
        for whole in (none + some, some + none):
            assert (whole.n, list(whole)) == (some.n, list(some))
            close(whole.dense(), some.dense())
        assert (none + none).n == 0
        with pytest.raises(OptionError, match="of no data"):
            fxkfac.RunningAverage().update(none)

    def test_a_part_without_a_target_that_counts_is_not_averaged(self, mlp):
        """Its A is without R, 1/N times as large in other batches."""
        _, program, X = mlp
        average = fxkfac.RunningAverage(0.5)
        average.update(fxkfac.kfac(program, CE(), (X, classes(5))))
        before = average.dense().clone()
        with pytest.raises(NoDataError) as info:
            fxkfac.kfac(program, CE(), (X, torch.full((5,), -100)))
        with pytest.raises(NoDataError, match="ignored"):
            average.update(info.value.part)
        assert torch.equal(average.dense(), before)


class TestRandomness:
    SAMPLED = pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])

    @staticmethod
    def sampled(mlp, fisher, g=None):
        _, program, X = mlp
        return fxkfac.kfac(program, CE(), (X, classes(5)), fisher=fisher, generator=g)

    @SAMPLED
    def test_the_same_state_gives_the_same_bits(self, mlp, fisher):
        first, second = (self.sampled(mlp, fisher, generator(5)) for _ in range(2))
        same_factors(first, second, exactly=True)

    @SAMPLED
    def test_another_state_gives_other_factors(self, mlp, fisher):
        first, second = (self.sampled(mlp, fisher, generator(seed)) for seed in (5, 6))
        assert not torch.allclose(first["0.weight"].B, second["0.weight"].B)

    @SAMPLED
    def test_a_generator_goes_on_from_call_to_call(self, mlp, fisher):
        for g in (None, generator(5)):
            first, second = (self.sampled(mlp, fisher, g) for _ in range(2))
            assert not torch.allclose(first["0.weight"].B, second["0.weight"].B)

    def test_the_default_follows_the_global_seed(self, mlp):
        model, _, X = mlp
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                program = fxkfac.trace(model, X)
                found.append(self.sampled((model, program, X), "mc")["0.weight"].B)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_the_global_state_is_the_callers(self):
        make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
        model, data = seeded(make).train(), (rand(5, 4), classes(5))
        before = torch.get_rng_state()
        program = fxkfac.trace(model, data[0])
        fxkfac.check(program, CE(), data)
        for fisher in ("type-2", "mc", "curvature-propagation"):
            fxkfac.kfac(program, CE(), data, fisher=fisher)
        loss = Likelihood.from_distribution(lambda f: D.Categorical(logits=f))
        fxkfac.kfac(program, loss, data, fisher="mc")
        assert torch.equal(torch.get_rng_state(), before)

    def test_dropout_is_drawn_from_the_generator(self):
        make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
        program = fxkfac.trace(seeded(make).train(), rand(5, 4))
        a, b, c = (
            fxkfac.kfac(program, CE(), (rand(5, 4), classes(5)), generator=generator(seed))
            for seed in (1, 1, 2)
        )
        same_factors(a, b, exactly=True)
        assert not torch.allclose(a["2.weight"].A, c["2.weight"].A)


class TestParameters:
    def test_params_stand_in_for_the_models_own(self, mlp):
        _, program, X = mlp
        other = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), seed=9)
        data = X, classes(5)
        found = fxkfac.kfac(program, CE(), data, params=dict(other.named_parameters()))
        same_factors(found, fxkfac.kfac(fxkfac.trace(other, X), CE(), data))
        assert off(found.dense(), fxkfac.kfac(program, CE(), data).dense()) > 0.1
        errors = fxkfac.check(program, CE(), data, params=dict(other.named_parameters()))
        assert max(errors.values()) < 1e-12

    @pytest.mark.parametrize("function", [fxkfac.kfac, fxkfac.step])
    def test_tensors_that_inference_mode_has_made(self, mlp, function):
        model, program, X = mlp
        with torch.inference_mode():
            made, params = X.clone(), {n: t.clone() for n, t in model.named_parameters()}
        expected = function(program, CE(), (X, classes(5)), fisher="empirical")
        found = function(program, CE(), (made, classes(5)), params, fisher="empirical")
        same_factors(*(getattr(r, "factors", r) for r in (found, expected)), exactly=True)

    def test_data_to_check_that_inference_mode_has_made(self, mlp):
        _, program, X = mlp
        with torch.inference_mode():
            made = X.clone(), classes(5)
        assert max(fxkfac.check(program, CE(), made).values()) < 1e-12

    def test_sums_with_something_else(self, parts_of_one):
        for other in (fxkfac.sum_of(parts_of_one, parts_of_one), 3):
            with pytest.raises(TypeError, match="unsupported operand"):
                parts_of_one + other
            with pytest.raises(TypeError, match="unsupported operand"):
                other + parts_of_one

    @pytest.fixture
    def parts_of_one(self, mlp):
        return fxkfac.kfac(mlp[1], CE(), (mlp[2], classes(5)))

    def test_params_of_a_function_may_be_nested(self):
        def f(params, x):
            return torch.tanh(x @ params["a"]["W"]) @ params["b"]["W"]

        params = {"a": {"W": rand(4, 3)}, "b": {"W": rand(3, 3, seed=1)}}
        other = {"a": {"W": rand(4, 3, seed=2)}, "b": {"W": rand(3, 3, seed=3)}}
        data = rand(5, 4, seed=4), classes(5)
        program = fxkfac.trace(f, data[0], params)
        found = fxkfac.kfac(program, CE(), data, params=other)
        assert list(found) == ["a.W", "b.W"]
        same_factors(found, fxkfac.kfac(fxkfac.trace(f, data[0], other), CE(), data))

    def test_patterns_select(self, mlp):
        model, _, X = mlp
        program = fxkfac.trace(model, X, params=["2.*"])
        factors = fxkfac.kfac(program, CE(), (X, classes(5)))
        assert list(factors) == ["2.weight"]
        assert factors["2.weight"].params == ("2.weight", "2.bias")

    def test_the_users_tensors_are_left_alone(self, mlp):
        model, program, X = mlp
        before = {n: (p.clone(), p.grad) for n, p in model.named_parameters()}
        fxkfac.kfac(program, CE(), (X, classes(5)))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name][0])
            assert p.requires_grad
            assert p.grad is before[name][1]
        assert not X.requires_grad

    def test_separate_weight_and_bias(self, mlp):
        model, program, X = mlp
        data = X, classes(5)
        separate = fxkfac.kfac(program, CE(), data, separate_weight_and_bias=True)
        together = fxkfac.kfac(program, CE(), data)
        assert set(separate) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert set(together) == {"0.weight", "2.weight"}
        for layer in ("0", "2"):
            weight, bias = (separate[name] for name in joint(layer))
            assert (weight.params, bias.params) == ((f"{layer}.weight",), (f"{layer}.bias",))
            whole = together[f"{layer}.weight"]
            close(whole.A[:-1, :-1], weight.A)
            close(whole.B, weight.B)
            # the block of a bias alone is exact, whatever the model
            close(bias.dense(), exact.ggn(model, CE(), data, f"{layer}.bias"))

    def test_a_parameter_that_is_used_nowhere(self):
        def f(params, x):
            return x @ params["W"]

        params = {"W": rand(4, 3), "spare": rand(2)}
        program = fxkfac.trace(f, rand(5, 4), params)
        factors = fxkfac.kfac(program, CE(), (rand(5, 4), classes(5)))
        assert list(factors) == ["W", "spare"]
        assert torch.equal(factors.dense("spare"), torch.zeros(2, 2, dtype=F64))
        close(factors.dense()[:12, :12], factors.dense("W"))
        assert not factors.dense()[12:].any()
        assert "spare" in str(program)


class TestBlocks:
    def test_shapes(self, mlp):
        _, program, X = mlp
        block = fxkfac.kfac(program, CE(), (X, classes(5)))["0.weight"]
        assert block.params == ("0.weight", "0.bias")
        assert block.shapes == ((3, 4), (3,))
        assert (block.A.shape, block.B.shape, block.numel) == ((5, 5), (3, 3), 15)
        close(block.dense(), turned(block))
        assert block.A[-1, -1].item() == pytest.approx(1)  # R N, the bias' own entry

    def test_groups_have_an_axis_of_their_own(self):
        def f(params, x):  # experts, each with its own part of the input
            return torch.einsum("ngi,gio->ngo", x, params["W"])

        params, data = {"W": rand(2, 4, 3)}, (rand(5, 2, 4), rand(5, 2, 3, seed=1))
        block = fxkfac.kfac(fxkfac.trace(f, data[0], params), MSE(), data)["W"]
        assert (block.A.shape, block.B.shape) == ((2, 4, 4), (2, 3, 3))
        close(block.dense(), exact.ggn(f, MSE(), data, "W", params))

    def test_dense_is_in_the_order_asked_for(self, functions):
        """Linear in both, so that every block is the exact one; stored as (in, out)."""

        def f(params, x):
            return x @ params["U"] @ params["V"]

        params = {"U": rand(4, 3), "V": rand(3, 2, seed=1)}
        data = rand(6, 4, seed=2), rand(6, 2, seed=3)
        factors = fxkfac.kfac(fxkfac.trace(f, data[0], params), MSE(), data)
        U, V = (exact.ggn(f, MSE(), data, name, params) for name in "UV")
        close(factors.dense("U"), U)
        close(factors.dense("V"), V)
        for names, order in ((("U", "V"), (U, V)), (("V", "U"), (V, U)), ((), (U, V))):
            close(factors.dense(*names), torch.block_diag(*order))

    def test_dense_of_part_of_a_block(self, mlp):
        _, program, X = mlp
        factors = fxkfac.kfac(program, CE(), (X, classes(5)))
        whole = factors.dense("0.weight", "0.bias")
        close(factors.dense("0.weight"), whole[:12, :12])
        close(factors.dense("0.bias"), whole[12:, 12:])
        swapped = [*range(12, 15), *range(12)]
        close(factors.dense("0.bias", "0.weight"), whole[swapped][:, swapped])
        between = factors.dense("2.bias", "0.bias")
        close(between, torch.block_diag(factors.dense("2.bias"), factors.dense("0.bias")))

    def test_dense_of_all_has_zeros_between_blocks(self, mlp):
        _, program, X = mlp
        factors = fxkfac.kfac(program, CE(), (X, classes(5)))
        blocks = [factors.dense(*joint(layer)) for layer in ("0", "2")]
        close(factors.dense(), torch.block_diag(*blocks))

    @pytest.mark.parametrize("separate", [False, True])
    def test_solve(self, mlp, separate):
        model, program, X = mlp
        factors = fxkfac.kfac(program, CE(), (X, classes(5)), separate_weight_and_bias=separate)
        gradients = {n: rand(*p.shape, seed=k) for k, (n, p) in enumerate(model.named_parameters())}
        solved = factors.solve(gradients, damping=0.1)
        flat = torch.cat([g.flatten() for g in gradients.values()])
        dense = factors.dense()
        expected = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=F64), flat)
        assert set(solved) == set(gradients)
        close(torch.cat([solved[name].flatten() for name in gradients]), expected)
        assert {n: s.shape for n, s in solved.items()} == {n: g.shape for n, g in gradients.items()}

    def test_solve_one_block_of_several(self, mlp):
        _, program, X = mlp
        factors = fxkfac.kfac(program, CE(), (X, classes(5)))
        gradients = {"2.weight": rand(3, 3), "2.bias": rand(3, seed=1)}
        assert set(factors.solve(gradients, damping=0.1)) == set(gradients)


class TestTiedWeight:
    """One weight as an embedding-like layer and, turned, as the head."""

    @pytest.fixture(scope="class")
    @classmethod
    def tied(cls):
        def f(params, x):
            return torch.tanh(x @ params["W"]) @ params["W"].T

        params, data = {"W": rand(4, 3)}, (rand(5, 4, seed=1), rand(5, 4, seed=2))
        return params["W"], fxkfac.kfac(fxkfac.trace(f, data[0], params), MSE(), data), data

    def test_no_single_product_is_given(self, tied):
        block = tied[1]["W"]
        assert len(block.terms) == 2
        for factor in "AB":
            with pytest.raises(FxkfacError, match=r"W .*2 Kronecker(.|\n)*terms"):
                getattr(block, factor)

    def test_dense_is_the_sum(self, tied):
        W, factors, (X, _) = tied
        R, N = 2 / 20, 5
        h = torch.tanh(X @ W)
        J = (1 - h**2).unsqueeze(2) * W.T  # of the prediction in x @ W: [N, hidden, out]
        below = torch.kron(R * X.T @ X, torch.einsum("nhc,nkc->hk", J, J) / N)
        above = torch.kron(torch.eye(4, dtype=F64), R * h.T @ h)  # stored (out, in) there
        close(factors.dense("W"), below + above)

    def test_solve(self, tied):
        factors, g = tied[1], rand(4, 3, seed=3)
        expected = torch.linalg.solve(factors.dense() + 0.1 * torch.eye(12, dtype=F64), g.flatten())
        close(factors.solve({"W": g}, damping=0.1)["W"].flatten(), expected)

    def test_uses_in_one_orientation_are_one_product(self):
        def f(params, x):
            return torch.tanh(x @ params["W"]) @ params["W"]

        params, X = {"W": rand(3, 3)}, rand(5, 3, seed=1)
        block = fxkfac.kfac(fxkfac.trace(f, X, params), MSE(), (X, X))["W"]
        h = torch.tanh(X @ params["W"])
        close(block.A, 2 / 15 * (X.T @ X + h.T @ h))
        J = (1 - h**2).unsqueeze(2) * params["W"]
        close(block.B, (torch.einsum("nhc,nkc->hk", J, J) + 5 * torch.eye(3, dtype=F64)) / 10)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, -1.0]))

    def forward(self, x):
        return self.head(self.scale * torch.tanh(self.norm(self.linear(x))))


@pytest.fixture(scope="module")
def normed():
    model, data = seeded(Normed), (rand(5, 4, seed=1), classes(5))
    with torch.no_grad():
        model.norm.weight += rand(3, seed=2) / 4
    return model, fxkfac.trace(model, data[0], unsupported="diagonal"), data


class TestFallbacks:
    NAMES = ("norm.weight", "norm.bias", "scale")

    @pytest.mark.parametrize(
        ("fisher", "truth"), [("type-2", exact.ggn), ("empirical", exact.empirical_fisher)]
    )
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_diagonal_is_exact(self, normed, fisher, truth, reduction):
        model, program, data = normed
        loss = CE(reduction=reduction)
        factors = fxkfac.kfac(program, loss, data, fisher=fisher)
        for name in self.NAMES:
            expected = truth(model, loss, data, name).diag()
            close(factors.dense(name).diag(), expected)
        assert set(factors) >= {"linear.weight", "norm.weight", "scale", "head.weight"}

    def test_the_diagonal_is_exact_over_several_batches(self, normed):
        model, program, (X, y) = normed
        factors = fxkfac.kfac(program, CE(), [(X[:4], y[:4]), (X[4:], y[4:])])
        close(factors["norm.weight"].diagonal, exact.ggn(model, CE(), (X, y), "norm.weight").diag())

    def test_diagonals_are_solved(self, normed):
        _, program, data = normed
        block = fxkfac.kfac(program, CE(), data)["scale"]
        g = rand(3)
        close(block.solve(g, 0.1), g / (block.dense().diag() + 0.1))

    def test_the_printed_program_names_the_diagonal(self, normed):
        printed = str(normed[1]).splitlines()
        for name in ("norm.weight", "scale"):
            lines = [line for line in printed if line.startswith(f"diagonal: {name}")]
            assert len(lines) == 1, printed

    def test_skip_leaves_out_and_says_so(self, normed):
        model, diagonal, data = normed
        program = fxkfac.trace(model, data[0], structure={"norm.*": "skip", "scale": "skip"})
        factors = fxkfac.kfac(program, CE(), data)
        assert "scale" not in factors
        assert "norm.weight" not in factors
        with pytest.raises(KeyError):
            factors.dense("scale")
        lines = [line for line in str(program).splitlines() if line.startswith("skip")]
        assert any("norm.weight" in line for line in lines)
        assert any("scale" in line for line in lines)
        others = fxkfac.kfac(diagonal, CE(), data)
        close(factors["linear.weight"].dense(), others["linear.weight"].dense())


class TestHalfPrecision:
    """A bfloat16 number holds whole numbers up to 256: counts and sums must not be such numbers."""

    def test_counts_and_factors_are_float32(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.shift = nn.Embedding(2, 3), nn.Parameter(torch.zeros(3))

            def forward(self, x):
                return torch.tanh(self.table(x)) + self.shift

        torch.manual_seed(0)
        model = Model().bfloat16()
        x = torch.zeros(1001, dtype=torch.long)
        y = torch.zeros(1001, 3, dtype=torch.bfloat16)
        program = fxkfac.trace(model, torch.tensor([0, 1, 1]))
        factors = fxkfac.kfac(program, MSE(reduction="sum"), (x, y))
        table, shift = factors["table.weight"], factors["shift"]
        assert table.A.dtype == table.B.dtype == shift.B.dtype == torch.float32
        assert table.A.tolist() == [2 * 1001, 0]
        assert shift.A.item() == 2 * 1001
        assert torch.equal(shift.B, torch.eye(3))
        assert factors.dense("shift").tolist() == (2 * 1001 * torch.eye(3)).tolist()
        step = factors.solve({"shift": torch.ones(3, dtype=torch.bfloat16)}, damping=1.0)
        assert step["shift"].dtype == torch.bfloat16
        close(step["shift"].float(), torch.full((3,), 1 / 2003), rtol=1e-2, atol=0.0)
