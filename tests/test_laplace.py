"""Laplace's approximation: exact where it can be, and elsewhere what its formula says."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn.utils.rnn import pack_padded_sequence

import fxkfac
from fxkfac import laplace, operators
from fxkfac.errors import OptionError, ParameterError, UnknownParameter, UnsupportedUse

N, IN, OUT, PRECISION = 7, 3, 2, 0.7


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def gaussian(width: float) -> fxkfac.Likelihood:
    return fxkfac.Likelihood.from_distribution(lambda f: Normal(f, width))


LOSSES = {
    "MSE, mean": (nn.MSELoss(), 1.0),
    "MSE, sum": (nn.MSELoss(reduction="sum"), 1.0),
    "Gaussian of width 0.3": (gaussian(0.3), 0.3),
}


def linear_data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, IN, generator=g), torch.randn(N, OUT, generator=g)
    return x.double(), y.double()


def design(x: Tensor) -> Tensor:
    """x̃ = (x 1)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def ridge(width: float) -> nn.Linear:
    """The most probable linear map under N(0, I/τ) and Gaussian noise."""
    x, y = linear_data()
    X = design(x)
    precision = X.T @ X / width**2 + PRECISION * torch.eye(IN + 1).double()
    W = torch.linalg.solve(precision, X.T @ y / width**2).T
    model = nn.Linear(IN, OUT).double()
    with torch.no_grad():
        model.weight.copy_(W[:, :-1])
        model.bias.copy_(W[:, -1])
    return model


def value(loss: object, f: Tensor, y: Tensor) -> Tensor:
    """A loss with its reduction; that of a likelihood is a mean."""
    return loss.criterion(f, y) / len(f) if isinstance(loss, fxkfac.Likelihood) else loss(f, y)


@pytest.mark.parametrize("case", LOSSES)
def test_linear_gaussian_models_have_their_exact_posterior_and_evidence(case: str) -> None:
    loss, width = LOSSES[case]
    model, (x, y) = ridge(width), linear_data()
    factors = fxkfac.kfac(fxkfac.trace(model, x), loss, (x, y))
    found = laplace.posterior(factors, PRECISION)

    X = design(x)
    of_row = X.T @ X / width**2 + PRECISION * torch.eye(IN + 1).double()
    by_row = torch.linalg.inv(torch.block_diag(of_row, of_row))  # (W b), row by row
    as_stored = [*(4 * o + i for o in range(OUT) for i in range(IN)), 3, 7]
    covariance = operators.to_dense(operators.power(found.precision, -1))
    close(covariance, by_row[as_stored][:, as_stored])

    outputs = MultivariateNormal(
        torch.zeros(N).double(), width**2 * torch.eye(N).double() + X @ X.T / PRECISION
    )
    expected = outputs.log_prob(y.T).sum()
    if isinstance(loss, nn.MSELoss):  # c = ½‖f − y‖² is −log p up to this
        expected = expected + y.numel() / 2 * math.log(2 * math.pi)
    close(laplace.log_evidence(found, value(loss, model(x), y).detach()), expected.detach())

    draws = laplace.sample(found, 5, torch.Generator().manual_seed(0))
    linear = laplace.linearised(found, draws, x)
    assert linear.shape == (5, N, OUT)
    close(linear, laplace.predictions(found, draws, x))
    close(linear, x @ draws["weight"].mT + draws["bias"].unsqueeze(1))


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(N, IN).double(), torch.randint(0, 3, (N,))


@cache
def network_program() -> fxkfac.Program:
    model, x, _ = network()
    return fxkfac.trace(model, x)


def network_posterior(names: tuple[str, ...] = ()) -> tuple[laplace.Posterior, Tensor]:
    _, x, y = network()
    factors = fxkfac.kfac(network_program(), nn.CrossEntropyLoss(), (x, y))
    return laplace.posterior(factors, PRECISION, names), x


@pytest.mark.parametrize("names", [(), ("2.weight", "2.bias")])
def test_precision_is_that_of_the_sum_of_the_loss(names: tuple[str, ...]) -> None:
    found, x = network_posterior(names=names)
    model, _, y = network()
    whole = fxkfac.kfac(network_program(), nn.CrossEntropyLoss(reduction="sum"), (x, y))
    H = whole.dense(*found.mean)
    assert list(found.mean) == list(names or dict(model.named_parameters()))
    close(operators.to_dense(found.precision), H + PRECISION * torch.eye(len(H)).double())


def test_a_posterior_prints_what_it_is_of_and_no_matrix() -> None:
    found, _ = network_posterior(names=("2.weight", "2.bias"))
    assert repr(found) == f"Posterior(over 2.weight, 2.bias; prior_precision={PRECISION:g})"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("correct", [fxkfac.ekfac, fxkfac.kfoc])
def test_corrected_factors_have_a_posterior(correct: Any, reduction: str) -> None:
    model, x, y = network()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    factors = fxkfac.kfac(network_program(), loss, (x, y))
    corrected = correct(network_program(), loss, (x, y), factors)
    found = laplace.posterior(corrected, PRECISION)
    H = corrected.dense(*found.mean) * (N if reduction == "mean" else 1)
    assert (corrected.dense() - factors.dense()).norm() > 1e-3 * factors.dense().norm()
    precision = H + PRECISION * torch.eye(len(H)).double()
    close(operators.to_dense(found.precision), precision)
    close(operators.to_dense(operators.power(found.precision, -1)), torch.linalg.inv(precision))
    θ = torch.cat([m.flatten() for m in found.mean.values()])
    log_prior = len(θ) / 2 * math.log(PRECISION) - PRECISION / 2 * θ @ θ
    value = loss(model(x), y).detach()
    nll = value * N if reduction == "mean" else value
    close(laplace.log_evidence(found, value), log_prior - nll - torch.logdet(precision) / 2)


@pytest.mark.parametrize("names", [(), ("2.weight", "2.bias")])
def test_linearised_predictions_are_those_of_the_jacobian(names: tuple[str, ...]) -> None:
    found, x = network_posterior(names=names)
    model, _, _ = network()
    draws = laplace.sample(found, 4, torch.Generator().manual_seed(0))
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(found.mean)
    expected = [
        model(x)
        + sum(torch.tensordot(J[n], draws[n][k] - found.mean[n], dims=J[n].ndim - 2) for n in J)
        for k in range(4)
    ]
    close(laplace.linearised(found, draws, x), torch.stack(expected).detach())


def test_predictions_are_those_of_the_drawn_parameters() -> None:
    found, x = network_posterior(names=("2.weight", "2.bias"))
    model, _, _ = network()
    draws = laplace.sample(found, 3, torch.Generator().manual_seed(0))
    expected = [
        torch.func.functional_call(model, {n: d[k] for n, d in draws.items()}, (x,))
        for k in range(3)
    ]
    close(laplace.predictions(found, draws, x), torch.stack(expected).detach())


def test_draws_have_the_posteriors_moments() -> None:
    found, _ = network_posterior()
    number = 40_000
    draws = laplace.sample(found, number, torch.Generator().manual_seed(0))
    flat = torch.cat([d.flatten(1) for d in draws.values()], dim=1)
    mean = torch.cat([m.flatten() for m in found.mean.values()])
    covariance = torch.linalg.inv(operators.to_dense(found.precision))
    sd = covariance.diagonal().sqrt()
    errors = (flat.mean(0) - mean) / sd * math.sqrt(number)  # standard normal
    assert errors.abs().max() < 5
    # Entries of a sample's correlation have a standard deviation of at most √(2/number).
    found_correlation = flat.T.cov() / torch.outer(sd, sd)
    correlation = covariance / torch.outer(sd, sd)
    assert (found_correlation - correlation).abs().max() < 5 * math.sqrt(2 / number)
    assert correlation.fill_diagonal_(0).abs().max() > 10 * math.sqrt(2 / number)


def test_the_most_likely_prior_precision_is_where_the_evidence_has_no_slope() -> None:
    found, _ = network_posterior()
    best = laplace.most_likely(found)
    H = operators.to_dense(found.curvature)
    θ = torch.cat([m.flatten() for m in found.mean.values()])
    τ = torch.tensor(best.prior_precision, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(len(H)).double()
    evidence = -N * 1.1 - τ / 2 * θ @ θ + len(θ) / 2 * τ.log() - torch.logdet(H + τ * eye) / 2
    close(laplace.log_evidence(best, 1.1), evidence.detach())
    (slope,) = torch.autograd.grad(evidence, τ)
    assert abs(slope * τ) < 1e-8
    for factor in (1e-3, 0.5, 0.99, 1.01, 2.0, 1e3):
        other = replace(best, prior_precision=factor * best.prior_precision)
        assert laplace.log_evidence(other, 1.1) < laplace.log_evidence(best, 1.1)


def test_a_function_and_parameters_in_the_place_of_its_own() -> None:
    _, x, y = network()
    params = {"in": torch.randn(IN, 4).double(), "out": torch.randn(4, 3).double()}
    others = {name: 2 * p for name, p in params.items()}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["in"]) @ params["out"]

    program = fxkfac.trace(model, x, params)
    factors = fxkfac.kfac(program, nn.CrossEntropyLoss(), (x, y), others)
    found = laplace.posterior(factors, PRECISION, names=("out",), params=others)
    assert torch.equal(found.mean["out"], others["out"])
    draws = {"out": others["out"].expand(1, 4, 3)}
    close(laplace.linearised(found, draws, x)[0], model(others, x))


def test_nothing_of_the_users_is_changed_and_the_posterior_stays() -> None:
    model, x, y = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y))
    found = laplace.posterior(factors)
    state = torch.get_rng_state()
    draws = laplace.sample(found, 2, torch.Generator().manual_seed(0))
    first = laplace.linearised(found, draws, x)
    laplace.predictions(found, draws, x)
    assert not first.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert torch.equal(laplace.linearised(found, draws, x), first)


def test_the_same_noise_is_stretched_by_the_prior() -> None:
    found, _ = network_posterior()
    wide, narrow = (
        laplace.sample(replace(found, prior_precision=τ), 3, torch.Generator().manual_seed(0))
        for τ in (1e6, 4e6)  # where the data say nothing
    )
    for name, mean in found.mean.items():
        torch.testing.assert_close(wide[name] - mean, 2 * (narrow[name] - mean), rtol=1e-4, atol=0)


@pytest.mark.parametrize("wrong", [-1, 1.5, None])
def test_a_number_of_draws_is_whole(wrong: Any) -> None:
    found, _ = network_posterior()
    with pytest.raises(OptionError, match=r"number=.*expected a whole number of draws"):
        laplace.sample(found, wrong, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_prior_precision_is_positive(wrong: float) -> None:
    found, _ = network_posterior()
    with pytest.raises(OptionError, match="prior_precision="):
        replace(found, prior_precision=wrong)


def test_half_a_block_is_refused() -> None:
    with pytest.raises(UnknownParameter, match="same block"):
        network_posterior(names=("2.weight",))


def test_without_curvature_no_prior_precision_is_the_best() -> None:
    found, _ = network_posterior()
    nowhere = replace(found, curvature=operators.scaled(found.curvature, 0.0))
    with pytest.raises(OptionError, match="largest eigenvalue is 0 "):
        laplace.most_likely(nowhere)
    at_zero = {name: torch.zeros_like(p) for name, p in found.parameters.items()}
    with pytest.raises(OptionError, match="parameters 0; expected"):
        laplace.most_likely(replace(found, parameters=at_zero))


def test_weights_computed_from_parameters_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))
    x, y = torch.randn(N, IN), torch.randn(N, OUT)
    program = fxkfac.trace(model, x, structure={"*original*": "derived"})
    factors = fxkfac.kfac(program, nn.MSELoss(), (x, y))
    with pytest.raises(ParameterError, match="computed from parameters"):
        laplace.posterior(factors)


def test_corrections_of_other_data_are_refused() -> None:
    _, x, y = network()
    loss = nn.CrossEntropyLoss()
    factors = fxkfac.kfac(network_program(), loss, (x, y))
    corrected = fxkfac.ekfac(network_program(), loss, (x[:4], y[:4]), factors)
    with pytest.raises(OptionError, match=r"of 7 data, .* corrections of 4"):
        laplace.posterior(corrected)


def test_an_average_is_of_no_number_of_data() -> None:
    _, x, y = network()
    average = fxkfac.RunningAverage()
    average.update(fxkfac.kfac(network_program(), nn.CrossEntropyLoss(), (x, y)))
    with pytest.raises(OptionError, match=r"is of type RunningAverage; expected what fxkfac\.kfac"):
        laplace.posterior(average)


class Attention(nn.Module):
    """Fused attention, which knows neither slopes nor draws beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


class Recurrent(nn.Module):
    """A recurrent module over packed sequences, whose length is in their first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0, 0].long()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0])


class Encoder(nn.Module):
    """PyTorch's own layer, which takes a faster way in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


MODELS = {
    "attention": Attention,
    "packed": Recurrent,
    "encoder": Encoder,
}


def posterior_of(model: nn.Module) -> tuple[laplace.Posterior, Tensor]:
    x, y = torch.randn(4, 5, 4).double(), torch.tensor([0, 2, 1, 0])
    x[:, 0, 0] = torch.tensor([3, 5, 2, 4])
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y))
    return laplace.posterior(factors, PRECISION), x


@pytest.mark.parametrize("name", MODELS)
def test_models_with_ops_that_have_no_rule(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    found, x = posterior_of(model)
    draws = laplace.sample(found, 3, torch.Generator().manual_seed(0))
    f = laplace.predictions(found, draws, x)
    for k in range(3):
        expected = torch.func.functional_call(model, {n: t[k] for n, t in draws.items()}, (x,))
        close(f[k], expected.detach())
    step = 1e-5  # by differences, where the model is smooth
    near = {n: m + step * (draws[n] - m) for n, m in found.mean.items()}
    far = {n: m - step * (draws[n] - m) for n, m in found.mean.items()}
    plus, minus = (laplace.predictions(found, d, x) for d in (near, far))
    slope = (plus - minus) / (2 * step)
    linear = laplace.linearised(found, draws, x)
    torch.testing.assert_close(linear - model(x).detach(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [laplace.linearised, laplace.predictions])
def test_draws_of_another_dtype_are_taken_in_the_parameters_own(call: Any) -> None:
    found, x = network_posterior()
    draws = laplace.sample(found, 2, torch.Generator().manual_seed(0))
    rounded = {name: t.float() for name, t in draws.items()}
    expected = call(found, {name: t.double() for name, t in rounded.items()}, x)
    assert torch.equal(call(found, rounded, x), expected)


def test_draws_of_other_shapes_are_refused() -> None:
    found, x = network_posterior()
    draws = laplace.sample(found, 2, torch.Generator().manual_seed(0))
    for wrong in ({n: t[0] for n, t in draws.items()}, {**draws, "0.bias": draws["0.bias"][:1]}):
        for predict in (laplace.linearised, laplace.predictions):
            with pytest.raises(ParameterError, match="expected as many of each"):
                predict(found, wrong, x)


def test_ops_without_a_second_derivative_are_named() -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randint(0, 5, (4, 3)), torch.randint(0, 2, (4,))
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y))
    found = laplace.posterior(factors)
    draws = laplace.sample(found, 2, torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedUse, match=r"_embedding_bag_backward.*expected ops whose"):
        laplace.linearised(found, draws, x)


def test_a_model_that_draws_numbers_is_refused() -> None:
    torch.manual_seed(0)
    found, x = posterior_of(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(20, 3)).double())
    draws = laplace.sample(found, 2, torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    for run in (laplace.predictions, laplace.linearised):
        with pytest.raises(OptionError, match=r"model\.eval\(\)"):
            run(found, draws, x)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_of_other_parameters() -> None:
    found, x = posterior_of(nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double())
    draws = laplace.sample(found, 2, torch.Generator())
    for wrong in ({**draws, "bias": draws["1.bias"]}, {"1.bias": draws["1.bias"]}):
        for run in (laplace.predictions, laplace.linearised):
            with pytest.raises(UnknownParameter, match="expected one of each of"):
                run(found, wrong, x)


@pytest.mark.parametrize("call", [laplace.linearised, laplace.predictions])
def test_a_model_that_fails_after_it_has_drawn_leaves_the_random_state(call):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.fails = nn.Linear(4, 3), False

        def forward(self, x):
            y = nn.functional.dropout(self.linear(x), training=self.training)
            return y + torch.zeros(7) if self.fails else y

    model, x, y = Failing().eval(), torch.randn(5, 4), torch.arange(5) % 3
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y))
    posterior = laplace.posterior(factors)
    draws = laplace.sample(posterior, 2, torch.Generator().manual_seed(0))
    model.train()
    model.fails = True
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        call(posterior, draws, x)
    assert torch.equal(before, torch.get_rng_state())
