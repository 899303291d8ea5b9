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
