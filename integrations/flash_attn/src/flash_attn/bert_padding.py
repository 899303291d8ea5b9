"""Padded batches (B, T, ..) as rows of tokens (total, ..), and back. Differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """input: (rows, ..). indices: int64 (total,). Returns (total, ..)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """values: (total, ..). indices: int32 or int64 (total,). Returns (first_axis_dim, ..), zero in all other rows."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """index_first_axis's result, and input without its gradient."""
    return index_first_axis(input, indices), input.detach()


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """hidden_states: (total, ..). indices: int64 (total,), rows of batch * seqlen. Returns (batch, seqlen, ..)."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """hidden_states: (B, T, ..). attention_mask: bool or int (B, T), 1 for tokens. unused_mask: the same, 1 for rows
    that are kept, too, but not in use.

    Returns (tokens (total, ..), their indices int64 (total,), cu_seqlens int32 (B + 1,), the longest length, tokens in
    use int32 (B,)).
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    indices = kept.flatten().nonzero().flatten()
    lengths = kept.sum(1, dtype=torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _starts(lengths), longest, used.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """hidden_states: (B, T, ..). attention_mask_in_length: int (B, T): the lengths of the sequences that a row holds,
    one behind another from its start; the rest of it is 0.

    Returns (tokens (total, ..), their indices int64 (total,), cu_seqlens int32 (sequences + 1,), the longest length).
    """
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths > 0].int()
    columns = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    kept = columns < attention_mask_in_length.sum(1, keepdim=True)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def __getattr__(name: str) -> Any:
    if name == "rearrange":  # verl takes it from here
        from einops import rearrange

        return rearrange
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
