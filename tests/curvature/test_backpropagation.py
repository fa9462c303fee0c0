"""Every flavour's vectors against the autodiff Hessian of the loss, for each datum."""

import pytest
import torch
import torch.distributions as D
from torch import nn
from torch.autograd.functional import hessian as autograd_hessian

from fxkfac.errors import LossError, OptionError
from fxkfac.likelihoods.backpropagation import FISHERS, backpropagated_vectors
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.losses import Gaussian, likelihood_of

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=4, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def layout(shape, batch_axis=0):
    """The position of each element within its own datum."""
    front = torch.zeros(shape, dtype=torch.int64).movedim(batch_axis, 0)
    positions = torch.arange(front[0].numel()).reshape(front[0].shape)
    return (front + positions).movedim(0, batch_axis)


def vectors(fisher, likelihood, f, y, datum=None, mc_samples=1, seed=0):
    datum = layout(f.shape) if datum is None else datum
    generator = torch.Generator().manual_seed(seed)
    return list(backpropagated_vectors(fisher, likelihood, f, y, datum, mc_samples, generator))


def outer(found, batch_axis=0):
    """Σ_c ▲▲ᵀ of every datum, [N, dim F, dim F]."""
    V = torch.stack([v.movedim(batch_axis, 0).flatten(1) for v in found])
    return torch.einsum("cni,cnj->nij", V, V)


def hessians(loss, f, y, batch_axis=0):
    """The blocks of the loss' Hessian that belong to one datum each, without the factor."""
    N = f.shape[batch_axis]
    front = f.movedim(batch_axis, 0)
    H = autograd_hessian(lambda at: loss(at.movedim(0, batch_axis), y), front.contiguous())
    H = H.reshape(N, f.numel() // N, N, f.numel() // N)
    return torch.stack([H[n, :, n] for n in range(N)]) / likelihood_of(loss).scale


W4 = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=F64)
IGNORED = classes(3, 2).masked_fill(torch.tensor([[0, 0], [1, 0], [1, 1]]).bool(), -100)
CE, BCE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
CASES = {
    "mse": (nn.MSELoss(reduction="sum"), rand(3, 2, 2), rand(3, 2, 2, seed=1)),
    "ce": (CE(reduction="sum"), rand(5, 4), classes(5)),
    "ce-all": (
        CE(reduction="sum", weight=W4, label_smoothing=0.1),
        rand(3, 4, 2),
        IGNORED,
    ),
    "ce-soft": (CE(reduction="sum", weight=W4), rand(3, 4), rand(3, 4, seed=2).softmax(1)),
    "bce": (
        BCE(reduction="sum", weight=W4, pos_weight=W4.flip(0) + 0.1),
        rand(3, 4),
        rand(3, 4, seed=2).sigmoid(),
    ),
}
all_cases = pytest.mark.parametrize("case", CASES)


class TestEqualsTheHessian:
    @all_cases
    def test_type2(self, case):
        loss, f, y = CASES[case]
        found = vectors("type-2", likelihood_of(loss), f, y)
        sites = f[0].numel() // 4
        assert len(found) == (3 * sites if case.startswith("ce") else f[0].numel())
        torch.testing.assert_close(outer(found), hessians(loss, f, y))

    @pytest.mark.parametrize("case", ["ce", "ce-all", "ce-soft", "bce"])
    def test_type1(self, case):
        loss, f, y = CASES[case]
        found = vectors("type-1", likelihood_of(loss), f, y)
        number_of_labels, sites = (2, 4) if case == "bce" else (4, f[0].numel() // 4)
        assert len(found) == number_of_labels * sites
        torch.testing.assert_close(outer(found), hessians(loss, f, y))

    @all_cases
    def test_mc_in_the_mean(self, case):
        loss, f, y = CASES[case]
        found = vectors("mc", likelihood_of(loss), f, y, mc_samples=20_000)
        assert len(found) == 20_000
        error = (outer(found) - hessians(loss, f, y)).abs().max()
        assert error < 0.1  # standard deviation of an entry: at most weight 2 · √2/√20000 = 0.02

    @all_cases
    def test_curvature_propagation_in_the_mean(self, case):
        loss, f, y = CASES[case]
        found = vectors("curvature-propagation", likelihood_of(loss), f, y, mc_samples=20_000)
        assert len(found) == 20_000
        expected = hessians(loss, f, y)
        assert (outer(found) - expected).abs().max() < 0.1
        # one vector is S ε: for the square loss its entries are signs
        if case == "mse":
            assert torch.equal(found[0].abs() * 20_000**0.5, torch.ones_like(f))

    @pytest.mark.parametrize("fisher", ["type-2", "type-1"])
    def test_batch_on_the_last_axis(self, fisher):
        # A prediction [positions, classes, batch]: the likelihood's rows are not the data.
        loss, f, y = CE(reduction="sum"), rand(2, 4, 3), classes(2, 3)
        found = vectors(fisher, likelihood_of(loss), f, y, layout(f.shape, batch_axis=2))
        assert len(found) == (6 if fisher == "type-2" else 8)
        torch.testing.assert_close(outer(found, 2), hessians(loss, f, y, 2))

    def test_batch_times_positions_in_one_axis(self):
        # [T·N, C], time outermost, as a flattened language model's prediction
        T, N, C = 2, 3, 4
        f, y = rand(T * N, C), classes(T * N)
        datum = torch.arange(T * C).reshape(T, 1, C).expand(T, N, C).reshape(T * N, C)
        for fisher in ("type-2", "type-1"):
            found = vectors(fisher, likelihood_of(CE()), f, y, datum)
            assert len(found) == T * (C if fisher == "type-1" else C - 1)
            V = torch.stack(found).reshape(-1, T, N, C).transpose(1, 2).flatten(2)
            by_datum = f.reshape(T, N, C).transpose(0, 1)
            H = autograd_hessian(
                lambda at: CE(reduction="sum")(
                    at.transpose(0, 1).reshape(T * N, C), classes(T * N)
                ),
                by_datum.contiguous(),
            ).reshape(N, T * C, N, T * C)
            expected = torch.stack([H[n, :, n] for n in range(N)])
            torch.testing.assert_close(torch.einsum("cni,cnj->nij", V, V), expected)


class TestGradients:
    @all_cases
    def test_empirical(self, case):
        loss, f, y = CASES[case]
        (found,) = vectors("empirical", likelihood_of(loss), f, y)
        expected = torch.func.grad(lambda at: loss(at, y))(f) / likelihood_of(loss).scale
        torch.testing.assert_close(found, expected)

    @all_cases
    def test_forward_only(self, case):
        loss, f, y = CASES[case]
        assert vectors("forward-only", likelihood_of(loss), f, y) == []

    def test_mc_scale(self):
        f, y = rand(3, 2), rand(3, 2)
        draws = Gaussian().sample(f, torch.Generator().manual_seed(0))
        (one,) = vectors("mc", Gaussian(), f, y)
        torch.testing.assert_close(one, f - draws)
        first, *_ = vectors("mc", Gaussian(), f, y, mc_samples=4)
        torch.testing.assert_close(first, (f - draws) / 2)


class TestUsersOwn:
    poisson = Likelihood.from_distribution(lambda f: D.Poisson(f.exp()))

    def test_type2_is_derived(self):
        f, y = rand(4, 3), torch.ones(4, 3)
        torch.testing.assert_close(
            outer(vectors("type-2", self.poisson, f, y)), torch.diag_embed(f.exp())
        )

    def test_derived_square_root_is_found_once(self, monkeypatch):
        calls = []
        eigh = torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", lambda H: calls.append(H) or eigh(H))
        assert len(vectors("type-2", self.poisson, rand(4, 3), torch.ones(4, 3))) == 3
        assert len(calls) == 1

    def test_a_given_square_root_is_used(self):
        class Given(Likelihood):
            def hessian_sqrt(self, f, y, v):
                return 2 * v

        found = vectors("type-2", Given(), rand(4, 3), None)
        torch.testing.assert_close(outer(found), 4 * torch.eye(3, dtype=F64).expand(4, 3, 3))

    def test_mc_in_the_mean(self):
        f, y = 0.3 * rand(4, 2), torch.ones(4, 2)
        found = outer(vectors("mc", self.poisson, f, y, mc_samples=10_000))
        assert (found - torch.diag_embed(f.exp())).abs().max() < 0.15

    def test_labels_that_cannot_be_enumerated(self):
        for likelihood in (self.poisson, Gaussian()):
            with pytest.raises(LossError, match=r"'type-1'. 'mc'"):
                vectors("type-1", likelihood, rand(4, 2), torch.ones(4, 2))


class TestOptions:
    @pytest.mark.parametrize(
        ("wrong", "near"), [("type2", "type-2"), ("MC", None), ("empiric", "empirical")]
    )
    def test_unknown_fisher(self, wrong, near):
        hint = f"Did you mean '{near}'" if near else "no fisher"
        with pytest.raises(OptionError, match=hint) as caught:
            vectors(wrong, Gaussian(), rand(2, 2), rand(2, 2))
        assert all(repr(choice) in str(caught.value) for choice in FISHERS)

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
    def test_mc_samples(self, wrong):
        with pytest.raises(OptionError, match=f"mc_samples={wrong}"):
            vectors("mc", Gaussian(), rand(2, 2), rand(2, 2), mc_samples=wrong)

    def test_errors_come_before_the_first_vector(self):
        with pytest.raises(OptionError):
            backpropagated_vectors(
                "type-3", Gaussian(), rand(2, 2), rand(2, 2), layout((2, 2)), 1, torch.Generator()
            )


class TestLeavesTheCallerAlone:
    @pytest.mark.parametrize("fisher", FISHERS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_graph_and_rng(self, fisher, dtype):
        f = rand(3, 4).to(dtype).requires_grad_()
        state = torch.get_rng_state()
        for v in vectors(fisher, likelihood_of(CE()), f * 1, classes(3)):
            assert v.dtype == dtype
            assert v.shape == f.shape
            assert not v.requires_grad
        assert torch.equal(state, torch.get_rng_state())
        assert f.grad is None

    @pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
    def test_seeds(self, fisher):
        f, y = rand(30, 4), classes(30)
        one, same, other = (
            torch.stack(vectors(fisher, likelihood_of(CE()), f, y, mc_samples=2, seed=s))
            for s in (3, 3, 4)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert not torch.equal(one[0], one[1])
