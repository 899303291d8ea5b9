"""Lists of blocks from masks and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._graph import host_array
from ._tensors import Array, is_torch

host = host_array


def moved_like(x: np.ndarray, like: Array) -> Array:
    """x in the container of `like`, a NumPy array or torch tensor, and on its device."""
    if not is_torch(like):
        return x
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device)


def ordered_to_dense(counts: Array, indices: Array) -> np.ndarray:
    """int32 (.., rows, columns), 1 at the first counts[.., row] of indices[.., row]."""
    number, place = host(counts), host(indices)
    columns = place.shape[-1]
    dense = np.zeros((*place.shape[:-1], columns + 1), np.int32)
    place = np.where(np.arange(columns) < number[..., None], place, columns)
    np.put_along_axis(dense, place.astype(np.int64), 1, -1)
    return dense[..., :columns]


def dense_to_ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 (.., rows) counts and int32 (.., rows, columns) indices, those of ones first, each in ascending order."""
    ones = dense != 0
    order = np.argsort(~ones, axis=-1, kind="stable")
    return ones.sum(-1, dtype=np.int32), order.astype(np.int32)


def transpose_ordered(counts: Array, indices: Array) -> tuple[Array, Array]:
    """The lists by columns, in the container of `indices` and on its device, which the host does not wait for."""
    if is_torch(indices):
        return _transposed_tensors(counts, indices)
    return dense_to_ordered(np.swapaxes(ordered_to_dense(counts, indices), -1, -2))


def _transposed_tensors(counts: Array, indices: Array) -> tuple[Array, Array]:
    import torch

    columns = indices.shape[-1]
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    place = torch.where(listed & (indices >= 0) & (indices < columns), indices, columns).long()
    dense = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.int32, device=indices.device)
    dense = dense.scatter_(-1, place, 1)[..., :columns].transpose(-1, -2)
    order = torch.argsort(dense, dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def contents(x: Array | None) -> Any:
    """What tells whether a list is changed in place: torch counts that; arrays are compared with a copy."""
    if x is None or isinstance(x, np.ndarray):
        return None if x is None else (x.shape, x.tobytes())
    return None if x.is_inference() else x._version


def holds(x: Array | None, then: Any) -> bool:
    """Whether a list is as it was when contents() gave `then`."""
    if x is None:
        return True
    if isinstance(x, np.ndarray):  # bytes are compared faster than arrays
        return x.shape == then[0] and x.tobytes() == then[1]
    return then is not None and x._version == then


def picture(dense: np.ndarray, row_step: int, column_step: int) -> str:
    """A line for each `row_step` rows, with full, part and empty squares."""
    lines = []
    for row in range(0, dense.shape[0], row_step):
        means = [
            dense[row : row + row_step, column : column + column_step].mean()
            for column in range(0, dense.shape[1], column_step)
        ]
        lines.append("".join(2 * ("█" if mean == 1 else " " if mean == 0 else "░") for mean in means) + "\n")
    return "".join(lines)
