"""Every bad argument raises the right exception, which names it, its value and the rule; nothing is written."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from flashspark import append_kv, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from problems import offsets

F = np.float32


def z(*shape, dtype=F):
    return np.zeros(shape, dtype)


def i32(*values):
    return np.array(values, np.int32)


def gap(*shape):
    """An array whose last dimension has stride 2."""
    return np.zeros((*shape[:-1], 2 * shape[-1]), F)[..., ::2]


Q, K = z(2, 5, 4, 32), z(2, 9, 2, 32)

# (arguments that differ from a valid call, exception, text of the message)
DENSE = [
    (dict(q=None), TypeError, "q = None"),
    (dict(q=[1, 2]), TypeError, "q = "),
    (dict(v="text"), TypeError, "v = "),
    (dict(k=3.0), TypeError, "k = a float"),
    (dict(q=z(5, 4, 32)), ValueError, "q.shape = (5, 4, 32)"),
    (dict(k=z(9, 2), v=z(9, 2)), ValueError, "k.shape = (9, 2)"),
    (dict(k=z(3, 9, 2, 32), v=z(3, 9, 2, 32)), ValueError, "k.shape[0] = 3"),
    (dict(v=z(2, 8, 2, 32)), ValueError, "v.shape[1] = 8"),
    (dict(v=z(2, 9, 1, 32)), ValueError, "v.shape[2] = 1"),
    (dict(k=z(2, 9, 2, 40)), ValueError, "k.shape[3] = 40"),
    (dict(k=z(2, 9, 3, 32), v=z(2, 9, 3, 32)), ValueError, "= 3"),
    (dict(k=z(2, 9, 0, 32), v=z(2, 9, 0, 32)), ValueError, "k.shape[-2] = 0"),
    (dict(q=z(2, 5, 4, 12), k=z(2, 9, 2, 12), strict=True), ValueError, "q.shape[-1] = 12"),
    (dict(q=z(2, 5, 4, 0), k=z(2, 9, 2, 0)), ValueError, "q.shape[-1] = 0"),
    (dict(q=z(2, 5, 4, 513), k=z(2, 9, 2, 513)), ValueError, "q.shape[-1] = 513"),
    (dict(v=z(2, 9, 2, 520), out=None), ValueError, "v.shape[-1] = 520"),
    (dict(q=gap(2, 5, 4, 32), strict=True), ValueError, "q.stride(-1) = 2"),
    (dict(k=gap(2, 9, 2, 32), strict=True), ValueError, "k.stride(-1) = 2"),
    (dict(q=z(2, 5, 4, 32, dtype=np.float64)), TypeError, "q.dtype = float64"),
    (dict(k=z(2, 9, 2, 32, dtype=np.int8)), TypeError, "k.dtype = int8"),
    (dict(v=z(2, 9, 2, 32, dtype=bool)), TypeError, "v.dtype = bool"),
    (dict(v=z(2, 9, 2, 32, dtype=np.complex64)), TypeError, "v.dtype"),
    (dict(k=z(2, 9, 2, 32, dtype=">f4")), TypeError, "k.dtype = >f4"),
    (dict(k=z(2, 9, 2, 32, dtype=object)), TypeError, "k.dtype = object"),
    (dict(q=z(2, 5, 4, 32, dtype=ml_dtypes.float8_e5m2)), TypeError, "q.dtype = float8_e5m2"),
    (dict(k=z(2, 9, 2, 32, dtype=np.float16), v=z(2, 9, 2, 32, dtype=np.float16)), TypeError, "k.dtype = float16"),
    (dict(v=z(2, 9, 2, 32, dtype=ml_dtypes.bfloat16)), TypeError, "v.dtype = bfloat16"),
    (dict(dropout_p=1.0), ValueError, "dropout_p = 1:"),
    (dict(dropout_p=1 - 1e-9), ValueError, "dropout_p = 1:"),
    (dict(dropout_p=-0.5), ValueError, "dropout_p = -0.5"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p = nan"),
    (dict(dropout_p="x"), TypeError, "dropout_p = a str"),
    (dict(dropout_p=0.5, rng_state=np.zeros(3, np.int64)), ValueError, "rng_state.shape[0] = 3"),
    (dict(dropout_p=0.5, rng_state=np.zeros((1, 2), np.int64)), ValueError, "rng_state.shape = (1, 2)"),
    (dict(dropout_p=0.5, rng_state=np.zeros(4, np.int64)[::2]), ValueError, "rng_state.stride(0) = 2"),
    (dict(dropout_p=0.5, rng_state=i32(1, 2)), TypeError, "rng_state.dtype = int32"),
    (dict(dropout_p=0.5, rng_state=z(2)), TypeError, "rng_state.dtype = float32"),
    (dict(rng_state=i32(1, 2)), TypeError, "rng_state.dtype = int32"),
    (dict(dropout_p=0.5, rng_state=5), TypeError, "rng_state = an int"),
    (dict(dropout_p=0.5, rng_state=(1, 2, 3)), ValueError, "rng_state = 3 values"),
    (dict(dropout_p=0.5, rng_state=(1, 2.0)), TypeError, "rng_state[1] = a float"),
    (dict(dropout_p=0.5, rng_state=(2**63, 0)), ValueError, "rng_state[0] = 9223372036854775808"),
    (dict(softmax_scale=float("nan")), ValueError, "softmax_scale = nan"),
    (dict(softmax_scale=-1.0), ValueError, "softmax_scale = -1"),
    (dict(softmax_scale="x"), TypeError, "softmax_scale = a str"),
    (dict(softcap=-2.0), ValueError, "softcap = -2"),
    (dict(softcap=float("inf")), ValueError, "softcap = inf"),
    (dict(causal=2), ValueError, "causal = 2"),
    (dict(causal=z(2)), TypeError, "causal = a tensor"),
    (dict(window_size=3), ValueError, "window_size = 3"),
    (dict(window_size=(1, 2, 3)), ValueError, "window_size = (1, 2, 3)"),
    (dict(window_size="ab"), ValueError, "window_size = 'ab'"),
    (dict(window_size=(True, 0)), TypeError, "window_size[0] = a bool"),
    (dict(window_size=(1.5, 0)), TypeError, "window_size[0] = a float"),
    (dict(num_splits=-1), ValueError, "num_splits = -1"),
    (dict(num_splits=2**40), ValueError, "num_splits = 1099511627776"),
    (dict(num_threads=-3), ValueError, "num_threads = -3"),
    (dict(implementation="cuda-magic"), ValueError, "cuda-magic"),
    (dict(implementation=7), TypeError, "implementation = an int"),
    (dict(out=z(2, 5, 4, 40)), ValueError, "out.shape[3] = 40"),
    (dict(out=z(5, 4, 32)), ValueError, "out.shape"),
    (dict(out=z(2, 5, 4, 32, dtype=np.int32)), TypeError, "out.dtype = int32"),
    (dict(out=gap(2, 5, 4, 32), strict=True), ValueError, "out.stride(-1) = 2"),
    (dict(out=np.broadcast_to(z(2, 5, 4, 32), (2, 5, 4, 32))), ValueError, "out = read-only"),
    (dict(lse=z(2, 4, 6)), ValueError, "lse.shape[2] = 6"),
    (dict(lse=z(2, 4, 5, dtype=np.float16)), TypeError, "lse.dtype = float16"),
    (dict(sinks=z(3)), ValueError, "sinks.shape[0] = 3"),
    (dict(sinks=z(4, dtype=np.int32)), TypeError, "sinks.dtype = int32"),
    (dict(sinks=np.array([0, np.nan, 0, 0], F)), ValueError, "sinks[1] = nan"),
    (dict(alibi_slopes=z(2)), ValueError, "alibi_slopes.shape[0] = 2"),
    (dict(alibi_slopes=z(3, 4)), ValueError, "alibi_slopes.shape[0] = 3"),
    (dict(alibi_slopes=np.full(4, np.inf, F)), ValueError, "alibi_slopes[0] = inf"),
    (dict(rel_logits=z(2, 5, 3, 8)), ValueError, "rel_logits.shape[2] = 3"),
    (dict(rel_logits=z(10, 4, 8)), ValueError, "rel_logits.shape"),
    (dict(seqused_k=i32(1)), ValueError, "seqused_k.shape[0] = 1"),
    (dict(seqused_k=i32(1, 10)), ValueError, "seqused_k[1] = 10"),
    (dict(seqused_k=i32(-1, 3)), ValueError, "seqused_k[0] = -1"),
    (dict(seqused_k=np.array([3, 3])), TypeError, "seqused_k.dtype = int64"),
    (dict(seqused_q=i32(0, 6)), ValueError, "seqused_q[1] = 6"),
    (dict(seqused_q=i32(1, 2, 3, 4)[::2]), ValueError, "seqused_q.stride(0) = 2"),
    (dict(causal_per_seq=i32(0, 2)), ValueError, "causal_per_seq[1] = 2"),
    (dict(prefix_ranges=z(2, 1, 3, dtype=np.int32)), ValueError, "prefix_ranges.shape[2] = 3"),
    (dict(prefix_ranges=z(9, 2, dtype=np.int32)), ValueError, "prefix_ranges.shape[0] = 9"),
    (dict(rswa_window=4), ValueError, "rswa_prefix_lens"),
    (dict(rswa_window=-4, rswa_prefix_lens=i32(0, 0)), ValueError, "rswa_window = -4"),
    (dict(output_scale=z(2)), ValueError, "output_scale.shape[0] = 2"),
    (dict(output_scale=z(1)), ValueError, "output_scale = 0"),
    (dict(q_descale=z(2, 2, dtype=np.float16)), TypeError, "q_descale.dtype = float16"),
    (dict(k_descale=z(3, 2)), ValueError, "k_descale.shape[0] = 3"),
]


@pytest.mark.parametrize(("change", "error", "text"), DENSE, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(DENSE)])
def test_dense(change, error, text):
    call = dict(q=Q, k=K, v=K, out=np.full(Q.shape, 7, F))
    if "output_scale" in change:
        call["out"] = None
    out = change.get("out", call["out"])
    with pytest.raises(error, match=re.escape(text)):
        flash_attn_func(**{**call, **change})
    assert out is not call["out"] or out is None or (out == 7).all()


PAGED = [
    (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q = None"),
    (dict(cu_seqlens_q=i32(0, 3, 8)[None]), ValueError, "cu_seqlens_q.shape"),
    (dict(cu_seqlens_q=np.array([0, 3, 8])), TypeError, "cu_seqlens_q.dtype = int64"),
    (dict(cu_seqlens_q=i32(0, 3, 9)), ValueError, "cu_seqlens_q[2] = 9"),
    (dict(cu_seqlens_q=i32(0, 9, 8)), ValueError, "cu_seqlens_q["),
    (dict(cu_seqlens_q=i32(-1, 3, 8)), ValueError, "cu_seqlens_q[0] = -1"),
    (dict(cu_seqlens_q=i32()), ValueError, "cu_seqlens_q.shape"),
    (dict(max_seqlen_q=4), ValueError, "cu_seqlens_q[2]"),
    (dict(max_seqlen_q=2.5), TypeError, "max_seqlen_q = a float"),
    (dict(block_table=i32(0, 1)), ValueError, "block_table.shape"),
    (dict(block_table=z(3, 2, dtype=np.int32)), ValueError, "block_table.shape[0] = 3"),
    (dict(block_table=z(2, 2, dtype=np.int64)), TypeError, "block_table.dtype = int64"),
    (dict(block_table=z(2, 4, dtype=np.int32)[:, ::2]), ValueError, "block_table.stride(-1) = 2"),
    (dict(block_table=i32(0, 5, 1, 2).reshape(2, 2)), ValueError, "block_table[0,1] = 5"),
    (dict(block_table=i32(0, -1, 1, 2).reshape(2, 2)), ValueError, "block_table[0,1] = -1"),
    (dict(seqused_k=i32(33, 0)), ValueError, "seqused_k[0] = 33"),
    (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q = -1"),
    (dict(max_seqlen_k=-3), ValueError, "max_seqlen_k = -3"),
    (dict(block_table=[[0, 1], [2, 3]]), TypeError, "block_table = a list"),
    (dict(cu_seqlens_k=np.array([0, 3, 8]), seqused_k=None), TypeError, "cu_seqlens_k.dtype = int64"),
    (dict(k=z(5, 0, 2, 32), v=z(5, 0, 2, 32)), ValueError, "k.shape[1] = 0"),
    (dict(k=z(9, 2, 32), v=z(9, 2, 32)), ValueError, "k.shape"),
    (dict(q=z(2, 4, 4, 32)), ValueError, "q.shape"),
]


@pytest.mark.parametrize(("change", "error", "text"), PAGED, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(PAGED)])
def test_paged(change, error, text):
    pages = z(5, 16, 2, 32)
    call = dict(
        q=z(8, 4, 32), k=pages, v=pages, cu_seqlens_q=i32(0, 3, 8), cu_seqlens_k=None, max_seqlen_q=5, max_seqlen_k=32,
        block_table=i32(0, 1, 2, 3).reshape(2, 2), seqused_k=i32(20, 32),
    )  # fmt: skip
    flash_attn_varlen_func(**call)
    with pytest.raises(error, match=re.escape(text)):
        flash_attn_varlen_func(**{**call, **change})


def test_varlen_keys():
    q, k = z(8, 4, 32), z(20, 2, 32)
    call = dict(cu_seqlens_q=i32(0, 3, 8), cu_seqlens_k=i32(0, 10, 20), max_seqlen_q=5, max_seqlen_k=10)
    flash_attn_varlen_func(q, k, k, **call)
    for change, text in (
        (dict(cu_seqlens_k=i32(0, 10, 21)), "cu_seqlens_k[2] = 21"),
        (dict(cu_seqlens_k=i32(0, 20)), "cu_seqlens_k.shape[0] = 2"),
        (dict(cu_seqlens_k=None), "k.shape"),
        (dict(max_seqlen_k=9), "cu_seqlens_k["),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            flash_attn_varlen_func(q, k, k, **{**call, **change})


CACHE = [
    (dict(k_cache=z(3, 16, 2, 32), v_cache=z(3, 16, 2, 32)), ValueError, "k_cache.shape[0] = 3"),
    (dict(v_cache=z(2, 16, 1, 32)), ValueError, "v_cache.shape[2] = 1"),
    (dict(k_cache=z(2, 16, 2, 32, dtype=np.float64)), TypeError, "k_cache.dtype = float64"),
    (dict(cache_seqlens=i32(3)), ValueError, "cache_seqlens.shape[0] = 1"),
    (dict(cache_seqlens=i32(3, 14)), ValueError, "cache_seqlens[1] = "),
    (dict(cache_seqlens=17), ValueError, "cache_seqlens[0] = "),
    (dict(cache_seqlens=None), ValueError, "cache_seqlens = None"),
    (dict(cache_seqlens=np.array([3, 3])), TypeError, "cache_seqlens.dtype = int64"),
    (dict(cache_batch_idx=i32(0, 2)), ValueError, "cache_batch_idx[1] = 2"),
    (dict(cache_batch_idx=i32(0, -1)), ValueError, "cache_batch_idx[1] = -1"),
    (dict(cache_leftpad=i32(0, -2)), ValueError, "cache_leftpad[1] = -2"),
    (dict(v=None), ValueError, "v = None"),
    (dict(k=z(2, 3, 2, 40)), ValueError, "k_cache.shape[3] = 32"),
    (dict(k=z(2, 3, 2, 32, dtype=np.float16)), TypeError, "v.dtype = float32"),
    (dict(k=z(3, 3, 2, 32), v=z(3, 3, 2, 32)), ValueError, "k_cache.shape[0] = 2"),
    (dict(rotary_cos=z(20, 4)), ValueError, "rotary_sin = None"),
    (dict(rotary_sin=z(20, 4)), ValueError, "rotary_cos = None"),
    (dict(rotary_cos=z(20, 4), rotary_sin=z(20, 5)), ValueError, "rotary_sin.shape[1] = 5"),
    (dict(rotary_cos=z(20, 20), rotary_sin=z(20, 20)), ValueError, "rotary_cos.shape[1] = 40"),
    (dict(rotary_cos=z(4, 4), rotary_sin=z(4, 4)), ValueError, "rotary_cos.shape[0] = 4"),
    (dict(k=None, v=None, rotary_cos=z(20, 4)), ValueError, "rotary_cos = given"),
    (dict(k=None, v=None, cu_seqlens_k_new=i32(0, 1, 2)), ValueError, "cu_seqlens_k_new = given"),
    (dict(q=z(3, 4, 4, 32), rotary_cos=z(20, 4), rotary_sin=z(20, 4)), ValueError, "k_cache.shape[0] = 2"),
    (dict(cache_seqlens=2**40), ValueError, "cache_seqlens = 1099511627776"),
    (dict(cache_seqlens=True), TypeError, "cache_seqlens = a bool"),
    (dict(cache_seqlens=[3, 4]), TypeError, "cache_seqlens = a list"),
    (dict(k=None, v=None, rotary_seqlens=i32(0, 0)), ValueError, "rotary_seqlens = given"),
]


@pytest.mark.parametrize(("change", "error", "text"), CACHE, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(CACHE)])
def test_kvcache(change, error, text):
    call = dict(
        q=z(2, 3, 4, 32), k_cache=z(2, 16, 2, 32), v_cache=z(2, 16, 2, 32), k=z(2, 3, 2, 32) + 1, v=z(2, 3, 2, 32) + 1,
        cache_seqlens=i32(3, 4),
    )  # fmt: skip
    call.update(change)
    with pytest.raises(error, match=re.escape(text)):
        flash_attn_with_kvcache(**call)
    assert (call["k_cache"] == 0).all() and (call["v_cache"] == 0).all()


i64 = lambda *x: np.array(x, np.int64)  # noqa: E731
TURN = dict(rotary_cos=z(20, 4), rotary_sin=z(20, 4), rotary_positions=i64(3, 19, 0))
SLOTS = [
    (dict(cache_seqlens=i32(1)), ValueError, "cache_seqlens = given"),
    (dict(cu_seqlens_k_new=i32(0, 3)), ValueError, "cu_seqlens_k_new = given"),
    (dict(block_table=np.zeros((1, 2), np.int32)), ValueError, "block_table = given"),
    (dict(cache_batch_idx=i32(0)), ValueError, "cache_batch_idx = given"),
    (dict(cache_leftpad=i32(0)), ValueError, "cache_leftpad = given"),
    (dict(rotary_cos=z(20, 4), rotary_sin=z(20, 4)), ValueError, "rotary_positions = None"),
    (dict(rotary_positions=i64(1, 2, 3)), ValueError, "rotary_positions = given"),
    (TURN | dict(rotary_positions=i64(1, 2)), ValueError, "rotary_positions.shape[0] = 2"),
    (TURN | dict(rotary_positions=i32(1, 2, 3)), TypeError, "rotary_positions.dtype = int32"),
    (TURN | dict(rotary_positions=i64(0, 0, 20)), ValueError, "rotary_positions[2] = 20"),
    (TURN | dict(rotary_positions=i64(0, -5, 0), q=z(3, 4, 32)), ValueError, "rotary_positions[1] = -5"),
    (TURN | dict(rotary_sin=z(20, 8)[:, :4]), ValueError, "rotary_sin.stride(0) = 8"),
    (TURN | dict(rotary_cos=np.broadcast_to(z(4), (20, 4))), ValueError, "rotary_cos.stride(0) = 0"),
    (dict(q=z(3, 4, 32)), ValueError, "q = given"),
    (dict(k=z(1, 3, 2, 32), v=z(1, 3, 2, 32)), ValueError, "k.shape = (1, 3, 2, 32)"),
    (dict(slot_mapping=i64(1, 2, 3, 4)), ValueError, "k.shape[0] = 3"),
    (dict(slot_mapping=i32(1, 2, 3)), TypeError, "slot_mapping.dtype = int32"),
    (dict(slot_mapping=i64(1, 2, 3)[None]), ValueError, "slot_mapping.shape = (1, 3)"),
    (dict(slot_mapping=i64(1, 2, 3, 4, 5)[::2]), ValueError, "slot_mapping.stride(0) = 2"),
    (dict(slot_mapping=i64(31, -1, 32)), ValueError, "slot_mapping[2] = 32"),
    (dict(k_descale=np.ones((3, 2), F)), ValueError, "k_descale.shape[0] = 3"),
    (dict(v_cache=z(2, 17, 2, 32)), ValueError, "v_cache.shape[1] = 17"),
]


@pytest.mark.parametrize(("change", "error", "text"), SLOTS, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(SLOTS)])
def test_slot_mapping(change, error, text):
    call = dict(
        k=z(3, 2, 32) + 1, v=z(3, 2, 32) + 1, k_cache=z(2, 16, 2, 32), v_cache=z(2, 16, 2, 32),
        slot_mapping=i64(5, -1, 31),
    )  # fmt: skip
    call.update(change)
    with pytest.raises(error, match=re.escape(text)):
        append_kv(**call)
    assert (call["k_cache"] == 0).all() and (call["v_cache"] == 0).all()


def test_read_only_cache():
    cache = z(2, 16, 2, 32)
    cache.flags.writeable = False
    flash_attn_with_kvcache(z(2, 3, 4, 32), cache, cache, cache_seqlens=5)  # reading is allowed
    with pytest.raises(ValueError, match="k_cache = read-only"):
        append_kv(z(2, 3, 2, 32), z(2, 3, 2, 32), cache, z(2, 16, 2, 32))


def test_strides_that_dlpack_cannot_say():
    odd = np.zeros(2 * 5 * 4 * 33 * 4, np.uint8)
    q = np.ndarray((2, 5, 4, 32), F, odd, strides=(5 * 4 * 129, 4 * 129, 129, 4))
    with pytest.raises(ValueError, match=r"q\.dtype = float32, strides"):
        flash_attn_func(q, K, K)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="colour"):
        flash_attn_func(Q, K, K, colour=1)
    assert offsets([1]).dtype == np.int32
