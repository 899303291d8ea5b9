"""Attention over a KV cache, and writing into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core
from ._call import APPEND_ARGUMENTS, CACHE, Array, attend, call, int32_full, is_torch, stored, window


def append_kv(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    cache_seqlens: Array | None = None,
    *,
    q: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    block_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    rotary_interleaved: bool = True,
    q_rotary_per_token: bool = True,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    slot_mapping: Array | None = None,
    rotary_positions: Array | None = None,
) -> None:
    """Writes new keys and values into a dense or paged cache, in place.

    k, v: (num_seqs, seqlen_new, num_heads_kv, head_dim), or (total, num_heads_kv, head_dim) with cu_seqlens_k_new.
    k_cache, v_cache: (num_seqs, seqlen_cache, num_heads_kv, head_dim), or pages with block_table. Any strides; v_cache
    may lie inside k_cache's rows. A float8_e4m3 cache takes wider rows, divided by k_descale and v_descale.
    cache_seqlens: int32 (num_seqs,), keys in the cache before the call; row i goes to cache_seqlens + i. None: 0.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotary embedding of the new keys, and of q **in place** when it
    is given: q's row i turns by cache_seqlens + i - cache_leftpad, all rows by the first of these without
    q_rotary_per_token. rotary_interleaved: pairs (0, 1), (2, 3) ..; else (0, rotary_dim / 2), (1, ..) ..
    slot_mapping: int64 (num_tokens,), in place of lengths and block_table: row t of k and v, (total, num_heads_kv,
    head_dim) with total >= num_tokens, goes to page slot_mapping[t] // page_size, row slot_mapping[t] % page_size of
    it; negative entries are skipped. Any page_size; descales of one sequence.
    rotary_positions: int64, at least num_tokens: with slot_mapping and rotary_cos, the position by which row t of k and
    of q (total, num_heads_q, head_dim) turns; of q also where slot_mapping[t] is negative. With vLLM's cos_sin_cache:
    rotary_cos, rotary_sin = cos_sin_cache.chunk(2, -1).
    """
    if isinstance(q, np.ndarray) and not q.flags.writeable:
        raise ValueError("q = read-only array: must be writable, it is turned in place")
    (k, k_as), (v, v_as) = stored(k, 0, "k"), stored(v, 1, "v")
    (k_cache, k_cache_as), (v_cache, v_cache_as) = stored(k_cache, 2, "k_cache"), stored(v_cache, 3, "v_cache")
    q, q_as = stored(q, 4, "q")
    (rotary_cos, cos_as), (rotary_sin, sin_as) = (
        stored(rotary_cos, 5, "rotary_cos"),
        stored(rotary_sin, 6, "rotary_sin"),
    )
    stored_as = k_as | v_as | k_cache_as | v_cache_as | q_as | cos_as | sin_as
    # fmt: off
    args = (
        stored_as, k, v, k_cache, v_cache, q, rotary_cos, rotary_sin, cache_seqlens, cu_seqlens_k_new, block_table,
        cache_batch_idx, cache_leftpad, rotary_interleaved, q_rotary_per_token, k_descale, v_descale,
        slot_mapping, rotary_positions,
    )
    # fmt: on
    call(_core.append_kv, APPEND_ARGUMENTS, args)


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    cu_seqlens_k_new: Array | None = None,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    seqused_q: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    output_scale: Array | None = None,
    rel_logits: Array | None = None,
    prefix_ranges: Array | None = None,
    prefix_clamp_window: bool = False,
    rswa_prefix_lens: Array | None = None,
    rswa_window: int = 0,
    causal_per_seq: Array | None = None,
    scheduler_metadata: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    num_threads: int = 0,
    explain: bool = False,
    _attend: Callable[..., Any] = attend,
    _append: Callable[..., None] = append_kv,
) -> Any:
    """Attention over a KV cache; with k and v, these are first written into the cache behind the keys it holds.

    q: (num_seqs, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens_q.
    k_cache, v_cache: (num_rows, seqlen_cache, num_heads_kv, head_dim), or with block_table
    (num_pages, page_size, num_heads_kv, head_dim), page_size a multiple of 16. Any strides; v_cache may lie inside
    k_cache's rows.
    k, v: (num_seqs, seqlen_new, num_heads_kv, head_dim), or (total, num_heads_kv, head_dim) with cu_seqlens_k_new.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2): turns k, and q by the positions of its rows when causal or
    windowed, else by cache_seqlens. Needs k and v, and as many rows in q. q itself is not changed.
    cache_seqlens: int32 (num_seqs,) or int: keys in the cache before the call. None: all of a dense cache.
    cache_batch_idx: int32 (num_seqs,): the cache row of each sequence.
    cache_leftpad: int32 (num_seqs,): keys to skip at the start; they count in cache_seqlens.
    block_table: int32 (num_seqs, pages per sequence).
    scheduler_metadata: int32, from get_scheduler_metadata: decoding on a GPU starts sooner.
    The other arguments are flash_attn_func's. With explain, nothing is written into the cache.

    Returns out, like q with v's head size; (out, lse) with return_softmax_lse.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else window(window_size)
    if k is not None or v is not None:
        if k is None or v is None:
            raise ValueError(f"{'k' if k is None else 'v'} = None: k and v go together")
        if cache_seqlens is None:
            raise ValueError("cache_seqlens = None: must be given with k and v")
    elif rotary_cos is not None or rotary_sin is not None:
        raise ValueError("rotary_cos = given: must be None without k and v")
    elif cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new = given: must be None without k and v")
    if isinstance(cache_seqlens, (int, np.integer)):
        num_seqs = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        cache_seqlens = int32_full(q, num_seqs, int(cache_seqlens))

    def run(queries: Array, *function: Any) -> Any:
        # fmt: off
        return _attend(
            CACHE, (queries, k_cache, v_cache), out, lse, return_softmax_lse, explain,
            (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads),
            (
                cu_seqlens_q, max_seqlen_q, None, max_seqlen_k, seqused_q, seqused_k, block_table, cache_leftpad,
                cache_batch_idx, sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits,
                causal_per_seq, prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window,
                scheduler_metadata,
            ),
            *function,
        )
        # fmt: on

    seqused_k = cache_seqlens
    if k is not None and hasattr(cache_seqlens, "shape"):
        if cu_seqlens_k_new is not None:
            seqused_k = cache_seqlens + (cu_seqlens_k_new[1:] - cu_seqlens_k_new[:-1])
        else:
            seqused_k = cache_seqlens + (k.shape[1] if len(k.shape) > 1 else 0)
        if not explain:
            if _attend is attend:
                # A bad argument must not leave new rows in the cache: the attention is checked before they are written.
                run(q, _core.attention_validate)
            if rotary_cos is not None or rotary_sin is not None:
                q = q.clone() if is_torch(q) else q.copy()
            # fmt: off
            _append(
                k, v, k_cache, v_cache, cache_seqlens, q=q if rotary_cos is not None else None, rotary_cos=rotary_cos,
                rotary_sin=rotary_sin, cu_seqlens_k_new=cu_seqlens_k_new, block_table=block_table,
                cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, rotary_interleaved=rotary_interleaved,
                q_rotary_per_token=causal or left not in (-1, None) or right not in (-1, None), k_descale=k_descale,
                v_descale=v_descale,
            )
            # fmt: on
    result = run(q)
    return result if explain or return_softmax_lse else result[0]
