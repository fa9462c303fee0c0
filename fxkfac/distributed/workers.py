"""The ranks of a group: what each one says to all, and what fails on one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxkfac.errors import RankError

Said = TypeVar("Said")


@dataclass(frozen=True)
class Workers:
    """The ranks of a group.

    Attributes:
        group: The group; `None` for that of all ranks.
        place: This rank's place among `ranks`.
        ranks: The members, by their numbers among all ranks.
    """

    group: Any
    place: int
    ranks: tuple[int, ...]

    @staticmethod
    def of(group: Any = None) -> Workers:
        """The ranks of a group. Raises `RankError` where this process is not one of them."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RankError(
                "this process has no rank; expected one of a `torch.distributed` group. Start the "
                "script with torchrun, and call torch.distributed.init_process_group() first."
            )
        place = dist.get_rank(group)
        if place < 0:
            raise RankError(
                f"rank {dist.get_rank()} is not in the group that was passed; expected a call by "
                "its members alone."
            )
        return Workers(group, place, tuple(dist.get_process_group_ranks(group)))

    def gather(self, said: Said, device: torch.device) -> list[Said]:
        """What every rank says, in the order of ranks. It travels through `device`, if it must."""
        heard: list[Any] = [None] * len(self.ranks)
        # NCCL sends what is on the current GPU, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            dist.all_gather_object(heard, said, group=self.group)
        return heard

    def require_all(self, failures: Sequence[str | None], own: Exception | None) -> None:
        """Raise, on every rank, what has failed on any of them: its own error where that was."""
        if own is not None:
            raise own
        failed = [place for place, failure in enumerate(failures) if failure is not None]
        if failed:
            said = "; ".join(f"{self.name([place])}: {failures[place]}" for place in failed)
            raise RankError(f"{self.name(failed)} failed, so that there is no result here. {said}")

    def name(self, places: Iterable[int]) -> str:
        """ "rank 1", or "ranks 0, 2"."""
        numbers = [str(self.ranks[place]) for place in places]
        return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def failure_of(result: object) -> str | None:
    """What a rank says of the error that it has in the place of a result."""
    return f"{type(result).__name__}: {result}" if isinstance(result, Exception) else None
