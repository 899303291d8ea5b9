"""Copies of tensors whose head size, strides or address the native call does not accept.

The native call accepts head sizes in multiples of 8, a contiguous last dimension and, on a GPU, rows aligned to 16
bytes (32 for float32). Like flash-attention's Python functions, ours pad and copy everything else unless `strict`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ._tensors import Array, array, is_cupy, is_torch

MAX_HEAD_DIM = 512
_ROW_STEP = 16  # elements: rows of a copy start at multiples of this, at least 16 bytes in any type


def _on_cuda(x: Array) -> bool:
    return is_cupy(x) or (is_torch(x) and x.is_cuda)


def _can_copy(x: Array) -> bool:
    return isinstance(x, np.ndarray) or is_torch(x) or is_cupy(x)


def _strides(x: Array) -> tuple[int, ...]:
    """The strides of x in bytes."""
    if is_torch(x):
        return tuple(stride * x.itemsize for stride in x.stride())
    return tuple(x.strides)


def _address(x: Array) -> int:
    return int(x.data_ptr() if is_torch(x) else x.data.ptr)


def _aligned(x: Array) -> bool:
    """Whether every row is aligned as the kernels need it: on a GPU to 16 bytes, to 32 in float32."""
    if not _on_cuda(x):
        return True
    unit = 32 if x.dtype.itemsize == 4 else 16
    steps = [stride for size, stride in zip(x.shape[:-1], _strides(x)) if size > 1]
    return _address(x) % unit == 0 and all(step % unit == 0 for step in steps)


def _contiguous_last(x: Array) -> bool:
    return x.shape[-1] <= 1 or _strides(x)[-1] == x.dtype.itemsize or 0 in x.shape


def step_of(k: Array) -> int:
    """The number that head sizes must be multiples of: 8, or 16 for keys in e4m3 on a GPU."""
    return 16 if _on_cuda(k) and k.dtype.itemsize == 1 else 8


def padded(width: int, step: int) -> int:
    """The head size that the native call computes with; elements past `width` are zeros."""
    return -(-width // step) * step


def readable(x: Array, step: int) -> Array:
    """x (.., width), or a copy that the native call can read, padded to padded(width, step) with zeros."""
    shape = x.shape
    if len(shape) < 3 or not 0 < shape[-1] <= MAX_HEAD_DIM or not _can_copy(x):
        return x  # the native call reports what is wrong with it
    if shape[-1] % step == 0 and type(x) is np.ndarray and x.strides[-1] == x.itemsize:
        return x
    width = padded(x.shape[-1], step)
    if width == x.shape[-1] and _contiguous_last(x) and _aligned(x):
        return x
    copy = _zeros(x, (*x.shape[:-1], padded(width, _ROW_STEP)))
    copy[..., : x.shape[-1]] = x
    return copy[..., :width]


def _zeros(x: Array, shape: tuple[int, ...]) -> Array:
    if is_torch(x):
        return x.new_zeros(shape)
    if is_cupy(x):
        with x.device:
            return sys.modules["cupy"].zeros(shape, x.dtype)
    return np.zeros(shape, x.dtype)


def beside(x: Array, step: int) -> Array:
    """Uninitialised memory for the gradient of x (.., width), in x's type; wider where readable() pads x."""
    width = padded(x.shape[-1], step) if len(x.shape) > 0 else 0
    if not _can_copy(x) or len(x.shape) < 3 or not 0 < width <= MAX_HEAD_DIM:
        return x  # the native call reports what is wrong with x
    if is_torch(x):
        torch = sys.modules["torch"]
        return torch.empty_like(x) if width == x.shape[-1] else x.new_empty((*x.shape[:-1], width))
    shape = (*x.shape[:-1], width)
    if is_cupy(x):
        with x.device:
            return sys.modules["cupy"].empty(shape, x.dtype)
    return np.empty(shape, x.dtype)


def writable(out: Array, width: int, step: int) -> Array:
    """out (.., width), or memory for the native call to write into instead; `hand_over` then copies it to out."""
    if not _can_copy(out) or len(out.shape) < 3 or out.shape[-1] != width or not 0 < width <= MAX_HEAD_DIM:
        return out
    if padded(width, step) == width and _contiguous_last(out):
        return out
    memory = _zeros(out, (*out.shape[:-1], padded(width, _ROW_STEP)))
    memory[..., :width] = out  # rows past seqused_q keep their values
    return memory[..., : padded(width, step)]


def hand_over(memory: Array, out: Any) -> None:
    """Copies what the native call has written to the caller's tensor, unless it is that tensor."""
    if memory is out:
        return
    if is_torch(out):
        out.copy_(memory[..., : out.shape[-1]])
    else:
        out[...] = memory[..., : out.shape[-1]]


def contiguous_rows(x: Array | None) -> Array | None:
    """x, or a copy of the same width whose last dimension is contiguous."""
    if x is None or not _can_copy(x) or len(x.shape) < 1 or _contiguous_last(x):
        return x
    return copied("", x)


def contiguous(x: Array) -> Array:
    """x, or a contiguous copy of it."""
    if is_torch(x):
        return x.contiguous()
    flags = getattr(x, "flags", None)
    return x if flags is None or flags.c_contiguous else x.copy()


def copied(name: str, x: Array) -> Array:
    """A contiguous copy of x."""
    if is_torch(x):
        if x.is_nested or x.layout is not sys.modules["torch"].strided:
            array(name, x)  # raises, naming the argument
        return x.clone(memory_format=sys.modules["torch"].contiguous_format)
    if not _can_copy(x):
        x = np.from_dlpack(array(name, x))
    return x.copy()
