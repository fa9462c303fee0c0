"""A tensor's bits -> one number, the same on every device and in every process."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**20  # words that are mixed at once: they stay in the cache


def checksum(t: Tensor) -> str:
    """Sixteen hex digits that change with every bit of a tensor, and where it is moved to.

    Σ_k word_k · (2k + 1) · odd modulo 2⁶⁴, over words of eight bytes: a sum of whole numbers, which
    no order of summation rounds otherwise. It finds accidents; it does not keep out forgers.
    """
    words = _words(t)
    total = 0
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        places = torch.arange(start, start + len(part), device=t.device)
        mixed = (part ^ (part >> 29)) * ((2 * places + 1) * ODD)
        total += int(mixed.sum())
    return f"{(total + t.nbytes) % 2**64:016x}"


ODD = 0x1E3779B97F4A7C15  # spreads a flipped bit over all digits


def _words(t: Tensor) -> Tensor:
    """The bytes of a tensor, by eights; the last ones are filled up with zeros."""
    # A copy where it is a part of something larger: a word must begin at a multiple of eight.
    own = t.detach().contiguous().flatten()
    if own.storage_offset() * own.element_size() % 8:
        own = own.clone()
    raw = own.view(torch.uint8)
    if len(raw) % 8:
        raw = torch.nn.functional.pad(raw, (0, 8 - len(raw) % 8))
    return raw.view(torch.int64)
