"""The forward Laplacian against nested autodiff."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import F64, rand, seeded
from torch import nn
from torch.func import functional_call, jacrev, jvp
from torch.fx.experimental.proxy_tensor import make_fx

import fxkfac
from fxkfac import laplacian
from fxkfac.errors import DataError, OptionError, UnsupportedUse

close = torch.testing.assert_close
N = 4


def truth(function, x, weights=None):
    """Value, gradient and Laplacian, one point after the other by reverse mode."""
    weights = x.new_ones(x.shape[1]) if weights is None else weights

    def single(point):
        return function(point[None])[0]

    functions = (single, jacrev(single), jacrev(jacrev(single)))
    value, slope, second = (torch.stack([f(point) for point in x]) for f in functions)
    bend = second.diagonal(dim1=-2, dim2=-1)
    return value, slope.movedim(-1, 0), bend @ weights


def same(function, x, weights=None):
    found = laplacian(function, x, weights)
    for mine, expected in zip(found, truth(function, x, weights), strict=True):
        close(mine, expected)


def mlp(D, out=2, act=nn.Tanh):
    return seeded(
        lambda: nn.Sequential(nn.Linear(D, 5), act(), nn.Linear(5, 3), act(), nn.Linear(3, out))
    )


def params(D=2):
    return {"W": rand(5, D, seed=1), "b": rand(5, seed=2), "V": rand(1, 5, seed=3)}


def net(p, x):
    return torch.tanh(F.linear(x, p["W"], p["b"])) @ p["V"].T


def by_jvp(function, x):
    """The Laplacian by forward mode, one axis after the other."""

    def bend(axis):
        v = torch.zeros_like(x)
        v[:, axis] = 1
        return jvp(lambda at: jvp(function, (at,), (v,))[1], (x,), (v,))[1]

    return sum(bend(axis) for axis in range(x.shape[1]))


class TestEqualsAutodiff:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("D", [1, 2, 3])
    def test_tanh_mlp(self, D, weighted):
        x = rand(N, D, seed=3)
        same(mlp(D), x, rand(D, seed=8) if weighted else None)

    def test_shapes_and_fields(self):
        out = laplacian(mlp(3), rand(N, 3))
        assert isinstance(out, fxkfac.Taylor)
        assert [tuple(t.shape) for t in out] == [(N, 2), (3, N, 2), (N, 2)]
        one = laplacian(lambda x: x[:, 0] * x[:, 1], rand(N, 3))
        assert [tuple(t.shape) for t in one] == [(N,), (3, N), (N,)]

    def test_sine_net(self):
        same(lambda x: torch.sin(3 * net(params(), x)).cos(), rand(N, 2))

    @pytest.mark.parametrize(
        "act",
        [
            nn.Sigmoid(),
            nn.SiLU(),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Softplus(),
            nn.Softplus(2.0, 0.5),
            nn.ReLU(),
            nn.ELU(),
            nn.Mish(),
            nn.LogSigmoid(),
            nn.LeakyReLU(),
            nn.Softsign(),
            torch.exp,
            torch.square,
            torch.erf,
            torch.atan,
            torch.sinh,
            torch.expm1,
            torch.abs,
            torch.absolute,
            torch.arctan,
            torch.arcsinh,
            torch.special.expit,
            torch.special.erf,
            F.relu6,
            nn.Hardswish(),
        ],
        ids=lambda act: getattr(act, "__name__", str(act)),
    )
    def test_elementwise(self, act):
        same(lambda x: act(x @ rand(2, 3, seed=5)), rand(N, 2), rand(2, seed=6))

    @pytest.mark.parametrize(
        "function",
        [
            torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p,
            lambda u: u**3, lambda u: u**-1.5, lambda u: u.pow(1), lambda u: u**0, lambda u: 2.0**u,
        ],
    )  # fmt: skip
    def test_of_positive_numbers(self, function):
        same(lambda x: function((x @ rand(2, 3, seed=5)).square() + 0.5), rand(N, 2))

    @pytest.mark.parametrize(
        "function",
        [
            lambda u: u.clip(-0.3, 0.4), lambda u: u.clamp_min(0.1), lambda u: u.clamp_max(0.1),
            lambda u: torch.arccos(u / 2), lambda u: torch.arcsin(u / 2),
            lambda u: torch.arctanh(u / 2), lambda u: torch.arccosh(u + 3),
        ],
    )  # fmt: skip
    def test_other_names(self, function):
        same(lambda x: function((x @ rand(2, 3, seed=5)).sin()), rand(N, 2))

    def test_bounds_with_more_axes(self):
        """As many along the first as there are axes of x: then all shapes fit by chance."""
        low = rand(2, 1, 1, seed=4)
        same(lambda x: x.sin().clamp(low, max=low + 0.5).movedim(0, 1), rand(N, 2))

    @pytest.mark.parametrize("at", [0.0, 1e-9, 1e-3, 0.0954, 0.0956, 0.7, -2.5])
    def test_sinc(self, at):
        """Near zero the quotient has no digits left: so against the integral of cos(x s)."""
        nodes, weights = (torch.tensor(t) for t in np.polynomial.legendre.leggauss(40))
        s, w = (nodes + 1) / 2 * torch.pi, weights / 2
        jet = fxkfac.laplacian(torch.sinc, torch.tensor([[at]], dtype=F64))
        close(jet.value, (w * torch.cos(at * s)).sum().view(1, 1))
        close(jet.laplacian, -(w * s**2 * torch.cos(at * s)).sum().view(1, 1))

    def test_powers_at_zero(self):
        out = laplacian(lambda x: (x**2 + x**1 + x**0).sum(-1), torch.zeros(N, 2, dtype=F64))
        close(out.laplacian, torch.full((N,), 4.0, dtype=F64))

    @pytest.mark.parametrize(
        "function",
        [
            lambda a, b: a * b,
            lambda a, b: a / (2 + b * b),
            lambda a, b: 1 / (2 + b.square()) - a,
            lambda a, b: torch.einsum("ni,nj->nij", a, b),
            lambda a, b: torch.einsum("ni,ni->n", a, b),
            lambda a, b: torch.einsum("...i, ...i, ki", a, b, rand(4, 3)),
            lambda a, b: a[:, :, None] @ b[:, None],
            lambda a, b: torch.bmm(a.unsqueeze(1), b.unsqueeze(-1)).squeeze(-1),
            lambda a, b: a * b[:, :1] + 3 * a - b / 2,
            lambda a, b: torch.add(a, b, alpha=2) - rand(1, 3),
            lambda a, b: torch.where(a > 0, a * b, b),
            lambda a, b: torch.where(a[:, :1] > 0, 0.0, b),
            lambda a, b: rand(3) - a * rand(5, 1, 3).sum(0) / b.exp(),
        ],
    )  # fmt: skip
    def test_products(self, function):
        def whole(x):
            return function(torch.sin(x @ rand(2, 3, seed=5)), torch.tanh(x @ rand(2, 3, seed=6)))

        same(whole, rand(N, 2), rand(2, seed=7))

    @pytest.mark.parametrize(
        "function",
        [
            lambda h: h.reshape(len(h), 2, 3).transpose(1, 2).sum(-1),
            lambda h: h.view(-1, 2, 3).permute(0, 2, 1).flatten(1),
            lambda h: nn.Flatten()(h.unflatten(1, (3, 2))).mean(dim=1, keepdim=True),
            lambda h: torch.cat([h, 2 * h, h.new_ones(h.shape)], dim=-1),
            lambda h: torch.stack([h[:, 0], h[:, -1]], dim=1),
            lambda h: torch.stack(h.unbind(1)[:2], -1) + h[..., [1]],
            lambda h: (rand(5, 6, seed=4) @ h.T).T,
            lambda h: rand(2, 3, seed=4) @ h.view(-1, 3, 2),
            lambda h: h.unsqueeze(1).expand(-1, 4, -1) * rand(4, 1),
            lambda h: h.split(2, dim=1)[1].prod(dim=1) - h.chunk(2, -1)[0].sum((1,)),
            lambda h: torch.einsum("oi,ni->no", rand(2, 6), h),
            lambda h: torch.einsum("ni,oi", h, rand(2, 6)),
            lambda h: torch.addmm(rand(2), h, rand(6, 2), beta=2, alpha=3),
            lambda h: torch.addmm(h, rand(1, 4).expand(len(h), 4), rand(4, 6), beta=2, alpha=3),
            lambda h: torch.narrow(-h, 1, 1, 2).cumsum(1).flip(1),
            lambda h: sum(column * k for k, column in enumerate(h.T)),
            lambda h: h @ rand(6),
            lambda h: h @ rand(2, 6, 3)[0] + 1.0,
        ],
    )  # fmt: skip
    def test_linear_ops(self, function):
        same(lambda x: function(torch.sin(x @ rand(2, 6, seed=5))), rand(N, 2))

    def test_constant(self):
        out = laplacian(lambda x: torch.ones(N, 2, dtype=F64), rand(N, 3))
        assert out.value.sum() == 2 * N
        assert not out.gradient.any()
        assert not out.laplacian.any()

    @pytest.mark.parametrize(
        "rounded",
        [
            lambda u: u.to(torch.int64),
            lambda u: u.type_as(torch.zeros(1, dtype=torch.int32)),
            lambda u: u.to(torch.bool),
        ],
    )
    def test_whole_numbers_have_no_slope(self, rounded):
        same(lambda x: x.sin() * rounded(3 * x), rand(N, 2))

    def test_heat_equation(self):
        """exp(−t) sin(x) solves ∂_t u = ∂²_x u."""
        out = laplacian(
            lambda x: torch.exp(-x[:, 0]) * torch.sin(x[:, 1]), rand(N, 2), torch.tensor([0, 1])
        )
        close(out.gradient[0], out.laplacian)

    @pytest.mark.parametrize(
        "function",
        [
            lambda u: torch.cat([u, rand(N, 1)], dim=1),
            lambda u: torch.where(u > 0, rand(1), u),
            lambda u: u.float_power(2),
        ],
    )
    def test_constants_have_their_own_precision(self, function):
        x = rand(N, 2).float()
        close(laplacian(function, x).value, function(x), rtol=0, atol=0)

    def test_single_precision(self):
        out = laplacian(mlp(2).float(), rand(N, 2).float())
        assert {t.dtype for t in out} == {torch.float32}


class TestThrough:
    def test_gradients_in_parameters(self):
        x = rand(N, 2)
        p = {name: t.requires_grad_() for name, t in params().items()}
        mine = laplacian(lambda at: net(p, at), x).laplacian.square().sum()
        nested = by_jvp(lambda at: net(p, at), x).square().sum()
        for a, b in zip(
            *(torch.autograd.grad(loss, p.values()) for loss in (mine, nested)), strict=True
        ):
            close(a, b)

    def test_gradients_in_points_and_weights(self):
        x, w = rand(N, 2), rand(2, seed=3)
        args = (x.requires_grad_(), w.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, w: laplacian(mlp(2), x, w).laplacian, args)

    def test_one_product_for_all_streams(self):
        graph = make_fx(lambda p, x: laplacian(lambda at: net(p, at), x))(params(), rand(N, 2))
        products = [n for n in graph.graph.nodes if "mm" in str(n.target)]
        assert len(products) == 2
        close(graph(params(), rand(N, 2)), laplacian(lambda at: net(params(), at), rand(N, 2)))

    def test_gradients_come_back_without_zeros_around_them(self):
        def gradients(p, x):
            p = {name: t.detach().requires_grad_() for name, t in p.items()}
            residual = laplacian(lambda at: net(p, at), x).laplacian
            return torch.autograd.grad(residual.sum(), list(p.values()))

        graph = make_fx(gradients)(params(), rand(N, 2)).graph
        padded = {"slice_backward", "select_backward", "slice_scatter", "select_scatter"}
        assert not [n for n in graph.nodes if any(name in str(n.target) for name in padded)]

    def test_what_moves_the_value_alone_has_a_gradient_of_zero(self):
        model = mlp(2)
        residual = laplacian(model, rand(N, 2)).laplacian
        (slope,) = torch.autograd.grad(residual.sum(), [model[-1].bias])
        assert not slope.any()

    @pytest.mark.parametrize("act", [nn.Tanh, nn.Mish])
    @pytest.mark.parametrize("mode", ["real", "symbolic"])
    def test_make_fx(self, mode, act):
        model = mlp(2, act=act)

        def f(p, x):
            return tuple(laplacian(lambda at: functional_call(model, p, (at,)), x))

        p, x = dict(model.named_parameters()), rand(N, 2)
        graph = make_fx(f, tracing_mode=mode)(p, x)
        close(graph(p, x), f(p, x))

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp(2, act=nn.GELU)

            def forward(self, x):
                return laplacian(self.net, x).laplacian

        sizes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(
            Residual(), (rand(N, 2),), dynamic_shapes=sizes, strict=strict
        )
        x = rand(7, 2)
        close(program.module()(x), laplacian(mlp(2, act=nn.GELU), x).laplacian)


class TestTraced:
    @pytest.mark.parametrize(
        "residual",
        [
            lambda p, x: laplacian(lambda at: net(p, at), x).laplacian,
            lambda p, x: (
                laplacian(lambda at: F.mish(at @ p["W"].T + p["b"]) @ p["V"].T, x).laplacian
            ),
            lambda p, x: _heat(laplacian(lambda at: net(p, at), x, torch.tensor([0, 1]))),
            lambda p, x: laplacian(lambda at: net(p, at) * (1 - at[:, :1] ** 2), x).laplacian,
        ],
        ids=["poisson", "by jvp", "heat", "hard boundary"],
    )
    def test_function(self, residual):
        x = rand(N, 2)
        program = fxkfac.trace(residual, x, params())
        errors = fxkfac.check(program, nn.MSELoss(), (x, rand(N, 1, seed=4)))
        assert errors.keys() == {"W", "b", "V"}
        assert max(errors.values()) < 1e-9
        more = (rand(6, 2, seed=5), rand(6, 1, seed=6))
        assert max(fxkfac.check(program, nn.MSELoss(), more).values()) < 1e-9

    def test_factor_is_over_the_streams(self):
        """A of the last weight sums over data and over D + 2 streams."""
        x, p = rand(N, 2), params()
        program = fxkfac.trace(lambda q, x: laplacian(lambda at: net(q, at), x).laplacian, x, p)
        found = fxkfac.kfac(program, nn.MSELoss(), (x, rand(N, 1, seed=4)))["V"].A
        hidden = laplacian(lambda at: torch.tanh(F.linear(at, p["W"], p["b"])), x)
        rows = torch.cat([hidden.value[None], hidden.gradient, hidden.laplacian[None]]).flatten(
            0, 1
        )
        expected = rows.T @ rows
        close(found / found.trace(), expected / expected.trace())


def _heat(taylor):
    return taylor.gradient[0] - taylor.laplacian


class TestRefusals:
    @pytest.mark.parametrize(
        ("function", "named"),
        [
            (lambda x: F.softmax(x, -1), "softmax"),
            (lambda x: x.detach(), "detach"),
            (lambda x: torch.linalg.norm(x, dim=-1), "linalg_norm"),
            (lambda x: x**x, "pow"),
            (lambda x: F.relu(x, inplace=True), r"relu\(inplace=True\)"),
            (lambda x: x - x.mean(0), "mean over axis 0"),
            (lambda x: x - x.mean(), "mean over axis 0"),
            (lambda x: x - x.sum(dim=(-2, -1), keepdim=True), "sum over axis 0"),
            (lambda x: torch.div(x, 2, rounding_mode="floor"), "div"),
            (lambda x: F.linear(rand(3, 2), x), "linear"),
            (lambda x: torch.einsum("ni,nj,nk->nijk", x, x, x), "einsum"),
            (lambda x: x if x.sum(-1) else -x, "bool"),
            (lambda x: x[torch.tensor([0]), torch.tensor([1])], "indexing"),
            (lambda x: x[:, 0] @ rand(N, 2), "matrix product"),
            (lambda x: nn.LayerNorm(2)(x), "layer_norm"),
            (lambda x: x.__setitem__(0, 1.0), "writing into"),
            (lambda x: torch.zeros(N, 2).__setitem__(0, x), "__setitem__"),
            (lambda x: torch.mul(x, other=x), r"mul\(other=\)"),
            (lambda x: torch.tanh(input=x), r"tanh\(input=\)"),
            (lambda x: torch.where(condition=x > 0, input=x, other=x), r"where\(condition=, inp"),
            (lambda x: torch.reshape(x, shape=(-1, 1, 2)), r"reshape\(shape=\)"),
        ],
    )
    def test_op_without_rule(self, function, named):
        with pytest.raises(UnsupportedUse, match=named):
            laplacian(function, rand(N, 2))

    @pytest.mark.parametrize("write", ["h += 1", "h -= 1", "h *= 2", "h /= 2", "h **= 2"])
    def test_operators_in_place(self, write):
        """Another name of the tensor would keep what it was."""

        def function(x):
            h = g = x.sin()
            names = {"h": h}
            exec(write, names)
            return g

        with pytest.raises(UnsupportedUse, match="in place"):
            laplacian(function, rand(N, 2))

    def test_what_is_returned(self):
        with pytest.raises(UnsupportedUse, match="a row for each point"):
            laplacian(lambda x: x[0], rand(N, 2))
        with pytest.raises(UnsupportedUse, match="tuple"):
            laplacian(lambda x: (x, x), rand(N, 2))

    @pytest.mark.parametrize("x", [rand(4), rand(4, 2).long(), rand(2, 3, 4), [1.0]])
    def test_points(self, x):
        with pytest.raises(DataError, match=r"\(N, D\)"):
            laplacian(mlp(2), x)

    def test_weights(self):
        with pytest.raises(OptionError, match=r"a tensor of shape \(3,\); expected .* \(2,\)"):
            laplacian(mlp(2), rand(N, 2), rand(3))

    @pytest.mark.parametrize(
        ("weights", "said"), [([1.0, 0.0], "list"), (np.ones(2), r"ndarray of shape \(2,\)")]
    )
    def test_weights_that_are_no_tensor(self, weights, said):
        with pytest.raises(OptionError, match=rf"weights are {said}; expected a tensor of shape"):
            laplacian(mlp(2), rand(N, 2), weights)

    def test_axis_out_of_range(self):
        with pytest.raises(IndexError):
            laplacian(lambda x: x.sum(-3), rand(N, 2))

    def test_refused_by_trace_too(self):
        def residual(p, x):
            return laplacian(lambda at: F.softmax(net(p, at), -1), x).laplacian

        with pytest.raises(UnsupportedUse, match="softmax"):
            fxkfac.trace(residual, rand(N, 2), params())


SPELLINGS = {
    "where": (
        lambda x: x.sin().where(x > 0.3, 0.0),
        lambda x: torch.where(x > 0.3, x.sin(), 0 * x),
    ),
    "pos": (lambda x: +x.sin(), torch.sin),
    "numpy": (lambda x: np.float64(2) * x.sin() - np.float64(1), lambda x: 2 * x.sin() - 1),
    "numpy's power": (lambda x: np.float64(2) ** x, lambda x: 2.0**x),
    "like": (lambda x: torch.ones(2).to(x) * torch.ones(2).type_as(x) * x.sin(), torch.sin),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_methods_and_operators_are_the_functions(name):
    spelled, plain = SPELLINGS[name]
    for found, expected in zip(*(laplacian(f, rand(N, 2)) for f in (spelled, plain)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["remainder", "floor_divide"])
def test_operators_without_rule(name):
    operators = {"remainder": lambda x: x % 0.3, "floor_divide": lambda x: x // 0.3}
    with pytest.raises(UnsupportedUse, match=name):
        laplacian(operators[name], rand(N, 2))
