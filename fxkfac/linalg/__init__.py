"""Linear algebra that knows nothing of graphs: flattening orders and Kronecker products."""

from fxkfac.linalg.flatten import cvec, rvec
from fxkfac.linalg.kronecker import kronecker_dense, kronecker_solve, require_regular

__all__ = ["cvec", "kronecker_dense", "kronecker_solve", "require_regular", "rvec"]
