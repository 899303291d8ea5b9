"""flash_attn_func against float64: types, shapes, masks, biases, layouts."""

from __future__ import annotations

import flashspark
import ml_dtypes
import numpy as np
import pytest
from flashspark import flash_attn_func
from reference import Options, attend_dense, close, wide


def problem(normal, dtype, b=2, tq=37, tk=53, hq=4, hkv=2, d=64, dv=None):
    return (
        normal(b, tq, hq, d, dtype=dtype),
        normal(b, tk, hkv, d, dtype=dtype),
        normal(b, tk, hkv, dv or d, dtype=dtype),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", [None, "cpu-engine", "cpu-reference"])
def test_types(normal, dtype, causal, implementation):
    q, k, v = problem(normal, dtype)
    out, lse = flash_attn_func(q, k, v, causal=causal, implementation=implementation, return_softmax_lse=True)
    want, want_lse = attend_dense(q, k, v, Options(causal=causal))
    assert out.dtype == np.dtype(dtype) and lse.dtype == np.float32
    close(out, want)
    close(lse, want_lse, what="lse")


@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (8, 8), (8, 2), (7, 1), (12, 3)])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 300), (64, 64), (5, 130), (130, 5)])
def test_shapes(normal, hq, hkv, tq, tk):
    q, k, v = problem(normal, np.float32, tq=tq, tk=tk, hq=hq, hkv=hkv, d=32)
    out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    want, want_lse = attend_dense(q, k, v, Options(causal=True))
    close(out, want)
    close(lse, want_lse, what="lse")


@pytest.mark.parametrize(("d", "dv"), [(8, 8), (40, 24), (72, 80), (128, 128), (192, 128), (256, 512), (512, 64)])
def test_head_sizes(normal, dtype, d, dv):
    q, k, v = problem(normal, dtype, b=1, tq=9, tk=40, d=d, dv=dv)
    close(flash_attn_func(q, k, v), attend_dense(q, k, v)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (5, 0), (0, 7), (-1, 3), (16, -1), (9, 9), (1000, 1000)])
def test_windows(normal, causal, window):
    q, k, v = problem(normal, np.float32, tq=33, tk=47, d=32)
    out, lse = flash_attn_func(q, k, v, causal=causal, window_size=window, return_softmax_lse=True)
    want, want_lse = attend_dense(q, k, v, Options(causal=causal, left=window[0], right=window[1]))
    close(out, want)
    close(lse, want_lse, what="lse")


def test_window_spellings(normal):
    q, k, v = problem(normal, np.float32)
    want = flash_attn_func(q, k, v, window_size=(5, -1))
    for spelling in ((5, None), [5, -1], np.array([5, -1])):
        np.testing.assert_array_equal(flash_attn_func(q, k, v, window_size=spelling), want)
    np.testing.assert_array_equal(flash_attn_func(q, k, v, window_size=None), flash_attn_func(q, k, v))


def test_fully_masked_rows_are_zero(normal):
    q, k, v = problem(normal, np.float32, tq=20, tk=4)
    out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert (out[:, :16] == 0).all() and (lse[:, :, :16] == -np.inf).all()
    assert np.isfinite(lse[:, :, 16:]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scale_softcap_sinks(normal, dtype):
    q, k, v = problem(normal, dtype)
    sinks = normal(4, dtype=dtype) * dtype(2)
    out, lse = flash_attn_func(
        q, k, v, softmax_scale=0.3, softcap=4.0, sinks=sinks, causal=True, return_softmax_lse=True
    )
    want, want_lse = attend_dense(q, k, v, Options(softmax_scale=0.3, softcap=4.0, sinks=sinks, causal=True))
    close(out, want)
    close(lse, want_lse, what="lse")


def test_sink_of_a_fully_masked_row(normal):
    q, k, v = problem(normal, np.float32, tq=8, tk=4)
    sinks = normal(4)
    out, lse = flash_attn_func(q, k, v, causal=True, sinks=sinks, return_softmax_lse=True)
    assert (out[:, 0] == 0).all()
    np.testing.assert_allclose(lse[:, :, 0], np.broadcast_to(sinks, (2, 4)), rtol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi(normal, rng, batched, causal):
    q, k, v = problem(normal, np.float32)
    slopes = rng.uniform(0.01, 0.5, (2, 4) if batched else (4,)).astype(np.float32)
    each = [Options(alibi_slopes=slopes[b] if batched else slopes, causal=causal) for b in range(2)]
    close(flash_attn_func(q, k, v, alibi_slopes=slopes, causal=causal), attend_dense(q, k, v, each)[0])


@pytest.mark.parametrize("extent", [1, 16, 200])
def test_rel_logits(normal, dtype, extent):
    q, k, v = problem(normal, dtype)
    bias = normal(2, 37, 4, extent, dtype=dtype)
    out = flash_attn_func(q, k, v, rel_logits=bias, causal=True)
    close(out, attend_dense(q, k, v, [Options(rel_logits=bias[b], causal=True) for b in range(2)])[0])


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("left", [-1, 6])
def test_prefix_ranges_of_a_sequence(normal, clamp, left):
    q, k, v = problem(normal, np.float32, tq=40, tk=50)
    ranges = np.array([[[0, 20], [25, 44], [-1, -1]], [[12, 12], [9, 3], [30, 49]]], np.int32)
    out = flash_attn_func(q, k, v, causal=True, window_size=(left, -1), prefix_ranges=ranges, prefix_clamp_window=clamp)
    each = [Options(causal=True, left=left, clamp=clamp, ranges=ranges[b].tolist()) for b in range(2)]
    close(out, attend_dense(q, k, v, each)[0])


def test_prefix_ranges_of_a_query(normal):
    q, k, v = problem(normal, np.float32, tq=40, tk=50)
    ranges = np.full((2, 40, 2), -1, np.int32)
    ranges[0, 3:20] = (13, 29)
    ranges[1, 30:] = (40, 49)
    out = flash_attn_func(q, k, v, causal=True, prefix_ranges=ranges.reshape(80, 2))
    close(out, attend_dense(q, k, v, [Options(causal=True, query_ranges=ranges[b]) for b in range(2)])[0])


def test_rswa(normal):
    q, k, v = problem(normal, np.float32, tq=40, tk=60)
    lens = np.array([7, 0], np.int32)
    out = flash_attn_func(q, k, v, causal=True, rswa_prefix_lens=lens, rswa_window=9)
    close(out, attend_dense(q, k, v, [Options(rswa_window=9, prefix_len=int(n)) for n in lens])[0])


def test_causal_per_sequence(normal):
    q, k, v = problem(normal, np.float32)
    out = flash_attn_func(q, k, v, causal_per_seq=np.array([1, 0], np.int32))
    close(out, attend_dense(q, k, v, [Options(causal=True), Options(causal=False)])[0])


def test_lengths_in_use(normal):
    q, k, v = problem(normal, np.float32)
    k[0, 20:], v[0, 20:], k[1, 50:], v[1, 50:] = np.nan, np.nan, np.nan, np.nan
    out = np.full((2, 37, 4, 64), 7, np.float32)
    got = flash_attn_func(
        q, k, v, causal=True, seqused_q=np.array([30, 37], np.int32), seqused_k=np.array([20, 50], np.int32), out=out
    )
    assert got is out and (out[0, 30:] == 7).all()
    close(out[:1, :30], attend_dense(q[:1, :30], k[:1, :20], v[:1, :20], Options(causal=True))[0])
    close(out[1:], attend_dense(q[1:], k[1:, :50], v[1:, :50], Options(causal=True))[0])


@pytest.mark.parametrize("q_dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16])
def test_fp8(normal, rng, q_dtype):
    e4m3 = ml_dtypes.float8_e4m3fn
    q, k, v = normal(2, 20, 4, 64, dtype=q_dtype), normal(2, 50, 2, 64, dtype=e4m3), normal(2, 50, 2, 64, dtype=e4m3)
    scales = [rng.uniform(0.5, 2, (2, 2)).astype(np.float32) for _ in range(3)]
    out = flash_attn_func(q, k, v, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2], causal=True)
    assert out.dtype == (ml_dtypes.bfloat16 if q_dtype is e4m3 else q_dtype)
    one = np.ones(2)
    q_scale = scales[0] if q_dtype is e4m3 else np.stack([one, one])
    each = [Options(causal=True, q_descale=q_scale[b], k_descale=scales[1][b], v_descale=scales[2][b]) for b in (0, 1)]
    close(out, attend_dense(q, k, v, each)[0])


def test_fp8_scales_without_strides(normal):
    e4m3 = ml_dtypes.float8_e4m3fn
    q, k, v = normal(2, 8, 4, 64, dtype=e4m3), normal(2, 50, 2, 64, dtype=e4m3), normal(2, 50, 2, 64, dtype=e4m3)
    one = np.array([1.5], np.float32)
    want = flash_attn_func(q, k, v, k_descale=np.full((2, 2), 1.5, np.float32))
    for spelling in (np.broadcast_to(one, (2, 2)), one, one.reshape(())):
        np.testing.assert_array_equal(wide(flash_attn_func(q, k, v, k_descale=spelling)), wide(want))


def test_fp8_result(normal):
    q, k, v = problem(normal, ml_dtypes.bfloat16)
    scale = np.array([0.02], np.float32)
    out = flash_attn_func(q, k, v, output_scale=scale)
    assert out.dtype == ml_dtypes.float8_e4m3fn
    close(out, attend_dense(q, k, v)[0] / 0.02)


def test_any_strides(normal, dtype):
    fused = normal(2, 40, 8 + 2 + 2, 64, dtype=dtype)  # a fused QKV projection
    q, k, v = fused[:, :, :8], fused[:, :, 8:10], fused[:, :, 10:]
    want, want_lse = attend_dense(q, k, v, Options(causal=True))
    close(flash_attn_func(q, k, v, causal=True), want)
    heads_first = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    close(flash_attn_func(*heads_first, causal=True), want)
    reversed_tokens = [np.ascontiguousarray(x[:, ::-1])[:, ::-1] for x in (q, k, v)]
    close(flash_attn_func(*reversed_tokens, causal=True), want)
    backing = np.zeros((2, 8, 40, 100), dtype)
    out = backing.transpose(0, 2, 1, 3)[..., 4:68]
    lse = np.zeros((40, 2, 8), np.float32).transpose(1, 2, 0)
    assert flash_attn_func(q, k, v, causal=True, out=out, lse=lse) is out
    close(out, want)
    close(lse, want_lse, what="lse")
    assert (backing[..., :4] == 0).all() and (backing[..., 68:] == 0).all()


def test_results(normal):
    q, k, v = problem(normal, np.float32)
    out = np.empty_like(q)
    lse = np.empty((2, 4, 37), np.float32)
    assert flash_attn_func(q, k, v, out=out) is out
    got = flash_attn_func(q, k, v, out=out, lse=lse, return_softmax_lse=True)
    assert got[0] is out and got[1] is lse
    three = flash_attn_func(q, k, v, return_attn_probs=True)
    assert len(three) == 3 and three[2] is None
    np.testing.assert_array_equal(three[0], out)
    np.testing.assert_array_equal(three[1], lse)


def test_wider_result_than_inputs(normal):
    q, k, v = problem(normal, ml_dtypes.bfloat16)
    out = flash_attn_func(q, k, v, out=np.empty(q.shape, np.float32))
    close(out, attend_dense(q, k, v)[0], dtype="float16")  # probabilities may be rounded, the result is not


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_read_only_inputs(normal, dtype):
    arrays = problem(normal, dtype)
    want = flash_attn_func(*arrays)
    for x in arrays:
        x.flags.writeable = False
    np.testing.assert_array_equal(wide(flash_attn_func(*arrays)), wide(want))
    lens = np.full(2, 53, np.int32)
    lens.flags.writeable = False
    np.testing.assert_array_equal(wide(flash_attn_func(*arrays, seqused_k=lens)), wide(want))


def test_empty_problems(normal):
    q, k, v = problem(normal, np.float32)
    assert flash_attn_func(q[:0], k[:0], v[:0]).shape == (0, 37, 4, 64)
    assert flash_attn_func(q[:, :0], k, v).shape == (2, 0, 4, 64)
    out, lse = flash_attn_func(q, k[:, :0], v[:, :0], return_softmax_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("splits", [0, 1, 2, 7, 128])
def test_splits_and_threads(normal, splits):
    q, k, v = problem(normal, np.float32, tq=2, tk=700)
    want = attend_dense(q, k, v, Options(causal=True))[0]
    for threads in (1, 2, 5):
        close(flash_attn_func(q, k, v, causal=True, num_splits=splits, num_threads=threads), want)


def test_deterministic(normal, dtype):
    q, k, v = problem(normal, dtype, b=3, tq=3, tk=513)
    whole = flash_attn_func(q, k, v, causal=True, deterministic=True)
    np.testing.assert_array_equal(wide(whole), wide(flash_attn_func(q, k, v, causal=True, deterministic=True)))
    alone = flash_attn_func(q[1:2], k[1:2], v[1:2], causal=True, deterministic=True)
    np.testing.assert_array_equal(wide(whole[1:2]), wide(alone))


def test_explain(normal):
    q, k, v = problem(normal, np.float32)
    text = flashspark.attention_explain(flash_attn_func, q, k, v, causal=True)
    assert "cpu-engine" in text
    out = np.full(q.shape, 7, np.float32)
    assert flash_attn_func(q, k, v, out=out, explain=True, implementation="cpu-reference").count("cpu-reference")
    assert (out == 7).all()


@pytest.mark.parametrize("seqlen_q", [1, 8, 40])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_shows(name: str, seqlen_q: int) -> None:
    """A NaN in what a head reads shows in that head's result, and in no other."""
    rng = np.random.default_rng(7)
    q = rng.standard_normal((1, seqlen_q, 2, 64)).astype(np.float32)
    k, v = (rng.standard_normal((1, 200, 2, 64)).astype(np.float32) for _ in range(2))
    {"q": q, "k": k, "v": v}[name][:, :, 0, 3] = np.nan
    out = flashspark.flash_attn_func(q, k, v)
    assert np.isnan(out[:, :, 0, 3]).all()
    assert np.isnan(out[:, :, 0]).all() or name == "v"
    assert np.isfinite(out[:, :, 1]).all()
