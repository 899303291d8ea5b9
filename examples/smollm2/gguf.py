"""Reads a GGUF file: metadata, and tensors dequantised to float32. Covers the types that SmolLM2 uses."""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
# Number of weights in a block, and the layout of the block in the file.
BLOCKS = {
    F32: (1, np.dtype("<f4")),
    F16: (1, np.dtype("<f2")),
    Q4_1: (32, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)])),
    Q8_0: (32, np.dtype([("scale", "<f2"), ("bytes", "i1", 32)])),
}


class GGUF:
    """An open GGUF file. `metadata` maps keys to values; `tensor(name)` gives a float32 array, shape [out, in]."""

    def __init__(self, path: Path | str) -> None:
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._pos = 0
        magic, version, num_tensors, num_keys = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: not a GGUF file of version 2 or 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(*self._unpack("<I"))
        self._tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            (rank,) = self._unpack("<I")
            shape = self._unpack(f"<{rank}Q")[::-1]  # the file lists the innermost dimension first
            self._tensors[name] = (shape, *self._unpack("<IQ"))
        alignment = self.metadata.get("general.alignment", 32)
        self._base = -(-self._pos // alignment) * alignment

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> np.ndarray:
        shape, kind, offset = self._tensors[name]
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name}: GGUF type {kind} is none of {sorted(BLOCKS)}")
        size, dtype = BLOCKS[kind]
        blocks = np.frombuffer(self._data, dtype, math.prod(shape) // size, self._base + offset)
        return dequantise(blocks, kind).reshape(shape)

    def _unpack(self, layout: str) -> tuple:
        values = struct.unpack_from(layout, self._data, self._pos)
        self._pos += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._pos += length
        return self._data[self._pos - length : self._pos].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, length = self._unpack("<IQ")
            if kind in SCALARS:
                return list(self._unpack(f"<{length}{SCALARS[kind]}"))
            return [self._value(kind) for _ in range(length)]
        return self._unpack("<" + SCALARS[kind])[0]


def dequantise(blocks: np.ndarray, kind: int) -> np.ndarray:
    if kind in (F32, F16):
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == Q8_0:
        return blocks["bytes"] * scale
    weights = np.empty((len(blocks), 32), np.float32)
    weights[:, :16] = blocks["nibbles"] & 15  # the low nibbles are the first half of the block
    weights[:, 16:] = blocks["nibbles"] >> 4
    weights *= scale
    weights += blocks["minimum"].astype(np.float32)[:, None]
    return weights
