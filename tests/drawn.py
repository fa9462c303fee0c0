"""What several test modules draw their tensors and models from, all from seeds, in float64."""

import torch

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=3, seed=1):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(make, seed=0):
    """A module in double precision, its parameters drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


class StraightThrough(torch.autograd.Function):
    """Rounding whose derivative is taken to be one."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class StraightThroughEach(torch.autograd.Function):
    """The same in the style that `vmap` knows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g
