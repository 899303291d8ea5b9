"""Rotary embedding of positions, in plain torch."""

from __future__ import annotations

import torch


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Turns the first rotary_dim numbers of each head by the angles of the token's position.

    x: (B, T, heads, D), or (total, heads, D) with cu_seqlens int32 (B + 1,).
    cos, sin: (positions, rotary_dim / 2). seqlen_offsets: the position of a sequence's first token, or int (B,).
    interleaved: turn pairs (0, 1), (2, 3) ..; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) ..
    inplace: into x, which is returned. conjugate: turn back. max_seqlen is not needed.

    Raises ValueError where cos has too few positions or too many angles.
    """
    size = 2 * cos.shape[-1]
    if size > x.shape[-1]:
        raise ValueError(f"cos.shape[-1] = {cos.shape[-1]}: must be at most half of x's head size, {x.shape[-1]}")
    cos, sin = (_of_tokens(table, x, seqlen_offsets, cu_seqlens).float() for table in (cos, sin))
    if conjugate:
        sin = -sin
    whole = x[..., :size].float()
    first, second = (whole[..., 0::2], whole[..., 1::2]) if interleaved else whole.chunk(2, -1)
    halves = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)
    turned = turned.to(x.dtype)
    if inplace:
        x[..., :size] = turned
        return x
    return torch.cat([turned, x[..., size:]], -1) if size < x.shape[-1] else turned


def _of_tokens(
    table: torch.Tensor, x: torch.Tensor, offsets: int | torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The rows of a table that belong to x's tokens, with a dimension for the heads."""
    if cu_seqlens is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp(max=len(cu_seqlens) - 2)
        start = offsets[sequence] if isinstance(offsets, torch.Tensor) else offsets
        return table[rows - cu_seqlens[sequence] + start, None]
    if isinstance(offsets, torch.Tensor):
        return table[offsets[:, None] + torch.arange(x.shape[1], device=x.device), None]
    if offsets < 0 or offsets + x.shape[1] > table.shape[0]:
        raise ValueError(
            f"cos.shape[0] = {table.shape[0]}: must be at least {offsets + x.shape[1]}, for every position"
        )
    return table[offsets : offsets + x.shape[1], None]
