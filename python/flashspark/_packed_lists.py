"""FlashAttention 4's block lists of packed sequences, as lists of one shape for all of them.

With cu_seqlens_q the lists of a head lie end to end: the counts of sequence b's query blocks from cu_total_m_blocks[b]
on, and its indices from cu_block_idx_offsets[b] on, as many for each query block as the sequence has key blocks.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from ._signature import in_tail
from ._tensors import Array, is_cupy, is_torch

_NAMES = ("cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k", "max_seqlen_k", "seqused_k", "page_table")


class PaddedLists(NamedTuple):
    """The fields of FlashAttention 4's lists; counts (num_seqs, heads or 1, query blocks), indices (.., key blocks)."""

    mask_block_cnt: Array
    mask_block_idx: Array
    full_block_cnt: Array | None
    full_block_idx: Array | None
    block_size: tuple[int, int]


def is_packed(lists: Any) -> bool:
    return getattr(lists, "cu_total_m_blocks", None) is not None


def padded_lists(lists: Any, tensors: tuple[Array, Array, Array], tail: tuple[Any, ...]) -> PaddedLists:
    """lists, whose cu_total_m_blocks is given, for a call's q, k and v and the options behind signature.def's head.

    Nothing is read from a device. Raises ValueError, which names what is wrong.
    """
    given = {name: tail[in_tail(name)] if len(tail) > in_tail(name) else None for name in _NAMES}
    q, k, _ = tensors
    xp = _Arrays(lists.mask_block_cnt)
    cu_m, offsets = lists.cu_total_m_blocks, getattr(lists, "cu_block_idx_offsets", None)
    size_q, size_k = map(int, getattr(lists, "block_size", None) or (128, 128))
    if given["cu_seqlens_q"] is None:
        raise ValueError("block_sparse_tensors.cu_total_m_blocks = given: must be None without cu_seqlens_q")
    if min(size_q, size_k) < 1:
        raise ValueError(f"block_sparse_tensors.block_size = {(size_q, size_k)}: must be above 0")
    count = given["cu_seqlens_q"].shape[0]
    _require("cu_total_m_blocks", cu_m, (count,))
    if offsets is not None:
        _require("cu_block_idx_offsets", offsets, (count,))
    elif given["cu_seqlens_k"] is not None or given["seqused_k"] is not None:
        raise ValueError(
            "block_sparse_tensors.cu_block_idx_offsets = None: must be given with cu_seqlens_k or seqused_k"
        )
    longest_q = q.shape[0] if given["max_seqlen_q"] is None else given["max_seqlen_q"]
    longest_k = _most_keys(k, given)
    shape = -(-longest_q // size_q), -(-longest_k // size_k)
    lengths = _lengths(xp, given, longest_k)
    key_blocks = (lengths + (size_k - 1)) // size_k  # (num_seqs,), or one number
    cu_m = xp.of(cu_m)
    first = cu_m[:-1] * key_blocks if offsets is None else xp.of(offsets)[:-1]
    result: list[Any] = []
    for name in ("mask", "full"):
        counts, indices = (getattr(lists, f"{name}_block_{what}", None) for what in ("cnt", "idx"))
        if name == "full" and counts is None and indices is None:
            result += [None, None]
            continue
        _require(f"{name}_block_cnt", counts, (None, None))
        _require(f"{name}_block_idx", indices, (counts.shape[0], None))
        result += _padded(xp, xp.of(counts), xp.of(indices), cu_m, first, key_blocks, shape)
    return PaddedLists(*result, (size_q, size_k))


def _padded(
    xp: _Arrays, counts: Array, indices: Array, cu_m: Array, first: Array, key_blocks: Any, shape: tuple[Any, Any]
) -> tuple[Array, Array]:
    """Counts and indices of one kind. first: where a sequence's indices begin."""
    blocks = xp.arange(shape[0])
    per_row = key_blocks[:, None] if getattr(key_blocks, "ndim", 0) else key_blocks
    at = cu_m[:-1, None] + blocks  # (num_seqs, query blocks)
    exists = at < cu_m[1:, None]
    number = xp.where(exists, counts[:, xp.inside(at, counts.shape[1])], 0)  # (heads, num_seqs, query blocks)
    start = first[:, None] + blocks * per_row
    place = start[..., None] + xp.arange(shape[1])
    index = indices[:, xp.inside(place, indices.shape[1])]
    return xp.sequences_first(number), xp.sequences_first(index)


def _most_keys(k: Array, given: dict[str, Any]) -> Any:
    """The bound of all sequences' keys."""
    if given["max_seqlen_k"] is not None:
        return given["max_seqlen_k"]
    if given["page_table"] is not None:
        return given["page_table"].shape[1] * k.shape[1]
    return k.shape[0] if given["cu_seqlens_k"] is not None else k.shape[1]


def _lengths(xp: _Arrays, given: dict[str, Any], longest: Any) -> Any:
    """Each sequence's keys, or the number that all have."""
    if given["seqused_k"] is not None:
        return xp.of(given["seqused_k"])
    if given["cu_seqlens_k"] is None:
        return longest
    offsets = xp.of(given["cu_seqlens_k"])
    return offsets[1:] - offsets[:-1]


def _require(name: str, x: Any, shape: tuple[int | None, ...]) -> None:
    """shape: None for a dimension of any size above 0."""
    name = f"block_sparse_tensors.{name}"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} = {type(x).__name__}: must be an array or tensor")
    found = tuple(x.shape)
    if len(found) != len(shape) or any(
        (wanted is None and size < 1) or (wanted is not None and size != wanted) for size, wanted in zip(found, shape)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}.shape = {found}: must be ({wanted}) in lists of packed sequences")
    if not str(x.dtype).endswith("int32") or "uint" in str(x.dtype):
        raise TypeError(f"{name}.dtype = {x.dtype}: must be int32")


class _Arrays:
    """The few functions of the lists' library that are used here."""

    def __init__(self, like: Any) -> None:
        self._torch = sys.modules["torch"] if is_torch(like) else None
        self._numpy = sys.modules["cupy"] if is_cupy(like) else np
        self._device = like.device if self._torch is not None else None

    def of(self, x: Any) -> Any:
        if self._torch is None:
            return self._numpy.asarray(x)
        return x if is_torch(x) else self._torch.as_tensor(np.asarray(x), device=self._device)

    def arange(self, count: Any) -> Array:
        if self._torch is None:
            return self._numpy.arange(count, dtype=np.int32)
        return self._torch.arange(count, dtype=self._torch.int32, device=self._device)

    def inside(self, places: Array, count: Any) -> Array:
        """The nearest places that exist, as indices."""
        if self._torch is None:
            return self._numpy.clip(places, 0, count - 1)
        return places.clamp(0, count - 1).long()

    def where(self, condition: Array, yes: Array, no: int) -> Array:
        return (self._numpy if self._torch is None else self._torch).where(condition, yes, no)

    def sequences_first(self, x: Array) -> Array:
        """(heads, num_seqs, ..) as int32 (num_seqs, heads, ..) in one piece."""
        if self._torch is None:
            return self._numpy.ascontiguousarray(self._numpy.swapaxes(x, 0, 1).astype(np.int32))
        return x.transpose(0, 1).to(self._torch.int32).contiguous()
