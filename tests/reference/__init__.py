"""Models with a reference: their forward passes by hand, one module for each family.

`CASES` holds all of them by name; `zoo.` in front says that the model is the zoo's.
"""

from reference import (  # noqa: F401 - each registers its cases
    attention,
    convolutions,
    layers,
    products,
    recurrent,
    scales,
    tables,
    transforms,
)
from reference.case import CASES, MSE, Case, N

__all__ = ["CASES", "MSE", "Case", "N"]
