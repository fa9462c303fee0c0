"""Sums over the data's own gradients: whatever the order, what the formula says."""

import pytest
import torch
from drawn import rand

from fxkfac.linalg.contraction import Left, Right, Squares
from fxkfac.linalg.orders import Sizes, order_of_products, order_of_squares
from fxkfac.linalg.rows import DatumRows, Formed, TokenRows

# (shared, vectors, in, out), and the order that is the cheapest one there
SQUARES = {
    (1, 3, 5, 4): (True, True, False),
    (2, 3, 5, 4): (True, True, True),
    (6, 3, 5, 4): (True, False, True),
    (7, 1, 9, 3): (False, True, True),
    (30, 1, 5, 4): (False, False, True),
}
PRODUCTS = {(1, 3, 5, 4): False, (2, 2, 8, 7): False, (9, 1, 3, 4): True, (12, 3, 3, 2): True}


def symmetric(group, d, seed):
    M = rand(group, d, d, seed=seed)
    return M @ M.mT


def rows(sizes, x_group=2, g_group=2, n=3):
    S, V, i, o = sizes
    return DatumRows(rand(x_group, n, S, i), rand(g_group, n, S, V, o, seed=1))


def gradients(r):
    """Every datum's own, one for each vector, by the formula: (group, n, vectors, in, out)."""
    group = max(len(r.x), len(r.g))
    x = r.x.expand(group, *r.x.shape[1:])
    return torch.einsum("gnsi,gnsvo->gnvio", x, r.g.expand(group, *r.g.shape[1:]))


GROUPS = pytest.mark.parametrize(("x_group", "g_group"), [(1, 1), (2, 2), (1, 2), (2, 1)])


@pytest.mark.parametrize("sizes", SQUARES, ids=str)
@GROUPS
def test_squares(sizes, x_group, g_group):
    order = order_of_squares(Sizes(*sizes))
    assert (order.x_first, order.g_first, order.forms) == SQUARES[sizes]
    r = rows(sizes, x_group, g_group)
    Q_A = torch.linalg.qr(rand(x_group, sizes[2], sizes[2], seed=2))[0]
    Q_B = torch.linalg.qr(rand(max(x_group, g_group), sizes[3], sizes[3], seed=3))[0]
    turned = torch.einsum("gij,gnvio,gop->gnvjp", Q_A.expand(len(Q_B), -1, -1), gradients(r), Q_B)
    expected = turned.square().sum((1, 2))
    torch.testing.assert_close(Squares(Q_A, Q_B).of(r), expected)


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
@GROUPS
def test_products(sizes, x_group, g_group):
    assert order_of_products(Sizes(*sizes)).forms == PRODUCTS[sizes]
    r, group = rows(sizes, x_group, g_group), max(x_group, g_group)
    A, B, G = symmetric(group, sizes[2], 2), symmetric(group, sizes[3], 3), gradients(r)
    left = torch.einsum("gnvio,gop,gnvjp->gij", G, B, G)
    right = torch.einsum("gnvio,gij,gnvjp->gop", G, A, G)
    torch.testing.assert_close(Left(B).of(r), left)
    torch.testing.assert_close(Right(A).of(r), right)


def test_one_hot_rows():
    """Two data with three tokens each, of which some are the same in both."""
    places = torch.tensor([0, 3, 4, 8, 6, 5])
    g = rand(6, 2, 3)
    G = torch.zeros(2, 2, 5, 3, dtype=g.dtype)
    for k, (token, each) in enumerate(zip(places % 5, g, strict=True)):
        G[k // 3, :, token] = each
    Q_B, B = torch.linalg.qr(rand(1, 3, 3, seed=2))[0], symmetric(1, 3, 3)
    a = rand(5, seed=4).square()
    r = TokenRows(places, g, 5, 2)
    torch.testing.assert_close(Squares(None, Q_B).of(r), (G @ Q_B).square().sum((0, 1))[None])
    torch.testing.assert_close(
        Left(B, tokens=True).of(r), torch.einsum("nvio,op,nvip->i", G, B[0], G)
    )
    torch.testing.assert_close(Right(a).of(r), torch.einsum("nvio,i,nvip->op", G, a, G)[None])


@pytest.mark.parametrize("sizes", [*SQUARES, *PRODUCTS], ids=str)
def test_a_chosen_order_is_the_cheapest(sizes):
    for order in (order_of_squares(Sizes(*sizes)), order_of_products(Sizes(*sizes))):
        assert all(order.cost <= cost for _, cost in order.others)


@pytest.mark.parametrize("largest", [1, 100, 1000, 10**6])
def test_chunks_hold_no_more_than_they_may(largest):
    sizes = Sizes(4, 3, 5, 6)
    order = order_of_squares(sizes)
    data, vectors = order.at_once(sizes, 2, largest)
    held = 2 * data * (4 * 5 + vectors * (4 * 6 + 5 * 6))
    assert held <= largest or data == 1
    assert 1 <= vectors <= 3


def test_gradients_that_are_formed():
    """As of rows; those of one-hot rows with all of their zeros."""
    r, A, B = rows((6, 3, 5, 4)), symmetric(2, 5, 2), symmetric(2, 4, 3)
    Q_A, Q_B = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(B).eigenvectors
    formed = Formed(gradients(r).movedim(2, 3))
    for statistic in (Squares(Q_A, Q_B), Left(B), Right(A)):
        torch.testing.assert_close(statistic.of(formed), statistic.of(r))
    hot = TokenRows(torch.tensor([0, 3, 5, 6, 8]), rand(5, 2, 4), 5, 2)
    formed = Formed(hot.formed())
    a = rand(5, seed=4).square()
    for statistic in (Squares(None, Q_B[:1]), Left(B[:1], tokens=True), Right(a)):
        torch.testing.assert_close(statistic.of(formed), statistic.of(hot))
