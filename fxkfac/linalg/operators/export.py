"""An operator as one of SciPy, for its iterative solvers and eigenvalue methods."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from fxkfac.errors import FxkfacError, OptionError
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.products import product, transpose

if TYPE_CHECKING:
    from numpy import ndarray
    from scipy.sparse.linalg import LinearOperator


def to_scipy(operator: Operator) -> LinearOperator:
    """A `scipy.sparse.linalg.LinearOperator` over the rvec of the arrays that it acts on.

    Products run where the operator is, in its dtype; vectors come and go as NumPy arrays.

    Raises:
        FxkfacError: SciPy is not installed.
        OptionError: The operator is in bfloat16, which NumPy does not have.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise FxkfacError(
            "to_scipy needs SciPy, which is not installed; install it by `pip install scipy`."
        ) from error

    if operator.dtype == torch.bfloat16:
        raise OptionError(
            "the operator is in torch.bfloat16; expected a dtype that NumPy has. Take "
            "to_dtype(operator, torch.float32)."
        )

    def columns(of: Operator, x: ndarray) -> ndarray:
        found = torch.as_tensor(x, dtype=operator.dtype, device=operator.device)
        rows = found.reshape(operator.numel, prod(x.shape[1:])).mT
        images = product(of, rows.reshape(len(rows), *operator.shape)).reshape(rows.shape)
        return images.mT.reshape(x.shape).detach().cpu().numpy()

    n, turned = operator.numel, transpose(operator)
    return LinearOperator(
        shape=(n, n),
        dtype=operator.like.new_empty(0).cpu().numpy().dtype,
        matvec=lambda x: columns(operator, x),
        rmatvec=lambda x: columns(turned, x),
        matmat=lambda x: columns(operator, x),
        rmatmat=lambda x: columns(turned, x),
    )
