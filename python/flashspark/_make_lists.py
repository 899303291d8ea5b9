"""The lists of a block mask from a traced mask function, by the library: on the CPU, or by a kernel on a GPU."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from . import _core
from ._graph import host_array
from ._tensors import BFLOAT16, Array, is_cupy, is_torch
from ._trace import Traced
from ._user_functions import captured_argument, native


def make_lists(
    traced: Traced, shape: tuple[int, int, int, int], size: tuple[int, int], device: Any, separate: bool
) -> tuple[Array | None, ...]:
    """kv_num_blocks, kv_indices, full_kv_num_blocks and full_kv_indices; the last two are None if not `separate`.

    shape: B, H, Q_LEN, KV_LEN. size: (queries, keys) of a block. device: where the lists go, as torch names it; None
    for NumPy arrays. Where the library has no kernel for a GPU, or no NVRTC to compile it, the CPU makes the lists.
    """
    if device is None or device.type in ("cpu", "cuda"):
        try:
            return _made(traced, shape, size, device, separate)
        except NotImplementedError as error:
            if device is None or device.type == "cpu":
                raise
            warnings.warn(f"create_block_mask: the CPU makes the lists: {error}", RuntimeWarning, stacklevel=3)
    torch = sys.modules["torch"]
    lists = _made(traced, shape, size, torch.device("cpu"), separate)
    return tuple(None if x is None else x.to(device) for x in lists)


def _made(
    traced: Traced, shape: tuple[int, int, int, int], size: tuple[int, int], device: Any, separate: bool
) -> tuple[Array | None, ...]:
    counts = (*shape[:2], -(-shape[2] // size[0]))
    indices = (*counts, -(-shape[3] // size[1]))
    lists = (
        *(_empty(x, device) for x in (counts, indices)),
        *(_empty(x, device) if separate else None for x in (counts, indices)),
    )
    function, scalars = native(traced), traced.scalars
    captured = [part for x in traced.tensors for part in captured_argument(_on_device(x, device))]
    numbers = (len(traced.tensors), len(scalars))
    _core.create_block_mask(function.handle, *shape, *size, *lists, *numbers, *captured, *map(float, scalars))
    return lists


def _empty(shape: tuple[int, ...], device: Any) -> Array:
    if device is None:
        return np.empty(shape, np.int32)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=torch.int32, device=device)


def _on_device(x: Array, device: Any) -> Array:
    """A captured array where the lists are made. device: None or torch's."""
    if device is None or device.type == "cpu":
        if is_torch(x):
            return x.detach().cpu()
        x = host_array(x)
        fits = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
        return x if fits else x.copy()
    if is_torch(x):
        return x.detach().to(device)
    if is_cupy(x):
        return x
    torch, x = sys.modules["torch"], np.ascontiguousarray(host_array(x)).reshape(x.shape)
    if x.dtype == BFLOAT16:  # which torch does not take from NumPy
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
