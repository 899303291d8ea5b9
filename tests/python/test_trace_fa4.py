"""Tracing functions in FlashAttention-4's form, with and without the CuTe DSL."""

from __future__ import annotations

import functools
import operator
import types

import numpy as np
import pytest
from flashspark._graph import evaluate
from flashspark._recognise import recognise
from flashspark._trace import TraceError, trace, traced

SLOPES = np.array([0.5, 0.25, 0.125])
LINE = np.arange(16.0)


def grid():
    at = np.ix_(*(np.arange(n, dtype=np.int32) for n in (2, 3, 7, 9)))
    score = np.random.default_rng(1).standard_normal((2, 3, 7, 9))
    return score, dict(zip(("b", "h", "q_idx", "kv_idx"), at))


def test_fa4():
    def score_mod(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[0]
        last = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q
        return s + bias[h_idx[0]] * (kv_idx - last) + aux_tensors[1][kv_idx + seqlen_info.offset_k]

    found = trace(score_mod, "score", "fa4", [SLOPES, LINE])
    assert found.sources == (0, 1) and "offset_k" in found.text
    with pytest.raises(TraceError, match="the call gives 1"):
        trace(score_mod, "score", "fa4", [SLOPES])
    first = traced(score_mod, "score", "fa4", [SLOPES, LINE])
    other = SLOPES * 2
    again = traced(score_mod, "score", "fa4", [other, LINE])
    assert again.tensors[0] is other and again.result is first.result and first.tensors[0] is SLOPES


def test_fa4_scalars():
    def score_mod(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
        return s * aux_scalars[0] + aux_scalars[1]

    assert trace(score_mod, "score", "fa4", [], [0.5, 3]).scalars == [0.5, 3]
    assert traced(score_mod, "score", "fa4", [], [0.5, 3]).scalars == [0.5, 3]
    assert traced(score_mod, "score", "fa4", [], [0.75, 4]).scalars == [0.75, 4]


def fake_dsl():
    """Modules that look like the CuTe DSL's; anything that the stand-ins do not replace fails."""
    cutlass, cute = types.ModuleType("cutlass"), types.ModuleType("cutlass.cute")
    utils = types.ModuleType("flash_attn.cute.utils")
    mlir_math = types.ModuleType("cutlass._mlir.dialects.math")
    scope = {"__name__": "cutlass.base_dsl.dsl", "functools": functools}
    exec(
        "def jit(function):\n"
        "    @functools.wraps(function)\n"
        "    def wrapper(*args, **kwargs):\n"
        "        raise AssertionError('the DSL runs')\n"
        "    return wrapper\n",
        scope,
    )
    cute.jit = scope["jit"]
    return cutlass, cute, utils, mlir_math


def test_fa4_with_the_dsl():
    cutlass, cute, utils, mlir_math = fake_dsl()

    @cute.jit
    def score_mod(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        distance = q_idx - kv_idx
        far = cute.TensorSSA(mlir_math.absi(distance), distance.shape, distance.dtype)
        place = cute.make_rmem_tensor(1, cutlass.Int32)
        place.store(h_idx)
        element = cute.make_rmem_tensor(1, aux_tensors[0].element_type)
        element[0] = aux_tensors[0][place[0]]
        bias = element.load().to(cutlass.Float32) * far.to(cutlass.Float32)
        kept = operator.ge(q_idx, kv_idx)
        scale = cute.math.exp2(cute.full_like(s, -1.0), fastmath=True)
        return cute.where(kept, s + bias * scale, cute.full_like(s, float("-inf")))

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        offset = utils.scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        return n_idx <= m_idx + offset

    score, at = grid()
    found = trace(score_mod, "score", "fa4", [SLOPES])
    (got,) = evaluate([found.result], {"score": score, **at}, found.tensors)
    q, k, h = at["q_idx"], at["kv_idx"], at["h"]
    np.testing.assert_allclose(got, np.where(q >= k, score + SLOPES[h] * abs(q - k) * 0.5, -np.inf))
    assert recognise(trace(mask_mod, "mask", "fa4"))["causal"] is True

    def unknown(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        return cute.arch.warp_reduction(s)

    with pytest.raises(TraceError, match=r"warp_reduction: is not supported.*write it with"):
        trace(unknown, "score", "fa4")


def values(found, **more):
    score, at = grid()
    (got,) = evaluate([found.result], {"score": score, **at, **more}, found.tensors)
    return got, score, at


def test_fa4_vectorised_scores():
    """Functions of several keys, kv_idx[0] and those behind it, are traced for one."""
    cutlass, cute, _, mlir_math = fake_dsl()

    @cute.jit
    def score_mod(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        first = q_idx[0] - kv_idx[0]
        distance = cute.make_rmem_tensor(kv_idx.shape, dtype=first.dtype)
        for i in cutlass.range_constexpr(cute.size(distance.shape)):
            distance[i] = mlir_math.absi(first - i) * 2
        bias = cute.make_rmem_tensor(1, aux_tensors[0].element_type)
        bias[0] = aux_tensors[0][h_idx[0]]
        return s + distance.load().to(cutlass.Float32) * bias.load().to(cutlass.Float32)

    score_mod.__vec_size__ = 4
    found = trace(score_mod, "score", "fa4", [SLOPES])
    got, score, at = values(found)
    np.testing.assert_allclose(got, score + 2 * abs(at["q_idx"] - at["kv_idx"]) * SLOPES[at["h"]])


def test_fa4_masks_of_bits():
    """A vectorised mask function's value has a bit for each key from kv_idx on; tensors of bits are those of int32."""
    cutlass, cute, utils, _ = fake_dsl()

    @cute.jit
    def causal(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        limit = m_idx[0] + seqlen_info.seqlen_k - seqlen_info.seqlen_q - n_idx[0] + cutlass.Int32(1)
        bits = cute.make_rmem_tensor(1, dtype=cutlass.Uint32)
        bits[0] = utils.shr_u32(cutlass.Uint32(0xFFFFFFFF), cutlass.Uint32(max(cutlass.Int32(32) - limit, 0)))
        return bits.load()

    @cute.jit
    def window(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        low, past = m_idx[0] - cutlass.Int32(3) - n_idx[0], min(m_idx[0] + 3 - n_idx[0], cutlass.Int32(32))
        below = utils.shr_u32(cutlass.Uint32(0xFFFFFFFF), cutlass.Uint32(cutlass.max(32 - past, 0)))
        bits = cute.make_rmem_tensor(1, dtype=cutlass.Uint32)
        bits[0] = below & utils.shl_u32(cutlass.Uint32(0xFFFFFFFF), cutlass.Uint32(max(low, 0)))
        return bits.load()

    def bit_of(packed, batch, m_idx, n_idx):
        word = packed[batch[0], m_idx[0], n_idx[0] // cutlass.Int32(32)]
        return utils.shr_u32(word, cutlass.Uint32(n_idx[0] % cutlass.Int32(32)))

    @cute.jit
    def packed_vectorised(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        bits = cute.make_rmem_tensor(1, dtype=cutlass.Uint32)
        bits[0] = bit_of(aux_tensors[0], batch, m_idx, n_idx)
        return bits.load()

    @cute.jit
    def packed(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        kept = cute.make_rmem_tensor(n_idx.shape, dtype=cutlass.Boolean)
        for j in cutlass.range_constexpr(cute.size(n_idx.shape)):
            kept[j] = cutlass.Boolean(bit_of(aux_tensors[0], batch, m_idx, n_idx) & cutlass.Uint32(1))
        return kept.load()

    for function in (causal, window, packed_vectorised):
        function.__vec_size__ = 32
    rng = np.random.default_rng(3)
    bits = rng.random((2, 7, 32)) < 0.5
    bits[0, 0, 8] = bits[1, 3, 8] = True
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.int32)
    at = grid()[1]
    q, k = at["q_idx"], at["kv_idx"]
    kept = {
        causal: k <= q + 2,
        window: (k >= q - 3) & (k < q + 3),
        packed: bits[at["b"], q, k],
        packed_vectorised: bits[at["b"], q, k],
    }
    for function, wanted in kept.items():
        got = values(trace(function, "mask", "fa4", [words]), seqlen_q=7, seqlen_k=9)[0]
        np.testing.assert_array_equal(np.broadcast_to(got, (2, 3, 7, 9)), np.broadcast_to(wanted, (2, 3, 7, 9)))
    with pytest.raises(TraceError, match=r"captured tensor of uint32: .*; x\.view\(int32\) has the same bits"):
        trace(packed, "mask", "fa4", [words.view(np.uint32)])
    del packed_vectorised.__vec_size__
    with pytest.raises(TraceError, match="the mask function returns i64: must return one bool"):
        trace(packed_vectorised, "mask", "fa4", [words])


def test_fa4_helpers_and_positions():
    """Functions that call others of the DSL; positions in the packed tensors, clamped to the sequence's end."""
    cutlass, cute, utils, _ = fake_dsl()

    @cute.jit
    def read(values, index, offset, length):
        place = cute.make_rmem_tensor(1, cutlass.Int32)
        place.store(index)
        value = cute.make_rmem_tensor(1, cutlass.Int32)
        value[0] = values[cutlass.min(place[0], offset + length - 1)]
        return value.load()

    @cute.jit
    def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        first = read(aux_tensors[0], m_idx + seqlen_info.offset_q, seqlen_info.offset_q, seqlen_info.seqlen_q)
        other = read(aux_tensors[0], n_idx + seqlen_info.offset_k, seqlen_info.offset_k, seqlen_info.seqlen_k)
        block = utils.scalar_to_ssa(4, cutlass.Int32)
        return (first == other) & ((m_idx // block) >= (n_idx % block))

    documents = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], np.int32)
    lengths = {"seqlen_q": 6, "seqlen_k": 9, "offset_q": 2, "offset_k": 3}
    got, _, at = values(trace(mask_mod, "mask", "fa4", [documents]), **lengths)
    q, k = at["q_idx"], at["kv_idx"]
    same = documents[np.minimum(q + 2, 7)] == documents[np.minimum(k + 3, 11)]
    np.testing.assert_array_equal(got, np.broadcast_to(same & (q // 4 >= k % 4), got.shape))


def test_fa4_with_the_real_dsl():
    """Functions that the installed DSL has decorated: their Python bodies are traced, and nothing of it runs."""
    cutlass = pytest.importorskip("cutlass")
    cute = pytest.importorskip("cutlass.cute")
    from cutlass._mlir.dialects import math as mlir_math

    @cute.jit
    def score_mod(s, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        difference = q_idx - kv_idx
        distance = cute.TensorSSA(mlir_math.absi(difference), difference.shape, difference.dtype)
        place = cute.make_rmem_tensor(1, cutlass.Int32)
        place.store(h_idx)
        bias = cute.make_rmem_tensor(1, aux_tensors[0].element_type)
        bias[0] = aux_tensors[0][place[0]]
        capped = cute.where(operator.le(distance, cute.full_like(distance, 4)), distance, cute.full_like(distance, 4))
        scale = cute.math.exp2(cute.full_like(s, -1.0))
        return s + bias.load().to(cutlass.Float32) * capped.to(cutlass.Float32) * scale

    got, score, at = values(trace(score_mod, "score", "fa4", [SLOPES]))
    capped = np.minimum(abs(at["q_idx"] - at["kv_idx"]), 4)
    np.testing.assert_allclose(got, score + SLOPES[at["h"]] * capped * 0.5)
