"""The torch losses as likelihoods against torch itself, and users' own likelihoods by autodiff."""

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian as autograd_hessian

import fxkfac
from fxkfac import exact
from fxkfac.errors import DataError, LossError, NonFiniteError, UnsupportedUse
from fxkfac.isolation import own_randomness
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.losses import Bernoulli, Categorical, Gaussian, likelihood_of

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=4, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def holes(y, every=3, ignore=-100):
    return y.masked_fill(torch.arange(y.numel()).reshape(y.shape) % every == 0, ignore)


W4 = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=F64)
SOFT = rand(5, 4, seed=2).softmax(1)
SOFT_SEQ = rand(3, 4, 2, seed=2).softmax(1)

CE, BCE, MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss
PW = torch.tensor([0.5, 3.0, 1.0], dtype=F64)
WB = torch.tensor([2.0, 0.0, 0.3], dtype=F64)
BITS = classes(4, 3, C=2).to(F64)

# name: (loss, its options, prediction, target)
CASES = {
    "mse": (MSE, {}, rand(5, 4), rand(5, 4, seed=1)),
    "mse-tensor": (MSE, {}, rand(5, 4, 3), rand(5, 4, 3, seed=1)),
    "mse-1d": (MSE, {}, rand(5), rand(5, seed=1)),
    "ce": (CE, {}, rand(5, 4), classes(5)),
    "ce-one-datum": (CE, {}, rand(4), classes()),
    "ce-seq": (CE, {}, rand(3, 4, 2), classes(3, 2)),
    "ce-image": (CE, {}, rand(2, 4, 2, 3), classes(2, 2, 3)),
    "ce-weights": (CE, {"weight": W4}, rand(5, 4), classes(5)),
    "ce-ignore": (CE, {}, rand(3, 4, 2), holes(classes(3, 2))),
    "ce-ignore-class": (CE, {"ignore_index": 1}, rand(9, 4), classes(9)),
    "ce-weights-ignore": (CE, {"weight": W4}, rand(3, 4, 2), holes(classes(3, 2))),
    "ce-smooth": (CE, {"label_smoothing": 0.3}, rand(5, 4), classes(5)),
    "ce-all": (
        CE,
        {"label_smoothing": 0.3, "weight": W4, "ignore_index": 3},
        rand(3, 4, 3),
        classes(3, 3),
    ),
    "ce-all-negative-ignore": (
        CE,
        {"label_smoothing": 0.3, "weight": W4},
        rand(3, 4, 2),
        holes(classes(3, 2)),
    ),
    "ce-soft": (CE, {}, rand(5, 4), SOFT),
    "ce-soft-unnormalised": (CE, {}, rand(5, 4), SOFT * rand(5, 1, seed=4).abs()),
    "ce-soft-one-datum": (CE, {}, rand(4), SOFT[0]),
    "ce-soft-weights": (CE, {"weight": W4}, rand(5, 4), SOFT),
    "ce-soft-all": (CE, {"weight": W4, "label_smoothing": 0.2}, rand(3, 4, 2), SOFT_SEQ),
    # classes side by side in memory, as in the transposed output of a linear layer
    "ce-rows": (CE, {}, rand(3, 2, 4).mT, holes(classes(3, 2))),
    "ce-rows-image": (CE, {}, rand(2, 2, 3, 4).movedim(-1, 1), classes(2, 2, 3)),
    "ce-rows-all": (
        CE,
        {"label_smoothing": 0.3, "weight": W4, "ignore_index": 3},
        rand(3, 3, 4).mT,
        classes(3, 3),
    ),
    "ce-rows-soft-all": (CE, {"weight": W4, "label_smoothing": 0.2}, rand(3, 2, 4).mT, SOFT_SEQ),
    "bce": (BCE, {}, rand(4, 3), BITS),
    "bce-1d": (BCE, {}, rand(4), BITS[:, 0]),
    "bce-soft": (BCE, {}, rand(4, 3), rand(4, 3, seed=3).sigmoid()),
    "bce-weight": (BCE, {"weight": WB}, rand(4, 3), BITS),
    "bce-pos-weight": (BCE, {"pos_weight": PW}, rand(4, 3), BITS),
    "bce-all": (
        BCE,
        {"weight": WB, "pos_weight": PW},
        rand(2, 4, 3),
        rand(2, 4, 3, seed=3).sigmoid(),
    ),
}
all_cases = pytest.mark.parametrize("case", CASES)


def make(case, reduction="sum"):
    kind, options, f, y = CASES[case]
    loss = kind(reduction=reduction, **options)
    return loss, likelihood_of(loss), f, y


def dense_sqrt(likelihood, f, y):
    """S over all of f, [f.numel(), f.numel()]."""
    eye = torch.eye(f.numel(), dtype=f.dtype)
    columns = [likelihood.hessian_sqrt(f, y, e.reshape(f.shape)).flatten() for e in eye]
    return torch.stack(columns, dim=1)


def dense_hessian(criterion, f):
    return autograd_hessian(criterion, f).reshape(f.numel(), f.numel())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ce-rows")])
def test_labels_do_not_depend_on_where_classes_lie(case):
    _, likelihood, f, y = make(case)
    moved = f.contiguous()
    assert moved.stride() != f.stride()
    drawn, again = (likelihood.sample(t, torch.Generator().manual_seed(3)) for t in (f, moved))
    assert torch.equal(drawn, again)
    torch.testing.assert_close(
        likelihood.sampled_gradient(f, y, drawn), likelihood.sampled_gradient(moved, y, again)
    )


@pytest.mark.parametrize("classes", [7, 512, 513, 529, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_label_is_where_the_running_sum_of_probabilities_exceeds_the_noise(classes, dtype):
    """Of many classes a block is drawn first; and what has no probability is never drawn."""
    logits = 3 * torch.randn(classes, generator=torch.Generator().manual_seed(0), dtype=F64)
    logits[[0, 1, classes // 2, -1]] = -torch.inf
    probabilities = logits.softmax(0)
    sums = probabilities.cumsum(0)
    even = torch.linspace(0, 1, 3001, dtype=F64)
    noise = torch.cat([even[:-1], sums, torch.ones(1, dtype=F64)]).to(dtype)
    noise = noise.clamp_max(1 - torch.finfo(dtype).eps / 2)
    f = logits.to(dtype).expand(len(noise), -1)
    drawn = Categorical().label(f, noise)
    assert (probabilities[drawn] > 0).all()
    below, above = sums[drawn] - probabilities[drawn], sums[drawn]
    tolerance = 1e-13 if dtype == F64 else 1e-5
    assert (noise - above).max() < tolerance
    assert (below - noise).max() < tolerance
    assert drawn[0] == 2


class TestAgainstTorch:
    @all_cases
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_reduction_factor_times_criterion_is_the_loss(self, case, reduction):
        loss, likelihood, f, y = make(case, reduction)
        R = likelihood.reduction_factor(likelihood.count(f, y))
        torch.testing.assert_close(R * likelihood.criterion(f, y), loss(f, y))

    @all_cases
    def test_gradient(self, case):
        loss, likelihood, f, y = make(case)
        expected = torch.func.grad(lambda at: loss(at, y))(f) / likelihood.scale
        torch.testing.assert_close(likelihood.gradient(f, y), expected)

    @all_cases
    def test_square_root_of_the_hessian(self, case):
        loss, likelihood, f, y = make(case)
        S = dense_sqrt(likelihood, f, y)
        expected = dense_hessian(lambda at: loss(at, y), f) / likelihood.scale
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(S @ S.T, expected)

    @pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("mse")])
    def test_expected_square_of_the_sampled_gradient_is_the_hessian(self, case):
        loss, likelihood, f, y = make(case)
        expected = dense_hessian(lambda at: loss(at, y), f)
        sites = sum_of_sites(likelihood, f, y)
        torch.testing.assert_close(sites, expected)

    @all_cases
    def test_validates_and_changes_nothing(self, case):
        _, likelihood, f, y = make(case)
        before = f.clone(), y.clone(), torch.get_rng_state()
        likelihood.validate(f, y)
        likelihood.gradient(f, y)
        likelihood.hessian_sqrt(f, y, torch.ones_like(f))
        likelihood.sampled_gradient(f, y, likelihood.sample(f, torch.Generator()))
        for old, new in zip(before, (f, y, torch.get_rng_state()), strict=True):
            assert torch.equal(old, new)
        assert not f.requires_grad

    @all_cases
    def test_half_precision(self, case):
        _, likelihood, f, y = make(case)
        low = f.bfloat16()
        exact = low.double()
        sampled = likelihood.sample(low, torch.Generator())
        ones = torch.ones_like(low)
        for found, expected in {
            likelihood.gradient(low, y): likelihood.gradient(exact, y),
            likelihood.hessian_sqrt(low, y, ones): likelihood.hessian_sqrt(exact, y, ones.double()),
            likelihood.sampled_gradient(low, y, sampled): likelihood.sampled_gradient(
                exact, y, sampled
            ),
        }.items():
            assert found.dtype == torch.bfloat16
            # rounded once, at the end
            torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(
            likelihood.criterion(low, y).double(), likelihood.criterion(exact, y), rtol=1e-5, atol=0
        )


def sum_of_sites(likelihood, f, y):
    """Σ_label p g gᵀ, with terms inside one site only."""
    axes = likelihood.event_axes(f)
    positions = torch.arange(f.numel()).reshape(f.shape)
    site = positions.amin(axes, keepdim=True).expand(f.shape) if axes else positions
    same = site.reshape(-1, 1) == site.reshape(1, -1)
    total = torch.zeros(f.numel(), f.numel(), dtype=f.dtype)
    for p, label in likelihood.labels(f):
        g = (p.sqrt() * likelihood.sampled_gradient(f, y, label)).flatten()
        total += torch.outer(g, g) * same
    return total


class TestClosedForms:
    """Values worked out by hand."""

    def test_softmax_cross_entropy_hessian(self):  # Examples 7 and 12
        f, y = rand(5), classes(C=5)
        σ = f.softmax(0)
        S = torch.diag(σ.sqrt()) - torch.outer(σ, σ.sqrt())
        torch.testing.assert_close(dense_sqrt(Categorical(), f, y), S)
        torch.testing.assert_close(S @ S.T, torch.diag(σ) - torch.outer(σ, σ))

    def test_square_loss_hessian_is_the_identity(self):  # Examples 8 and 11
        f, y = rand(3, 2), rand(3, 2, seed=1)
        assert torch.equal(dense_sqrt(Gaussian(), f, y), torch.eye(6, dtype=F64))

    def test_bernoulli_square_root(self):
        f = torch.tensor([0.0, 0.0], dtype=F64)
        S = Bernoulli(pos_weight=torch.tensor(4.0)).hessian_sqrt(
            f, torch.tensor([0.0, 1.0], dtype=F64), torch.ones_like(f)
        )
        torch.testing.assert_close(S, torch.tensor([0.5, 1.0], dtype=F64))  # √(π/4)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_reduction_factors_of_tensor_valued_targets(self, reduction):  # Examples 1 and 2
        mean = reduction == "mean"
        shape = (10, 5, 4, 3)
        y, labels = rand(*shape), classes(10, 4, 3, C=5)
        R = {
            likelihood: likelihood.reduction_factor(likelihood.count(rand(*shape, seed=1), target))
            for likelihood, target in [
                (Gaussian(reduction), y),
                (Categorical(reduction), labels),
                (Bernoulli(reduction), y.sigmoid()),
            ]
        }
        expected = [2 / 600, 1 / 120, 1 / 600] if mean else [2, 1, 1]
        assert list(R.values()) == pytest.approx(expected)

    def test_counts_of_batches_add_up(self):
        loss = CE(weight=W4, label_smoothing=0.1)
        f, y = rand(7, 4, 3), holes(classes(7, 3))
        parts = zip(f.split(3), y.split(3), strict=True)
        likelihood = likelihood_of(loss)
        criterion, count = 0.0, 0.0
        for f_b, y_b in parts:
            criterion += likelihood.criterion(f_b, y_b)
            count += likelihood.count(f_b, y_b)
        torch.testing.assert_close(likelihood.reduction_factor(count) * criterion, loss(f, y))

    def test_ignored_positions_give_nothing(self):
        likelihood = Categorical(ignore_index=2)
        f, y = rand(2, 4), torch.tensor([2, 1])
        ones = torch.tensor([[1.0, 0, 0, 0]] * 2, dtype=F64)
        for t in (
            likelihood.gradient(f, y),
            likelihood.hessian_sqrt(f, y, ones),
            likelihood.sampled_gradient(f, y, torch.tensor([0, 0])),
        ):
            assert (t[0] == 0).all()
            assert (t[1] != 0).all()

    def test_confident_predictions_stay_finite_and_curved(self):
        f = torch.tensor([[60.0, -60.0]])
        S = Bernoulli().hessian_sqrt(f, torch.ones_like(f), torch.ones_like(f))
        # p (1 - p) ≈ exp(-60): 1 - p computed by subtraction would be 0
        torch.testing.assert_close(S, torch.full_like(S, 9.357623e-14), rtol=1e-4, atol=0)
        columns = dense_sqrt(Categorical(), torch.tensor([[100.0, 0.0, -100.0]]), torch.tensor([1]))
        assert columns.isfinite().all()
        assert columns[1, 1] > 0

    def test_a_class_weight_counts_once_in_the_gradient(self):
        f, y = rand(1, 4), torch.tensor([1])
        plain, weighted = Categorical(), Categorical(weight=W4)
        torch.testing.assert_close(weighted.gradient(f, y), 2 * plain.gradient(f, y))
        sampled = torch.tensor([3])
        torch.testing.assert_close(
            weighted.sampled_gradient(f, y, sampled), 2**0.5 * plain.gradient(f, sampled)
        )


class TestSampling:
    @pytest.mark.parametrize("case", ["mse", "ce-one-datum", "ce-seq", "bce"])
    def test_mean_outer_product_is_the_hessian(self, case):
        _, likelihood, f, y = make(case)
        many = f.expand(20_000, *f.shape) if case == "ce-one-datum" else f
        draws = 1 if case == "ce-one-datum" else 20_000
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(f.numel(), f.numel(), dtype=F64)
        for _ in range(draws):
            g = likelihood.gradient(many, likelihood.sample(many, generator))
            g = g.reshape(-1, f.numel())
            total += g.T @ g
        expected = dense_sqrt(likelihood, f, y)
        error = (total / 20_000 - expected @ expected.T).abs().max()
        assert error < 0.06  # standard deviation of an entry: below √2/√20000 = 0.01

    @pytest.mark.parametrize(
        "likelihood",
        [
            Gaussian(),
            Categorical(),
            Bernoulli(),
            Likelihood.from_distribution(lambda f: D.Poisson(f.exp())),
        ],
    )
    def test_seeds(self, likelihood):
        f = rand(50, 4)
        state = torch.get_rng_state()
        first, second, third = (
            likelihood.sample(f, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
        assert torch.equal(state, torch.get_rng_state())
        generator = torch.Generator().manual_seed(7)
        assert torch.equal(likelihood.sample(f, generator), first)
        assert not torch.equal(likelihood.sample(f, generator), first)

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("shape", [(7,), (3, 7), (3, 7, 2, 2)])
    def test_every_class_has_its_share_of_the_noise(self, dtype, shape):
        """A fine grid of noise, of which each class takes its probability."""
        axis, N = min(1, len(shape) - 1), 20_000
        f = rand(*shape).to(dtype)
        for k in (0, 3, 6):  # the first, one in the middle, the last
            f.select(axis, k).fill_(-torch.inf)
        sites = f.select(axis, 0)
        largest = 1 - torch.finfo(dtype).eps / 2  # that a generator gives
        grid = torch.cat([torch.arange(N).to(dtype) / N, torch.tensor([largest], dtype=dtype)])
        drawn = torch.stack([Categorical().label(f, u.expand(sites.shape)) for u in grid])
        shares = torch.nn.functional.one_hot(drawn, 7).double().mean(0)
        expected = f.double().softmax(axis).movedim(axis, -1)
        torch.testing.assert_close(shares, expected, rtol=0, atol=2 / N)
        assert not shares[..., [0, 3, 6]].any()

    def test_samples_are_targets(self):
        generator = torch.Generator()
        for case in ("mse-tensor", "ce-image", "ce-one-datum", "bce-all"):
            _, likelihood, f, _ = make(case)
            likelihood.validate(f, likelihood.sample(f, generator).to(CASES[case][3].dtype))

    def test_isolated_rng_restores_the_state_after_an_error(self):
        state = torch.get_rng_state()

        def fail():
            with own_randomness(3):
                torch.rand(3)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert torch.equal(state, torch.get_rng_state())

    def test_isolated_rng_without_a_seed_continues_the_callers_stream(self):
        torch_state = torch.get_rng_state()
        with own_randomness():
            inside = torch.rand(3)
        assert torch.equal(inside, torch.rand(3))
        torch.set_rng_state(torch_state)


class PoissonRate(Likelihood):
    def distribution(self, prediction):
        return D.Poisson(prediction.exp())


class LogCosh(Likelihood):
    reduction = "sum"
    scale = 3.0

    def nll(self, prediction, target):
        return (prediction - target).cosh().log().flatten(1).sum(1)


class Cauchy(Likelihood):
    def distribution(self, prediction):
        return D.Cauchy(prediction, 1.0)


class Linear(Likelihood):
    def nll(self, prediction, target):
        return (prediction * target).sum(1)


class TestUsersOwn:
    def test_poisson(self):
        f, y = rand(6, 3), torch.poisson(rand(6, 3).exp())
        likelihood = PoissonRate()
        likelihood.validate(f, y)
        expected = (f.exp() - y * f + torch.lgamma(y + 1)).sum(1)
        torch.testing.assert_close(likelihood.nll(f, y), expected)
        torch.testing.assert_close(likelihood.gradient(f, y), f.exp() - y)
        S = dense_sqrt(likelihood, f, y)
        torch.testing.assert_close(S @ S.T, torch.diag(f.exp().flatten()))
        assert likelihood.reduction_factor(likelihood.count(f, y)) == pytest.approx(1 / 6)

    def test_nll_alone(self):
        f, y = rand(4, 2, 3), rand(4, 2, 3, seed=1)
        likelihood = LogCosh()
        assert likelihood.reduction_factor(likelihood.count(f, y)) == 3.0
        torch.testing.assert_close(likelihood.gradient(f, y), (f - y).tanh())
        S = dense_sqrt(likelihood, f, y)
        torch.testing.assert_close(S @ S.T, torch.diag((1 - (f - y).tanh() ** 2).flatten()))
        with pytest.raises(LossError, match="LogCosh has no distribution"):
            likelihood.sample(f, torch.Generator())

    def test_categorical_by_distribution_is_cross_entropy(self):
        f, y = rand(5, 4), classes(5)
        derived = Likelihood.from_distribution(lambda f: D.Categorical(logits=f))
        closed = likelihood_of(CE())
        for name in ("nll", "criterion", "gradient"):
            torch.testing.assert_close(getattr(derived, name)(f, y), getattr(closed, name)(f, y))
        S, expected = dense_sqrt(derived, f, y), dense_sqrt(closed, f, y)
        torch.testing.assert_close(S @ S.T, expected @ expected.T)
        assert derived.count(f, y) == closed.count(f, y)
        assert derived.event_axes(f) == closed.event_axes(f)

    def test_from_distribution_takes_the_reduction(self):
        likelihood = Likelihood.from_distribution(D.Exponential, reduction="sum")
        assert likelihood.reduction_factor(7.0) == 1.0
        with pytest.raises(LossError, match="'none'"):
            Likelihood.from_distribution(D.Exponential, reduction="none")

    def test_half_precision_of_the_derived_square_root(self):
        f, v = rand(3, 2).bfloat16(), torch.ones(3, 2).bfloat16()
        Sv = PoissonRate().hessian_sqrt(f, torch.ones(3, 2), v)
        assert Sv.dtype == torch.bfloat16
        torch.testing.assert_close(Sv.double(), (f.double() / 2).exp(), rtol=2**-8, atol=0)

    def test_a_linear_criterion_has_no_curvature(self):
        f, y = rand(3, 2), rand(3, 2, seed=1)
        assert (Linear().hessian_sqrt(f, y, torch.ones_like(f)) == 0).all()

    def test_derived_square_root_of_a_saturated_prediction(self):
        derived = Likelihood.from_distribution(lambda f: D.Categorical(logits=f))
        f = torch.tensor([[40.0, 0.0, -3.0], [1.0, 2.0, 3.0]], dtype=F64)
        S = dense_sqrt(derived, f, torch.tensor([0, 0]))
        expected = dense_sqrt(Categorical(), f, torch.tensor([0, 0]))
        torch.testing.assert_close(S @ S.T, expected @ expected.T, rtol=1e-6, atol=1e-16)

    def test_non_convex_is_refused(self):
        f, y = torch.tensor([[0.0], [5.0]], dtype=F64), torch.zeros(2, 1, dtype=F64)
        with pytest.raises(LossError, match=r"Cauchy is not convex.*row 1 .*fisher='mc'"):
            Cauchy().hessian_sqrt(f, y, torch.ones_like(f))
        # the same criterion where it is convex
        near = torch.tensor([[0.0], [0.5]], dtype=F64)
        assert Cauchy().hessian_sqrt(near, y, torch.ones_like(f)).min() > 0

    def test_without_second_derivative_is_refused(self):
        """PyTorch has none of its margin losses and of CTC."""

        class Margin(Likelihood):
            def nll(self, prediction, target):
                return F.multi_margin_loss(prediction, target, reduction="none")

        f, y = torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([0])
        with pytest.raises(LossError, match=r"Margin has no second derivative.*'empirical'"):
            Margin().hessian_sqrt(f, y, f)
        model, x = nn.Linear(1, 2).double(), torch.ones(1, 1, dtype=F64)
        for matrix in (exact.ggn, exact.hessian):
            with pytest.raises(
                UnsupportedUse, match=r"multi_margin_loss.*model and loss of others"
            ):
                matrix(model, Margin(), (x, y))

    def test_infinite_curvature_is_refused(self):
        f = torch.tensor([[1000.0]], dtype=F64)
        with pytest.raises(NonFiniteError, match="PoissonRate holds NaN or Inf"):
            PoissonRate().hessian_sqrt(f, torch.ones(1, 1, dtype=F64), f)

    def test_nll_of_a_wrong_shape_is_refused(self):
        class Reduced(Likelihood):
            def nll(self, prediction, target):
                return (prediction - target).square().mean()

        with pytest.raises(LossError, match=r"Reduced.nll returned shape \(\); .* shape \(3,\)"):
            Reduced().gradient(rand(3, 2), rand(3, 2))

    def test_an_nll_that_autograd_cannot_follow_needs_a_gradient(self):
        class Detached(Likelihood):
            def nll(self, prediction, target):
                return (prediction.detach() - target).square().sum(1) / 2

        class Formula(Detached):
            def gradient(self, f, y):
                return f - y

        f, y = rand(3, 2), rand(3, 2, seed=1)
        with pytest.raises(LossError, match=r"Detached.nll does not depend on the prediction"):
            Detached().validate(f, y)
        Formula().validate(f, y)
        with torch.no_grad():
            LogCosh().validate(f, y)

    def test_nothing_given(self):
        with pytest.raises(LossError, match="Likelihood has no distribution"):
            Likelihood().criterion(rand(3, 2), rand(3, 2))

    def test_labels_cannot_be_enumerated(self):
        for likelihood in (Gaussian(), PoissonRate()):
            with pytest.raises(LossError, match=r"'type-1'. 'mc' .* 'type-2'"):
                likelihood.labels(rand(3, 2))

    def test_outside_of_the_support(self, monkeypatch):
        # `torch.compile`, wherever it was used before, switches the check off for everyone.
        monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
        with pytest.raises(DataError, match="PoissonRate refuses these data"):
            PoissonRate().validate(rand(2, 1), torch.tensor([[1.0], [-1.0]]))

    def test_validation_lets_the_likelihoods_own_error_through(self):
        with pytest.raises(LossError, match="returns Tensor"):
            Likelihood.from_distribution(lambda f: f).validate(rand(2, 1), rand(2, 1))

    def test_differing_lengths(self):
        with pytest.raises(DataError, match=r"3 predictions, but targets of shape \(2, 1\)"):
            PoissonRate().validate(rand(3, 1), torch.ones(2, 1))


class TestLikelihoodOf:
    def test_a_likelihood_is_itself(self):
        likelihood = PoissonRate()
        assert likelihood_of(likelihood) is likelihood

    @pytest.mark.parametrize(
        ("loss", "name"),
        [
            (nn.L1Loss(), "L1Loss"),
            (nn.functional.mse_loss, "mse_loss"),
            (nn.MSELoss, "MSELoss"),
            (None, "NoneType"),
        ],
    )
    def test_others_are_refused_with_a_remedy(self, loss, name):
        with pytest.raises(LossError, match=f"loss {name}.*an instance of nn.MSELoss.*`nll"):
            likelihood_of(loss)

    @pytest.mark.parametrize("kind", [MSE, CE, BCE])
    def test_no_reduction_is_refused(self, kind):
        with pytest.raises(LossError, match=f"{kind.__name__} has reduction='none'"):
            likelihood_of(kind(reduction="none"))

    def test_a_subclass_with_its_own_forward_is_another_loss(self):
        class Renamed(MSE):
            pass

        class Halved(MSE):
            def forward(self, input, target):
                return super().forward(input, target) / 2

        assert isinstance(likelihood_of(Renamed()), Gaussian)
        with pytest.raises(LossError, match="loss Halved"):
            likelihood_of(Halved())

    def test_negative_weights_are_refused(self):
        with pytest.raises(LossError, match="class weight of -1; expected weights ≥ 0"):
            likelihood_of(CE(weight=torch.tensor([1.0, -1.0])))
        for name in ("weight", "pos_weight"):
            with pytest.raises(LossError, match=f"{name}=-2; expected"):
                likelihood_of(BCE(**{name: torch.tensor([1.0, -2.0])}))


NAN = torch.full((3, 2), torch.nan)
REFUSED = {
    "mse shape": (MSE(), rand(3, 1), rand(3), r"shape \(3,\) for MSELoss .* shape \(3, 1\)"),
    "mse dtype": (MSE(), rand(3, 1), classes(3, 1), "torch.int64.*expected floating targets"),
    "mse nan": (MSE(), rand(3, 2), NAN, r"6 of 6 target values are NaN or Inf.*\(0, 0\)"),
    "mse empty": (MSE(), rand(0, 2), rand(0, 2), r"shape \(0, 2\); expected a floating tensor"),
    "mse not a tensor": (MSE(), rand(2), [0.0, 1.0], "targets are a list; expected a tensor"),
    "mse no prediction": (MSE(), {"logits": 1}, rand(2), "is of type dict; expected a tensor"),
    "ce length": (CE(), rand(3, 4), classes(2), r"shape \(2,\).*of shape \(3,\)"),
    "ce axis": (CE(), rand(3, 2, 4), classes(3, 2), r"of shape \(3, 4\).*Classes lie on axis 1"),
    "ce dtype": (CE(), rand(3, 4), classes(3).int(), "dtype torch.int32"),
    "ce range": (CE(), rand(3, 4), torch.tensor([0, 4, 9]), r"2 of 3 .*\[4, 9\]; expected 0\.\.3"),
    "ce negative": (CE(), rand(1, 4), torch.tensor([-1]), r"\[-1\]; .*ignore_index=-100"),
    "ce soft shape": (CE(), rand(3, 4), rand(3), "CrossEntropyLoss with class probabilities"),
    "ce soft negative": (CE(), rand(3, 4), -SOFT[:3], "a class probability is -.*softmax"),
    "ce soft ignore": (CE(ignore_index=1), rand(3, 4), SOFT[:3], "no ignore_index, but it is 1"),
    "ce soft nan": (CE(), rand(3, 2), NAN, "6 of 6 target values are NaN"),
    "ce dtype of f": (CE(), classes(3, 4), classes(3), "prediction has dtype torch.int64"),
    "bce range": (BCE(), rand(1, 2), torch.tensor([[0.5, 2.0]]), r"1 of 2 .*\[2.0\]"),
    "bce dtype": (BCE(), rand(3, 4), classes(3, 4, C=2), "torch.int64 .*expected floating"),
    "bce weight": (
        BCE(weight=torch.ones(3)),
        rand(3, 2),
        rand(3, 2).sigmoid(),
        r"^weight of shape \(3,\) does not broadcast .* \(3, 2\)",
    ),
    "bce pos_weight": (
        BCE(pos_weight=torch.ones(2, 3, 2)),
        rand(3, 2),
        rand(3, 2).sigmoid(),
        r"pos_weight of shape \(2, 3, 2\) does not broadcast",
    ),
}


class TestValidation:
    @pytest.mark.parametrize("case", REFUSED)
    def test_refused(self, case):
        loss, f, y, message = REFUSED[case]
        with pytest.raises(DataError, match=message):
            likelihood_of(loss).validate(f, y)

    def test_number_of_class_weights(self):
        with pytest.raises(LossError, match=r"weights of shape \(4,\).* 3 classes"):
            likelihood_of(CE(weight=W4)).validate(rand(2, 3), classes(2, C=3))

    @pytest.mark.parametrize("count", [0.0, float("nan"), float("inf")])
    def test_nothing_to_average(self, count):
        with pytest.raises(DataError, match=f"divide by {count}"):
            Gaussian().reduction_factor(count)
        assert Gaussian("sum").reduction_factor(count) == 2.0

    def test_all_ignored(self):
        likelihood = likelihood_of(CE())
        f, y = rand(2, 4), torch.tensor([-100, -100])
        likelihood.validate(f, y)  # one batch may hold padding only
        with pytest.raises(DataError, match="every target is ignored"):
            likelihood.reduction_factor(likelihood.count(f, y))


class Cosh(Likelihood):
    def nll(self, prediction, target):
        return (prediction - target).cosh().log().flatten(1).sum(1)


class Rate(Likelihood):
    def distribution(self, prediction):
        return D.Poisson(prediction.exp())


class TestNothingIsBroadcast:
    @pytest.mark.parametrize("shapes", [((8, 1), (8,)), ((8, 3), (8, 1)), ((8, 3), (8, 1, 3))])
    def test_labels_of_a_distribution(self, shapes):
        f, y = rand(*shapes[0]), torch.ones(shapes[1], dtype=F64)
        with pytest.raises(DataError, match=r"targets of shape .* for a Poisson of shape"):
            Rate().validate(f, y)

    def test_targets_that_an_nll_couples(self):
        with pytest.raises(LossError, match=r"Cosh\.nll gives .* for it alone; expected the same"):
            Cosh().validate(rand(8, 1), rand(8, seed=1))
        Cosh().validate(rand(8, 1), rand(8, 1, seed=1))

    @pytest.mark.parametrize(("backwards", "place"), [(False, "last"), (True, "first")])
    def test_an_nll_that_adds_up_along_the_data(self, backwards, place):
        class Cox(Likelihood):
            def nll(self, prediction, target):
                at_risk = prediction[:, 0].flip(0) if backwards else prediction[:, 0]
                total = at_risk.logcumsumexp(0)
                return (total.flip(0) if backwards else total) - prediction[:, 0]

        with pytest.raises(LossError, match=f"for the {place} of 8 data"):
            Cox().validate(rand(8, 1), rand(8, 1, seed=1))

    def test_weights_of_data(self):
        class Weighted(Cosh):
            weights = torch.rand(8, dtype=F64, generator=torch.Generator().manual_seed(0))

            def nll(self, prediction, target):
                return self.weights * super().nll(prediction, target)

        Weighted().validate(rand(8, 2), rand(8, 2, seed=1))

    def test_targets_may_be_probabilities_where_labels_are_classes(self):
        class Own(Likelihood):
            def distribution(self, prediction):
                return D.Categorical(logits=prediction)

            def nll(self, prediction, target):
                return F.cross_entropy(prediction, target, reduction="none")

        x, y = rand(6, 4), rand(6, 3, seed=1).softmax(-1)
        program, options = fxkfac.trace(nn.Linear(4, 3).double(), x), {"fisher": "mc"}
        found = fxkfac.kfac(program, Own(), (x, y), generator=torch.Generator(), **options)
        expected = fxkfac.kfac(
            program, Own(), (x, y.argmax(-1)), generator=torch.Generator(), **options
        )
        assert torch.equal(found["weight"].B, expected["weight"].B)

    def test_drawn_labels_that_have_no_weight(self):
        class Weighted(Likelihood):
            def distribution(self, prediction):
                return D.Normal(prediction, 1.0)

            def nll(self, prediction, target):
                return target[:, -1] * (prediction[:, 0] - target[:, 0]).square() / 2

        class Told(Weighted):
            def sampled_gradient(self, f, y, sampled):
                return y[:, 1:].sqrt() * (f - sampled)

        x, y = rand(6, 4), rand(6, 2, seed=1).abs()
        program = fxkfac.trace(nn.Linear(4, 1).double(), x)
        options = {"fisher": "mc", "mc_samples": 4000, "separate_weight_and_bias": True}
        with pytest.raises(LossError, match=r"shape \(6, 1\), the targets have \(6, 2\)"):
            fxkfac.kfac(program, Weighted(), (x, y), **options)
        found = fxkfac.kfac(program, Told(), (x, y), **options).dense("bias")
        torch.testing.assert_close(found.squeeze(), y[:, 1].mean(), rtol=0.05, atol=0)

    def test_distributions_with_events(self):
        make = Likelihood.from_distribution(lambda f: D.Independent(D.Normal(f, 1.0), 1))
        make.validate(rand(5, 3), rand(5, 3, seed=1))
        Likelihood.from_distribution(lambda f: D.Categorical(logits=f)).validate(
            rand(5, 3), classes(5, C=3)
        )


ROOT = {"hessian_sqrt": lambda self, f, y, v: v}
GRADIENT = {"gradient": lambda self, f, y: f - y}
NOISY = {"sample": lambda self, f, generator: f + torch.randn(f.shape, generator=generator).to(f)}
EITHER = {"labels": lambda self, f: ((torch.full_like(f, 0.5), f + sign) for sign in (-1.0, 1.0))}
ENOUGH = {
    "type-2": ROOT,
    "curvature-propagation": ROOT,
    "mc": NOISY | GRADIENT,
    "type-1": EITHER | GRADIENT,
    "empirical": GRADIENT,
    "forward-only": {},
}


@pytest.mark.parametrize("fisher", ENOUGH)
def test_the_formulas_of_a_flavour_are_enough_for_it(fisher):
    def factors(**methods):
        loss = type("Own", (Likelihood,), methods)()
        generator = torch.Generator().manual_seed(0)
        return fxkfac.kfac(program, loss, data, fisher=fisher, generator=generator)

    data = rand(5, 3), rand(5, 2, seed=1)
    program = fxkfac.trace(nn.Linear(3, 2).double(), data[0])
    rest = {n: m for n, m in ENOUGH[fisher].items() if n in ("sample", "labels")}
    derived = factors(nll=lambda self, f, y: (f - y).square().sum(1) / 2, **rest)
    torch.testing.assert_close(factors(**ENOUGH[fisher]).dense(), derived.dense())
    for part in rest:  # a label by itself does not say how it is sent back
        with pytest.raises(LossError, match="Own has no distribution"):
            factors(**{part: rest[part]})


class TestTorchLossesThatAreOtherFunctions:
    def test_hooks(self):
        loss = MSE()
        loss.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(LossError, match="without hooks"):
            likelihood_of(loss)

    def test_a_forward_of_its_own(self):
        loss = MSE()
        loss.forward = lambda f, y: (f - y).abs().mean()
        with pytest.raises(LossError, match="no likelihood is known for the loss MSELoss"):
            likelihood_of(loss)

    def test_label_smoothing_beyond_one(self):
        with pytest.raises(LossError, match=r"label_smoothing=1\.5"):
            likelihood_of(CE(label_smoothing=1.5))


class Padded(Likelihood):
    """Cross-entropy that ignores a class, as one would write it."""

    def nll(self, prediction, target):
        return nn.functional.cross_entropy(prediction, target, reduction="none").flatten(1).sum(1)

    def count(self, f, y):
        return float((y != -100).sum())

    def event_axes(self, f):
        return (1,)

    def ignored(self, f, y):
        return (y == -100).unsqueeze(1)

    def ignores(self, y):
        return bool((y == -100).any())

    def distribution(self, prediction):
        return D.Categorical(logits=prediction.movedim(1, -1))


class TestIgnoredSitesOfAUsersLikelihood:
    @pytest.fixture
    def made(self):
        torch.manual_seed(0)
        inside = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
        x = rand(9, 5, 4)
        y = classes(9, 5, C=3)
        y[:, 3:] = -100

        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = inside

            def forward(self, x):
                return self.inside(x).transpose(1, 2)

        return fxkfac.trace(Positions(), x), (x, y)

    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_rows_and_factors_are_those_of_cross_entropy(self, made, fisher):
        program, data = made
        expected = fxkfac.kfac(program, CE(), data, fisher=fisher)
        found = fxkfac.kfac(program, Padded(), data, fisher=fisher)
        assert found.products["inside.0.weight"][0].rows == 27
        for name, block in expected.items():
            torch.testing.assert_close(found[name].A, block.A)
            torch.testing.assert_close(found[name].B, block.B, rtol=1e-7, atol=1e-9)

    def test_no_gradient_of_a_drawn_label_arrives_at_them(self, made):
        y, f = made[1][1], rand(9, 3, 5)
        likelihood, source = Padded(), torch.Generator().manual_seed(0)
        sampled = likelihood.sample(f, source)
        assert not likelihood.sampled_gradient(f, y, sampled)[..., 3:].any()
        assert not torch.stack(list(likelihood.hessian_columns(f, y)))[..., 3:].any()
