"""FlashAttention 4's block lists of packed sequences, against the dense mask that they stand for."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest
from flex_reference import check, kept_by_lists
from problems import offsets, pages

HEADS, D, SIZE = 4, 32, (16, 32)
LENGTHS = [(40, 90), (1, 17), (0, 33), (70, 200)]
CU_Q, CU_K = (offsets([x[i] for x in LENGTHS]) for i in range(2))
USED = np.array([n for _, n in LENGTHS], np.int32)


def near(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (q_idx * 2 + 30 >= kv_idx) | (kv_idx % 7 == h_idx)


def kinds_of(rng, heads, keys=None):
    """For each sequence (heads, query blocks, key blocks): 0 not listed, 1 asks the mask function, 2 keeps all."""
    blocks = [(-(-rows // SIZE[0]), -(-(keys or own) // SIZE[1])) for rows, own in LENGTHS]
    return [rng.integers(0, 3, (heads, *shape)) for shape in blocks]


def packed(rng, kinds, full=True, with_offsets=True):
    """Lists as FlashAttention 4 has them; what lies past a count is out of range."""
    fields = {}
    for kind, name in ((1, "mask"), (2, "full")):
        counts = [(x == kind).sum(-1).astype(np.int32) for x in kinds]
        indices = []
        for x in kinds:
            rows = np.full(x.shape, 2**30, np.int32)
            for place in np.ndindex(x.shape[:2]):
                found = rng.permutation(np.flatnonzero(x[place] == kind))
                rows[(*place, slice(0, len(found)))] = found
            indices.append(rows.reshape(len(x), -1))
        fields[f"{name}_block_cnt"], fields[f"{name}_block_idx"] = np.hstack(counts), np.hstack(indices)
    if not full:
        fields.update(full_block_cnt=None, full_block_idx=None)
    starts = offsets([x.shape[1] * x.shape[2] for x in kinds]) if with_offsets else None
    fields |= {"cu_total_m_blocks": offsets([x.shape[1] for x in kinds]), "cu_block_idx_offsets": starts}
    return flashspark.BlockSparseTensors(**fields, block_size=SIZE)


def check_all(out, lse, q, ks, vs, kinds, mask_mod):
    for b, (rows, _) in enumerate(LENGTHS):
        at = slice(CU_Q[b], CU_Q[b] + rows)
        mask = mask_mod and (lambda b, h, q, k: mask_mod(b, h, q, k, None, None))
        keep = kept_by_lists(kinds[b][None], SIZE, mask, 1, HEADS, rows, len(ks[b]))
        tensors = (x.transpose(1, 0, 2)[None] for x in (q[at], ks[b], vs[b]))
        if rows:
            check(out[at].transpose(1, 0, 2)[None], *tensors, None, keep, lse=lse[None, :, at])


@pytest.fixture
def sequences(normal):
    def make(keys=None):
        q = normal(sum(n for n, _ in LENGTHS), HEADS, D)
        return q, *([normal(keys or n, 2, D) for _, n in LENGTHS] for _ in range(2))

    return make


@pytest.mark.parametrize("bounds", [(70, 200), (None, None), (99, 260)])
@pytest.mark.parametrize("mask_mod", [None, near])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_packed_keys(sequences, rng, heads, mask_mod, bounds):
    q, ks, vs = sequences()
    kinds = kinds_of(rng, heads)
    out, lse = flashspark.flash_attn_varlen_func(
        q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, *bounds, return_softmax_lse=True, mask_mod=mask_mod,
        block_sparse_tensors=packed(rng, kinds),
    )  # fmt: skip
    check_all(out, lse, q, ks, vs, kinds, mask_mod)


@pytest.mark.parametrize("function", ["flash_attn_varlen_func", "_flash_attn_fwd", "interface"])
def test_pages(sequences, rng, function):
    """Each sequence's key blocks are those of its own length."""
    q, ks, vs = sequences()
    k, v, table = pages(rng, ks, vs, 16)
    kinds = kinds_of(rng, 1)
    lists = {"block_sparse_tensors": packed(rng, kinds), "mask_mod": near}
    if function == "flash_attn_varlen_func":
        out, lse = flashspark.flash_attn_varlen_func(
            q, k, v, CU_Q, None, 70, 200, block_table=table, seqused_k=USED, return_softmax_lse=True, **lists
        )
    elif function == "interface":
        from flashspark.interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=CU_Q, seqused_k=USED, page_table=table, return_lse=True, **lists
        )
    else:
        out, lse = flashspark._flash_attn_fwd(
            q, k, v, cu_seqlens_q=CU_Q, seqused_k=USED, page_table=table, return_lse=True, **lists
        )
    check_all(out, lse, q, ks, vs, kinds, near)


@pytest.mark.parametrize("full", [False, True])
def test_keys_of_one_length_need_no_offsets(sequences, rng, full):
    q, ks, vs = sequences(keys=130)
    kinds = kinds_of(rng, HEADS, keys=130)
    kinds = kinds if full else [np.minimum(x, 1) for x in kinds]
    out, lse = flashspark.flash_attn_varlen_func(
        q, np.stack(ks), np.stack(vs), CU_Q, None, 70, None, return_softmax_lse=True, mask_mod=near,
        block_sparse_tensors=packed(rng, kinds, full, with_offsets=False),
    )  # fmt: skip
    check_all(out, lse, q, ks, vs, kinds, near)


def test_torch_under_compile(sequences, rng):
    torch = pytest.importorskip("torch")
    from flashspark import torch_ops

    q, ks, vs = sequences()
    kinds = kinds_of(rng, HEADS)
    lists = packed(rng, kinds)
    lists = lists._replace(
        **{name: torch.from_numpy(x) for name, x in lists._asdict().items() if isinstance(x, np.ndarray)}
    )
    args = [torch.from_numpy(x) for x in (q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K)]
    options = {"return_softmax_lse": True, "mask_mod": near, "block_sparse_tensors": lists}
    torch._dynamo.reset()
    compiled = torch.compile(torch_ops.flash_attn_varlen_func, fullgraph=True, backend="eager")
    for function in (flashspark.flash_attn_varlen_func, torch_ops.flash_attn_varlen_func, compiled):
        out, lse = function(*args, 70, 200, **options)
        check_all(out.numpy(), lse.numpy(), q, ks, vs, kinds, near)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"cu_total_m_blocks": CU_Q[:-1]}, ValueError, r"cu_total_m_blocks\.shape = \(4,\): must be \(5\)"),
        ({"cu_total_m_blocks": CU_Q.astype(np.int64)}, TypeError, r"cu_total_m_blocks\.dtype = int64: must be int32"),
        ({"cu_block_idx_offsets": None}, ValueError, "cu_block_idx_offsets = None: must be given with cu_seqlens_k"),
        ({"cu_block_idx_offsets": CU_Q[:2]}, ValueError, r"cu_block_idx_offsets\.shape = \(2,\)"),
        (
            {"mask_block_cnt": np.ones((1, 1, 9), np.int32)},
            ValueError,
            r"mask_block_cnt\.shape = \(1, 1, 9\): must be \(any, any\)",
        ),
        (
            {"mask_block_idx": np.ones((2, 30), np.int32)},
            ValueError,
            r"mask_block_idx\.shape = \(2, 30\): must be \(1, any\)",
        ),
        ({"mask_block_idx": np.ones((1, 0), np.int32)}, ValueError, r"mask_block_idx\.shape = \(1, 0\)"),
        ({"mask_block_cnt": np.ones((1, 9), np.float32)}, TypeError, r"mask_block_cnt\.dtype = float32: must be int32"),
        ({"full_block_cnt": None}, ValueError, "full_block_cnt and full_block_idx: must be given together"),
        ({"block_size": (16, 0)}, ValueError, r"block_size = \(16, 0\)"),
        ({"block_size": (16, 40)}, ValueError, r"block_size"),
    ],
)
def test_errors(sequences, rng, changes, error, match):
    q, ks, vs = sequences()
    lists = packed(rng, kinds_of(rng, 1))._replace(**changes)
    with pytest.raises(error, match=match):
        flashspark.flash_attn_varlen_func(
            q, np.concatenate(ks), np.concatenate(vs), CU_Q, CU_K, 70, 200, block_sparse_tensors=lists
        )
