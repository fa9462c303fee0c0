"""A small character-level GPT, and text for it: the source code of Python's own standard library.

Tokens are bytes of ASCII. Both are used by other examples.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 128  # of ASCII


class Block(nn.Module):
    """Attention to what came before, and a layer for every place by itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """(N, T, width) -> the same."""
        split = self.qkv(self.attention_norm(h)).unflatten(2, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm(h))))


class GPT(nn.Module):
    """Tokens (N, T) -> logits of the next one at every place, (N, VOCABULARY, T)."""

    def __init__(self, width: int, depth: int, heads: int, length: int):
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """As of `nn.CrossEntropyLoss`: classes are the second axis."""
        h = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).transpose(1, 2)


def text(size: int = 2_000_000) -> Tensor:
    """So many characters of the installed library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source, total = [], 0
    for file in files:
        source.append(file.read_bytes())
        total += len(source[-1])
        if total >= size:
            break
    characters = torch.frombuffer(bytearray(b"".join(source)[:size]), dtype=torch.uint8).long()
    return characters.where(characters < VOCABULARY, ord("?"))


def windows(characters: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and what comes next, (N, length) each."""
    cut = characters[starts.unsqueeze(1) + torch.arange(length + 1)]
    return cut[:, :-1], cut[:, 1:]
