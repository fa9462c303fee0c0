"""Rules: for each ATen overload, how it is one einsum in one of its operands.

A rule takes the call and the operand that holds the parameter, and returns a `Form`, or raises
`NotLinear` with the reason. Registering twice is an error. Each file below holds one family.
"""

from fxkfac.graph.form import Form, OneHot, Patches
from fxkfac.graph.rules import addition, convolution, elementwise, embedding, products
from fxkfac.graph.rules.registry import RULES, Call, NotLinear, Operand, rule

__all__ = [
    "RULES",
    "Call",
    "Form",
    "NotLinear",
    "OneHot",
    "Operand",
    "Patches",
    "addition",
    "convolution",
    "elementwise",
    "embedding",
    "products",
    "rule",
]
