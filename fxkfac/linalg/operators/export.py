"""An operator as one of SciPy, for its iterative solvers and eigenvalue methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxkfac.errors import FxkfacError
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
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise FxkfacError(
            "to_scipy needs SciPy, which is not installed; install it by `pip install scipy`."
        ) from error

    def columns(of: Operator, x: ndarray) -> ndarray:
        found = torch.as_tensor(x, dtype=operator.dtype, device=operator.device)
        rows = found.reshape(operator.numel, -1).mT
        images = product(of, rows.reshape(len(rows), *operator.shape)).reshape(rows.shape)
        return images.mT.reshape(x.shape).cpu().numpy()

    n, turned = operator.numel, transpose(operator)
    return LinearOperator(
        shape=(n, n),
        dtype=operator.like.new_empty(0).cpu().numpy().dtype,
        matvec=lambda x: columns(operator, x),
        rmatvec=lambda x: columns(turned, x),
        matmat=lambda x: columns(operator, x),
        rmatmat=lambda x: columns(turned, x),
    )
