"""flash-attention's packed forms: the same as the functions of their parts, and errors that name the packed tensor."""

from __future__ import annotations

import flashspark
import numpy as np
import pytest

CU = np.array([0, 9, 20], np.int32)
OPTIONS = {"causal": True, "window_size": (6, 0), "softcap": 3.0, "softmax_scale": 0.2}


def test_dense(normal):
    qkv = normal(2, 20, 3, 4, 32)
    want = flashspark.flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **OPTIONS)
    assert np.array_equal(flashspark.flash_attn_qkvpacked_func(qkv, **OPTIONS), want)
    assert np.array_equal(flashspark.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **OPTIONS), want)
    positional = flashspark.flash_attn_qkvpacked_func(qkv, 0.0, 0.2, True, (6, 0), 3.0, None, False, True)
    assert np.array_equal(positional[0], want) and len(positional) == 3 and positional[1].shape == (2, 4, 20)


def test_packed_end_to_end(normal):
    qkv = normal(20, 3, 4, 32)
    want = flashspark.flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], CU, CU, 11, 11, **OPTIONS)
    assert np.array_equal(flashspark.flash_attn_varlen_qkvpacked_func(qkv, CU, 11, **OPTIONS), want)
    got = flashspark.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], CU, CU, None, None, **OPTIONS)
    assert np.array_equal(got, want)


def test_grouped_heads(normal):
    qkv = normal(2, 10, 8, 32)
    want = flashspark.flash_attn_func(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:])
    assert np.array_equal(flashspark.flash_attn_qkvpacked_func(qkv, num_heads_q=4), want)
    rows, cu = qkv.reshape(20, 8, 32), np.array([0, 10, 20], np.int32)
    got = flashspark.flash_attn_varlen_qkvpacked_func(rows, cu, 10, num_heads_q=4)
    assert np.array_equal(got.reshape(want.shape), want)


def test_explain_and_results_in_place(normal):
    qkv = normal(1, 10, 3, 4, 32)
    out = np.empty((1, 10, 4, 32), np.float32)
    assert flashspark.flash_attn_qkvpacked_func(qkv, out=out) is out
    assert "cpu" in flashspark.attention_explain(flashspark.flash_attn_qkvpacked_func, qkv)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 20, 4, 32), {}, r"qkv.shape = \(2, 20, 4, 32\): must be of 5 dimensions"),
        ((2, 20, 2, 4, 32), {}, r"qkv.shape\[2\] = 2: must be 3"),
        ((2, 20, 9, 32), {"num_heads_q": 4}, "num_heads_q = 4: must leave an even number of qkv's 9 heads"),
        ((2, 20, 3, 4, 32), {"softcap": -1.0}, "softcap = -1"),
    ],
)
def test_errors(normal, shape, options, message):
    with pytest.raises(ValueError, match=message):
        flashspark.flash_attn_qkvpacked_func(normal(*shape), **options)


def test_kinds(normal):
    with pytest.raises(ValueError, match=r"kv.shape\[2\] = 3: must be 2"):
        flashspark.flash_attn_kvpacked_func(normal(2, 5, 4, 32), normal(2, 5, 3, 4, 32))
    with pytest.raises(TypeError, match="qkv = list: must be an array"):
        flashspark.flash_attn_qkvpacked_func([1])


def test_operators(normal):
    torch = pytest.importorskip("torch")
    from flashspark import torch_ops

    qkv = torch.from_numpy(normal(2, 20, 3, 4, 32))
    compiled = torch.compile(torch_ops.flash_attn_qkvpacked_func, fullgraph=True, backend="aot_eager")
    want = flashspark.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(torch_ops.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(compiled(qkv, causal=True), want)
    rows, cu = qkv.view(40, 3, 4, 32), torch.tensor([0, 20, 40], dtype=torch.int32)
    got = torch_ops.flash_attn_varlen_kvpacked_func(rows[:, 0], rows[:, 1:], cu, cu, 20, 20, causal=True)
    assert torch.equal(got.view(want.shape), want)
