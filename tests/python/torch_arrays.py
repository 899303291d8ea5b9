"""Converts NumPy arrays, including ml_dtypes' types, to torch tensors and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

_STORED = {ml_dtypes.bfloat16: (np.uint16, torch.bfloat16), ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn)}


def moved(x: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """A new tensor with the values of x."""
    if x.dtype.type in _STORED:
        integer, dtype = _STORED[x.dtype.type]
        return torch.from_numpy(x.view(integer).copy()).to(device).view(dtype)
    return torch.from_numpy(x.copy()).to(device)


def back(x: torch.Tensor) -> np.ndarray:
    """x as float32; integers are unchanged."""
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
