"""get_scheduler_metadata: how decoding is spread over the GPU, found once for all layers of a model."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np

from . import _core
from ._call import call
from ._kinds import pair, settled
from ._layout import MAX_HEAD_DIM, padded
from ._signature import REQUIRED, SCHEDULE
from ._tensors import DTYPE_CODES, Array, array, bump, empty_like, is_torch

_TYPES = ("float16", "bfloat16", "float8_e4m3fn")  # that the kernels take


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
    attention_chunk: int = 0,
    seqused_q: Array | None = None,
    cache_batch_idx: Array | None = None,
    causal_per_seq: Array | None = None,
    deterministic: bool = False,
    out: Array | None = None,
) -> Array:
    """scheduler_metadata for calls over a KV cache, made from the current lengths.

    The arguments are FlashAttention 3's and mean the same as in the calls: bounds, heads, head sizes, cache_seqlens
    int32 (batch_size,) including new keys, cu_seqlens_q int32 (batch_size + 1,) if q is packed end to end, the mask,
    attention_chunk. qkv_dtype: the cache's type; None: bfloat16. page_size, cu_seqlens_k_new, max_seqlen_k_new,
    pack_gqa and sm_margin are ignored. out: int32 (size,), at least as large as the result, written in place so that
    captured graphs find it; the result is a slice from its start.

    It spares each decoding call on a GPU the search for its work, and never changes a result: a call whose lengths have
    changed since, or for which it was not made, ignores it. The result is empty where nothing can be gained: prefill,
    num_splits other than 0, deterministic, biased or capped scores, the CPU.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else pair(window_size)
    if type(headdim) is int and 0 < headdim < MAX_HEAD_DIM:  # padded as in the calls
        headdim = padded(headdim, 8)
    if type(headdim_v) is int and 0 < headdim_v < MAX_HEAD_DIM:
        headdim_v = padded(headdim_v, 8)
    # fmt: off
    args = (
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, _type(qkv_dtype),
        cache_seqlens, cu_seqlens_q, seqused_q, cache_leftpad, cache_batch_idx, causal_per_seq, causal, left, right,
        has_softcap, num_splits, deterministic, attention_chunk,
    )
    # fmt: on
    if out is None:
        size = _run((None, *args))
        array("cache_seqlens", cache_seqlens)
        int32 = sys.modules["torch"].int32 if is_torch(cache_seqlens) else np.dtype(np.int32)
        out = empty_like(cache_seqlens, (size,), int32)
        return out if size == 0 else out[: _run((out, *args))]
    size = _run((out, *args))
    bump(out)
    return out[:size]


def _run(values: tuple[Any, ...]) -> int:
    """The number of elements. They are written as well if `out` is given."""
    for name, value, fallback in zip(SCHEDULE.words[0], values, SCHEDULE.fallbacks):
        if value is None and fallback is REQUIRED:
            raise TypeError(f"{name} = None: must be an int")
    if is_torch(values[SCHEDULE.index("cache_seqlens")]):
        try:
            return int(_core.attention_schedule(*values))
        except Exception:  # noqa: BLE001, S110 - converted or reported below
            pass
    return int(call(_core.attention_schedule, SCHEDULE, tuple(settled(SCHEDULE, 0, values))))


def _type(dtype: Any) -> int:
    if dtype is None:
        return DTYPE_CODES["bfloat16"]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = type(dtype).__name__
        with suppress(Exception):  # anything that is no dtype is reported below
            name = str(np.dtype(dtype))
    if name not in _TYPES:
        raise TypeError(f"qkv_dtype = {name}: must be one of {', '.join(_TYPES)}")
    return DTYPE_CODES[name]
