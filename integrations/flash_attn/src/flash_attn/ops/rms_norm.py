"""RMS norm, under the names of flash-attention's older module."""

from __future__ import annotations

import torch

from .triton.layer_norm import RMSNorm, rms_norm_fn

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x: (.., size). weight: (size,). Returns the norm in x's type."""
    return rms_norm_fn(x, weight, None, eps=epsilon)
