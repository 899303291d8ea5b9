"""get_scheduler_metadata: how decoding is spread over the GPU, found once for all layers of a model."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np

from . import _core
from ._call import call
from ._kinds import pair, settled
from ._layout import MOST, padded
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
    """What calls over a KV cache may be given as `scheduler_metadata`, made from the lengths as they are now.

    The arguments are FlashAttention 3's and mean what they mean to the calls: bounds, heads, head sizes,
    cache_seqlens int32 (batch_size,) with the new keys among them, cu_seqlens_q int32 (batch_size + 1,) where q is laid
    end to end, the mask, attention_chunk. qkv_dtype: of the cache; None: bfloat16. page_size, cu_seqlens_k_new,
    max_seqlen_k_new, pack_gqa and sm_margin do not matter here. out: int32 (size,), at least as large as the result:
    written in place, so that captured graphs find it; the result is its beginning.

    It saves each decoding call on a GPU 1 us (H100), and never changes what the call computes: where lengths have
    changed meanwhile, or it was made for another problem, calls do without. Has no elements where there is nothing to
    gain: prefill, num_splits other than 0, deterministic, biased or capped scores, the CPU.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else pair(window_size)
    if type(headdim) is int and 0 < headdim < MOST:  # as the calls compute with it
        headdim = padded(headdim, 8)
    if type(headdim_v) is int and 0 < headdim_v < MOST:
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
    """Elements of the schedule; written, too, where there is memory for it."""
    for name, value, fallback in zip(SCHEDULE.words[0], values, SCHEDULE.fallbacks):
        if value is None and fallback is REQUIRED:
            raise TypeError(f"{name} = None: must be an int")
    if is_torch(values[SCHEDULE.index("cache_seqlens")]):
        try:
            return int(_core.attention_schedule(*values))
        except Exception:  # noqa: BLE001, S110 - below, arguments are looked at one by one
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
        with suppress(Exception):  # what is no type at all is named below
            name = str(np.dtype(dtype))
    if name not in _TYPES:
        raise TypeError(f"qkv_dtype = {name}: must be one of {', '.join(_TYPES)}")
    return DTYPE_CODES[name]
