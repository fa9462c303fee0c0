"""fxkfac: a torch.fx compiler that makes Kronecker-factored curvature visible and usable."""

from fxkfac import errors, exact
from fxkfac.curvature.blocks import Block, Diagonal, Kronecker
from fxkfac.curvature.check import check
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.kfac import kfac
from fxkfac.curvature.likelihoods import Likelihood
from fxkfac.errors import FxkfacError
from fxkfac.graph.program import Program
from fxkfac.graph.trace import trace

__all__ = [
    "Block",
    "Diagonal",
    "Factors",
    "FxkfacError",
    "Kronecker",
    "Likelihood",
    "Program",
    "check",
    "errors",
    "exact",
    "kfac",
    "trace",
]
