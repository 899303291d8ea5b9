"""flash_attn_varlen_func against float64, contiguous and paged."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from flashspark import flash_attn_varlen_func
from problems import offsets, pages
from reference import Options, attend_varlen, close, wide

LENGTHS = [(1, 41), (17, 17), (0, 5), (30, 90), (3, 0), (9, 4)]


def problem(normal, dtype, lengths=LENGTHS, hq=4, hkv=2, d=32, dv=None):
    q = normal(sum(n for n, _ in lengths), hq, d, dtype=dtype)
    ks = [normal(n, hkv, d, dtype=dtype) for _, n in lengths]
    vs = [normal(n, hkv, dv or d, dtype=dtype) for _, n in lengths]
    return q, ks, vs, offsets([n for n, _ in lengths]), offsets([n for _, n in lengths])


@pytest.mark.parametrize("causal", [False, True])
def test_contiguous(normal, dtype, causal):
    q, ks, vs, cu_q, cu_k = problem(normal, dtype, dv=48)
    k, v = np.concatenate(ks), np.concatenate(vs)
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 90, causal=causal, return_softmax_lse=True)
    want, want_lse = attend_varlen(q, ks, vs, cu_q, Options(causal=causal))
    assert out.shape == (60, 4, 48) and lse.shape == (4, 60)
    close(out, want)
    close(lse, want_lse, what="lse")


def test_bounds_may_be_left_to_the_shapes_or_be_generous(normal):
    q, ks, vs, cu_q, cu_k = problem(normal, np.float32)
    k, v = np.concatenate(ks), np.concatenate(vs)
    want = attend_varlen(q, ks, vs, cu_q)[0]
    close(flash_attn_varlen_func(q, k, v, cu_q, cu_k, None, None), want)
    close(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 10_000, 1_000_000), want)


@pytest.mark.parametrize("page_size", [16, 48, 784])
@pytest.mark.parametrize("causal", [False, True])
def test_paged(normal, rng, dtype, page_size, causal):
    q, ks, vs, cu_q, cu_k = problem(normal, dtype)
    k_cache, v_cache, table = pages(rng, ks, vs, page_size)
    used = np.diff(cu_k).astype(np.int32)
    want, want_lse = attend_varlen(q, ks, vs, cu_q, Options(causal=causal))
    got, lse = flash_attn_varlen_func(
        *(q, k_cache, v_cache, cu_q, None, 30, 90),
        block_table=table, seqused_k=used, causal=causal, return_softmax_lse=True,
    )  # fmt: skip
    close(got, want)
    close(lse, want_lse, what="lse")
    # flash-attention's own spelling: the lengths come from cu_seqlens_k
    again = flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 30, 90, block_table=table, causal=causal)
    np.testing.assert_array_equal(wide(again), wide(got))


def test_page_table_with_wide_rows(normal, rng):
    q, ks, vs, cu_q, cu_k = problem(normal, np.float32)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    wider = np.full((len(table), 100), -7, np.int32)
    wider[:, 3 : 3 + table.shape[1]] = table
    view = wider[:, 3 : 3 + table.shape[1]]
    close(
        flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 30, 90, block_table=view),
        attend_varlen(q, ks, vs, cu_q)[0],
    )


@pytest.mark.parametrize("layout", ["packed", "packed heads first", "one plane", "layers"])
def test_cache_layouts(normal, rng, dtype, layout):
    q, ks, vs, cu_q, cu_k = problem(normal, dtype)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    n, p, h, d = k_cache.shape
    if layout == "packed":  # (pages, tokens, heads, 2 D): V lies behind K in every row
        both = np.concatenate([k_cache, v_cache], axis=-1)
        k_view, v_view = both[..., :d], both[..., d:]
    elif layout == "packed heads first":  # physically (pages, heads, tokens, 2 D)
        both = np.ascontiguousarray(np.concatenate([k_cache, v_cache], axis=-1).transpose(0, 2, 1, 3)).transpose(
            0, 2, 1, 3
        )
        k_view, v_view = both[..., :d], both[..., d:]
    elif layout == "one plane":  # (pages, 2, tokens, heads, D)
        both = np.stack([k_cache, v_cache], axis=1)
        k_view, v_view = both[:, 0], both[:, 1]
    else:  # all layers of a page together
        both = np.zeros((n, 3, 2, p, h, d), dtype)
        both[:, 1, 0], both[:, 1, 1] = k_cache, v_cache
        k_view, v_view = both[:, 1, 0], both[:, 1, 1]
    assert np.shares_memory(k_view, both) and np.shares_memory(v_view, both)
    out = flash_attn_varlen_func(q, k_view, v_view, cu_q, cu_k, 30, 90, block_table=table, causal=True)
    close(out, attend_varlen(q, ks, vs, cu_q, Options(causal=True))[0])


def test_fp8_cache(normal, rng):
    e4m3 = ml_dtypes.float8_e4m3fn
    q, ks, vs, cu_q, cu_k = problem(normal, ml_dtypes.bfloat16)
    ks, vs = [x.astype(e4m3) for x in ks], [x.astype(e4m3) for x in vs]
    k_cache, v_cache, table = pages(rng, ks, vs, 32)
    per_head = np.broadcast_to(np.array([0.5, 2.0], np.float32), (len(ks), 2))  # strides (0, 1)
    per_tensor = np.broadcast_to(np.float32(1.25), (len(ks), 2))  # strides (0, 0)
    got = flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_q,
        cu_k,
        30,
        90,
        block_table=table,
        causal=True,
        k_descale=per_head,
        v_descale=per_tensor,
    )
    close(got, attend_varlen(q, ks, vs, cu_q, Options(causal=True, k_descale=[0.5, 2.0], v_descale=1.25))[0])


def test_everything_at_once(normal, rng, dtype):
    """Window, softcap, sinks and bias over shuffled pages, with seqused_q and seqused_k."""
    q, ks, vs, cu_q, cu_k = problem(normal, dtype)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    sinks, bias = normal(4, dtype=dtype), normal(60, 4, 24, dtype=dtype)
    out, lse = flash_attn_varlen_func(
        *(q, k_cache, v_cache, cu_q, cu_k, 30, 90),
        block_table=table, causal=True, window_size=(20, 0), softcap=5.0, sinks=sinks, rel_logits=bias,
        return_softmax_lse=True, num_splits=3,
    )  # fmt: skip
    common = dict(causal=True, left=20, right=0, softcap=5.0, sinks=sinks)
    each = [Options(**common, rel_logits=bias[cu_q[b] : cu_q[b + 1]]) for b in range(len(ks))]
    want, want_lse = attend_varlen(q, ks, vs, cu_q, each)
    close(out, want)
    close(lse, want_lse, what="lse")


def test_masks_of_prefixes(normal, rng):
    q, ks, vs, cu_q, cu_k = problem(normal, np.float32)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    run = lambda **kw: flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 30, 90, block_table=table, **kw)  # noqa: E731
    ranges = np.full((len(ks), 2, 2), -1, np.int32)
    ranges[1, 0], ranges[3, 0], ranges[3, 1] = (2, 9), (60, 70), (75, 89)
    each = [Options(causal=True, ranges=r.tolist()) for r in ranges]
    close(run(causal=True, prefix_ranges=ranges), attend_varlen(q, ks, vs, cu_q, each)[0])
    per_query = np.full((60, 2), -1, np.int32)
    per_query[3:10] = (2, 12)
    each = [Options(causal=True, query_ranges=per_query[cu_q[b] : cu_q[b + 1]]) for b in range(len(ks))]
    close(run(causal=True, prefix_ranges=per_query), attend_varlen(q, ks, vs, cu_q, each)[0])
    lens = np.array([3, 0, 0, 20, 0, 2], np.int32)
    each = [Options(rswa_window=6, prefix_len=int(n)) for n in lens]
    close(run(causal=True, rswa_prefix_lens=lens, rswa_window=6), attend_varlen(q, ks, vs, cu_q, each)[0])
    flags = np.array([1, 0, 1, 0, 1, 1], np.int32)
    each = [Options(causal=bool(f)) for f in flags]
    close(run(causal_per_seq=flags), attend_varlen(q, ks, vs, cu_q, each)[0])


def test_padded_rows_change_nothing(normal, rng):
    """Padding of a captured graph: repeated offsets, stale lengths and page numbers, rows of no sequence."""
    q, ks, vs, cu_q, cu_k = problem(normal, np.float32)
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    used = np.diff(cu_k).astype(np.int32)
    want = flash_attn_varlen_func(q, k_cache, v_cache, cu_q, None, 30, 90, block_table=table, seqused_k=used)
    padded = flash_attn_varlen_func(
        np.concatenate([q, np.full((5, 4, 32), np.nan, np.float32)]),
        *(k_cache, v_cache, np.concatenate([cu_q, [60, 60]]).astype(np.int32), None, 30, 90),
        block_table=np.concatenate([table, np.full((2, table.shape[1]), 2**31 - 1, np.int32)]),
        seqused_k=np.concatenate([used, [99999, -5]]).astype(np.int32),
        out=(out := np.full((65, 4, 32), 7, np.float32)),
    )
    assert padded is out and (out[60:] == 7).all()
    np.testing.assert_array_equal(out[:60], want)


def test_dense_queries_of_one_sequence_equal_flash_attn_func(normal):
    from flashspark import flash_attn_func

    q, k, v = normal(1, 20, 4, 32), normal(1, 33, 2, 32), normal(1, 33, 2, 32)
    one = flash_attn_func(q, k, v, causal=True)[0]
    other = flash_attn_varlen_func(q[0], k[0], v[0], offsets([20]), offsets([33]), 20, 33, causal=True)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
