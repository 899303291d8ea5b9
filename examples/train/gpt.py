"""A small GPT whose documents are packed end to end, without padding: each attends to itself alone.

RMS norms, rotary embedding, grouped queries (8 heads, 2 for keys and values, 64 wide), SwiGLU; every second layer sees
a sliding window of 128 tokens. Its attention is one function, so that several can be compared (attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention import Attention, Packed, flashspark_attention
from torch import Tensor, nn


@dataclass
class Config:
    vocabulary: int = 256  # bytes
    layers: int = 4
    width: int = 512
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 1216
    window: int = 128
    longest: int = 1024


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (tokens, heads, head_dim); cos and sin (tokens, 1, head_dim / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Block(nn.Module):
    def __init__(self, config: Config, window: int | None) -> None:
        super().__init__()
        self.config, self.window = config, window
        heads = config.heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.up = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in range(2))

    def forward(self, x: Tensor, packed: Packed, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        c = self.config
        rows = self.qkv(self.norms[0](x)).view(len(x), -1, c.head_dim)
        q, k, v = rows.split([c.heads, c.kv_heads, c.kv_heads], 1)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        x = x + self.out(attention(q, k, v, packed, self.window).flatten(1))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    def __init__(self, config: Config | None = None, attention: Attention = flashspark_attention) -> None:
        super().__init__()
        self.config, self.attention = config or Config(), attention
        c = self.config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.blocks = nn.ModuleList(Block(c, c.window if i % 2 else None) for i in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        angles = torch.arange(c.longest)[:, None] / 10000 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = 0.02 / (2 * c.layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(weight, std=scale)

    def forward(self, tokens: Tensor, packed: Packed) -> Tensor:
        """Logits (tokens, vocabulary)."""
        x, cos, sin = self.embedding(tokens), self.cos[packed.places], self.sin[packed.places]
        for block in self.blocks:
            x = block(x, packed, cos, sin, self.attention)
        return self.norm(x) @ self.embedding.weight.t()
