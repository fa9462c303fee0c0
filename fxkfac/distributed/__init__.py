"""Many workers under `torch.distributed`: data shared out among ranks, and matrices, too.

    import fxkfac.distributed

    factors = fxkfac.distributed.kfac(program, loss, this_ranks_data)    # those of all data
    eigen = fxkfac.distributed.eigh({name: block.B for name, block in factors.items()})

Every call is made by all ranks of a group, and returns the same bits on all of them. What fails on
one rank is raised on every rank.
"""

from fxkfac.distributed.passes import kfac, step
from fxkfac.distributed.reduce import all_reduce
from fxkfac.distributed.spread import assignment, eigh, spread

__all__ = ["all_reduce", "assignment", "eigh", "kfac", "spread", "step"]
