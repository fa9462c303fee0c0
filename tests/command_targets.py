"""What the tests of the command line name as TARGET, and what they must not."""

import os
import time

import torch
from torch import nn

import fxkfac


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 2))


def target(count=4):
    """Model, loss and batches, the last of which is smaller."""
    model = net()
    sizes = [6] * (count - 1) + [4]
    data = [(torch.randn(n, 3), torch.randint(2, (n,))) for n in sizes]
    return model, nn.CrossEntropyLoss(), data


def inputs_only():
    return net(), torch.randn(5, 3)


def one_pair():
    model, loss, data = target()
    return model, loss, data[0]


def shuffled():
    """Every batch is drawn when it is asked for."""
    model, loss, data = target()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    data_set = torch.utils.data.TensorDataset(x, y)
    return model, loss, torch.utils.data.DataLoader(data_set, 6, shuffle=True)


def used_up():
    """An iterator, whose first batch is gone once it was looked at."""
    model, loss, data = target()
    return model, loss, iter(data)


def drawn():
    """An iterator whose batches are drawn as they come."""
    model, loss, _ = target()
    return model, loss, ((torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(3))


class Blocking:
    """Batches; before the fourth it waits for Ctrl-C where the environment says so."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        for k, pair in enumerate(self.data):
            if k == 3 and "BLOCK" in os.environ:
                print("waiting", flush=True)
                time.sleep(120)
            yield pair


def blocking():
    model, loss, data = target(6)
    return model, loss, Blocking(data)


def failing_loader():
    def batches():
        yield from data[:2]
        raise RuntimeError("the disk\nis gone")

    model, loss, data = target()
    return model, loss, batches()


def regression():
    model = nn.Linear(3, 2)
    return model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2))


def function_of_parameters():
    params = {"W": torch.randn(2, 3)}
    data = torch.randn(5, 3), torch.randn(5, 2)
    return fxkfac.trace(lambda params, x: x @ params["W"].T, data[0], params), nn.MSELoss(), data


class Sharp(nn.Tanh):
    """By an attribute of the class, of which a trace does not hear when it is changed."""

    slope = 1.0

    def forward(self, x):
        return super().forward(self.slope * x)


def changed():
    """A program whose model has changed since it was traced."""

    class Own(Sharp):
        pass

    model, loss, data = target()
    model[1] = Own()
    program = fxkfac.trace(model, data[0][0])
    Own.slope = 3.0
    return program, loss, data


def without_rule():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.w = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.layer(x) + torch.cumsum(self.w, 0)

    return Squared(), torch.randn(5, 3)


def rows_last():
    """Data along axis 1."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x.T)

    return Turned(), torch.randn(3, 5)


def talkative():
    print("on standard output")
    return target()


# --- what is refused ---


def four():
    return 1, 2, 3, 4


def a_list():
    return [net(), torch.randn(5, 3)]


def no_model():
    return "model", torch.randn(5, 3)


def bare_function():
    return torch.sin, torch.randn(5, 3)


def fails():
    raise KeyError("weights")


def wants_an_argument(x):
    return x


def leaves():
    raise SystemExit(3)


def no_batch():
    return net(), nn.CrossEntropyLoss(), []


not_a_function = 3
