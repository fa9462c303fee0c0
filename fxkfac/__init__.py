"""fxkfac: a torch.fx compiler that makes Kronecker-factored curvature visible and usable."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxkfac.front import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import everything when something is first asked for.

        PyTorch takes seconds to import, and the command line answers what needs none without it.
        """
        if "__all__" in globals():  # everything is here, and this is no part of it
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        front = import_module("fxkfac.front")
        globals().update({n: getattr(front, n) for n in front.__all__}, __all__=front.__all__)
        return getattr(sys.modules[__name__], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("fxkfac.front").__all__})
