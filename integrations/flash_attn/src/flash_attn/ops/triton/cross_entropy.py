"""Cross entropy with a penalty on the logarithm of the softmax's denominator, in plain torch."""

from __future__ import annotations

from typing import Any

import torch


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: (rows, classes). labels: int64 (rows,). precomputed_lse: float32 (rows,), of scaled logits.

    Returns float32 (rows,) twice: the losses, and the part lse_square_scale * lse^2 of them; 0 for ignore_index.
    inplace_backward saves memory in flash-attention's and is ignored. Raises NotImplementedError for a process_group.
    """
    if process_group is not None:
        raise NotImplementedError("process_group = given: this flash_attn is flashspark's, which splits no vocabulary")
    scaled = logits.float() * logit_scale
    lse = scaled.logsumexp(-1) if precomputed_lse is None else precomputed_lse.float()
    kept = labels != ignore_index
    chosen = scaled.gather(-1, labels.where(kept, 0)[:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * chosen
    if label_smoothing:
        losses = losses - label_smoothing * scaled.mean(-1)
    penalty = lse_square_scale * lse.square()
    return (losses + penalty).where(kept, 0.0), penalty.where(kept, 0.0)
