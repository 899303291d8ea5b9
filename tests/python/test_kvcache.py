"""flash_attn_with_kvcache and append_kv against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from flashspark import append_kv, flash_attn_with_kvcache
from problems import offsets, pages
from reference import Options, attend_dense, attend_varlen, close, rotate, wide

SEQLENS = np.array([5, 0, 31, 64], np.int32)


def dense_cache(normal, dtype, rows=4, capacity=80, hkv=2, d=32):
    return normal(rows, capacity, hkv, d, dtype=dtype), normal(rows, capacity, hkv, d, dtype=dtype)


def parts(cache, seqlens, rows=None):
    return [cache[b if rows is None else rows[b]][:n] for b, n in enumerate(seqlens)]


def want_each(q, ks, vs, option=None):
    """Dense q over sequences of different lengths."""
    outs = [attend_dense(q[b : b + 1], ks[b][None], vs[b][None], option or Options())[0] for b in range(len(q))]
    return np.concatenate(outs)


@pytest.mark.parametrize("causal", [False, True])
def test_reading_a_dense_cache(normal, dtype, causal):
    k_cache, v_cache = dense_cache(normal, dtype)
    q = normal(4, 3, 4, 32, dtype=dtype)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=SEQLENS, causal=causal, return_softmax_lse=True
    )
    close(out, want_each(q, parts(k_cache, SEQLENS), parts(v_cache, SEQLENS), Options(causal=causal)))
    assert lse.shape == (4, 4, 3) and (lse[1] == -np.inf).all()


def test_lengths_as_a_number_or_absent(normal):
    k_cache, v_cache = dense_cache(normal, np.float32)
    q = normal(4, 1, 4, 32)
    np.testing.assert_array_equal(
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=40),
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=np.full(4, 40, np.int32)),
    )
    np.testing.assert_array_equal(
        flash_attn_with_kvcache(q, k_cache, v_cache),
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=80),
    )


def test_rows_of_a_larger_cache(normal):
    k_cache, v_cache = dense_cache(normal, np.float32, rows=9)
    rows = np.array([8, 0, 3, 3], np.int32)
    q = normal(4, 2, 4, 32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=SEQLENS, cache_batch_idx=rows, causal=True)
    close(out, want_each(q, parts(k_cache, SEQLENS, rows), parts(v_cache, SEQLENS, rows), Options(causal=True)))


def test_left_padding(normal):
    k_cache, v_cache = dense_cache(normal, np.float32)
    k_cache[:, :3], v_cache[:, :3] = np.nan, np.nan
    seqlens, pad = np.array([5, 3, 31, 64], np.int32), np.array([3, 3, 10, 5], np.int32)
    q = normal(4, 2, 4, 32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, cache_leftpad=pad, causal=True)
    ks = [k_cache[b, pad[b] : n] for b, n in enumerate(seqlens)]
    vs = [v_cache[b, pad[b] : n] for b, n in enumerate(seqlens)]
    close(out, want_each(q, ks, vs, Options(causal=True)))


@pytest.mark.parametrize("paged", [False, True])
def test_append(normal, rng, dtype, paged):
    k_cache, v_cache = dense_cache(normal, dtype)
    old_k, old_v = parts(k_cache, SEQLENS), parts(v_cache, SEQLENS)
    q, k, v = (normal(4, 6, h, 32, dtype=dtype) for h in (4, 2, 2))
    ks = [np.concatenate([old_k[b], k[b]]) for b in range(4)]
    vs = [np.concatenate([old_v[b], v[b]]) for b in range(4)]
    table = None
    for b, n in enumerate(SEQLENS):
        k_cache[b, n : n + 6], v_cache[b, n : n + 6] = np.nan, np.nan
    if paged:
        room = [np.concatenate([x, np.full((6, 2, 32), np.nan, dtype)]) for x in old_k]
        room_v = [np.concatenate([x, np.full((6, 2, 32), np.nan, dtype)]) for x in old_v]
        k_cache, v_cache, table = pages(rng, room, room_v, 16)
    before = wide(k_cache).copy()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=SEQLENS, block_table=table, causal=True)
    close(out, want_each(q, ks, vs, Options(causal=True)))
    changed = ~((wide(k_cache) == before) | (np.isnan(wide(k_cache)) & np.isnan(before)))
    assert changed.sum() == k.size  # every new element and nothing else
    np.testing.assert_array_equal(SEQLENS, [5, 0, 31, 64])
    again = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=SEQLENS + 6, block_table=table, causal=True)
    np.testing.assert_array_equal(wide(again), wide(out))


def test_append_into_packed_pages_of_different_lengths(normal, rng, dtype):
    """Varlen prefill over a paged cache whose rows hold K and V, as in a serving engine."""
    new, old = [7, 1, 0, 20], [3, 40, 5, 0]
    make = lambda lengths: [normal(n, 2, 32, dtype=dtype) for n in lengths]  # noqa: E731
    old_k, old_v, new_k, new_v = make(old), make(old), make(new), make(new)
    full = [np.concatenate([a, np.zeros_like(b)]) for a, b in zip(old_k, new_k, strict=True)]
    full_v = [np.concatenate([a, np.zeros_like(b)]) for a, b in zip(old_v, new_v, strict=True)]
    k_pages, v_pages, table = pages(rng, full, full_v, 16)
    both = np.concatenate([k_pages, v_pages], axis=-1)
    q, cu = normal(sum(new), 4, 32, dtype=dtype), offsets(new)
    out, lse = flash_attn_with_kvcache(
        *(q, both[..., :32], both[..., 32:], np.concatenate(new_k), np.concatenate(new_v)),
        cache_seqlens=np.array(old, np.int32), block_table=table, cu_seqlens_q=cu, cu_seqlens_k_new=cu, max_seqlen_q=20,
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    ks = [np.concatenate(pair) for pair in zip(old_k, new_k, strict=True)]
    vs = [np.concatenate(pair) for pair in zip(old_v, new_v, strict=True)]
    want, want_lse = attend_varlen(q, ks, vs, cu, Options(causal=True))
    close(out, want)
    close(lse, want_lse, what="lse")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 32])
def test_rotary(normal, dtype, interleaved, causal, rotary_dim):
    k_cache, v_cache = dense_cache(normal, dtype)
    old_k, old_v = parts(k_cache, SEQLENS), parts(v_cache, SEQLENS)
    angle = np.arange(80)[:, None] / 10 ** np.linspace(0, 3, rotary_dim // 2)
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    q, k, v = (normal(4, 6, h, 32, dtype=dtype) for h in (4, 2, 2))
    q_before = wide(q).copy()
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=SEQLENS, causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    np.testing.assert_array_equal(wide(q), q_before)
    steps = np.arange(6)
    turned_q = np.stack([rotate(q[b], cos, sin, n + steps * causal, interleaved) for b, n in enumerate(SEQLENS)])
    turned_k = [rotate(k[b], cos, sin, n + steps, interleaved) for b, n in enumerate(SEQLENS)]
    ks = [np.concatenate([wide(old_k[b]), turned_k[b]]) for b in range(4)]
    vs = [np.concatenate([old_v[b], v[b]]) for b in range(4)]
    for b, n in enumerate(SEQLENS):
        close(k_cache[b, n : n + 6], turned_k[b], what="k_cache")
    close(out, want_each(turned_q, ks, vs, Options(causal=causal)))


def test_append_to_an_fp8_cache(normal):
    e4m3 = ml_dtypes.float8_e4m3fn
    k_cache, v_cache = np.zeros((2, 32, 2, 32), e4m3), np.zeros((2, 32, 2, 32), e4m3)
    k, v, q = (normal(2, 9, h, 32, dtype=ml_dtypes.bfloat16) for h in (2, 2, 4))
    k_scale, v_scale = np.full((2, 2), 0.02, np.float32), np.full((2, 2), 0.01, np.float32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, k_descale=k_scale, v_descale=v_scale)
    want = (wide(k) / np.float32(0.02)).astype(np.float32).astype(e4m3)
    close(k_cache[:, :9], wide(want), what="k_cache")
    close(out, attend_dense(q, wide(k_cache[:, :9]) * 0.02, wide(v_cache[:, :9]) * 0.01)[0], dtype="bfloat16")


def test_append_kv_alone(normal):
    k_cache, v_cache = np.zeros((2, 16, 2, 32), np.float32), np.zeros((2, 16, 2, 32), np.float32)
    k, v = normal(2, 3, 2, 32), normal(2, 3, 2, 32)
    assert append_kv(k, v, k_cache, v_cache) is None
    assert append_kv(k, v, k_cache, v_cache, np.array([3, 13], np.int32)) is None
    np.testing.assert_array_equal(k_cache[0, :6], np.concatenate([k[0], k[0]]))
    np.testing.assert_array_equal(v_cache[1, 13:], v[1])
    assert (k_cache[0, 6:] == 0).all() and (k_cache[1, 3:13] == 0).all()


def slot_caches(normal, dtype, layout):
    """Five pages of seven rows, two heads of 32, for K and V, and the memory that contains them."""
    if layout == "packed":
        both = normal(5, 7, 2, 64, dtype=dtype)
        return both[..., :32], both[..., 32:], both
    if layout == "heads first":
        both = normal(2, 5, 2, 7, 32, dtype=dtype)
        return both[0].swapaxes(1, 2), both[1].swapaxes(1, 2), both
    both = normal(5, 2, 7, 2, 32, dtype=dtype)
    return both[:, 0], both[:, 1], both


@pytest.mark.parametrize("layout", ["packed", "heads first", "planes"])
def test_slot_mapping(normal, rng, dtype, layout):
    k_cache, v_cache, memory = slot_caches(normal, dtype, layout)
    k, v = normal(15, 2, 32, dtype=dtype), normal(15, 2, 32, dtype=dtype)  # more rows than slots, as in vLLM
    slots = rng.permutation(35)[:12]
    slots[[0, 5, 11]] = -1
    kept = slots >= 0
    want = memory.copy()
    at = np.ndarray(k_cache.shape, dtype, want, k_cache.ctypes.data - memory.ctypes.data, k_cache.strides)
    at[slots[kept] // 7, slots[kept] % 7] = k[:12][kept]
    at = np.ndarray(v_cache.shape, dtype, want, v_cache.ctypes.data - memory.ctypes.data, v_cache.strides)
    at[slots[kept] // 7, slots[kept] % 7] = v[:12][kept]
    assert append_kv(k, v, k_cache, v_cache, slot_mapping=slots) is None
    np.testing.assert_array_equal(memory, want)
    append_kv(k, v, k_cache, v_cache, slot_mapping=slots[:0])
    np.testing.assert_array_equal(memory, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_slot_mapping_with_rotary(normal, rng, dtype, interleaved):
    """vLLM's layout: cos and sin are halves of one table, and rows beyond the slots are padding."""
    k_cache, v_cache = np.zeros((5, 7, 2, 32), dtype), np.zeros((5, 7, 2, 32), dtype)
    q, k, v = (normal(15, h, 32, dtype=dtype) for h in (4, 2, 2))
    angle = np.arange(80)[:, None] / 10 ** np.linspace(0, 3, 8)
    cos, sin = np.split(np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(dtype), 2, -1)
    slots, positions = rng.permutation(35)[:12], rng.integers(0, 80, 15)
    slots[[0, 5, 11]] = -1
    kept = slots >= 0
    turned_q, turned_k = (rotate(x[:12], cos, sin, positions[:12], interleaved) for x in (q, k))
    rest = q[12:].copy()
    append_kv(
        k, v, k_cache, v_cache, q=q, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, slot_mapping=slots,
        rotary_positions=positions,
    )  # fmt: skip
    step = {"float32": 1e-6, "float16": 1e-3}.get(np.dtype(dtype).name, 8e-3)
    np.testing.assert_allclose(wide(k_cache).reshape(35, 2, 32)[slots[kept]], turned_k[kept], step, step)
    np.testing.assert_array_equal(v_cache.reshape(35, 2, 32)[slots[kept]], v[:12][kept])
    np.testing.assert_allclose(wide(q[:12]), turned_q, step, step)
    np.testing.assert_array_equal(q[12:], rest)
    assert not wide(np.delete(k_cache.reshape(35, 2, 32), slots[kept], 0)).any()


def test_slot_mapping_to_an_fp8_cache(normal):
    e4m3 = ml_dtypes.float8_e4m3fn
    k_cache, v_cache = np.zeros((3, 16, 2, 32), e4m3), np.zeros((3, 16, 2, 32), e4m3)
    k, v = normal(4, 2, 32, dtype=ml_dtypes.bfloat16), normal(4, 2, 32, dtype=ml_dtypes.bfloat16)
    slots = np.array([17, -1, 0, 47])
    k_scale, v_scale = np.array(0.5, np.float32), np.array([[0.25, 2]], np.float32)  # of all heads, of each
    append_kv(k, v, k_cache, v_cache, slot_mapping=slots, k_descale=k_scale, v_descale=v_scale)
    want_k, want_v = np.zeros((48, 2, 32), np.float32), np.zeros((48, 2, 32), np.float32)
    want_k[slots[[0, 2, 3]]] = (wide(k) / 0.5)[[0, 2, 3]]
    want_v[slots[[0, 2, 3]]] = (wide(v) / v_scale[0][:, None])[[0, 2, 3]]
    np.testing.assert_array_equal(wide(k_cache).reshape(48, 2, 32), wide(want_k.astype(e4m3)))
    np.testing.assert_array_equal(wide(v_cache).reshape(48, 2, 32), wide(want_v.astype(e4m3)))


def test_explain_writes_nothing(normal):
    k_cache, v_cache = dense_cache(normal, np.float32)
    before = k_cache.copy()
    q, k, v = (normal(4, 6, h, 32) for h in (4, 2, 2))
    text = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=SEQLENS, explain=True)
    assert "cpu-engine" in text
    np.testing.assert_array_equal(k_cache, before)


@pytest.mark.parametrize(
    "bad",
    [
        dict(window_size=(1.5, 0)),
        dict(softcap=-1.0),
        dict(softmax_scale=float("nan")),
        dict(sinks=np.zeros(3, np.float32)),
        dict(cache_seqlens=np.array([5, 0, 31, 75], np.int32)),
        dict(k=np.zeros((4, 6, 2, 40), np.float32)),
        dict(implementation="no-such-thing"),
    ],
)
def test_bad_arguments_write_nothing(normal, bad):
    k_cache, v_cache = dense_cache(normal, np.float32)
    before = k_cache.copy(), v_cache.copy()
    q, k, v = (normal(4, 6, h, 32) for h in (4, 2, 2))
    with pytest.raises((ValueError, TypeError)):
        flash_attn_with_kvcache(q, k_cache, v_cache, **{"k": k, "v": v, "cache_seqlens": SEQLENS, **bad})
    np.testing.assert_array_equal(k_cache, before[0])
    np.testing.assert_array_equal(v_cache, before[1])
