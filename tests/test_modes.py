"""Ways to run a model: frozen in part, in low precision, under autocast, with checkpoints."""

import math
from collections import Counter

import pytest
import torch
from drawn import F64, rand, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxkfac
from fxkfac.curvature.together import enlarged, reduced
from fxkfac.errors import NonFiniteError
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.optim.gradients import loss_and_gradients

CE, MSE = nn.CrossEntropyLoss, nn.MSELoss
close = torch.testing.assert_close
X, Y = rand(5, 4, seed=5), rand(5, 3, seed=6)
BF16 = torch.bfloat16


class Counted(TorchDispatchMode):
    """Counts the ATen ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def deep():
    """Six layers of width 4 with tanh, then a head."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 3))


class TestFrozen:
    """Nothing is computed below the lowest selected parameter, but its input."""

    # selected -> how many tanh layers lie above its lowest parameter
    ABOVE = (("*", 6), ("6.*", 3), ("10.*", 1), ("12.*", 0), ("12.bias", 0))

    @staticmethod
    def ops(selected, **options):
        program = fxkfac.trace(seeded(deep), X, **options)
        fxkfac.kfac(program, MSE(), (X, Y), fisher="empirical")  # compiles
        with Counted() as counted:
            fxkfac.kfac(program, MSE(), (X, Y), fisher="empirical")
        return counted.ops

    @pytest.mark.parametrize(("lowest", "above"), ABOVE)
    def test_no_backward_below_the_lowest(self, lowest, above):
        last = ["12.*"] if lowest != "12.bias" else []
        found = self.ops(lowest, params=[lowest, *last])
        assert found["aten.tanh.default"] == 6
        assert found["aten.tanh_backward.default"] == above
        assert found["aten.mm.default"] <= above + 1  # no gradient of a weight, ever

    @pytest.mark.parametrize("kind", ["dense", "diagonal"])
    def test_nor_for_exact_blocks(self, kind):
        found = self.ops("10.*", params=["10.*"], structure={"*": kind})
        assert found["aten.tanh_backward.default"] == 1

    def test_autograd_keeps_nothing_from_below(self):
        program = fxkfac.trace(seeded(deep), X, ["12.*"])
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            program.run(X)
        assert not kept

    def test_frozen_by_requires_grad(self):
        model = seeded(deep)
        model[:12].requires_grad_(False)
        by_flag, by_name = fxkfac.trace(model, X), fxkfac.trace(model, X, ["12.*"])
        assert by_flag.parameters == by_name.parameters == ("12.weight", "12.bias")
        close(*(fxkfac.kfac(p, MSE(), (X, Y)).dense() for p in (by_flag, by_name)))


class TestFrozenNorms:
    """What a frozen scale enters stays whole; fixed statistics are a scale and a shift."""

    @staticmethod
    def graph_of(program):
        return [str(node.target) for node in program.graph_module.graph.nodes]

    @pytest.mark.parametrize("scale", [True, False], ids=["scale", "frozen"])
    def test_a_layer_norm(self, scale):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
        program = fxkfac.trace(model, X, ["0.*", "2.*", *["1.*"] * scale])
        assert ("aten.mul.Tensor" in self.graph_of(program)) == scale
        assert max(fxkfac.check(program, MSE(), (X, Y)).values()) < 1e-12

    @pytest.mark.parametrize("scale", ["selected", "frozen", "absent"])
    @pytest.mark.parametrize("space", [(), (3, 2)], ids=["vectors", "images"])
    def test_a_batch_norm_in_eval_mode(self, scale, space):
        """Autograd keeps no input of the norm, and the model is what it was."""

        def make():
            layer = nn.Conv2d(4, 6, 1) if space else nn.Linear(4, 6)
            norm = (nn.BatchNorm2d if space else nn.BatchNorm1d)(6, affine=scale != "absent")
            norm.running_mean, norm.running_var = rand(6), 0.5 + rand(6) ** 2
            head = nn.Linear(6 * math.prod(space), 3)
            return nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), head).eval()

        x = rand(5, 4, *space)
        selected = ["0.*", "4.*", *["1.*"] * (scale == "selected")]
        program = fxkfac.trace(seeded(make), x, selected)
        found = self.graph_of(program)
        assert "aten.addcmul.default" in found
        assert not any("batch_norm" in name for name in found)
        assert max(fxkfac.check(program, MSE(), (x, Y)).values()) < 1e-12
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            program.run(x)
        assert sum(t.numel() == 5 * 6 * math.prod(space) for t in kept) == 1  # what ReLU gave

    def test_other_dtypes_and_batch_statistics_stay_as_they_are(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
        found = self.graph_of(fxkfac.trace(model, X, ["0.*", "2.*"]))
        assert any("batch_norm" in name for name in found)
        half = model.to(BF16).eval()
        half[1].float()
        found = self.graph_of(fxkfac.trace(half, X.to(BF16), ["0.*", "2.*"]))
        assert "aten.addcmul.default" not in found


class Mixed(nn.Module):
    """A layer, a convolution, a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(4, 6), nn.Conv1d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        h = self.conv(self.first(x).tanh().unsqueeze(-1)).squeeze(-1)
        return self.last(h.relu()).float()


class Inside(Mixed):
    """The same, with autocast inside."""

    def forward(self, x):
        with torch.autocast("cpu", BF16):
            return super().forward(x)


class TestLowPrecision:
    X, Y = X.float(), Y.float()

    def factors(self, model, x=None, **options):
        program = fxkfac.trace(model, self.X if x is None else x)
        return fxkfac.kfac(program, MSE(), (self.X if x is None else x, self.Y), **options)

    @staticmethod
    def near(found, expected):
        """Equal up to the rounding of bfloat16, and not more exactly than that."""
        off = (found.dense() - expected.dense()).norm() / expected.dense().norm()
        assert 1e-6 < off < 0.05

    @staticmethod
    def model():
        return seeded(Mixed).float()

    def test_factors_of_bfloat16_are_float32(self):
        """Products in bfloat16 would have three digits, and eigenvectors none."""
        x = self.X.to(BF16)
        found = self.factors(self.model().to(BF16), x)
        assert {t.dtype for b in found.values() for t in (b.A, b.B)} == {torch.float32}
        ones = torch.cat([x.float(), torch.ones(5, 1)], 1)
        close(found["first.weight"].A, 2 / 15 * ones.T @ ones, rtol=1e-6, atol=1e-6)
        self.near(found, self.factors(self.model()))

    def test_autocast_inside(self):
        inside = Inside()
        inside.load_state_dict(self.model().state_dict())
        found = self.factors(inside)
        assert {t.dtype for b in found.values() for t in (b.A, b.B)} == {torch.float32}
        self.near(found, self.factors(self.model()))

    def test_autocast_around_is_autocast_inside(self):
        inside = Inside()
        inside.load_state_dict(self.model().state_dict())
        with torch.autocast("cpu", BF16):
            around = self.factors(self.model())
        close(around.dense(), self.factors(inside).dense(), rtol=1e-5, atol=1e-6)

    def test_it_belongs_to_the_program_from_the_trace_on(self):
        """As everything else that was so when the model was traced; the arithmetic has none."""
        model, data = self.model(), (self.X, self.Y)
        plain = fxkfac.trace(model, self.X)
        with torch.autocast("cpu", BF16):
            cast = fxkfac.trace(model, self.X)
            inside = [fxkfac.kfac(p, MSE(), data) for p in (plain, cast)]
            dense = [f.dense() for f in inside]
            assert all(max(fxkfac.check(p, MSE(), data).values()) < 1e-2 for p in (plain, cast))
        outside = [fxkfac.kfac(p, MSE(), data) for p in (plain, cast)]
        for a, b, c in zip(dense, outside, inside, strict=True):
            assert torch.equal(a, b.dense())
            assert torch.equal(a, c.dense())
        self.near(*outside)

    def test_the_natural_gradient_is_not_rounded_either(self):
        found = self.factors(self.model())
        gradients = {n: torch.ones_like(p) for n, p in self.model().named_parameters()}
        expected = found.solve(gradients, damping=0.1)
        with torch.autocast("cpu", BF16):
            close(found.solve(gradients, damping=0.1), expected, rtol=0, atol=0)

    def test_exact_matrices_under_autocast(self):
        """The model runs under autocast, the products of the ground truth do not."""
        one, model = (self.X[:1], self.Y[:1]), self.model()
        with torch.autocast("cpu", BF16):
            expected = fxkfac.exact.ggn(model, MSE(), one, ["last.weight"])
            program = fxkfac.trace(model, self.X)
            factors = fxkfac.kfac(program, MSE(), one, separate_weight_and_bias=True)
        assert expected.dtype == torch.float32
        close(factors.dense("last.weight"), expected, rtol=1e-5, atol=1e-6)


class Faint(nn.Module):
    """With a part whose gradients are about as large as the smallest number of float16, 6e-8."""

    def __init__(self):
        super().__init__()
        self.way, self.first = nn.Linear(4, 3), nn.Linear(4, 5)
        self.small, self.smaller, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        with torch.no_grad():
            self.small.weight *= 1e-3
            self.smaller.weight *= 1e-3

    def forward(self, x):
        return self.way(x) + self.last(self.smaller(self.small(self.first(x).tanh())))


class FaintRates(Faint):
    """With a parameter in that part that has no normal form."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x):
        h = self.first(x).tanh() * self.rates.exp()
        return self.way(x) + self.last(self.smaller(self.small(h)))


class TestGradientsThatFloat16DoesNotHold:
    """They go back as large ones."""

    X, Y = rand(6, 4).float(), torch.arange(6) % 3

    def model(self):
        return seeded(Faint).float()

    def near(self, compute, parameters=None):
        model = self.model()
        expected = compute(fxkfac.trace(model, self.X, parameters))
        with torch.autocast("cpu", torch.float16):
            program = fxkfac.trace(model, self.X, parameters)
        found = compute(program)
        for name, t in expected.items():
            assert t.any()
            assert 0 < (found[name] - t).norm() < 0.01 * t.norm()

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_factors(self, fisher, backend):
        def compute(program):
            options = {"fisher": fisher, "backend": backend}
            factors = fxkfac.kfac(program, CE(), (self.X, self.Y), **options)
            return {name: block.B for name, block in factors.items()}

        self.near(compute)

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_gradients_of_a_step(self, fisher, backend):
        def compute(program):
            options = {"fisher": fisher, "backend": backend}
            return fxkfac.step(program, CE(), (self.X, self.Y), **options).gradients

        self.near(compute)

    def test_exact_blocks_without_taps(self):
        def moments():
            program = fxkfac.trace(model, self.X, unsupported="diagonal")
            factors = fxkfac.kfac(program, CE(), (self.X, self.Y))
            return factors["rates"].dense()

        model = seeded(FaintRates).float()
        expected = moments()
        with torch.autocast("cpu", torch.float16):
            found = moments()
        assert 0 < (found - expected).norm() < 0.01 * expected.norm()

    def test_influence(self):
        data = self.X, self.Y

        def compute(program):
            factors = fxkfac.kfac(program, CE(), data, fisher="empirical")
            scores = fxkfac.influence(program, CE(), factors, data, data, damping=1e-14)
            return {"scores": scores}

        self.near(compute, ["first.*"])

    @pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e4])
    def test_vectors_stay_finite(self, size):
        vectors = size * torch.ones(1, 6, 3, dtype=torch.float16)
        larger, power = enlarged(vectors, True)
        assert larger.isfinite().all()
        close(larger.float(), power * vectors.float(), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_gradients_keep_their_digits(self, dtype):
        """Those of a part in float64 of a model in float16 are as they were, to its last digit."""
        g, power = (1 + rand(5) * 1e-3).to(dtype), torch.tensor(2.0**9)
        found = reduced(g * power.to(dtype), power)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        close(found, g.to(found.dtype), rtol=0, atol=0)


class TestGradientsInHalfPrecision:
    """They are sums over data, and over batches, which it cannot hold."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("n", "batches", "size"), [(256, 1, 1.0), (64, 2, 1000.0), (4, 500, 1.0)]
    )
    def test_sums(self, dtype, n, batches, size):
        model, x = seeded(lambda: nn.Linear(3, 2)).to(dtype), rand(n, 3).to(dtype)
        y = size * (1 + rand(n, 2, seed=1).abs()).to(dtype)
        expected = (model(x).double() - y.double()).mean(0)
        for source in (fxkfac.step, self.without_factors):
            found = source(fxkfac.trace(model, x), nn.MSELoss(), [(x, y)] * batches)
            g = found.gradients["bias"] if source is fxkfac.step else found
            assert g.dtype == dtype
            close(g.double(), expected, rtol=0.01, atol=0)

    @staticmethod
    def without_factors(program, loss, data):
        """As an optimizer takes them where no factors are due."""
        of, generator = likelihood_of(loss), torch.Generator()
        return loss_and_gradients(program, of, data, generator, ["weight", "bias"])[1]["bias"]

    def test_what_float16_cannot_hold_is_refused(self):
        model, x = seeded(lambda: nn.Linear(3, 2)).half(), rand(64, 3).half()
        y = torch.full((64, 2), 1100.0).half()
        program, loss = fxkfac.trace(model, x), nn.MSELoss(reduction="sum")
        with pytest.raises(NonFiniteError, match="the gradient in 'bias'"):
            fxkfac.step(program, loss, (x, y))


class Checkpointed(nn.Module):
    """Part of it computed again in the backward pass."""

    def __init__(self, on):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.more, self.on = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), on

    def forward(self, x):
        h = self.first(x).tanh()
        if not self.on:
            return self.last(self.more(self.body(h).sin()))
        h = checkpoint(lambda h: self.body(h).sin(), h, use_reentrant=False)
        return self.last(checkpoint_sequential(self.more, 2, h, use_reentrant=False))


class TestCheckpoints:
    @pytest.mark.parametrize("params", [None, ["last.*"], ["body.*", "more.3.*"]])
    def test_are_the_same_model(self, params):
        found = []
        for on in (True, False):
            program = fxkfac.trace(seeded(lambda on=on: Checkpointed(on)), X, params)
            assert max(fxkfac.check(program, MSE(), (X, Y)).values()) < 1e-12
            found.append(fxkfac.kfac(program, MSE(), (X, Y)).dense())
        close(*found)

    def test_of_a_function(self):
        def model(params, x):
            h = checkpoint(lambda x: torch.tanh(x @ params["W"]), x, use_reentrant=False)
            return h @ params["V"]

        params = {"W": rand(4, 4), "V": rand(4, 3)}
        program = fxkfac.trace(model, X, params)
        assert max(fxkfac.check(program, MSE(), (X, Y)).values()) < 1e-12
        assert fxkfac.kfac(program, MSE(), (X, Y))["W"].A.dtype == F64
