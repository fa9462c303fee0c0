"""Autodiff ground truth for curvature, independent of the compiler. Paper, Section 2.

Dense matrices (`hessian`, `ggn`, `type1_fisher`, `mc_fisher`, `empirical_fisher`) and products
that never form them, all from plain automatic differentiation of the model as it is; Jacobians,
Hessians and partial linearisation of any function; the two flattening orders.
"""

from fxkfac.exact.functions import hessian_matrix, jacobian, linearize
from fxkfac.exact.matrices import empirical_fisher, ggn, hessian, mc_fisher, type1_fisher
from fxkfac.exact.products import (
    fisher_vector_product,
    ggn_vector_product,
    hessian_vector_product,
    jacobian_vector_product,
    vector_jacobian_product,
)
from fxkfac.linalg import cvec, rvec

__all__ = [
    "cvec",
    "empirical_fisher",
    "fisher_vector_product",
    "ggn",
    "ggn_vector_product",
    "hessian",
    "hessian_matrix",
    "hessian_vector_product",
    "jacobian",
    "jacobian_vector_product",
    "linearize",
    "mc_fisher",
    "rvec",
    "type1_fisher",
    "vector_jacobian_product",
]
