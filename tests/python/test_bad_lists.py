"""Bad block lists at every door: the error names argument, value and rule, and nothing has been computed."""

from __future__ import annotations

import importlib
import sys

import flashspark
import numpy as np
import pytest
from flashspark import BlockMask, BlockSparseTensors
from problems import offsets

B, H, Q, K, D, SIZE = 2, 4, 40, 70, 16, (16, 32)
ROWS, KEYS = 3, 3  # blocks
NAMES = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
FLEX = dict(zip(NAMES, ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")))


def lists(**changes):
    counts, indices = np.ones((B, H, ROWS), np.int32), np.zeros((B, H, ROWS, KEYS), np.int32)
    whole = dict(zip(NAMES, (counts, indices, counts.copy(), indices + 1))) | {"block_size": SIZE}
    return {name: changes.get(name, x) for name, x in whole.items()}


def tensors(normal):
    return normal(B, Q, H, D), normal(B, K, 2, D), normal(B, K, 2, D)


def flex(normal, given):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in tensors(normal))
    size = given.pop("block_size")
    mask = BlockMask.from_kv_blocks(*lists().values(), seq_lengths=(Q, K), compute_q_blocks=False)
    mask = BlockMask((Q, K), *(given[name] for name in NAMES), None, None, None, None, size, mask.mask_mod)
    return flashspark.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def dense(normal, given):
    out = np.full((B, Q, H, D), 7, np.float32)
    try:
        flashspark.flash_attn_func(*tensors(normal), out=out, block_sparse_tensors=BlockSparseTensors(**given))
    finally:
        assert (out == 7).all()


def forward(normal, given):
    return flashspark._flash_attn_fwd(*tensors(normal), block_sparse_tensors=BlockSparseTensors(**given))


def packed(normal, given):
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in tensors(normal))
    cu = offsets([Q] * B), offsets([K] * B)
    out = np.full(q.shape, 7, np.float32)
    try:
        flashspark.flash_attn_varlen_func(q, k, v, *cu, Q, K, out=out, block_sparse_tensors=BlockSparseTensors(**given))
    finally:
        assert (out == 7).all()


def moved(x):
    return sys.modules["torch"].from_numpy(x) if isinstance(x, np.ndarray) else x


def operator(normal, given):
    pytest.importorskip("torch")
    torch_ops = importlib.import_module("flashspark.torch_ops")
    given = BlockSparseTensors(**{name: moved(x) for name, x in given.items()})
    return torch_ops.flash_attn_func(*map(moved, tensors(normal)), block_sparse_tensors=given)


DOORS = {"flex": flex, "dense": dense, "forward": forward, "packed": packed, "operator": operator}
COUNTS, INDICES = np.ones((B, H, ROWS), np.int32), np.zeros((B, H, ROWS, KEYS), np.int32)
SHAPE = r"\.shape.* must be"
BAD = [
    ("mask_block_cnt", COUNTS[:, :, :2], SHAPE),
    ("mask_block_cnt", COUNTS[0], SHAPE),
    ("mask_block_cnt", COUNTS[:, :3], SHAPE),
    ("mask_block_cnt", np.ones((3, H, ROWS), np.int32), SHAPE),
    ("mask_block_idx", INDICES[:, :, :2], SHAPE),
    ("mask_block_idx", INDICES[..., 0], SHAPE),
    ("mask_block_idx", INDICES[:1], SHAPE),
    ("full_block_cnt", COUNTS[:, :, :2], SHAPE),
    ("full_block_idx", INDICES[:, :, :1], SHAPE),
    ("mask_block_cnt", COUNTS * 4, r"\[0, 0, 0\] = 4: must be from 0 to"),
    ("full_block_cnt", COUNTS * -1, r"\[0, 0, 0\] = -1: must be from 0 to"),
    ("mask_block_idx", INDICES + 3, r"\[0, 0, 0, 0\] = 3: must name"),
    ("full_block_idx", INDICES - 1, r"\[0, 0, 0, 0\] = -1: must name"),
    ("mask_block_cnt", COUNTS.astype(np.int64), r"\.dtype = (torch\.)?int64: must be int32"),
    ("mask_block_idx", INDICES.astype(np.float32), r"\.dtype = (torch\.)?float32: must be int32"),
    ("full_block_idx", INDICES.astype(np.int16), r"\.dtype = (torch\.)?int16: must be int32"),
    ("block_size", (17, 32), r"\[0\] = 17: must be a multiple of 16"),
    ("block_size", (16, 24), r"\[1\] = 24: must be a multiple of 16"),
    ("block_size", (0, 32), r"\[0\] = 0: must be"),
    ("block_size", (16, -16), r"\[1\] = -16: must be"),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("name", "value", "match"), BAD, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD)])
def test_bad_lists(normal, door, name, value, match):
    # Where counts and indices do not fit each other, either may be named.
    names = [x for x in NAMES if x[:4] == name[:4]] if "shape" in match else [name]
    if door == "flex":
        names = [FLEX.get(x, "BLOCK_SIZE") for x in names]
    where = "(block_mask\\.)?" if door == "flex" else r"block_sparse_tensors\."
    with pytest.raises(TypeError if "dtype" in match else ValueError, match=f"^{where}({'|'.join(names)}){match}"):
        DOORS[door](normal, lists(**{name: value}))


@pytest.mark.parametrize("door", DOORS)
def test_good_lists(normal, door):
    """What the cases above change is right."""
    if door in ("dense", "packed"):
        with pytest.raises(AssertionError):
            DOORS[door](normal, lists())
    else:
        DOORS[door](normal, lists())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", ["flex", "dense", "operator"])
def test_lists_on_another_device(normal, door, name):
    pytest.importorskip("torch")
    q, k, v = map(moved, tensors(normal))
    given = {key: moved(x) for key, x in lists().items()}
    given[name] = given[name].to("meta")
    with pytest.raises(
        (ValueError, NotImplementedError), match=r"^block_(mask|sparse_tensors)\.\w+\.device = meta"
    ) as raised:
        if door == "flex":
            mask = BlockMask((Q, K), *(given[x] for x in NAMES), None, None, None, None, SIZE, flashspark.noop_mask)
            flashspark.flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True)
        else:
            module = flashspark if door == "dense" else importlib.import_module("flashspark.torch_ops")
            module.flash_attn_func(q, k, v, block_sparse_tensors=BlockSparseTensors(**given))
    assert (FLEX[name] if door == "flex" else name) in str(raised.value)
