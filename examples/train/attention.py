"""Causal attention of packed documents, each to itself alone: flashspark's, and the forms that torch has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flashspark.torch_ops
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Packed:
    """Where each document starts, and where the last one ends; the longest; each token's place in its document.

    dense: all documents are as long as the longest, so that the tokens are a batch (documents, longest).
    """

    offsets: Tensor  # int32 (documents + 1,)
    longest: int
    places: Tensor  # (tokens,)
    rows: Tensor  # (tokens,): each token's row where every document is padded to the longest
    dense: bool = False


Attention = Callable[[Tensor, Tensor, Tensor, Packed, int | None], Tensor]


def flashspark_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None) -> Tensor:
    """q (tokens, heads, head_dim), k and v alike. Gradients come by themselves; torch.compile keeps the operator."""
    function = flashspark.torch_ops if torch.compiler.is_compiling() else flashspark
    sides = (-1 if window is None else window - 1, 0)
    if packed.dense:
        q, k, v = (x.unflatten(0, (-1, packed.longest)) for x in (q, k, v))
        return function.flash_attn_func(q, k, v, causal=True, window_size=sides).flatten(0, 1)
    return function.flash_attn_varlen_func(
        q, k, v, packed.offsets, packed.offsets, packed.longest, packed.longest, causal=True, window_size=sides
    )


def torch_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None) -> Tensor:
    """The same by torch's scaled_dot_product_attention, which knows no packed documents: they are padded at their ends,
    where no row of a causal mask sees it. That leaves torch its flash kernels in layers without a window. A window is a
    mask, the same for all documents; torch's kernels with a mask know no grouped heads, so that these are repeated."""

    def unpacked(x: Tensor) -> Tensor:
        if not packed.dense:
            memory = x.new_zeros((len(packed.offsets) - 1) * packed.longest, *x.shape[1:])
            x = memory.index_copy(0, packed.rows, x)
        return x.unflatten(0, (-1, packed.longest)).transpose(1, 2)

    if window is None:
        out = F.scaled_dot_product_attention(*map(unpacked, (q, k, v)), is_causal=True, enable_gqa=True)
    else:
        place = torch.arange(packed.longest, device=q.device)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < window)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(*map(unpacked, (q, k, v)), attn_mask=seen)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if packed.dense else out[packed.rows]


def torch_varlen_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None) -> Tensor:
    """The same by torch's varlen_attn, flash-attention 2 without padding. On CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    sides = (-1 if window is None else window - 1, 0)
    lengths = packed.offsets, packed.offsets, packed.longest, packed.longest
    return varlen_attn(q, k, v, *lengths, window_size=sides)


ATTENTION: dict[str, Attention] = {
    "flashspark": flashspark_attention,
    "torch": torch_attention,
    "torch-varlen": torch_varlen_attention,
}
