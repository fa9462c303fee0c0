"""Symmetric positive semi-definite operators: small final classes, and functions of them."""

from fxkfac.linalg.operators.algebra import add, scaled, to_dtype
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Placed,
    Sum,
    identity,
)
from fxkfac.linalg.operators.damping import DAMP, Damping, damped
from fxkfac.linalg.operators.entries import diagonal, inner, norm, to_dense, trace
from fxkfac.linalg.operators.export import to_scipy
from fxkfac.linalg.operators.factored import (
    Congruence,
    Eigenbasis,
    Factor,
    Kronecker,
    KroneckerSum,
)
from fxkfac.linalg.operators.functions import condition, det, logdet, power, solve
from fxkfac.linalg.operators.named import Named
from fxkfac.linalg.operators.products import product, transpose
from fxkfac.linalg.operators.roots import cholesky, inverse_root, sample
from fxkfac.linalg.operators.spectra import diagonalised, eigenvalues, eigh
from fxkfac.linalg.operators.summary import Summary, summary

__all__ = [
    "DAMP",
    "BlockDiagonal",
    "Congruence",
    "Damping",
    "Dense",
    "Diagonal",
    "Eigenbasis",
    "Factor",
    "Kronecker",
    "KroneckerSum",
    "Named",
    "Operator",
    "Placed",
    "Sum",
    "Summary",
    "add",
    "cholesky",
    "condition",
    "damped",
    "det",
    "diagonal",
    "diagonalised",
    "eigenvalues",
    "eigh",
    "identity",
    "inner",
    "inverse_root",
    "logdet",
    "norm",
    "power",
    "product",
    "sample",
    "scaled",
    "solve",
    "summary",
    "to_dense",
    "to_dtype",
    "to_scipy",
    "trace",
    "transpose",
]
