"""One operator of every kind, of drawn shapes, and its matrix written out by other means."""

from __future__ import annotations

import torch
from torch import Tensor

from fxkfac.linalg.operators import (
    BlockDiagonal,
    Congruence,
    Dense,
    Diagonal,
    Eigenbasis,
    Factor,
    Kronecker,
    KroneckerSum,
    Operator,
    Placed,
    Sum,
    identity,
)

F64 = torch.float64


class Source:
    """Tensors from a seed, in float64."""

    def __init__(self, seed: int, dtype: torch.dtype = F64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.dtype)

    def regular(self, group: int, d: int) -> Tensor:
        """Positive definite, with condition numbers of tens."""
        x = self.rand(group, d, d + 2)
        return x @ x.mT / (d + 2) + 0.2 * torch.eye(d, dtype=self.dtype)

    def rank_one(self, group: int, d: int) -> Tensor:
        x = self.rand(group, d, 1)
        return x @ x.mT

    def positive(self, *shape: int) -> Tensor:
        return self.rand(*shape).square() + 0.2

    def basis(self, group: int, d: int) -> Tensor:
        return torch.linalg.qr(self.rand(group, d, d)).Q

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


def kronecker(s: Source, g: int, i: int, o: int) -> Kronecker:
    return Kronecker(s.regular(g, i), s.regular(g, o))


def embedding(s: Source, g: int, i: int, o: int) -> Kronecker:
    return Kronecker(s.positive(g, i), s.regular(g, o))


def shared_input(s: Source, g: int, i: int, o: int) -> Kronecker:
    return Kronecker(s.regular(1, i), s.regular(g, o))


def shared_output(s: Source, g: int, i: int, o: int) -> Kronecker:
    return Kronecker(s.positive(g, i), s.regular(1, o))


def eigenbasis(s: Source, g: int, i: int, o: int) -> Eigenbasis:
    return Eigenbasis(s.basis(1, i), s.basis(g, o), s.positive(g, i, o))


def half_a_basis(s: Source, g: int, i: int, o: int) -> Eigenbasis:
    return Eigenbasis(None, s.basis(g, o), s.positive(g, i, o))


def no_basis(s: Source, g: int, i: int, o: int) -> Eigenbasis:
    return Eigenbasis(None, None, s.positive(g, i, o))


def congruence(s: Source, g: int, i: int, o: int) -> Congruence:
    return Congruence(s.regular(g, i), s.regular(g, o), s.positive(g, i, o))


def sum_of_two(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    return KroneckerSum(kronecker(s, g, i, o), shared_input(s, g, i, o))


def sum_of_two_embeddings(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    return KroneckerSum(embedding(s, g, i, o), shared_output(s, g, i, o))


def sum_with_an_embedding(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    return KroneckerSum(embedding(s, g, i, o), kronecker(s, g, i, o))


def sum_with_a_singular_one(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    return KroneckerSum(kronecker(s, g, i, o), Kronecker(0 * s.positive(g, i), s.regular(g, o)))


def sum_of_singular_ones(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """Each is zero where the other is not."""
    first = (torch.arange(i) % 2).to(s.dtype).expand(g, i)
    return KroneckerSum(Kronecker(first, s.regular(g, o)), Kronecker(1 - first, s.regular(g, o)))


def sum_of_singular_inputs(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """Neither A has an inverse, and their sum has; of very different scales."""
    X = torch.linalg.cholesky(s.regular(g, i))
    first = (torch.arange(i) % 2).to(s.dtype)
    A, D = (X * first) @ X.mT, (X * (1 - first)) @ X.mT
    return KroneckerSum(Kronecker(A, s.regular(g, o)), Kronecker(1e3 * D, s.regular(g, o)))


def sum_beside_a_singular_one(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """Both factors of the first are singular."""
    return KroneckerSum(Kronecker(s.rank_one(g, i), s.rank_one(g, o)), kronecker(s, g, i, o))


def sum_with_a_term_of_no_outputs(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """That is zero, however large its inputs are."""
    none = Kronecker(1e3 * s.regular(g, i), 0 * s.regular(g, o))
    return KroneckerSum(kronecker(s, g, i, o), none)


def diagonal(s: Source, g: int, i: int, o: int) -> Diagonal:
    return Diagonal(s.positive(g, i, o))


def number(s: Source, g: int, i: int, o: int) -> Diagonal:
    return Diagonal(s.positive())


def scaled_identity(s: Source, g: int, i: int, o: int) -> Diagonal:
    return identity((i, o), s.rand(1), 0.7)


def dense(s: Source, g: int, i: int, o: int) -> Dense:
    return Dense(s.regular(1, i + o)[0])


def block_diagonal(s: Source, g: int, i: int, o: int) -> BlockDiagonal:
    blocks = (kronecker(s, g, i, o), diagonal(s, 1, i, o), dense(s, g, i, o), number(s, 1, 1, 1))
    return BlockDiagonal((*blocks, sum_of_two(s, 1, i, o)), ("W", "s", "D", "n", "V"))


def placed(s: Source, g: int, i: int, o: int) -> Placed:
    inner = kronecker(s, g, i, o)
    return Placed(inner, s.order(inner.numel).view(inner.shape), (inner.numel,))


def placed_sum(s: Source, g: int, i: int, o: int) -> Placed:
    inner = sum_of_two(s, g, i, o)
    return Placed(inner, s.order(inner.numel).view(inner.shape), (inner.numel,))


def overlapping(s: Source, g: int, i: int, o: int) -> Sum:
    """Two products that lie over each other in part, beside a matrix."""
    one, other, size = kronecker(s, g, i, o), kronecker(s, 1, o, i), (2 * g + 1) * i * o + 1
    parts = [Placed(op, s.order(size)[: op.numel].view(op.shape), (size,)) for op in (one, other)]
    return Sum((*parts, Dense(s.regular(1, size)[0])))


def sum_of_three(s: Source, g: int, i: int, o: int) -> Sum:
    return Sum((kronecker(s, g, i, o), embedding(s, g, i, o), shared_input(s, g, i, o)))


REGULAR = [
    kronecker,
    embedding,
    shared_input,
    shared_output,
    eigenbasis,
    half_a_basis,
    no_basis,
    congruence,
    sum_of_two,
    sum_of_two_embeddings,
    sum_with_an_embedding,
    sum_with_a_singular_one,
    sum_of_singular_ones,
    sum_of_singular_inputs,
    sum_beside_a_singular_one,
    sum_with_a_term_of_no_outputs,
    diagonal,
    number,
    scaled_identity,
    dense,
    block_diagonal,
    placed,
    placed_sum,
    overlapping,
    sum_of_three,
]


def singular_kronecker(s: Source, g: int, i: int, o: int) -> Kronecker:
    """Of rank one in every group, on one side."""
    return Kronecker(s.rank_one(g, i), s.regular(g, o))


def embedding_of_unseen_words(s: Source, g: int, i: int, o: int) -> Kronecker:
    return Kronecker((torch.arange(i) % 2).to(s.dtype).expand(g, i), s.regular(g, o))


def singular_on_both_sides(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """One has an A without an inverse, the other such a B; nothing is both."""
    return KroneckerSum(
        Kronecker(s.rank_one(g, i), s.regular(g, o)), Kronecker(s.regular(g, i), s.rank_one(g, o))
    )


def alike_singular(s: Source, g: int, i: int, o: int) -> KroneckerSum:
    """The inputs of both lack the same directions."""
    A = s.rank_one(g, i)
    return KroneckerSum(Kronecker(A, s.regular(g, o)), Kronecker(2 * A, s.regular(g, o)))


def singular_dense(s: Source, g: int, i: int, o: int) -> Dense:
    x = s.rand(i + o, 1)
    return Dense(x @ x.mT)


def partly_placed(s: Source, g: int, i: int, o: int) -> Placed:
    inner, size = kronecker(s, g, i, o), g * i * o + 3
    return Placed(inner, s.order(size)[: inner.numel].view(inner.shape), (size,))


def twice_placed(s: Source, g: int, i: int, o: int) -> Placed:
    """Every entry comes twice, and one of the vector never."""
    inner = kronecker(s, 2 * g, i, o)
    return Placed(inner, torch.arange(g * i * o).repeat(2).view(inner.shape), (g * i * o + 1,))


def zero(s: Source, g: int, i: int, o: int) -> Diagonal:
    return identity((i, o), s.rand(1), 0.0)


SINGULAR = [
    singular_kronecker,
    embedding_of_unseen_words,
    singular_on_both_sides,
    alike_singular,
    singular_dense,
    partly_placed,
    twice_placed,
    zero,
]


def matrix(op: Operator) -> Tensor:
    """The matrix of an operator by its definition."""
    match op:
        case Kronecker():
            return _kronecker(op.A, op.B, op.shape[0])
        case Eigenbasis():
            Q = _basis(op.Q_A, op.Q_B, op.eigenvalues)
            return Q @ torch.diag(op.eigenvalues.flatten()) @ Q.T
        case Congruence():
            Q = _basis(op.U, op.V, op.values)
            return Q @ torch.diag(op.values.flatten()) @ Q.T
        case Factor():
            F = _basis(op.U, op.V, op.scale) @ torch.diag(op.scale.flatten())
            return F.T if op.transposed else F
        case KroneckerSum():
            return matrix(op.first) + matrix(op.second)
        case Diagonal():
            return torch.diag(op.values.flatten())
        case Dense():
            return op.matrix
        case BlockDiagonal():
            return torch.block_diag(*map(matrix, op.blocks))
        case Placed():
            P = torch.eye(op.numel, dtype=op.dtype)[op.entries.flatten()]
            return P.T @ matrix(op.operator) @ P
        case Sum():
            return torch.stack([matrix(term) for term in op.terms]).sum(0)
    raise AssertionError(op)


def _kronecker(A: Tensor, B: Tensor, groups: int) -> Tensor:
    a = [torch.diag(A[k % len(A)]) if A.ndim == 2 else A[k % len(A)] for k in range(groups)]
    pairs = [(a[k].contiguous(), B[k % len(B)].contiguous()) for k in range(groups)]
    none = B.new_zeros(0, 0)  # what there is without groups
    return torch.block_diag(none, *(torch.kron(*pair) for pair in pairs))


def _basis(U: Tensor | None, V: Tensor | None, like: Tensor) -> Tensor:
    g, i, o = like.shape
    eyes = [torch.eye(n, dtype=like.dtype).unsqueeze(0) for n in (i, o)]
    return _kronecker(eyes[0] if U is None else U, eyes[1] if V is None else V, g)
