"""What tests read of the terms of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped(term: Any) -> tuple[Tensor, Tensor]:
    """A and B of a Kronecker product with their group axis, A written out."""
    A, B = term.operator.A, term.operator.B
    A = torch.diag_embed(A) if A.ndim == 2 else A
    return A.expand(len(B), -1, -1), B
