"""_flash_attn_fwd and the tags that stand for its score and mask functions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from flashspark import _flash_attn_fwd, mods
from problems import offsets, pages
from reference import Options, attend_dense, attend_varlen, close

LENGTHS = [(1, 41), (17, 17), (30, 90)]


@pytest.fixture
def paged(normal, rng):
    q = normal(48, 4, 32, dtype=ml_dtypes.bfloat16)
    ks = [normal(n, 2, 32, dtype=ml_dtypes.bfloat16) for _, n in LENGTHS]
    vs = [normal(n, 2, 32, dtype=ml_dtypes.bfloat16) for _, n in LENGTHS]
    k_cache, v_cache, table = pages(rng, ks, vs, 16)
    cu = offsets([n for n, _ in LENGTHS])
    call = dict(
        cu_seqlens_q=cu, seqused_k=np.array([n for _, n in LENGTHS], np.int32), max_seqlen_q=32, page_table=table
    )
    return q, ks, vs, cu, (q, k_cache, v_cache), call


def test_returns_out_and_lse(paged):
    q, ks, vs, cu, arrays, call = paged
    out, lse = _flash_attn_fwd(*arrays, **call, max_seqlen_k=100_000, causal=True, return_lse=True, num_splits=0)
    want, want_lse = attend_varlen(q, ks, vs, cu, Options(causal=True))
    close(out, want)
    close(lse, want_lse, dtype="float16", what="lse")
    same, none = _flash_attn_fwd(*arrays, **call, causal=True)
    assert none is None
    np.testing.assert_array_equal(same.view(np.uint16), out.view(np.uint16))
    given = np.empty_like(out), np.empty_like(lse)
    got = _flash_attn_fwd(*arrays, **call, causal=True, out=given[0], lse=given[1])
    assert got[0] is given[0] and got[1] is given[1]


def test_unpaged_and_dense(normal):
    q, k, v = normal(2, 20, 4, 32), normal(2, 33, 2, 32), normal(2, 33, 2, 16)
    close(_flash_attn_fwd(q, k, v, causal=True)[0], attend_dense(q, k, v, Options(causal=True))[0])
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out, lse = _flash_attn_fwd(*flat, cu_seqlens_q=offsets([20, 20]), cu_seqlens_k=offsets([33, 33]), return_lse=True)
    want, want_lse = attend_dense(q, k, v)
    close(out.reshape(2, 20, 4, 16), want)
    close(lse.reshape(4, 2, 20).transpose(1, 0, 2), want_lse, what="lse")


def test_window_softcap_sink_and_causal_per_sequence(paged, normal):
    q, ks, vs, cu, arrays, call = paged
    sink = normal(4, dtype=ml_dtypes.bfloat16)
    out, _ = _flash_attn_fwd(*arrays, **call, causal=True, window_size_left=11, softcap=3.0, learnable_sink=sink)
    close(out, attend_varlen(q, ks, vs, cu, Options(causal=True, left=11, softcap=3.0, sinks=sink))[0])
    out, _ = _flash_attn_fwd(*arrays, **call, window_size_left=9, window_size_right=None, softcap=None)
    close(out, attend_varlen(q, ks, vs, cu, Options(left=9))[0])
    flags = np.array([0, 1, 0], np.int32)
    out, _ = _flash_attn_fwd(*arrays, **call, causal=True, dynamic_causal=flags)
    close(out, attend_varlen(q, ks, vs, cu, [Options(causal=bool(f)) for f in flags])[0])


@pytest.mark.parametrize("causal", [False, True])
def test_negative_windows_are_open_or_refused(paged, causal):
    """FlashAttention 4 treats both sides as open if their sum is negative; otherwise a negative side shifts the
    window."""
    arrays, call = paged[4:]
    want, _ = _flash_attn_fwd(*arrays, **call, causal=causal)
    for left, right in ((-1, -1), (-1, 0), (-3, 2), (4, -9)):
        if causal and left >= 0:
            continue
        got, _ = _flash_attn_fwd(*arrays, **call, causal=causal, window_size_left=left, window_size_right=right)
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    for left, right in ((None, -5), (-1, None), (9, -1), (-1, 5)):
        if causal and (left is None or left >= 0 or right is not None):
            continue
        if not causal:
            with pytest.raises(NotImplementedError, match="window_size_"):
                _flash_attn_fwd(*arrays, **call, window_size_left=left, window_size_right=right)


def test_fp8_queries_give_bfloat16(paged, normal):
    _, ks, vs, cu, arrays, call = paged
    e4m3 = ml_dtypes.float8_e4m3fn
    q = normal(48, 4, 32, dtype=e4m3)
    caches = [np.nan_to_num(x.astype(np.float32)).astype(e4m3) for x in arrays[1:]]
    one = np.broadcast_to(np.float32(1.5), (3, 2))
    out, _ = _flash_attn_fwd(q, *caches, **call, causal=True, q_descale=one, k_descale=one, v_descale=one)
    assert out.dtype == ml_dtypes.bfloat16
    narrow = [[x.astype(e4m3) for x in part] for part in (ks, vs)]
    option = Options(causal=True, q_descale=1.5, k_descale=1.5, v_descale=1.5)
    close(out, attend_varlen(q, *narrow, cu, option)[0])


def test_descales_of_16_bit_inputs_are_ignored(paged):
    arrays, call = paged[4:]
    two = np.full((3, 2), 2, np.float32)
    with_scales, _ = _flash_attn_fwd(*arrays, **call, q_descale=two, k_descale=two, v_descale=two)
    without, _ = _flash_attn_fwd(*arrays, **call)
    np.testing.assert_array_equal(with_scales.view(np.uint16), without.view(np.uint16))


def test_rel_bias(paged, normal):
    q, ks, vs, cu, arrays, call = paged
    bias = normal(48, 4, 128, dtype=ml_dtypes.bfloat16)
    out, _ = _flash_attn_fwd(
        *arrays, **call, causal=True, softmax_scale=1 / 32, score_mod=mods.RelBias(), aux_tensors=[bias]
    )
    each = [Options(causal=True, softmax_scale=1 / 32, rel_logits=bias[cu[b] : cu[b + 1]]) for b in range(3)]
    close(out, attend_varlen(q, ks, vs, cu, each)[0])


@pytest.mark.parametrize("clamp", [False, True])
def test_mm_prefix_of_both_generations(paged, clamp):
    q, ks, vs, cu, arrays, call = paged
    ranges = np.full((3, 2, 2), -1, np.int32)
    ranges[1, 0], ranges[2, 1] = (3, 12), (61, 89)
    each = [Options(causal=True, left=7, clamp=clamp, ranges=r.tolist()) for r in ranges]
    want = attend_varlen(q, ks, vs, cu, each)[0]
    first, _ = _flash_attn_fwd(
        *arrays,
        **call,
        causal=True,
        window_size_left=7,
        mask_mod=mods.MmPrefix(clamp_window=clamp),
        aux_tensors=[ranges],
    )
    close(first, want)
    per_query = np.full((48, 2), -1, np.int32)
    per_query[1 + 3 : 1 + 13], per_query[18 + 1 : 48] = (3, 12), (61, 89)
    second, _ = _flash_attn_fwd(
        *arrays, **call, causal=False, mask_mod=mods.MmPrefix(window_left=7, clamp_window=clamp),
        aux_tensors=[per_query, cu],
    )  # fmt: skip
    close(second, want)


def test_rswa(paged):
    q, ks, vs, cu, arrays, call = paged
    lens = np.array([8, 0, 20], np.int32)
    want = attend_varlen(q, ks, vs, cu, [Options(rswa_window=5, prefix_len=int(n)) for n in lens])[0]
    width = np.array([5], np.int32)
    for mod, aux in ((mods.RSwa(), [lens, width]), (mods.RSwa(window=5), [lens])):
        close(_flash_attn_fwd(*arrays, **call, causal=True, mask_mod=mod, aux_tensors=aux)[0], want)


def test_knobs(paged):
    arrays, call = paged[4:]
    want, _ = _flash_attn_fwd(*arrays, **call)
    tuned, _ = _flash_attn_fwd(
        *arrays, **call, tile_mn=(128, 64), num_threads=384, pack_gqa=True, _arch=90, fp8_kv_dequant=True,
        min_seqlen_k=3, gather_kv_indices=None, block_sparse_tensors=None, something_new=None,
    )  # fmt: skip
    np.testing.assert_array_equal(tuned.view(np.uint16), want.view(np.uint16))
    for knob in ("gather_kv_indices", "gather_kv_valid_length", "qv"):
        with pytest.raises(NotImplementedError, match=knob):
            _flash_attn_fwd(*arrays, **call, **{knob: np.zeros(1)})
    with pytest.raises(TypeError, match="something_new"):
        _flash_attn_fwd(*arrays, **call, something_new=1)


def test_compile_only_computes_nothing(paged):
    arrays, call = paged[4:]
    out = np.full((48, 4, 32), 7, ml_dtypes.bfloat16)
    got, lse = _flash_attn_fwd(*arrays, **call, out=out, compile_only=True)
    assert got is out and lse is None and (out == 7).all()


def test_mods_that_do_not_fit(paged):
    arrays, call = paged[4:]
    with pytest.raises(TypeError, match="a score function or mask function is int: must be callable"):
        _flash_attn_fwd(*arrays, **call, score_mod=3)
    with pytest.raises(TypeError, match=r"score_mod = RSwa: must be flashspark.mods.RelBias or a function"):
        _flash_attn_fwd(*arrays, **call, score_mod=mods.RSwa(window=3), aux_tensors=[np.zeros(1)])
    with pytest.raises(TypeError, match=r"mask_mod = RelBias: must be MmPrefix or RSwa"):
        _flash_attn_fwd(*arrays, **call, mask_mod=mods.RelBias(), aux_tensors=[np.zeros(1)])
    with pytest.raises(NotImplementedError, match="must be None with mask_mod"):
        _flash_attn_fwd(*arrays, **call, mask_mod=mods.RSwa(), score_mod=lambda *_: 0, aux_tensors=[np.zeros(1)])
    with pytest.raises(NotImplementedError, match=r"must be None with flashspark\.mods"):
        _flash_attn_fwd(*arrays, **call, mask_mod=mods.RSwa(window=2), aux_tensors=[np.zeros(3)], aux_scalars=[1])
    with pytest.raises(ValueError, match="aux_tensors"):
        _flash_attn_fwd(*arrays, **call, mask_mod=mods.RSwa(), aux_tensors=[])
    with pytest.raises(ValueError, match="aux_tensors"):
        _flash_attn_fwd(*arrays, **call, aux_tensors=[np.zeros(1)])
