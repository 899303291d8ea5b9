"""get_scheduler_metadata without a GPU: the result is empty, and errors name their argument."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from flashspark import _flash_attn_fwd, flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata
from problems import offsets, pages
from reference import close

LENGTHS = np.array([40, 700, 3], np.int32)


def made(**changes):
    arguments = dict(
        batch_size=3, max_seqlen_q=1, max_seqlen_k=700, num_heads_q=8, num_heads_kv=2, headdim=64, cache_seqlens=LENGTHS
    )
    return get_scheduler_metadata(**arguments | changes)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.float8_e4m3fn)], ids=str)
def test_the_cpu_has_none(dtype):
    metadata = made(qkv_dtype=dtype, page_size=16, causal=True, cu_seqlens_q=offsets([1, 1, 1]))
    assert metadata.shape == (0,) and metadata.dtype == np.int32
    buffer = np.full(100, 7, np.int32)
    assert made(qkv_dtype=dtype, out=buffer).shape == (0,) and (buffer == 7).all()


def test_torch():
    torch = pytest.importorskip("torch")
    metadata = made(qkv_dtype=torch.bfloat16, cache_seqlens=torch.from_numpy(LENGTHS))
    assert metadata.shape == (0,) and metadata.dtype == torch.int32 and metadata.is_cpu


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        (dict(batch_size=4), ValueError, "cache_seqlens"),
        (dict(batch_size=-1), ValueError, ""),
        (dict(num_heads_q=7), ValueError, "num_heads_q = 7"),
        (dict(headdim=513), ValueError, "headdim = 513"),
        (dict(headdim=0), ValueError, "headdim = 0"),
        (dict(qkv_dtype=np.float64), TypeError, "qkv_dtype"),
        (dict(cache_seqlens=LENGTHS.astype(np.int64)), TypeError, "cache_seqlens"),
        (dict(cu_seqlens_q=offsets([1, 1])), ValueError, "cu_seqlens_q"),
        (dict(window_size=3), ValueError, "window_size"),
        (dict(window_size=("a", 0)), TypeError, "window_size[0] = a str"),
        (dict(out=np.zeros((2, 2), np.int32)), ValueError, "out"),
        (dict(out=np.zeros(4, np.float32)), TypeError, "out"),
        (dict(out=np.zeros(8, np.int32)[::2]), ValueError, "out"),
        (dict(num_splits=-1), ValueError, "num_splits"),
    ],
)
def test_bad_arguments_are_named(changes, kind, name):
    with pytest.raises(kind) as error:
        made(**changes)
    assert name in str(error.value)


def test_calls_take_it(normal, rng):
    """The result of attention does not depend on scheduler_metadata, whatever it holds."""
    ks, vs = ([normal(n, 2, 64) for n in LENGTHS] for _ in range(2))
    k, v, table = pages(rng, ks, vs, 16)
    q, cu = normal(3, 8, 64), offsets([1, 1, 1])
    given = dict(block_table=table, causal=True)
    want = flash_attn_varlen_func(q, k, v, cu, None, 1, 700, seqused_k=LENGTHS, **given)
    for metadata in (made(), np.arange(64, dtype=np.int32)):
        got = flash_attn_varlen_func(q, k, v, cu, None, 1, 700, seqused_k=LENGTHS, scheduler_metadata=metadata, **given)
        np.testing.assert_array_equal(got, want)
        got = flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=LENGTHS, scheduler_metadata=metadata, **given)
        close(got[:, 0], want)
    out, _ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu, seqused_k=LENGTHS, page_table=table, causal=True, scheduler_metadata=object()
    )
    close(out, want)
    with pytest.raises(ValueError, match="scheduler_metadata"):
        flash_attn_varlen_func(
            q, k, v, cu, None, 1, 700, seqused_k=LENGTHS, scheduler_metadata=np.zeros((2, 2), np.int32), **given
        )
