"""The traps of capturing a model, and the errors that other KFAC libraries had: a test for each.

In the order of `docs/design.md`. Each expects what is derived by hand, or by autodiff; the long
versions are where the subject is tested.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from drawn import F64, StraightThrough, classes, generator, rand, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxkfac
from fxkfac import exact
from fxkfac.errors import BatchAxisError, CaptureError
from fxkfac.likelihoods.losses import Gaussian

MSE, CE = nn.MSELoss, nn.CrossEntropyLoss
close = torch.testing.assert_close
X, Y, LABELS = rand(5, 4, seed=5), rand(5, 3, seed=6), classes(5, C=3)


def kfac(model, x, y, loss=None, params=None, batch_axis=0, **options):
    """Trace, prove the gradients, and take the factors."""
    program = fxkfac.trace(model, x, params, batch_axis=batch_axis)
    loss = loss or MSE()
    assert max(fxkfac.check(program, loss, (x, y)).values()) < 1e-9
    return fxkfac.kfac(program, loss, (x, y), **options)


def linear(bias=False):
    return seeded(lambda: nn.Linear(4, 3, bias=bias))


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))


@torch.library.custom_op("fxkfac_traps::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    """An op that draws, and does not say so."""
    return x + torch.randn_like(x)


noisy.register_fake(torch.empty_like)
noisy.register_autograd(lambda ctx, g: g)
noisy.register_vmap(lambda info, dims, x: (noisy(x), dims[0]))


class Noisy(nn.Module):
    def forward(self, x):
        return noisy(x)


class Drawing(fxkfac.Likelihood):
    """Labels by the global state."""

    def nll(self, f, y):
        return (f - y).square().sum(1) / 2

    def sample(self, f, generator):
        return f + torch.randn_like(f)


class DrawingToo(Gaussian):
    """The same, made of a likelihood that does not."""

    sample = Drawing.sample


class Made(nn.Module):
    """Modules and tensors by name, and the forward pass as a function of the model and x."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, *x):
        return self.run(self, *x)


class TestTraps:
    """Of the tools: section 4 of the design."""

    def test_custom_backward_is_not_lost_without_a_word(self):
        def model(params, x):
            return StraightThrough.apply(x @ params["W"]) @ params["V"]

        params = {"W": rand(4, 4), "V": rand(4, 3)}
        with contextlib.suppress(CaptureError):
            kfac(model, X, Y, params=params)  # whose gradients are compared with autograd's

    def test_tied_parameters_are_one_by_storage(self):
        a, b = (nn.Linear(4, 4, bias=False) for _ in "ab")
        b.weight = a.weight
        model = Made(lambda m, x: m.b(m.a(x).tanh()), a=a, b=b).double()
        factors = kfac(model, X, rand(5, 4))
        h = torch.tanh(X @ a.weight.T).detach()
        assert list(factors) == ["a.weight"]
        close(factors["b.weight"].A, 2 / 20 * (X.T @ X + h.T @ h))

    def test_batch_norm_in_train_mode_leaves_the_users_buffers(self):
        norm = nn.BatchNorm1d(3, affine=False)
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), norm, nn.Linear(3, 3))).train()
        before = {name: (b, b.clone()) for name, b in model.named_buffers()}
        kfac(model, X, Y)
        for name, buffer in model.named_buffers():
            assert buffer is before[name][0]
            assert torch.equal(buffer, before[name][1])

    @pytest.mark.parametrize("fisher", ["type-2", "type-1"])
    @pytest.mark.parametrize("coupled", ["batch norm", "differences"])
    def test_data_that_depend_on_each_other_send_back_one_by_one(self, coupled, fisher):
        """Together they meet at the taps, in a sum that hangs on the choice of the root."""
        norm = nn.BatchNorm1d(3, affine=False)
        first, rest = linear(), seeded(lambda: nn.Sequential(norm, nn.Tanh(), nn.Linear(3, 3)))

        def heads(h):
            return rest(h) if coupled == "batch norm" else torch.tanh(h - h.mean(0))

        model = Made(lambda m, x: heads(m.first(x)), first=first, rest=rest)
        program = fxkfac.trace(model, X, ["first.*"])
        found = fxkfac.kfac(program, nn.CrossEntropyLoss(), (X, LABELS), fisher=fisher)
        h = first(X)
        f = heads(h)
        expected = torch.zeros(3, 3, dtype=F64)
        for n, σ in enumerate(f.detach().softmax(1)):
            for root in (σ.sqrt().diag() - torch.outer(σ, σ.sqrt())).T:
                v = torch.zeros_like(f)
                v[n] = root
                (g,) = torch.autograd.grad(f, h, v, retain_graph=True)
                expected += g.T @ g / 5
        close(found["first.weight"].B, expected)

    @pytest.mark.parametrize("draw", [nn.Dropout(0.5), Noisy(), nn.Identity()])
    @pytest.mark.parametrize("loss", [MSE(), Drawing(), DrawingToo()])
    def test_what_draws_leaves_the_global_random_state(self, draw, loss):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), draw, nn.Linear(3, 3)))
        before = torch.get_rng_state()
        program = fxkfac.trace(model.train(), X)
        data = [(X, Y), (X[:3], Y[:3])]  # another size is compared with the model
        first, again = (
            fxkfac.kfac(program, loss, data, fisher="mc", generator=generator(0)) for _ in range(2)
        )
        assert torch.equal(torch.get_rng_state(), before)
        close(first["2.weight"].A, again["2.weight"].A, rtol=0, atol=0)
        close(first["2.weight"].B, again["2.weight"].B, rtol=0, atol=0)

    def test_a_mask_that_draws_leaves_the_global_random_state(self):
        x, y = rand(5, 2, 4), rand(5, 2, 3)
        program, before = fxkfac.trace(linear(), x), torch.get_rng_state()
        first, again = (
            fxkfac.kfac(
                program,
                MSE(),
                (x, y),
                mask=lambda x, y: torch.rand(x.shape[:2]) < 0.5,
                generator=generator(0),
            )
            for _ in range(2)
        )
        assert torch.equal(torch.get_rng_state(), before)
        close(first["weight"].A, again["weight"].A, rtol=0, atol=0)

    def test_the_batch_axis_of_attention_is_not_axis_0(self):
        """Inside, tokens come first; reduce is the mean over them, not over the data."""
        attend = nn.MultiheadAttention(4, 2, batch_first=True)
        model = seeded(lambda: Made(lambda m, x: m.attend(x, x, x)[0], attend=attend))
        x = rand(5, 3, 4)
        factors = kfac(model, x, rand(5, 3, 4), sharing="reduce")
        mean = torch.cat([x.mean(1), torch.ones(5, 1, dtype=F64)], 1)
        close(factors["attend.in_proj_weight"].A, 2 / 60 * mean.T @ mean)

    def test_zeros_do_not_hide_the_batch_axis(self):
        """An initial state of zeros fits every layout; so the tap's output is asked, too."""

        def model(params, x):
            h = x.new_zeros(3, x.shape[0], 4)  # tokens first
            h = torch.tanh(h @ params["U"] + x.transpose(0, 1) @ params["W"])
            return h.transpose(0, 1)

        params = {"U": rand(4, 4), "W": rand(2, 4)}
        program = fxkfac.trace(model, rand(5, 3, 2), params)  # tried with 3 data: as many as tokens
        assert [use.batch.axis for use in program.uses] == [program.uses[0].form.rows[1]] * 2
        factors = fxkfac.kfac(program, MSE(), (rand(5, 3, 2), rand(5, 3, 4)), sharing="reduce")
        assert not factors["U"].A.any()

    @pytest.mark.parametrize(
        ("there", "back"),
        [
            (lambda x: x.roll(1, 0), lambda h: h.roll(-1, 0)),
            (lambda x: x.flip(0), lambda h: h.flip(0)),
        ],
        ids=["roll", "flip"],
    )
    def test_a_model_that_moves_the_data_itself(self, there, back):
        """No prediction changes with another datum; but the rows of the bias are out of order."""

        def model(params, x):
            first, second = (torch.cat([x, there(x)]) + params["b"]).tanh().chunk(2)
            return first + 2 * back(second)

        with pytest.raises(BatchAxisError, match="no one axis of its output"):
            fxkfac.kfac(fxkfac.trace(model, X, {"b": rand(4)}), MSE(), (X, rand(5, 4)))

    def test_dropout_does_not_hide_the_batch_axis(self):
        """It would be another one in each run of the experiment."""
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 3)))
        program = fxkfac.trace(model.train(), rand(5, 2, 4))
        assert all(use.batch is not None for use in program.uses)

    @pytest.mark.parametrize("shape", [(6, 5, 2), (5, 6, 4)], ids=["transposed", "strided"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_on_an_input_that_is_not_contiguous(self, shape, bias):
        """A product with an expanded weight in some modes, with a flat one in others."""

        def turned(x):
            return x.transpose(0, 1) if shape[-1] == 2 else x[..., ::2]

        layer, x, y = seeded(lambda: nn.Linear(2, 3, bias)), rand(*shape), rand(5, 6, 3)
        model = Made(lambda m, x: m.layer(turned(x)), layer=layer)
        factors = kfac(model, x, y, batch_axis=1 if shape[-1] == 2 else 0)
        rows = turned(x).reshape(30, 2)
        rows = torch.cat([rows, torch.ones(30, 1, dtype=F64)], 1) if bias else rows
        close(factors["layer.weight"].A, 2 / 90 * rows.T @ rows)

    @pytest.mark.parametrize("grad", [True, False])
    def test_the_fused_encoder_layer_of_eval_mode(self, grad):
        layer = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)).eval()
        x = rand(3, 2, 4)
        with torch.set_grad_enabled(grad):
            factors = kfac(layer, x, rand(3, 2, 4))
        rows = torch.cat([x.flatten(0, 1), torch.ones(6, 1, dtype=F64)], 1)
        close(factors["self_attn.in_proj_weight"].A, 2 / 24 * rows.T @ rows)

    def test_control_flow_is_named(self):
        def model(params, x):
            y = x @ params["W"]
            return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)) @ params["V"]

        with pytest.raises(CaptureError, match=r"torch\.cond at .*test_traps\.py:\d+ in model"):
            fxkfac.trace(model, X, {"W": rand(4, 4), "V": rand(4, 3)})

    def test_checkpoints_are_seen_through(self):
        layers = {"a": linear(), "b": seeded(lambda: nn.Linear(3, 3), seed=1)}
        plain = Made(lambda m, x: m.b(m.a(x).tanh()), **layers)
        again = Made(
            lambda m, x: m.b(checkpoint(lambda x: m.a(x).tanh(), x, use_reentrant=False)), **layers
        )
        close(kfac(again, X, Y).dense(), kfac(plain, X, Y).dense())

    def test_outer_products_are_not_in_bfloat16(self):
        model, x = nn.Linear(4, 3, bias=False), X.float()

        def cast(params, x):
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, params["W"]).float()

        program = fxkfac.trace(cast, x, {"W": model.weight.detach()})
        A = fxkfac.kfac(program, MSE(), (x, Y.float()))["W"].A
        rows = x.bfloat16().float()  # what the op takes
        close(A, 2 / 15 * rows.T @ rows, rtol=1e-6, atol=1e-6)

    def test_no_gradient_of_a_weight_is_computed(self):
        """They would be the only products of this shape."""

        class Shapes(TorchDispatchMode):
            seen = ()

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if "mm" in str(func):
                    self.seen = (*self.seen, tuple(out.shape)[-2:])
                return out

        model = seeded(lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)))
        program = fxkfac.trace(model, X)
        with Shapes() as shapes:
            fxkfac.kfac(program, MSE(), (X, Y))
        assert (5, 7) in shapes.seen  # a gradient at a tap
        assert not {(7, 4), (4, 7), (3, 7), (7, 3)} & set(shapes.seen)


class TestErrorsOfOthers:
    """What other KFAC libraries got wrong."""

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_the_factor_two_of_the_square_loss(self, reduction):
        """MSELoss is 2 · ½‖f − y‖², by sum."""
        R = 2 if reduction == "sum" else 2 / 15
        block = kfac(linear(), X, Y, MSE(reduction=reduction))["weight"]
        close(block.A, R * X.T @ X)
        close(block.B, torch.eye(3, dtype=F64))

    def test_the_factor_c_of_the_mean(self):
        """The mean is over the C entries of the square loss, over the data of cross-entropy."""
        close(kfac(linear(), X, Y, MSE())["weight"].A, 2 / (5 * 3) * X.T @ X)
        close(kfac(linear(), X, LABELS, CE())["weight"].A, 1 / 5 * X.T @ X)

    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_the_length_of_a_sequence(self, sharing):
        """Expand counts every position in A, in B their mean; reduce every datum."""
        x, y = rand(5, 6, 4), rand(5, 6, 3)
        block = kfac(linear(), x, y, MSE(reduction="sum"), sharing=sharing)["weight"]
        rows = x.flatten(0, 1) if sharing == "expand" else x.mean(1)
        close(block.A, 2 * rows.T @ rows)
        # reduce: each of the 6 positions' vectors is a vector of its own
        close(block.B, (1 if sharing == "expand" else 6) * torch.eye(3, dtype=F64))

    @pytest.mark.parametrize("option", [{"padding": 1}, {"stride": 2}, {"dilation": 2}])
    def test_padding_stride_and_dilation_of_patches(self, option):
        conv, x = seeded(lambda: nn.Conv2d(2, 3, 2, bias=False, **option)), rand(5, 2, 5, 5)
        rows = F.unfold(x, 2, **option).mT.flatten(0, 1)
        y = torch.zeros_like(conv(x))
        close(kfac(conv, x, y)["weight"].A, 2 / y.numel() * rows.T @ rows)

    def test_the_column_of_the_bias(self):
        ones = torch.cat([X, torch.ones(5, 1, dtype=F64)], 1)
        close(kfac(linear(bias=True), X, Y)["weight"].A, 2 / 15 * ones.T @ ones)

    def test_the_column_of_the_bias_is_masked_as_its_row(self):
        """Appended after masking, it would count the padding."""
        model, x, y = linear(bias=True), rand(2, 3, 4), rand(2, 3, 3)
        real = torch.tensor([[True, True, False], [True, False, False]])
        program = fxkfac.trace(model, x)
        block = fxkfac.kfac(program, MSE(reduction="sum"), (x, y), mask=lambda x, y: real)
        rows = torch.cat([x[real], torch.ones(3, 1, dtype=F64)], 1)
        close(block["weight"].A, 2 * rows.T @ rows)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_order_of_the_kronecker_product(self, transposed):
        """Rows first, as stored: B ⊗ A for (out, in), A ⊗ B for (in, out)."""

        def model(params, x):
            return x @ (params["W"] if transposed else params["W"].T)

        W = rand(4, 3) if transposed else rand(3, 4)
        data = X[:1], LABELS[:1]
        factors = kfac(model, *data, CE(), params={"W": W})
        A, B = factors["W"].A, factors["W"].B
        close(factors.dense("W"), torch.kron(A, B) if transposed else torch.kron(B, A))
        close(factors.dense("W"), exact.ggn(model, CE(), data, "W", {"W": W}))

    @pytest.mark.parametrize(
        "inplace",
        [
            lambda m, h: m.b(h.relu_()),
            lambda m, h: m.b(h.mul_(2).add_(1)),
            lambda m, h: m.b(h.tanh()) + h.mul_(3),
        ],
    )
    def test_ops_in_place_after_the_layer(self, inplace):
        """The tap's output, and the next one's input, are what they were when it ran."""
        data = X[:1], Y[:1]
        model = Made(lambda m, x: inplace(m, m.a(x)), a=linear(), b=nn.Linear(3, 3)).double()
        factors = kfac(model, *data, separate_weight_and_bias=True)
        for name in ("a.weight", "b.weight"):
            close(factors.dense(name), exact.ggn(model, MSE(), data, name))

    def test_a_module_that_is_called_twice(self):
        layer = seeded(lambda: nn.Linear(4, 4, bias=False))
        model = Made(lambda m, x: m.layer(m.layer(x).tanh()), layer=layer)
        h = torch.tanh(X @ layer.weight.T).detach()
        close(kfac(model, X, rand(5, 4))["layer.weight"].A, 2 / 20 * (X.T @ X + h.T @ h))

    def test_groups_are_not_averaged_before_the_covariance(self):
        conv, x = seeded(lambda: nn.Conv1d(4, 6, 1, groups=2, bias=False)), rand(5, 4, 3)
        y = torch.zeros_like(conv(x))
        rows = [part.mT.flatten(0, 1) for part in x.chunk(2, 1)]
        close(kfac(conv, x, y)["weight"].A, torch.stack([2 / y.numel() * r.T @ r for r in rows]))

    def test_ignored_targets_are_not_in_the_loss_hessian(self):
        """Nor are their rows, to which no gradient arrives; the mean is over those that count."""
        y = torch.tensor([0, -100, 2, -100, 1])
        rows = X[y != -100]
        block = kfac(linear(), X, y, CE())["weight"]
        p = linear()(rows).softmax(1).detach()
        close(block.A, 1 / 3 * rows.T @ rows)
        close(block.B, (p.sum(0).diag() - p.T @ p) / 3)

    def test_class_weights_are_in_the_loss_hessian(self):
        w = torch.tensor([0.5, 2.0, 1.0], dtype=F64)
        data, model = (X[:1], LABELS[:1]), linear()
        loss = CE(weight=w, reduction="sum")
        found = kfac(model, *data, loss)
        close(found.dense("weight"), exact.ggn(model, loss, data, "weight"))
        plain = kfac(model, *data, CE(reduction="sum"))
        close(found.dense("weight"), w[LABELS[0]] * plain.dense("weight"))

    def test_axis_0_is_not_taken_for_the_batch(self):
        """Tokens first: the mean over tokens is over axis 0."""
        model, x, y = linear(), rand(6, 5, 4), rand(6, 5, 3)
        block = kfac(model, x, y, batch_axis=1, sharing="reduce")["weight"]
        close(block.A, 2 / 90 * x.mean(0).T @ x.mean(0))

    @pytest.mark.parametrize("damp", ["block", "factors"])
    def test_damping_is_not_added_in_place(self, damp):
        factors = kfac(mlp(), X, LABELS, CE())
        before = factors.dense()
        gradients = {n: torch.ones_like(p) for n, p in mlp().named_parameters()}
        first = factors.solve(gradients, damping=0.5, damp=damp)
        close(factors.solve(gradients, damping=0.5, damp=damp), first, rtol=0, atol=0)
        assert torch.equal(factors.dense(), before)

    def test_nothing_of_the_users_is_changed(self):
        model = mlp()
        model[0].bias.requires_grad_(False)
        model[0].weight.grad = torch.ones(3, 4, dtype=F64)
        held = {n: (p, p.detach().clone(), p._version) for n, p in model.named_parameters()}
        x, state = X.clone(), torch.get_rng_state()
        kfac(model, x, LABELS, CE(), fisher="mc")
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, X)
        assert not x.requires_grad
        assert torch.equal(model[0].weight.grad, torch.ones(3, 4, dtype=F64))
        assert model[2].weight.grad is None
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
        for name, p in model.named_parameters():
            assert p is held[name][0]
            assert torch.equal(p, held[name][1])
            assert p._version == held[name][2]
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())

    @pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
    def test_sampled_labels_can_be_drawn_again(self, fisher):
        program = fxkfac.trace(mlp(), X)
        a, b, c = (
            fxkfac.kfac(
                program, CE(), (X, LABELS), fisher=fisher, mc_samples=2, generator=generator(seed)
            ).dense()
            for seed in (1, 1, 2)
        )
        assert torch.equal(a, b)
        assert not torch.allclose(a, c)
