"""Matrices without graphs: vectorisation, operators, sums over rows."""

from fxkfac.linalg.flatten import cvec, rvec
from fxkfac.linalg.gram import Gram, add_gram, strip
from fxkfac.linalg.kept import kept
from fxkfac.linalg.kronecker import kronecker_dense
from fxkfac.linalg.opaque import Opaque, opaque_gram, opaque_patch_gram
from fxkfac.linalg.patches import add_patch_gram
from fxkfac.linalg.windows import Windows, patch_sums

__all__ = [
    "Gram",
    "Opaque",
    "Windows",
    "add_gram",
    "add_patch_gram",
    "cvec",
    "kept",
    "kronecker_dense",
    "opaque_gram",
    "opaque_patch_gram",
    "patch_sums",
    "rvec",
    "strip",
]
