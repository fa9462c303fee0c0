"""Processes that accumulate and save, and save again, until they are killed."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import fxkfac

BATCHES = 24


def problem():
    """The program, the loss, and its batches by number; dropout and labels are drawn."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 40), nn.Tanh(), nn.Dropout(0.3), nn.Linear(40, 30), nn.Linear(30, 5)]
    model = nn.Sequential(*layers)
    program = fxkfac.trace(model, torch.randn(4, 20))
    return program, nn.CrossEntropyLoss()


def batch(number):
    g = torch.Generator().manual_seed(number)
    n = 8 + 9 * (number % 7)
    return torch.randn(n, 20, generator=g), torch.randint(5, (n,), generator=g)


def started(program, loss):
    generator = torch.Generator().manual_seed(3)
    return fxkfac.Accumulation(program, loss, fisher="mc", generator=generator)


def go_on(accumulation, save=lambda: None):
    """Add what is missing."""
    while accumulation.batches < BATCHES:
        accumulation.add(*batch(accumulation.batches))
        save()
    return accumulation


def work(program, loss, path):
    """Go on from the file, for ever."""
    known = Path(path).exists()
    accumulation = fxkfac.resume(path, program, loss) if known else started(program, loss)

    def save():
        for _ in range(5):
            fxkfac.save(accumulation, path)

    while True:
        go_on(accumulation, save)
        save()


def main(path):
    """For every line, start a process of its own, say its number, and wait for its end."""
    torch.set_num_threads(1)  # no threads but this one, which a forked process could not have
    program, loss = problem()
    print("ready", flush=True)
    for _ in sys.stdin:
        number = os.fork()
        if not number:
            work(program, loss, path)
        print(number, flush=True)
        os.waitpid(number, 0)


if __name__ == "__main__":
    main(sys.argv[1])
