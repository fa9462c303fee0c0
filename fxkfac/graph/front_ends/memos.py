"""What a model computes of its parameters once, and keeps: a graph would take it for a constant.

Such as a cache of biases that is filled at the first call in eval mode. It is found by two runs on
parameters that ask for gradients, and what they leave is taken out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxkfac.errors import CaptureError
from fxkfac.graph.flat import FlatModel

# Torch's attributes; by the last ones recurrent modules hold parameters two times more.
OWN = frozenset([*nn.Module().__dict__, "_flat_weights", "_flat_weight_refs"])

Place = tuple[nn.Module, str]


class Held:
    """The attributes of some modules, as they are."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._held = [(m, {n: _copied(v) for n, v in _own(m).items()}) for m in modules]

    def tensors_are_new(self) -> bool:
        """Whether a tensor is in a place where it was not."""
        return any(
            id(t) not in set(map(id, _tensors(held.get(name))))
            for m, held in self._held
            for name, value in _own(m).items()
            for t in _tensors(value)
        )

    def put_back(self) -> None:
        """Have them as they were."""
        for m, held in self._held:
            for name in _own(m).keys() - held.keys():
                del vars(m)[name]
            for name, value in held.items():
                now = vars(m).get(name)
                if type(now) is dict and type(value) is dict:
                    now.clear()
                    now.update(value)
                else:
                    vars(m)[name] = value


def require_no_memos(model: FlatModel, tensors: list[Tensor], modules: Sequence[nn.Module]) -> None:
    """Raise `CaptureError` where the model keeps what it has computed of its parameters.

    What a run leaves and the next one makes anew, as a loss beside the prediction, is no memo.
    """
    held, state = Held(modules), dict(model.state())
    for name in model.bound.tensors:
        state[name] = state[name].detach().requires_grad_(state[name].is_floating_point())
    try:
        model.predict(state, tensors)
        first = _computed(modules)
        model.predict(state, tensors)
        again = _computed(modules)
    except Exception:  # the model's own: it runs on parameters that ask for no gradients
        return
    finally:
        held.put_back()
    memos = [place for place, kept in first.items() if kept & again.get(place, set())]
    if memos:
        listed = ", ".join(f"{name!r} of a {type(m).__name__}" for m, name in memos[:4])
        raise CaptureError(
            f"the model keeps what it has computed of its parameters, in {listed}, and reads it at "
            "the next call, whatever the parameters are then; expected that it is computed at "
            "every call. Such caches are often for eval mode alone: call train() on that module, "
            "or trace a function around the model that empties them."
        )


def _own(m: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(m).items() if name not in OWN}


def _copied(value: Any) -> Any:
    return dict(value) if type(value) is dict else value


def _tensors(value: Any) -> list[Tensor]:
    """Those that an attribute is, or a dict holds."""
    if not isinstance(value, Tensor | dict):
        return []
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _computed(modules: Sequence[nn.Module]) -> dict[Place, set[int]]:
    """Where tensors are that were computed of the parameters, and these by `id`."""
    places = {(m, name): _tensors(value) for m in modules for name, value in _own(m).items()}
    return {p: {id(t) for t in found if t.grad_fn is not None} for p, found in places.items()}
