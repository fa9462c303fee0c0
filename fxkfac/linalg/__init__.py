"""Matrices without graphs: vectorisation, Kronecker products and sums of two of them."""

from fxkfac.linalg.flatten import cvec, rvec
from fxkfac.linalg.gram import add_gram
from fxkfac.linalg.kronecker import (
    damped,
    kronecker_dense,
    kronecker_solve,
    kronecker_sum_solve,
    require_positive,
    require_regular,
)

__all__ = [
    "add_gram",
    "cvec",
    "damped",
    "kronecker_dense",
    "kronecker_solve",
    "kronecker_sum_solve",
    "require_positive",
    "require_regular",
    "rvec",
]
