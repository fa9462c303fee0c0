"""The autodiff ground truth against closed forms, the paper's examples, and itself."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.distributions as D
from einops import rearrange
from torch import nn

from fxkfac import exact
from fxkfac.errors import (
    CaptureError,
    DataError,
    FxkfacError,
    LossError,
    NonFiniteError,
    OptionError,
    ParameterError,
    UnknownParameter,
)
from fxkfac.exact import cvec, rvec
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.losses import Categorical, Gaussian, likelihood_of

F64 = torch.float64
MSE, CE, BCE = nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
close = torch.testing.assert_close


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=3, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


MATRICES = [
    exact.hessian,
    exact.ggn,
    exact.type1_fisher,
    exact.mc_fisher,
    exact.empirical_fisher,
]
X = rand(5, 4, seed=5)
Y = {
    MSE: rand(5, 3, seed=6),
    CE: classes(5),
    BCE: rand(5, 3, seed=6).sigmoid(),
}
both_orders = pytest.mark.parametrize("vec", ["rvec", "cvec"])
all_losses = pytest.mark.parametrize("kind", [MSE, CE, BCE])
FLATTEN = {"rvec": rvec, "cvec": cvec}


@pytest.mark.parametrize("matrix", [exact.hessian, exact.ggn, exact.type1_fisher])
def test_parameters_without_entries_have_blocks_without_entries(matrix):
    params = {"W": rand(3, 4), "none": rand(0, 4)}

    def model(params, x):
        return x @ params["W"].T + (x @ params["none"].T).sum(1, keepdim=True)

    expected = matrix(model, CE(), (X, Y[CE]), ["W"], params)
    assert matrix(model, CE(), (X, Y[CE]), ["none"], params).shape == (0, 0)
    assert matrix(model, CE(), (X, Y[CE]), ("none", "W"), params).shape == (0, 12)
    close(matrix(model, CE(), (X, Y[CE]), None, params), expected)


class TestFlattening:
    def test_matrix(self):  # Example 5
        A = torch.tensor([[1, 2], [3, 4]])
        assert rvec(A).tolist() == [1, 2, 3, 4]
        assert cvec(A).tolist() == [1, 3, 2, 4]

    def test_partial(self):
        A = rand(2, 3, 4, 5)
        assert torch.equal(rvec(A, 1, 2), rearrange(A, "a b c d -> a (b c) d"))
        assert torch.equal(cvec(A, 1, 2), rearrange(A, "a b c d -> a (c b) d"))
        assert torch.equal(cvec(A, end_dim=1), rearrange(A, "a b c d -> (b a) c d"))
        assert torch.equal(cvec(A, start_dim=1), rearrange(A, "a b c d -> a (d c b)"))


class TestJacobian:
    """Example 6: an affine map z = W x + b with W̃ = (W b), x̃ = (x 1)."""

    x = rand(3)
    x1 = torch.cat([x, torch.ones(1, dtype=F64)])

    def test_of_a_linear_layer(self):
        W1, identity = rand(2, 4), torch.eye(2, dtype=F64)
        row = self.x1.unsqueeze(0)

        def affine(at):
            return at @ self.x1

        close(exact.jacobian(affine, W1, "rvec"), torch.kron(identity, row))  # I ⊗ x̃ᵀ
        close(exact.jacobian(affine, W1, "cvec"), torch.kron(row, identity))  # x̃ᵀ ⊗ I

    @both_orders
    def test_of_a_tensor_valued_function(self, vec):
        A = rand(2, 3)

        def f(t):
            return torch.einsum("ij,kj->kij", t.sin(), A)

        J = torch.func.jacrev(f)(A + 1)  # [2, 2, 3, 2, 3]
        expected = torch.stack([FLATTEN[vec](j) for j in J.flatten(0, 2)])
        rows = FLATTEN[vec](torch.arange(12).reshape(2, 2, 3))
        close(exact.jacobian(f, A + 1, vec), expected[rows])

    def test_of_a_scalar_and_of_a_constant(self):
        close(exact.jacobian(lambda x: x.square().sum(), self.x), 2 * self.x.unsqueeze(0))
        assert (exact.jacobian(lambda x: torch.ones(2), self.x) == torch.zeros(2, 3)).all()

    @both_orders
    def test_hessian_matrix(self, vec):
        A, B = rand(2, 2), rand(3, 3, seed=1)
        H = exact.hessian_matrix(lambda W: torch.trace(A @ W @ B @ W.T) / 2, rand(2, 3), vec)
        A, B = (A + A.T) / 2, (B + B.T) / 2
        skew = (rand(2, 2) - rand(2, 2).T) / 2, (rand(3, 3, seed=1) - rand(3, 3, seed=1).T) / 2
        kron = {"rvec": torch.kron, "cvec": lambda a, b: torch.kron(b, a)}[vec]
        # tr(A W B Wᵀ)/2: only sym⊗sym and skew⊗skew parts are symmetric; the latter with sign −
        close(H, kron(A, B) - kron(*skew))

    def test_unknown_order(self):
        with pytest.raises(OptionError, match="vec is 'row'; expected 'rvec'"):
            exact.jacobian(torch.sin, self.x, "row")


class TestLinearize:
    """Rosenbrock f = ‖h‖², h = (1 - x₁, √α (x₂ - x₁²)). Example 9."""

    α, x = 10.0, torch.tensor([0.3, -0.7], dtype=F64)

    def first(self, x):
        return torch.stack([1 - x[0], self.α**0.5 * (x[1] - x[0] ** 2)])

    @staticmethod
    def second(h):
        return h.square().sum()

    def test_ggn_of_rosenbrock(self):
        x1, α = self.x[0], self.α
        expected = 2 * torch.tensor([[1 + 4 * α * x1**2, -2 * α * x1], [-2 * α * x1, α]]).to(F64)
        linear = exact.linearize(self.first, self.x)
        G = exact.hessian_matrix(lambda x: self.second(linear(x)), self.x)
        close(G, expected, rtol=1e-6, atol=0)
        J = exact.jacobian(self.first, self.x)
        close(G, J.T @ exact.hessian_matrix(self.second, self.first(self.x)) @ J)
        # the Hessian differs: 2 − 4α(x₂ − 3x₁²) in the corner
        H = exact.hessian_matrix(lambda x: self.second(self.first(x)), self.x)
        close(H[0, 0], 2 - 4 * α * (self.x[1] - 3 * x1**2))
        assert (H - G).abs()[0, 0] > 1

    def test_is_the_function_at_the_anchor_and_affine(self):
        linear = exact.linearize(self.first, self.x)
        close(linear(self.x), self.first(self.x))
        step = torch.tensor([1.0, 2.0], dtype=F64)
        close(
            linear(self.x + 2 * step) - linear(self.x), 2 * (linear(self.x + step) - linear(self.x))
        )
        close(linear(self.x + step) - linear(self.x), exact.jacobian(self.first, self.x) @ step)

    def test_composes_with_functorch_and_with_autograd(self):
        linear = exact.linearize(self.first, self.x)
        G = exact.hessian_matrix(lambda x: self.second(linear(x)), self.x)
        for transform in (
            torch.func.hessian(lambda x: self.second(linear(x))),
            lambda x: torch.autograd.functional.hessian(lambda t: self.second(linear(t)), x),
        ):
            close(transform(self.x), G)

    def test_dict_of_parameters(self):
        params = {"W": rand(2, 3), "b": rand(2, seed=1)}

        def f(p):
            return (p["W"] @ torch.ones(3, dtype=F64) + p["b"]).tanh()

        moved = {name: p + 0.1 for name, p in params.items()}
        shift = (0.1 * torch.ones(2, 3, dtype=F64)).sum(1) + 0.1
        close(exact.linearize(f, params)(moved), f(params) + (1 - f(params) ** 2) * shift)

    @all_losses
    @both_orders
    def test_ggn_of_a_model_by_partial_linearisation(self, kind, vec):
        net, loss = mlp(), kind()
        names = ["0.weight", "2.bias"]
        weights = {name: net.get_parameter(name).detach() for name in names}
        linear = exact.linearize(lambda p: torch.func.functional_call(net, p, (X,)), weights)
        H = torch.func.hessian(lambda p: loss(linear(p), Y[kind]))(weights)
        blocks = [
            [FLATTEN[vec](FLATTEN[vec](H[a][b], 0, weights[a].ndim - 1), 1) for b in names]
            for a in names
        ]
        expected = torch.cat([torch.cat(row, dim=1) for row in blocks])
        close(exact.ggn(net, loss, (X, Y[kind]), names, vec=vec), expected)


class TestClosedForms:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_ggn_of_linear_regression(self, reduction):  # Example 10
        net = nn.Linear(4, 3, bias=False).double()
        R = 2 / 15 if reduction == "mean" else 2
        A, identity = R * X.T @ X, torch.eye(3, dtype=F64)
        loss, data = MSE(reduction=reduction), (X, Y[MSE])
        for matrix in (exact.ggn, exact.hessian, exact.type1_fisher):
            close(matrix(net, loss, data, vec="cvec"), torch.kron(A, identity))
            close(matrix(net, loss, data, vec="rvec"), torch.kron(identity, A))

    def test_empirical_fisher_of_linear_regression(self):  # Definition 21
        net = nn.Linear(4, 3, bias=False).double()
        residual = (net(X) - Y[MSE]).detach()
        gradients = torch.einsum("no,ni->noi", residual, X)
        for vec, order in {"rvec": "n o i -> n (o i)", "cvec": "n o i -> n (i o)"}.items():
            G = rearrange(gradients, order)
            close(exact.empirical_fisher(net, MSE(), (X, Y[MSE]), vec=vec), 2 / 15 * G.T @ G)

    def test_empirical_fisher_of_logistic_regression(self):
        net, y = nn.Linear(4, 3, bias=False).double(), Y[CE]
        residual = (net(X).softmax(1) - nn.functional.one_hot(y, 3)).detach()
        G = torch.einsum("no,ni->noi", residual, X).flatten(1)
        close(exact.empirical_fisher(net, CE(), (X, y)), G.T @ G / 5)

    def test_ggn_of_logistic_regression(self):  # Example 7
        net, y = nn.Linear(4, 3, bias=False).double(), Y[CE]
        σ = net(X).softmax(1).detach()
        H = torch.diag_embed(σ) - torch.einsum("ni,nj->nij", σ, σ)
        expected = torch.einsum("noq,ni,nj->oiqj", H, X, X).reshape(12, 12) / 5
        for matrix in (exact.ggn, exact.hessian, exact.type1_fisher):
            close(matrix(net, CE(), (X, y)), expected)

    def test_data_terms_of_one_sequence_are_summed_before_the_square(self):
        # Empirical Fisher: a datum is a whole sequence [T], its gradient the sum over T.
        net, x = nn.Linear(4, 3, bias=False).double(), rand(2, 6, 4)
        y = rand(2, 6, 3, seed=1)
        residual = (net(x) - y).detach()
        G = torch.einsum("nto,nti->noi", residual, x).flatten(1)
        expected = 2 / y.numel() * G.T @ G
        close(exact.empirical_fisher(net, MSE(), (x, y)), expected)

        def flat(params, x):  # the same sequences, as a prediction [N·T, C]
            return (x @ params["weight"].T).flatten(0, 1)

        weight = {"weight": net.weight}
        close(exact.empirical_fisher(flat, MSE(), (x, y.flatten(0, 1)), params=weight), expected)


class TestAgreement:
    """The matrices are related as the paper says; each is computed on its own way."""

    @all_losses
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_type1_equals_ggn(self, kind, reduction):
        data, loss = (X, Y[kind]), kind(reduction=reduction)
        close(exact.type1_fisher(mlp(), loss, data), exact.ggn(mlp(), loss, data))

    @pytest.mark.parametrize(
        "loss",
        [
            CE(weight=torch.tensor([0.5, 2.0, 1.0], dtype=F64), label_smoothing=0.2),
            CE(ignore_index=1, weight=torch.tensor([0.5, 2.0, 1.0], dtype=F64)),
            CE(ignore_index=0, reduction="sum"),
        ],
    )
    def test_type1_equals_ggn_with_options_and_sequences(self, loss):
        net = nn.Linear(4, 3).double()

        def model(params, x):  # [N, T, 4] -> [N, 3, T]
            return torch.func.functional_call(net, params, (x,)).tanh().movedim(1, 2)

        params, data = dict(net.named_parameters()), (rand(4, 2, 4), classes(4, 2))
        G = exact.ggn(model, loss, data, params=params)
        assert G.abs().max() > 0.01
        close(exact.type1_fisher(model, loss, data, params=params), G)

    @all_losses
    def test_hessian_is_that_of_functorch(self, kind):
        net, loss = mlp(), kind()
        params = {name: p.detach() for name, p in net.named_parameters()}
        H = torch.func.hessian(lambda p: loss(torch.func.functional_call(net, p, (X,)), Y[kind]))(
            params
        )
        rows = [
            torch.cat([H[a][b].flatten(0, p.ndim - 1).flatten(1) for b in params], dim=1)
            for a, p in params.items()
        ]
        close(exact.hessian(net, loss, (X, Y[kind])), torch.cat(rows))

    def test_hessian_differs_from_ggn(self):
        data = (X, Y[MSE])
        assert (
            exact.hessian(mlp(), MSE(), data) - exact.ggn(mlp(), MSE(), data)
        ).abs().max() > 0.01

    @all_losses
    def test_mc_converges_at_the_rate_of_monte_carlo(self, kind):  # Figure 7
        data, net = (X, Y[kind]), mlp()
        G = exact.ggn(net, kind(), data)

        def error(M, seed):
            generator = torch.Generator().manual_seed(seed)
            F = exact.mc_fisher(net, kind(), data, mc_samples=M, generator=generator)
            return (F - G).square().sum()

        few = sum(error(10, seed) for seed in range(8)) / 8
        many = sum(error(1000, seed) for seed in range(8)) / 8
        # the mean squared error is proportional to 1/M: a ratio of 100, up to chance
        assert 30 < few / many < 300

    @all_losses
    def test_expected_loss_hessian_roots(self, kind):
        # G from S of the likelihood: J by `jacobian`, no loss Hessian involved
        net, loss, y = mlp(), kind(), Y[kind]
        likelihood = likelihood_of(loss)

        def f(weight):
            return torch.func.functional_call(net, {"0.weight": weight}, (X,))

        out = net(X).detach()
        J = exact.jacobian(f, net.get_parameter("0.weight").detach()).unflatten(0, (5, 3))
        roots = [likelihood.hessian_sqrt(out, y, e.expand(5, 3)) for e in torch.eye(3, dtype=F64)]
        V = torch.stack([torch.einsum("nc,ncd->nd", S, J) for S in roots]).flatten(0, 1)
        R = likelihood.reduction_factor(likelihood.count(out, y))
        close(R * V.T @ V, exact.ggn(net, loss, (X, y), "0.weight"))

    @all_losses
    @pytest.mark.parametrize(
        "matrix", [exact.hessian, exact.ggn, exact.type1_fisher, exact.mc_fisher]
    )
    def test_a_likelihood_is_its_loss(self, kind, matrix):
        data = (X, Y[kind])
        close(matrix(mlp(), likelihood_of(kind()), data), matrix(mlp(), kind(), data))


class TestBlocks:
    data = (X, Y[CE])
    matrices = pytest.mark.parametrize(
        "matrix",
        MATRICES,
    )

    @matrices
    @both_orders
    def test_single_mixed_and_joint(self, matrix, vec):
        net = mlp()
        full = matrix(net, CE(), self.data, vec=vec)
        sizes = {name: p.numel() for name, p in net.named_parameters()}
        assert list(sizes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert full.shape == (27, 27)
        parts = dict(
            zip(
                ((a, b) for a in sizes for b in sizes),
                (
                    block
                    for row in full.split(list(sizes.values()))
                    for block in row.split(list(sizes.values()), dim=1)
                ),
                strict=True,
            )
        )
        a, b = "2.weight", "0.weight"
        close(matrix(net, CE(), self.data, a, vec=vec), parts[a, a])
        close(matrix(net, CE(), self.data, (a, b), vec=vec), parts[a, b])
        close(matrix(net, CE(), self.data, (a, a), vec=vec), parts[a, a])
        joint = matrix(net, CE(), self.data, [a, b], vec=vec)
        close(joint, torch.cat([torch.cat([parts[r, c] for c in (a, b)], 1) for r in (a, b)]))

    @matrices
    def test_orders_are_permutations_of_each_other(self, matrix):
        # vec rows of W as stored: rvec of W is cvec of its transpose
        r = matrix(mlp(), CE(), self.data, ("0.weight", "2.weight"), vec="rvec")
        c = matrix(mlp(), CE(), self.data, ("0.weight", "2.weight"), vec="cvec")
        expected = rearrange(r, "(o i) (p j) -> (i o) (j p)", o=3, p=3)
        close(c, expected)
        assert not torch.allclose(r, c)

    @matrices
    def test_several_batches_are_one_data_set(self, matrix):
        loss = CE(weight=torch.tensor([0.5, 2.0, 1.0], dtype=F64), ignore_index=0)
        x, y = rand(7, 4), classes(7)
        expected = matrix(mlp(), loss, (x, y), "0.weight")
        batches = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
        for data in (batches, iter(batches), [batches[0], (x[3:], y[3:])], loader, [x, y]):
            close(matrix(mlp(), loss, data, "0.weight"), expected)

    @matrices
    def test_functional_model_with_nested_params(self, matrix):
        net = mlp()

        def model(params, x):
            hidden = (x @ params["first"]["W"] + params["first"]["b"]).tanh()
            return hidden @ params["second"]["W"] + params["second"]["b"]

        layers = {"first": net[0], "second": net[2]}
        params = {k: {"W": layer.weight.T, "b": layer.bias} for k, layer in layers.items()}
        found = matrix(model, CE(), self.data, "first.W", params=params, vec="cvec")
        close(found, matrix(net, CE(), self.data, "0.weight", vec="rvec"))
        assert matrix(model, CE(), self.data, params=params).shape == (27, 27)

    def test_params_replace_those_of_a_module(self):
        net, other = mlp(0), mlp(1)
        replacing = dict(other.named_parameters())
        close(
            exact.ggn(net, CE(), self.data, "0.weight", params=replacing),
            exact.ggn(other, CE(), self.data, "0.weight"),
        )
        one = {"0.weight": replacing["0.weight"]}
        found = exact.ggn(net, CE(), self.data, params=one)
        net.load_state_dict({**net.state_dict(), **one})
        close(found, exact.ggn(net, CE(), self.data, "0.weight"))

    def test_keyword_inputs_and_shared_inputs(self):
        net = mlp()

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x, scale):
                return self.net(x) * scale

        scale, (x, y) = torch.tensor([2.0, 1.0, 0.5], dtype=F64), self.data
        whole = exact.ggn(Scaled(), CE(), ({"x": x, "scale": scale}, y))
        batches = [({"x": x[:2], "scale": scale}, y[:2]), ({"x": x[2:], "scale": scale}, y[2:])]
        close(exact.ggn(Scaled(), CE(), batches), whole)
        close(exact.ggn(Scaled(), CE(), ((x, scale), y)), whole)

    @matrices
    def test_an_input_that_all_data_share_may_be_as_long_as_a_batch(self, matrix):
        def attended(params, x, keys):
            return (x @ params["W"] @ keys.T).exp() @ params["V"]

        params = {"W": rand(4, 2), "V": rand(3, 3)}
        (x, y), keys = (rand(6, 4), classes(6)), 0.3 * rand(3, 2)
        batches = [((x[:3], keys), y[:3]), ((x[3:], keys), y[3:])]
        whole = matrix(attended, CE(), ((x, keys), y), "W", params)
        close(matrix(attended, CE(), batches, "W", params), whole)

    @pytest.mark.parametrize("matrix", [m for m in MATRICES if m is not exact.mc_fisher])
    @all_losses
    def test_batches_may_differ_in_lengths_and_options(self, matrix, kind):
        """A mean over all of them is not that of their means."""

        def model(params, x, scale):
            return scale * (x @ params["W"].T).tanh().mT

        params, sizes = {"W": rand(3, 4)}, [(2, 5, 1.0), (3, 4, 2.0)]
        target = {MSE: rand, BCE: lambda *n: rand(*n).sigmoid(), CE: lambda n, _, T: classes(n, T)}
        batches = [((rand(n, T, 4), scale), target[kind](n, 3, T)) for n, T, scale in sizes]
        parts = [matrix(model, kind(reduction="sum"), batch, None, params) for batch in batches]
        count = 22 if kind is CE else 66
        close(matrix(model, kind(), batches, None, params), sum(parts) / count)

    def test_a_batch_has_statistics_of_its_own(self):
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().train()
        x, y = rand(8, 4), rand(8, 3)
        x[4:] += 3
        halves = [(x[:4], y[:4]), (x[4:], y[4:])]
        whole = exact.ggn(net, MSE(reduction="sum"), halves)
        close(whole, sum(exact.ggn(net, MSE(reduction="sum"), half) for half in halves))

    def test_batches_have_draws_of_their_own(self):
        """Of labels and of dropout alike: else they would be the same in all batches."""
        x, y = X[:1].expand(2, 4), Y[CE][:2]
        once, twice = (
            exact.mc_fisher(mlp(), CE(reduction="sum"), [(x, y)] * number) for number in (1, 2)
        )
        assert not torch.allclose(twice, 2 * once)
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
        once = exact.ggn(net, MSE(), (X, Y[MSE]))
        assert not torch.allclose(exact.ggn(net, MSE(), [(X, Y[MSE])] * 2), once)

    def test_tied_and_frozen_parameters(self):
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
        net[1].weight = net[0].weight
        y = rand(5, 4)

        def twice(params, x):
            return x @ params["W"].T @ params["W"].T

        expected = exact.hessian(twice, MSE(), (X, y), params={"W": net[0].weight})
        close(exact.hessian(net, MSE(), (X, y)), expected)
        net.requires_grad_(False)
        close(exact.hessian(net, MSE(), (X, y), "1.weight"), expected)
        with pytest.raises(ParameterError, match="named twice"):
            exact.ggn(net, MSE(), (X, y), ["0.weight", "1.weight"])

    def test_a_parameter_without_influence_has_no_curvature(self):
        def model(params, x):
            return x @ params["used"].T

        params = {"used": rand(3, 4), "idle": rand(2)}
        for matrix in (exact.hessian, exact.ggn, exact.empirical_fisher):
            full = matrix(model, CE(), self.data, params=params)
            assert full.shape == (14, 14)
            assert (full[12:] == 0).all()
            assert (full[:, 12:] == 0).all()
            close(full[:12, :12], matrix(model, CE(), self.data, "used", params=params))

    def test_one_datum_without_a_batch_axis(self):
        net, x, y = nn.Linear(3, 3).double(), rand(3), classes()
        expected = exact.ggn(net, CE(), (x.unsqueeze(0), y.unsqueeze(0)))
        close(exact.ggn(net, CE(), (x, y)), expected)


class TestUsersOwn:
    poisson = Likelihood.from_distribution(lambda f: D.Poisson(f.exp()))

    def test_poisson_regression(self):
        net = nn.Linear(4, 1).double()
        data = (X, torch.tensor([[0.0], [2.0], [1.0], [0.0], [4.0]], dtype=F64))
        x1 = torch.cat([X, torch.ones(5, 1, dtype=F64)], dim=1)
        rate = net(X).exp().detach()
        expected = x1.T @ (rate * x1) / 5
        close(exact.ggn(net, self.poisson, data), expected)
        close(exact.hessian(net, self.poisson, data), expected)
        g = (rate - data[1]) * x1
        close(exact.empirical_fisher(net, self.poisson, data), g.T @ g / 5)
        with pytest.raises(LossError, match="'type-1'"):
            exact.type1_fisher(net, self.poisson, data)

    def test_criterion_that_is_not_convex_has_an_indefinite_ggn(self):
        cauchy = Likelihood.from_distribution(lambda f: D.Cauchy(f, 1.0), reduction="sum")
        net, x, y = nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1).double(), rand(1, 1) + 9
        r = (net.weight - y).detach()
        expected = 2 * (1 - r**2) / (1 + r**2) ** 2
        assert expected < 0
        close(exact.ggn(net, cauchy, (x, y)), expected)


def vector_like(net, names, seed=3):
    return {name: rand(*net.get_parameter(name).shape, seed=seed) for name in names}


def flat(vector):
    return torch.cat([rvec(v) for v in vector.values()])


class TestProducts:
    names = ("2.weight", "0.bias")

    @all_losses
    @pytest.mark.parametrize("fisher", ["hessian", "ggn", "type-1", "mc", "empirical", "type-2"])
    def test_product_is_that_of_the_matrix(self, kind, fisher):
        net, loss, data = mlp(), kind(), (X, Y[kind])
        v = vector_like(net, self.names)
        products = {
            "hessian": exact.hessian_vector_product,
            "ggn": exact.ggn_vector_product,
        }
        matrices = {
            "hessian": exact.hessian,
            "ggn": exact.ggn,
            "type-1": exact.type1_fisher,
            "type-2": exact.ggn,
            "mc": lambda *args: exact.mc_fisher(*args, mc_samples=3),
            "empirical": exact.empirical_fisher,
        }
        if fisher in products:
            found = products[fisher](net, loss, data, v)
        else:
            found = exact.fisher_vector_product(net, loss, data, v, fisher=fisher, mc_samples=3)
        assert list(found) == list(self.names)
        assert all(found[name].shape == v[name].shape for name in v)
        close(flat(found), matrices[fisher](net, loss, data, list(self.names)) @ flat(v))

    def test_curvature_propagation_is_unbiased(self):
        net, data, v = mlp(), (X, Y[CE]), vector_like(mlp(), self.names)
        found = exact.fisher_vector_product(
            net, CE(), data, v, fisher="curvature-propagation", mc_samples=20_000
        )
        expected = flat(exact.ggn_vector_product(net, CE(), data, v))
        assert (flat(found) - expected).norm() < 0.05 * expected.norm()

    def test_jacobian_products(self):
        net = mlp()
        v = vector_like(net, self.names)
        J = [
            exact.jacobian(
                lambda w, name=name: torch.func.functional_call(net, {name: w}, (X,)),
                net.get_parameter(name).detach(),
            )
            for name in self.names
        ]
        Jv = exact.jacobian_vector_product(net, X, v)
        assert Jv.shape == (5, 3)
        close(Jv.flatten(), torch.cat(J, dim=1) @ flat(v))
        u = rand(5, 3, seed=8)
        found = exact.vector_jacobian_product(net, X, u, list(self.names))
        assert list(found) == list(self.names)
        close(flat(found), torch.cat(J, dim=1).T @ u.flatten())
        everything = exact.vector_jacobian_product(net, X, u)
        assert list(everything) == [name for name, _ in net.named_parameters()]
        close(everything["0.bias"], exact.vector_jacobian_product(net, X, u, "0.bias")["0.bias"])

    def test_nested_params_of_a_function(self):
        def model(params, x):
            return (x @ params["a"]["W"].T).tanh()

        params, v = {"a": {"W": rand(3, 4)}}, {"a": {"W": rand(3, 4, seed=1)}}
        found = exact.ggn_vector_product(model, CE(), (X, Y[CE]), v, params=params)
        G = exact.ggn(model, CE(), (X, Y[CE]), params=params)
        close(rvec(found["a"]["W"]), G @ rvec(v["a"]["W"]))

    def test_names_of_tied_parameters_are_kept(self):
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
        net[1].weight = net[0].weight
        v, data = rand(4, 4), (X, rand(5, 4))
        first = exact.hessian_vector_product(net, MSE(), data, {"0.weight": v})
        second = exact.hessian_vector_product(net, MSE(), data, {"1.weight": v})
        close(first["0.weight"], second["1.weight"])

    def test_attention_model(self):
        # Its fused kernel has no second derivative, and its eval mode another forward pass.
        net = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0).double().eval()
        x, y = rand(2, 3, 4), rand(2, 3, 4, seed=1)
        v = vector_like(net, ["self_attn.in_proj_weight"])
        found = exact.ggn_vector_product(net, MSE(), (x, y), v)
        G = exact.ggn(net, MSE(), (x, y), "self_attn.in_proj_weight")
        close(flat(found), G @ flat(v))
        H = exact.hessian(net, MSE(), (x, y), "self_attn.in_proj_bias")
        close(H, H.T)

    def test_shape_of_the_vector_and_of_the_cotangent(self):
        with pytest.raises(ParameterError, match=r"vector\['0.bias'\] has shape \(2,\); .*\(3,\)"):
            exact.jacobian_vector_product(mlp(), X, {"0.bias": rand(2)})
        with pytest.raises(DataError, match=r"cotangent has shape \(5,\); .*\(5, 3\)"):
            exact.vector_jacobian_product(mlp(), X, rand(5))

    def test_forward_only_and_unknown_fishers(self):
        v = vector_like(mlp(), ["0.bias"])
        for wrong, message in {"forward-only": "sends nothing back", "type1": "'type-1'"}.items():
            with pytest.raises(OptionError, match=message):
                exact.fisher_vector_product(mlp(), CE(), (X, Y[CE]), v, fisher=wrong)


class Stateful(nn.Module):
    """Batch norm in train mode writes buffers; dropout draws random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, x):
        return self.body(x)


class TestLeavesTheCallerAlone:
    @pytest.mark.parametrize(
        "compute",
        [
            *MATRICES,
            lambda *args: exact.hessian_vector_product(
                *args, vector_like(args[0], ["body.0.bias"])
            ),
            lambda *args: exact.fisher_vector_product(
                *args, vector_like(args[0], ["body.0.bias"]), fisher="mc"
            ),
        ],
    )
    @pytest.mark.parametrize("grad_enabled", [True, False])
    def test_nothing_changes(self, compute, grad_enabled):
        net = Stateful().double().train()
        net.body[0].bias.requires_grad_(False)
        net.body[0].weight.grad = torch.ones_like(net.body[0].weight)
        before = copy.deepcopy(net)
        rng = torch.get_rng_state()
        x, y = X.clone().requires_grad_(), Y[CE].clone()
        with torch.set_grad_enabled(grad_enabled):
            result = compute(net, CE(), (x, y))
        for t in result.values() if isinstance(result, dict) else [result]:
            assert not t.requires_grad
            assert t.isfinite().all()
        assert torch.equal(torch.get_rng_state(), rng)
        assert net.training
        assert x.grad is None
        for (name, new), old in zip(net.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(new, old), name
            assert new.requires_grad == old.requires_grad, name
            assert new.grad is None or torch.equal(new.grad, torch.ones_like(new)), name
        assert net.body[0].weight.grad is not None
        for (name, new), old in zip(net.named_buffers(), before.buffers(), strict=True):
            assert torch.equal(new, old), name

    @pytest.mark.parametrize("compute", [exact.hessian, exact.ggn, exact.empirical_fisher])
    @all_losses
    def test_data_that_inference_mode_has_made(self, compute, kind):
        with torch.inference_mode():
            made = X.clone(), Y[kind].clone()
        close(compute(mlp(), kind(), made), compute(mlp(), kind(), (X, Y[kind])), rtol=0, atol=0)

    def test_seeds(self):
        def fisher(generator):
            return exact.mc_fisher(mlp(), CE(), (X, Y[CE]), mc_samples=2, generator=generator)

        one, same, other = (fisher(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert torch.equal(fisher(None), fisher(None))

    def test_knows_no_graph(self):
        # the compiler is tested against it, so it must not be built on the compiler
        sources = list(Path(exact.__file__).parent.glob("*.py"))
        assert len(sources) == 6
        for source in sources:
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert "graph" not in ast.unparse(node), source


class TestErrors:
    data = (X, Y[CE])

    def test_names(self):
        with pytest.raises(UnknownParameter, match=r"Did you mean '0\.weight'"):
            exact.ggn(mlp(), CE(), self.data, "0.wieght")
        with pytest.raises(OptionError, match="tuple of 3; expected two"):
            exact.ggn(mlp(), CE(), self.data, ("0.weight", "0.bias", "2.bias"))
        with pytest.raises(OptionError, match="vec is 'C'"):
            exact.ggn(mlp(), CE(), self.data, vec="C")

    def test_a_parameter_of_integers(self):
        def model(params, x):
            return x @ params["W"].T

        with pytest.raises(ParameterError, match=r"'steps' has dtype torch\.int64"):
            exact.ggn(
                model,
                CE(),
                self.data,
                "steps",
                params={"W": rand(3, 4), "steps": torch.ones(1).long()},
            )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "there are no data"),
            (X, "data hold a Tensor"),
            (None, "data hold a NoneType"),
            ([X, X, X], "data hold a Tensor"),
            ({"x": X}, "data hold a dict"),
            ((X, Y[CE][:3]), "expected class indices"),
            ((X[:0], Y[CE][:0]), "inputs are empty"),
            (((3.0,), Y[CE]), "hold no tensor"),
        ],
    )
    def test_data(self, data, message):
        # A size is asked of the inputs before the model fails on them.
        net = nn.Sequential(nn.Flatten(), mlp())
        with pytest.raises(DataError, match=message):
            exact.ggn(lambda p, x: net(x), CE(), data, params={"W": rand(2)})

    def test_batch_not_in_front(self):
        def model(params, x):  # [4, 5] -> [5, 3], data along axis 1 of the input
            return x.T @ params["W"].T

        with pytest.raises(DataError, match=r"inputs hold 4 data, .* shape \(5, 3\)"):
            exact.ggn(model, CE(), (X.T, Y[CE]), params={"W": rand(3, 4)})

    def test_prediction(self):
        params = {"W": rand(3, 4)}
        with pytest.raises(FxkfacError, match="returns tuple with 2 tensors; expected one tensor"):
            exact.ggn(lambda p, x: (x @ p["W"].T, x), CE(), self.data, params=params)
        with pytest.raises(NonFiniteError, match="prediction holds NaN"):
            exact.ggn(lambda p, x: x @ p["W"].T / 0, CE(), self.data, params=params)

    def test_loss(self):
        with pytest.raises(LossError, match="no likelihood is known for the loss L1Loss"):
            exact.ggn(mlp(), nn.L1Loss(), (X, Y[MSE]))
        with pytest.raises(DataError, match="every target is ignored"):
            exact.ggn(mlp(), CE(), (X, torch.full_like(Y[CE], -100)))

    @pytest.mark.parametrize(
        "compute",
        [
            *MATRICES,
            lambda net, *of: exact.ggn_vector_product(net, *of, vector_like(net, ["0.bias"])),
            lambda net, _, data: exact.vector_jacobian_product(net, data[0], rand(5, 3)),
            lambda *_: exact.jacobian(torch.sin, X),
        ],
    )
    def test_inference_mode(self, compute):
        """In which nothing would depend on the parameters."""
        with torch.inference_mode(), pytest.raises(CaptureError, match="Leave inference mode"):
            compute(mlp(), CE(), (X, Y[CE]))

    def test_closed_form_classes_are_the_ones_of_the_losses(self):
        # guards the special case of the square loss in the exact type-1 Fisher
        assert isinstance(likelihood_of(MSE()), Gaussian)
        assert isinstance(likelihood_of(CE()), Categorical)
