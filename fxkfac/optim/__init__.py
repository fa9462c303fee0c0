"""Training with Kronecker-factored curvature: an optimizer, and a preconditioner for any other."""

from fxkfac.optim.optimizer import KFAC
from fxkfac.optim.preconditioner import Preconditioner

__all__ = ["KFAC", "Preconditioner"]
