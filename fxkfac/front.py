"""The names that `fxkfac` has: imported when the first of them is asked for."""

import fxkfac.errors as errors
import fxkfac.exact as exact
import fxkfac.laplace as laplace
import fxkfac.optim as optim
from fxkfac.attribution import influence, token_influence
from fxkfac.comparison import layer_errors
from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.blocks import Block, Dense, Diagonal, Kronecker
from fxkfac.curvature.check import check
from fxkfac.curvature.corrections.corrected import Corrected
from fxkfac.curvature.corrections.ekfac import ekfac
from fxkfac.curvature.corrections.kfoc import kfoc
from fxkfac.curvature.eigen import EigenBlock
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.kfac import kfac
from fxkfac.curvature.report import Report
from fxkfac.curvature.running import RunningAverage
from fxkfac.curvature.spectra import spectra
from fxkfac.curvature.step import Step, step
from fxkfac.curvature.total import Total, sum_of
from fxkfac.errors import FxkfacError
from fxkfac.graph import rules
from fxkfac.graph.coverage import Coverage
from fxkfac.graph.program import Program
from fxkfac.graph.trace import trace
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.linalg import operators
from fxkfac.persistence import load, resume, save
from fxkfac.taylor import Taylor, laplacian

__all__ = [
    "Accumulation",
    "Block",
    "Corrected",
    "Coverage",
    "Dense",
    "Diagonal",
    "EigenBlock",
    "Factors",
    "FxkfacError",
    "Kronecker",
    "Likelihood",
    "Program",
    "Report",
    "RunningAverage",
    "Step",
    "Taylor",
    "Total",
    "check",
    "ekfac",
    "errors",
    "exact",
    "influence",
    "kfac",
    "kfoc",
    "laplace",
    "laplacian",
    "layer_errors",
    "likelihood_of",
    "load",
    "operators",
    "optim",
    "resume",
    "rules",
    "save",
    "spectra",
    "step",
    "sum_of",
    "token_influence",
    "trace",
]
