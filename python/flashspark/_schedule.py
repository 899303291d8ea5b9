"""Work distribution of decoding, found once for the layers of a model."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core
from ._call import Array, call, empty_like, is_torch, window

# flashspark_dtype of the types that the kernels take.
_TYPES = {"float16": 2, "bfloat16": 3, "float8_e4m3fn": 4}
SCHEDULE_ARGUMENTS = (
    *("out", "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim", "headdim_v"),
    *("qkv_dtype", "cache_seqlens", "cu_seqlens_q", "seqused_q", "cache_leftpad", "cache_batch_idx", "causal_per_seq"),
    *("causal", "window_size[0]", "window_size[1]", "has_softcap", "num_splits", "deterministic"),
)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Array,
    qkv_dtype: Any = None,
    headdim_v: int | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    cache_leftpad: Array | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: Any = None,
    sm_margin: int = 0,
    *,
    seqused_q: Array | None = None,
    cache_batch_idx: Array | None = None,
    causal_per_seq: Array | None = None,
    deterministic: bool = False,
    out: Array | None = None,
) -> Array:
    """What calls over a KV cache may be given as `scheduler_metadata`, made from the lengths as they are now.

    The arguments are FlashAttention 3's and mean what they mean to the calls: bounds, heads, head sizes,
    cache_seqlens int32 (batch_size,) with the new keys among them, cu_seqlens_q int32 (batch_size + 1,) where q is laid
    end to end, the mask. qkv_dtype: of the cache; None: bfloat16. page_size, cu_seqlens_k_new, max_seqlen_k_new,
    pack_gqa and sm_margin do not matter here. out: int32 (size,), at least as large as the result: written in place, so
    that captured graphs find it; the result is its beginning.

    It saves each decoding call on a GPU 1 us (H100), and never changes what the call computes: where lengths have
    changed meanwhile, or it was made for another problem, calls do without. Has no elements where there is nothing to
    gain: prefill, num_splits other than 0, deterministic, biased or capped scores, the CPU.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else window(window_size)
    # fmt: off
    args = (
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, _type(qkv_dtype),
        cache_seqlens, cu_seqlens_q, seqused_q, cache_leftpad, cache_batch_idx, causal_per_seq, causal, left, right,
        has_softcap, num_splits, deterministic,
    )
    # fmt: on
    if out is None:
        size = call(_core.attention_schedule, SCHEDULE_ARGUMENTS, (None, *args))
        int32 = sys.modules["torch"].int32 if is_torch(cache_seqlens) else np.dtype(np.int32)
        out = empty_like(cache_seqlens, (size,), int32)
        if size == 0:
            return out
    return out[: call(_core.attention_schedule, SCHEDULE_ARGUMENTS, (out, *args))]


def _type(dtype: Any) -> int:
    if dtype is None:
        return _TYPES["bfloat16"]
    name = str(dtype if str(dtype).startswith("torch.") else np.dtype(dtype)).removeprefix("torch.")
    if name not in _TYPES:
        raise TypeError(f"qkv_dtype = {dtype}: must be one of {', '.join(_TYPES)}")
    return _TYPES[name]
