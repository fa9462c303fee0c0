"""Matrices without graphs: vectorisation, operators, sums over rows, checksums."""

from fxkfac.linalg.checksum import checksum
from fxkfac.linalg.flatten import cvec, rvec
from fxkfac.linalg.gram import Gram, in_front, new_total
from fxkfac.linalg.kronecker import kronecker_dense
from fxkfac.linalg.made_once import made_once
from fxkfac.linalg.opaque import opaque_gram, opaque_patch_gram
from fxkfac.linalg.patches import add_patch_gram
from fxkfac.linalg.products import add_gram, strip
from fxkfac.linalg.windows import Windows, patch_sums

__all__ = [
    "Gram",
    "Windows",
    "add_gram",
    "add_patch_gram",
    "checksum",
    "cvec",
    "in_front",
    "kronecker_dense",
    "made_once",
    "new_total",
    "opaque_gram",
    "opaque_patch_gram",
    "patch_sums",
    "rvec",
    "strip",
]
