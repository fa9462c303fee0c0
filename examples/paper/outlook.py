"""Section 7: what the paper leaves for later, and this library has.

Eigenvalue correction, weight sharing by reduce, functional models, and derivatives inside a model.
"""

from __future__ import annotations

import torch
from setting import classes, error, mlp, rand, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact

LOSS = nn.CrossEntropyLoss()


def eigenvalue_correction() -> None:
    """In KFAC's eigenbasis the corrected eigenvalues are the nearest to the GGN. Section 7."""
    net, x, y = mlp(4, 5, 3), rand(20, 4), classes(20)
    program, names = fxkfac.trace(net, x), ["0.weight", "0.bias"]
    kfac = fxkfac.kfac(program, LOSS, (x, y))
    ekfac = fxkfac.ekfac(program, LOSS, (x, y), kfac)
    G = exact.ggn(net, LOSS, (x, y), names)
    off = [error(found.dense(*names), G) for found in (kfac, ekfac)]
    assert off[1] < off[0]
    same(ekfac.dense(*names).trace(), G.trace())
    print(f"  relative error: KFAC {off[0]:.4f}, corrected {off[1]:.4f}")


def weight_sharing() -> None:
    """Where a mean is taken over the shared axis, reduce is exact and expand is not. Section 7."""
    below, above = mlp(4, 3), mlp(3, 2)
    weights = {"W": below[0].weight.detach(), "V": above[0].weight.detach()}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["W"].T).mean(1) @ params["V"].T

    x, y, loss = rand(6, 5, 4), rand(6, 2, seed=1), nn.MSELoss()
    program = fxkfac.trace(model, x, weights)
    G = exact.ggn(model, loss, (x, y), "W", params=weights)
    reduce, expand = (
        fxkfac.kfac(program, loss, (x, y), sharing=sharing).dense("W")
        for sharing in ("reduce", "expand")
    )
    same(reduce, G)
    assert error(expand, G) > 0.1
    print(f"  relative error: reduce {error(reduce, G):.1e}, expand {error(expand, G):.2f}")


def functional_models() -> None:
    """A function of parameters and inputs has the factors of the module. Section 7."""
    net, x, y = mlp(4, 5, 3), rand(20, 4), classes(20)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("ni, oi -> no", x, p["0.weight"]) + p["0.bias"])
        return h @ p["2.weight"].T + p["2.bias"]

    found = fxkfac.kfac(fxkfac.trace(model, x, params), LOSS, (x, y))
    expected = fxkfac.kfac(fxkfac.trace(net, x), LOSS, (x, y))
    same(found.dense(*params), expected.dense(*params))
    print(f"  {list(found)}")


def derivatives_inside() -> None:
    """The residual of a physics-informed net, whose streams share each weight. Section 7."""
    net, x, y = mlp(2, 4, 1), rand(10, 2), rand(10, 1, seed=1)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def residual(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return fxkfac.laplacian(lambda x: torch.func.functional_call(net, p, (x,)), x).laplacian

    program = fxkfac.trace(residual, x, params)
    off = fxkfac.check(program, nn.MSELoss(), (x, y))
    assert max(off.values()) < 1e-12
    factors = fxkfac.kfac(program, nn.MSELoss(), (x, y))
    G = exact.ggn(residual, nn.MSELoss(), (x, y), "0.bias", params=params)
    same(factors.dense("0.bias"), G)  # a bias by itself is exact
    print(f"  gradients from the taps are right to {max(off.values()):.0e}; blocks {list(factors)}")


if __name__ == "__main__":
    run(globals())
