"""Matrices without graphs: vectorisation, Kronecker products and their sums, sums over rows."""

from fxkfac.linalg.flatten import cvec, rvec
from fxkfac.linalg.gram import Gram, add_gram
from fxkfac.linalg.kronecker import (
    damped,
    diagonalise,
    kronecker_dense,
    kronecker_solve,
    kronecker_sum_solve,
    require_positive,
    require_regular,
)
from fxkfac.linalg.patches import add_patch_gram
from fxkfac.linalg.windows import Windows, patch_sums

__all__ = [
    "Gram",
    "Windows",
    "add_gram",
    "add_patch_gram",
    "cvec",
    "damped",
    "diagonalise",
    "kronecker_dense",
    "kronecker_solve",
    "kronecker_sum_solve",
    "patch_sums",
    "require_positive",
    "require_regular",
    "rvec",
]
