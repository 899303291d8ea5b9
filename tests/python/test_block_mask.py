"""Block masks on NumPy arrays: creation against whole masks, lists, slices, and FlashAttention-4's form."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from flashspark._block_lists import dense_to_ordered, ordered_to_dense
from flashspark._block_mask import (
    BlockMask,
    and_masks,
    as_block_mask,
    create_block_mask,
    from_block_sparse_tensors,
    noop_mask,
    or_masks,
    to_block_sparse_tensors,
)
from flashspark.mods import scalar

DOCS = np.sort(np.random.default_rng(0).integers(0, 5, 1000)).astype(np.int32)


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return q - k < 40


def documents(b, h, q, k):
    return DOCS[q] == DOCS[k]


MASKS = {
    "causal": causal,
    "sliding": and_masks(causal, window),
    "documents": documents,
    "documents or prefix": or_masks(documents, lambda b, h, q, k: k < 70),
    "by head": lambda b, h, q, k: (q + h * 50 >= k) & (b * 30 <= k),
    "noop": noop_mask,
    "nothing": or_masks(),
    "everything": and_masks(),
    "stripes": lambda b, h, q, k: (q // 16) % 3 == (k // 16) % 3,
}


def whole(mask, b, h, q, k):
    at = np.ix_(*(np.arange(n, dtype=np.int32) for n in (b, h, q, k)))
    return np.broadcast_to(mask(*at), (b, h, q, k))


def blocks(dense, size):
    """(partial, full) of a whole mask, padded with keys that are not seen."""
    b, h, q, k = dense.shape
    padded = np.pad(dense, ((0, 0), (0, 0), (0, -q % size[0]), (0, -k % size[1])))
    rows, columns = padded.shape[2] // size[0], padded.shape[3] // size[1]
    counts = padded.reshape(b, h, rows, size[0], columns, size[1]).sum((3, 5))
    return (counts > 0) & (counts < size[0] * size[1]), counts == size[0] * size[1]


@pytest.mark.parametrize("size", [128, (64, 32), (17, 50)])
@pytest.mark.parametrize("name", MASKS)
def test_blocks(name, size):
    both = (size, size) if isinstance(size, int) else size
    mask = create_block_mask(MASKS[name], 2, 3, 200, 333, "numpy", size)
    partial, full = blocks(whole(MASKS[name], 2, 3, 200, 333), both)
    np.testing.assert_array_equal(ordered_to_dense(mask.kv_num_blocks, mask.kv_indices), partial)
    np.testing.assert_array_equal(ordered_to_dense(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    np.testing.assert_array_equal(mask.to_dense(), partial | full)
    turned = ordered_to_dense(mask.q_num_blocks, mask.q_indices)
    np.testing.assert_array_equal(np.swapaxes(turned, -1, -2), partial)
    assert mask.shape == (2, 3, 200, 333) and both == mask.BLOCK_SIZE and mask.mask_mod is MASKS[name]
    assert mask.kv_indices.dtype == mask.kv_num_blocks.dtype == np.int32 and mask.numel() == 2 * 3 * 200 * 333


@pytest.mark.parametrize("size", [(300, 16), (16, 2500), (5000, 5000), (1, 100)])
def test_blocks_of_any_size(size):
    """Several tiles in a block, and several blocks in a tile."""
    long = np.sort(np.random.default_rng(1).integers(0, 5, 3000)).astype(np.int64)
    mask_mod = lambda b, h, q, k: long[q] == long[k]  # noqa: E731
    mask = create_block_mask(mask_mod, None, None, 320, 3000, "numpy", size)
    partial, full = blocks(whole(mask_mod, 1, 1, 320, 3000), size)
    np.testing.assert_array_equal(ordered_to_dense(mask.kv_num_blocks, mask.kv_indices), partial)
    np.testing.assert_array_equal(ordered_to_dense(mask.full_kv_num_blocks, mask.full_kv_indices), full)


def captured_arrays():
    """The same numbers in arrays that the library does not take as they are."""
    numbers = np.arange(-40, 260).reshape(300, 1) // 3
    record = np.zeros(300, np.dtype([("a", "i1"), ("b", "i4")]))
    record["b"] = numbers[:, 0]
    frozen = numbers[:, 0].copy()
    frozen.flags.writeable = False
    return {
        "strided": np.repeat(numbers, 3, axis=1)[:, 1],
        "backwards": numbers[::-1, 0].copy()[::-1],
        "unaligned": record["b"],
        "read-only": frozen,
        "bfloat16": numbers[:, 0].astype(ml_dtypes.bfloat16),
        "float64": numbers[:, 0].astype(np.float64),
        "int8": numbers[:, 0].astype(np.int8),
    }


@pytest.mark.parametrize("kind", captured_arrays())
def test_captured_arrays(kind):
    held = captured_arrays()[kind]
    mask = create_block_mask(lambda b, h, q, k: held[q] >= held[k], None, None, 300, 300, "numpy", 32)
    same = create_block_mask(lambda b, h, q, k: (q - 40) // 3 >= (k - 40) // 3, None, None, 300, 300, "numpy", 32)
    for a, b in zip(mask.as_tuple()[2:10], same.as_tuple()[2:10]):
        np.testing.assert_array_equal(a, b)


def test_scalars_and_indices_outside():
    limit = scalar(40)
    row = np.array([0, 1, 1, 0])
    mask_mod = lambda b, h, q, k: (q - k < limit) & (row[k - 200] == row[q])  # noqa: E731
    for value in (40, 7):
        limit.value = value
        mask = create_block_mask(mask_mod, 1, 1, 64, 200, "numpy", 16)
        q, k = np.arange(64)[:, None], np.arange(200)[None, :]
        kept = (q - k < value) & (row[np.clip(k - 200, -4, 3)] == row[np.clip(q, 0, 3)])
        partial, full = blocks(kept[None, None], (16, 16))
        np.testing.assert_array_equal(ordered_to_dense(mask.kv_num_blocks, mask.kv_indices), partial)
        np.testing.assert_array_equal(ordered_to_dense(mask.full_kv_num_blocks, mask.full_kv_indices), full)


def test_without_full_blocks():
    mask = create_block_mask(causal, None, None, 256, 256, "numpy", separate_full_blocks=False)
    assert mask.full_kv_num_blocks is None and mask.full_q_indices is None and mask.shape == (1, 1, 256, 256)
    assert mask.to_dense().tolist() == [[[[1, 0], [1, 1]]]]


def test_sparsity_and_picture():
    mask = create_block_mask(causal, 1, 1, 256, 256, "numpy")
    assert mask.sparsity() == 25.0
    assert mask.to_string() == "(0, 0)\n██  \n████\n"
    assert str(mask).startswith("BlockMask(shape=(1, 1, 256, 256), sparsity=25.00%") and "mask_mod=causal" in repr(mask)
    small = create_block_mask(causal, 3, 2, 1280, 1280, "numpy", 64).to_string(grid_size=5, limit=2)
    assert small.count("(") == 4 and "░" in small and "To print out more" in small
    assert len(mask.to_string(grid_size=-1).splitlines()) == 3


def test_slices():
    mask = create_block_mask(MASKS["by head"], 2, 3, 256, 256, "numpy")
    assert mask[0].shape == (1, 3, 256, 256) and mask[1, -1].shape == (1, 1, 256, 256)
    rows = mask[:, 1:, np.array([1])]
    assert rows.kv_indices.shape == (2, 2, 1, 2) and rows.q_num_blocks is not None
    np.testing.assert_array_equal(mask[1, 2].to_dense()[0, 0], mask.to_dense()[1, 2])
    with pytest.raises(RuntimeError, match="must be set again"):
        mask[0].mask_mod(0, 0, 0, 0)
    with pytest.raises(IndexError):
        mask[0, 0, 0, 0]
    assert mask._adjust(128, 200).kv_indices.shape == (2, 3, 1, 2)


def test_lists():
    dense = np.random.default_rng(1).integers(0, 2, (2, 3, 5, 7))
    counts, indices = dense_to_ordered(dense)
    np.testing.assert_array_equal(ordered_to_dense(counts, indices), dense)
    assert all((np.diff(row[:n]) > 0).all() for row, n in zip(indices.reshape(-1, 7), counts.ravel()))


def test_from_kv_blocks():
    counts, indices = np.array([[[1, 2]]], np.int32), np.array([[[[0, 1], [0, 1]]]], np.int32)
    mask = BlockMask.from_kv_blocks(counts, indices)
    assert mask.shape == (1, 1, 256, 256) and mask.q_num_blocks.tolist() == [[[2, 1]]]
    assert BlockMask.from_kv_blocks(counts, indices, compute_q_blocks=False).q_indices is None
    assert len(mask.as_tuple()) == 13 and len(mask.as_tuple(flatten=False)) == 11
    with pytest.raises(RuntimeError, match="at least 2"):
        BlockMask.from_kv_blocks(np.int32(1), np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="together"):
        BlockMask.from_kv_blocks(counts, indices, counts)
    with pytest.raises(ValueError, match=r"kv_num_blocks\.shape"):
        BlockMask.from_kv_blocks(counts[..., :1], indices)


def test_accepts_other_masks():
    mask = create_block_mask(causal, 1, 1, 256, 256, "numpy")
    assert as_block_mask(mask) is mask
    other = as_block_mask(SimpleNamespace(**vars(mask)))
    assert other.kv_indices is mask.kv_indices and other.mask_mod is causal
    with pytest.raises(TypeError, match="must be a BlockMask"):
        as_block_mask(3)


def test_block_sparse_tensors():
    mask = create_block_mask(causal, 1, 2, 300, 300, "numpy", (64, 128))
    tensors = to_block_sparse_tensors(mask)
    assert tensors.mask_block_cnt is mask.kv_num_blocks and tensors.block_size == (64, 128)
    again = from_block_sparse_tensors(tensors, causal, (300, 300))
    np.testing.assert_array_equal(again.to_dense(), mask.to_dense())
    assert again.shape == mask.shape and again.BLOCK_SIZE == (64, 128)
    fields = SimpleNamespace(mask_block_cnt=mask.kv_num_blocks, mask_block_idx=mask.kv_indices)
    fields.full_block_cnt = fields.full_block_idx = None
    assert from_block_sparse_tensors(fields).BLOCK_SIZE == (128, 128)


def test_errors():
    with pytest.raises(ValueError, match="Q_LEN = 0"):
        create_block_mask(causal, 1, 1, 0, 5)
    with pytest.raises(ValueError, match=r"Q_LEN = 1073741825: must be from 1 to 1073741824"):
        create_block_mask(causal, 1, 1, 2**30 + 1, 5, "numpy", 2**30)
    with pytest.raises(ValueError, match=r"mask_mod: captured tensor 0: dimension 0 has size 0"):
        empty = np.zeros(0, np.int32)
        create_block_mask(lambda b, h, q, k: empty[q] == k, 1, 1, 5, 5, "numpy")
    with pytest.raises(RuntimeError, match="must be functions"):
        and_masks(causal, 3)
    with pytest.raises(TypeError, match="must return one bool"):
        create_block_mask(lambda b, h, q, k: q - k, 1, 1, 5, 5, "numpy")
