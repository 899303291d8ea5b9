"""Block masks: which blocks of keys each block of queries sees, wholly or in part.

The names, fields, defaults and meaning are those of torch.nn.attention.flex_attention, whose BlockMask objects are
accepted everywhere; the lists may be NumPy arrays or torch tensors. FlashAttention-4's block-sparse tensors are the
same lists in other words.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._block_lists import (
    contents,
    dense_to_ordered,
    holds,
    host,
    moved_like,
    ordered_to_dense,
    picture,
    transpose_ordered,
)
from ._make_lists import make_lists
from ._tensors import Array, is_torch
from ._trace import traced

_DEFAULT_BLOCK = 128
MaskMod = Callable[..., Any]
_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
_Q_LISTS = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Keeps every key."""
    return b.new_ones((), dtype=bool) if hasattr(b, "new_ones") else np.True_


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A mask function that keeps what all of `mask_mods` keep. Raises RuntimeError if one is not callable."""
    _require_callable(mask_mods)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = noop_mask(b, h, q_idx, kv_idx) if not mask_mods else mask_mods[0](b, h, q_idx, kv_idx)
        for mask in mask_mods[1:]:
            result = result & mask(b, h, q_idx, kv_idx)
        return result

    return and_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """A mask function that keeps what any of `mask_mods` keeps. Raises RuntimeError if one is not callable."""
    _require_callable(mask_mods)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = ~noop_mask(b, h, q_idx, kv_idx) if not mask_mods else mask_mods[0](b, h, q_idx, kv_idx)
        for mask in mask_mods[1:]:
            result = result | mask(b, h, q_idx, kv_idx)
        return result

    return or_mask


def _require_callable(mask_mods: tuple[Any, ...]) -> None:
    if not all(map(callable, mask_mods)):
        raise RuntimeError(f"mask_mods = {mask_mods}: must be functions")


def _sliced(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    raise RuntimeError(
        "mask_mod of a BlockMask that was sliced: must be set again, since indices in the slice are others; "
        "set sliced.mask_mod to a function made from the mask_mod of the whole BlockMask"
    )


class BlockMask:
    """Lists of blocks of keys for each block of queries.

    kv_num_blocks: int32 (B, H, num_q_blocks). kv_indices: int32 (B, H, num_q_blocks, num_kv_blocks), of which the
    first kv_num_blocks count. With full_kv_num_blocks and full_kv_indices, those blocks are seen wholly, and the
    former need mask_mod; without them, all do. The q_ lists are the same, transposed; None if not computed.
    BLOCK_SIZE: (queries, keys). seq_lengths: (Q_LEN, KV_LEN).
    """

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Array,
        kv_indices: Array,
        full_kv_num_blocks: Array | None,
        full_kv_indices: Array | None,
        q_num_blocks: Array | None,
        q_indices: Array | None,
        full_q_num_blocks: Array | None,
        full_q_indices: Array | None,
        BLOCK_SIZE: tuple[int, int],
        mask_mod: MaskMod,
    ) -> None:
        _check_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        if (full_q_num_blocks is None) != (full_q_indices is None):
            raise ValueError("full_q_num_blocks and full_q_indices: must be given together")
        self.seq_lengths = seq_lengths
        self.kv_num_blocks, self.kv_indices = kv_num_blocks, kv_indices
        self.full_kv_num_blocks, self.full_kv_indices = full_kv_num_blocks, full_kv_indices
        self.q_num_blocks, self.q_indices = q_num_blocks, q_indices
        self.full_q_num_blocks, self.full_q_indices = full_q_num_blocks, full_q_indices
        self.BLOCK_SIZE = BLOCK_SIZE
        self.mask_mod = mask_mod
        self._whole: tuple[Any, ...] | None = None

    def _seal(self, graph: str) -> BlockMask:
        """Notes that the lists name all blocks that mask_mod, whose graph has this text, keeps."""
        lists = [getattr(self, name) for name in _LISTS]
        self._whole = (graph, self.mask_mod, self.BLOCK_SIZE, self.seq_lengths, lists, list(map(contents, lists)))
        return self

    def lists_are_whole(self, graph: str) -> bool:
        """Whether nothing has changed since create_block_mask, so that mask_mod alone says what is kept.

        graph: the text of mask_mod's graph now, which differs if mask_mod refers to other numbers than then.
        """
        if self._whole is None:
            return False
        text, *fields, lists, contents = self._whole
        now = [getattr(self, name) for name in _LISTS]
        return (
            text == graph
            and all(a is b for a, b in zip((self.mask_mod, self.BLOCK_SIZE, self.seq_lengths), fields))
            and all(a is b for a, b in zip(now, lists))
            and all(holds(x, then) for x, then in zip(now, contents))
        )

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Array,
        kv_indices: Array,
        full_kv_num_blocks: Array | None = None,
        full_kv_indices: Array | None = None,
        BLOCK_SIZE: int | tuple[int, int] = _DEFAULT_BLOCK,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
    ) -> BlockMask:
        """A BlockMask from lists of blocks of keys.

        mask_mod: None keeps every key. seq_lengths: None for as many rows as there are blocks, times the block size.
        Raises ValueError if the lists do not fit together.
        """
        _check_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        q_lists: tuple[Array | None, ...] = (None,) * 4
        if compute_q_blocks:
            full = (None, None)
            if full_kv_num_blocks is not None and full_kv_indices is not None:
                full = transpose_ordered(full_kv_num_blocks, full_kv_indices)
            q_lists = (*transpose_ordered(kv_num_blocks, kv_indices), *full)
        size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
        if seq_lengths is None:
            seq_lengths = (kv_indices.shape[-2] * size[0], kv_indices.shape[-1] * size[1])
        lists = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        return cls(seq_lengths, *lists, *q_lists, size, noop_mask if mask_mod is None else mask_mod)

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """(*seq_lengths, the eight lists, *BLOCK_SIZE, mask_mod); the two pairs are kept whole if not `flatten`."""
        lengths = tuple(self.seq_lengths) if flatten else (self.seq_lengths,)
        size = tuple(self.BLOCK_SIZE) if flatten else (self.BLOCK_SIZE,)
        return (*lengths, *(getattr(self, name) for name in (*_LISTS, *_Q_LISTS)), *size, self.mask_mod)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q_LEN, KV_LEN)."""
        return (*self.kv_indices.shape[:-2], *self.seq_lengths)

    def numel(self) -> int:
        """The number of scores, seen or not."""
        return math.prod(self.shape)

    def sparsity(self) -> float:
        """The percentage of the scores that is in blocks which are not computed."""
        blocks = int(self.kv_num_blocks.sum())
        if self.full_kv_num_blocks is not None:
            blocks += int(self.full_kv_num_blocks.sum())
        return 100 * (1 - blocks * self.BLOCK_SIZE[0] * self.BLOCK_SIZE[1] / self.numel())

    def to_dense(self) -> Array:
        """int32 (B, H, num_q_blocks, num_kv_blocks): 1 where a block is seen, wholly or in part."""
        dense = ordered_to_dense(self.kv_num_blocks, self.kv_indices)
        if self.full_kv_num_blocks is not None:
            dense |= ordered_to_dense(self.full_kv_num_blocks, self.full_kv_indices)
        return moved_like(dense, self.kv_indices)

    def to(self, device: Any) -> BlockMask:
        """The same mask with its lists on a device of torch. NumPy arrays become tensors, but for "cpu"."""
        lists = [_on_device(getattr(self, name), device) for name in (*_LISTS, *_Q_LISTS)]
        moved = BlockMask(self.seq_lengths, *lists, self.BLOCK_SIZE, self.mask_mod)
        if self._whole is not None and self.lists_are_whole(self._whole[0]):
            moved._seal(self._whole[0])
        return moved

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some sequences, heads and blocks of queries. Its mask_mod has to be set again."""
        parts = index if isinstance(index, tuple) else (index,)
        rank = len(self.kv_num_blocks.shape)
        if len(parts) > rank:
            raise IndexError(f"{len(parts)} indices into a BlockMask: must be at most {rank}")
        kept = tuple(
            slice(i, i + 1 or None) if isinstance(i, int) else _for_container(i, self.kv_indices) for i in parts
        )
        lists = [None if x is None else x[kept] for x in (getattr(self, name) for name in _LISTS)]
        return BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=_sliced,
            seq_lengths=self.seq_lengths,
            compute_q_blocks=self.q_indices is not None,
        )

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask of the first queries and keys, as torch's method of this name."""
        rows, columns = -(-new_q_len // self.BLOCK_SIZE[0]), -(-new_kv_len // self.BLOCK_SIZE[1])
        lists: list[Array | None] = []
        for counts, indices in ((self.kv_num_blocks, self.kv_indices), (self.full_kv_num_blocks, self.full_kv_indices)):
            if counts is None:
                lists += [None, None]
                continue
            dense = ordered_to_dense(counts, indices)[..., :rows, :columns]
            lists += [moved_like(x, indices) for x in dense_to_ordered(dense)]
        return BlockMask.from_kv_blocks(*lists, self.BLOCK_SIZE, self.mask_mod)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%, \n{self.to_string().strip()}\n)"

    def __repr__(self) -> str:
        shapes = [
            f"    {name}={None if getattr(self, name) is None else tuple(getattr(self, name).shape)},\n"
            for name in (*_LISTS, *_Q_LISTS)
        ]
        name = getattr(self.mask_mod, "__name__", self.mask_mod)
        return (
            f"BlockMask(\n{''.join(shapes)}    BLOCK_SIZE={self.BLOCK_SIZE},\n    shape={self.shape},\n"
            f"    sparsity={self.sparsity():.2f}%,\n    mask_mod={name}\n)"
        )

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture of each sequence and head: full, part and empty squares. grid_size -1: a square for each block."""
        dense = host(self.to_dense())
        *batch, rows, columns = dense.shape
        most = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        steps = [1 if m == -1 else max(1, -(-n // m)) for n, m in zip((rows, columns), most)]
        pictures = []
        for place in itertools.islice(itertools.product(*map(range, batch)), limit):
            pictures.append(f"{place}\n" + picture(dense[place], *steps))
        if math.prod(batch) > limit:
            pictures += ["...", "To print out more, set BlockMask.to_string(limit=N)"]
            pictures.append("You can also index (BlockMask[batch, head]) to choose a specific batch or head")
        return "\n".join(pictures)


def _check_lists(counts: Array, indices: Array, full_counts: Array | None, full_indices: Array | None) -> None:
    if counts is None or indices is None:
        raise ValueError("kv_num_blocks and kv_indices: must be given")
    if len(indices.shape) < 2:
        raise RuntimeError(f"kv_indices.shape = {tuple(indices.shape)}: BlockMask must have at least 2 dimensions")
    if (full_counts is None) != (full_indices is None):
        raise ValueError("full_kv_num_blocks and full_kv_indices: must be given together")
    for name, count, index in (("kv", counts, indices), ("full_kv", full_counts, full_indices)):
        if count is not None and tuple(count.shape) != tuple(index.shape[:-1]):
            raise ValueError(
                f"{name}_num_blocks.shape = {tuple(count.shape)}: must be {tuple(index.shape[:-1])}, "
                f"as {name}_indices has"
            )


def _for_container(index: Any, container: Array) -> Any:
    if is_torch(index) and not is_torch(container):
        return index.cpu().numpy()
    if isinstance(index, np.ndarray) and is_torch(container):
        return moved_like(index, container)
    return index


def _on_device(x: Array | None, device: Any) -> Array | None:
    if x is None or (isinstance(x, np.ndarray) and str(device) in ("cpu", "numpy")):
        return x
    if isinstance(x, np.ndarray):
        import torch

        x = torch.from_numpy(np.ascontiguousarray(x))
    return x.to(device)


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = _DEFAULT_BLOCK,
    _compile: bool = False,
    separate_full_blocks: bool = True,
) -> BlockMask:
    """The BlockMask of a mask function mask_mod(b, h, q_idx, kv_idx).

    B, H: None for a mask that is the same for all sequences or heads. device: where the lists go; None is
    torch's CUDA device or else the CPU; NumPy arrays where torch is not loaded or for device "numpy". _compile: does
    nothing. separate_full_blocks: whether blocks that are seen wholly have lists of their own.
    The lists are made where they go; on a GPU the work is put on torch's current stream, and the host does not wait.
    An index outside a captured array reads its nearest element. Raises TraceError if mask_mod cannot become a graph.
    """
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    for name, value in (("B", B), ("H", H), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN), ("BLOCK_SIZE", min(size))):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    graph = traced(mask_mod, "mask")
    lists = make_lists(graph, (B or 1, H or 1, Q_LEN, KV_LEN), size, _place(device), separate_full_blocks)
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=(Q_LEN, KV_LEN))
    return mask._seal(graph.text)


def _place(device: Any) -> Any:
    """torch's device for the lists, or None for NumPy arrays."""
    if "torch" not in sys.modules and (device is None or str(device) == "cpu"):
        return None
    if device is None:
        device = _default_device()
    if str(device) == "numpy":
        return None
    import torch

    return torch.device(device)


def _default_device() -> str:
    return "cuda" if sys.modules["torch"].cuda.is_available() else "cpu"


def as_block_mask(mask: Any) -> BlockMask:
    """torch's BlockMask, or anything with its fields, as a BlockMask on the same lists. Raises TypeError for others."""
    if isinstance(mask, BlockMask):
        return mask
    if not all(hasattr(mask, name) for name in (*_LISTS, "BLOCK_SIZE", "mask_mod")):
        raise TypeError(f"block_mask = {type(mask).__name__}: must be a BlockMask of flashspark or torch")
    lists = [getattr(mask, name, None) for name in (*_LISTS, *_Q_LISTS)]
    size = tuple(mask.BLOCK_SIZE)
    blocks = mask.kv_indices.shape[-2:]
    lengths = getattr(mask, "seq_lengths", None) or (blocks[0] * size[0], blocks[1] * size[1])  # torch 2.5 has none
    return BlockMask(tuple(lengths), *lists, size, mask.mask_mod)


class BlockSparseTensors(NamedTuple):
    """FlashAttention-4's lists: int32 counts (B, H, num_q_blocks) and indices (B, H, num_q_blocks, num_kv_blocks).

    With cu_seqlens_q they may be packed instead, and cu_total_m_blocks is given: see flashspark._packed_lists.
    """

    mask_block_cnt: Array
    mask_block_idx: Array
    full_block_cnt: Array | None = None
    full_block_idx: Array | None = None
    block_size: tuple[int, int] | None = None
    cu_total_m_blocks: Array | None = None
    cu_block_idx_offsets: Array | None = None


def to_block_sparse_tensors(mask: Any) -> BlockSparseTensors:
    """A BlockMask's lists in FlashAttention-4's words."""
    mask = as_block_mask(mask)
    return BlockSparseTensors(*(getattr(mask, name) for name in _LISTS), mask.BLOCK_SIZE)


def from_block_sparse_tensors(
    tensors: Any,
    mask_mod: MaskMod | None = None,
    seq_lengths: tuple[int, int] | None = None,
    block_size: tuple[int, int] | None = None,
) -> BlockMask:
    """FlashAttention-4's lists, its own tuple or this module's, as a BlockMask without lists by keys.

    block_size: (queries, keys); tensors.block_size if None, and 128 if that is None, too.
    """
    size = block_size or getattr(tensors, "block_size", None) or _DEFAULT_BLOCK
    return BlockMask.from_kv_blocks(
        *(getattr(tensors, name) for name in BlockSparseTensors._fields[:4]),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=seq_lengths,
        compute_q_blocks=False,
    )
