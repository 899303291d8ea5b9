"""flashspark as operators of torch: torch.compile keeps one graph around them. Importing this module registers them.

    from flashspark.torch_ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

These take and give what the package's functions of the same names do, for torch tensors; inference only. Outside
torch.compile the package's own functions are quicker to call. Two differences: `explain` is not offered, and
flash_attn_with_kvcache checks the attention's arguments after the new rows are in the cache.

The operators are flashspark::attention, which returns (out, lse), flashspark::attention_out, which fills tensors that
it is given, and flashspark::append_kv. Their arguments go by the order of the native call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import _cache, _call, _ops

# After q, k, v: ATTENTION_ARGUMENTS from softmax_scale on.
_OPTIONS = """
    float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, int num_splits,
    bool deterministic, str? implementation, int num_threads, Tensor? cu_seqlens_q, SymInt? max_seqlen_q,
    Tensor? cu_seqlens_k, SymInt? max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? block_table,
    Tensor? leftpad_k, Tensor? kv_batch_index, Tensor? sinks, Tensor? alibi_slopes, Tensor? q_descale,
    Tensor? k_descale, Tensor? v_descale, Tensor? output_scale, Tensor? rel_logits, Tensor? causal_per_seq,
    Tensor? prefix_ranges, bool prefix_clamp_window, Tensor? rswa_prefix_lens, SymInt rswa_window"""
_HEAD = 9  # options up to num_threads
_NO_TAIL = (*(None,) * 18, False, None, 0)

_library = torch.library.Library("flashspark", "DEF")
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool want_lse) -> (Tensor, Tensor)")
_library.define(f"attention_out(Tensor q, Tensor k, Tensor v, {_OPTIONS}, Tensor(a!) out, Tensor(b!)? lse) -> ()")
_library.define(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? cache_seqlens, Tensor(c!)? q, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cu_seqlens_k_new, Tensor? block_table, Tensor? cache_batch_idx, "
    "Tensor? cache_leftpad, bool rotary_interleaved, bool q_rotary_per_token, Tensor? k_descale, Tensor? v_descale, "
    "Tensor? slot_mapping=None, Tensor? rotary_positions=None) -> ()"
)


def _attention_out(q, k, v, *rest):
    *options, out, lse = rest
    face = _call.FUNC if options[_HEAD + 7] is None and options[_HEAD + 8] is None else _call.CACHE
    _call.attend(face, (q, k, v), out, lse, False, False, tuple(options[:_HEAD]), tuple(options[_HEAD:]))


def _results(q, k, v, *rest):
    """Empty out and lse; an lse that nobody wants has no elements."""
    tail, want_lse = rest[_HEAD:-1], rest[-1]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=_call.out_dtype(q, tail[_call.OUTPUT_SCALE]))
    shape: tuple[int, ...] = (0,)
    if want_lse and tail[_call.CU_SEQLENS_Q] is not None:
        shape = (q.shape[1], q.shape[0])
    elif want_lse:
        shape = (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float32)


def _attention(q, k, v, *rest):
    out, lse = _results(q, k, v, *rest)
    _attention_out(q, k, v, *rest[:-1], out, lse if rest[-1] else None)
    return out, lse


def _append(
    k, v, k_cache, v_cache, cache_seqlens, q, rotary_cos, rotary_sin, cu_seqlens_k_new, block_table, cache_batch_idx,
    cache_leftpad, rotary_interleaved, q_rotary_per_token, k_descale, v_descale, slot_mapping=None,
    rotary_positions=None,
):  # fmt: skip
    _cache.append_kv(
        k, v, k_cache, v_cache, cache_seqlens, q=q, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cu_seqlens_k_new=cu_seqlens_k_new, block_table=block_table, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, rotary_interleaved=rotary_interleaved, q_rotary_per_token=q_rotary_per_token,
        k_descale=k_descale, v_descale=v_descale, slot_mapping=slot_mapping,
        rotary_positions=rotary_positions,
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_out", _attention_out, _device)
    _library.impl("append_kv", _append, _device)
torch.library.register_fake("flashspark::attention", _results, lib=_library)
torch.library.register_fake("flashspark::attention_out", lambda *_: None, lib=_library)
torch.library.register_fake("flashspark::append_kv", lambda *_: None, lib=_library)


def _attend(
    face: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    want_lse: bool,
    explain: bool,
    head: tuple[Any, ...],
    tail: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """_call.attend, through the operators."""
    if explain:
        raise ValueError("explain = True: must be False in flashspark.torch_ops; use the package's own function")
    softmax_scale, causal, left, right, softcap, *rest = head
    left, right = -1 if left is None else left, -1 if right is None else right
    options = (softmax_scale, bool(causal), left, right, float(softcap or 0), *rest, *(tail or _NO_TAIL))
    if out is None and lse is None:
        out, lse = torch.ops.flashspark.attention(*tensors, *options, want_lse)
        return out, lse if want_lse else None
    empty_out, empty_lse = _results(*tensors, *options, want_lse)
    out = empty_out if out is None else out
    lse = empty_lse if lse is None and want_lse else lse
    torch.ops.flashspark.attention_out(*tensors, *options, out, lse)
    return out, lse


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    *,
    q: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    rotary_interleaved: bool = True,
    q_rotary_per_token: bool = True,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    rotary_positions: torch.Tensor | None = None,
) -> None:
    """flashspark.append_kv as an operator."""
    torch.ops.flashspark.append_kv(
        k, v, k_cache, v_cache, cache_seqlens, q, rotary_cos, rotary_sin, cu_seqlens_k_new, block_table,
        cache_batch_idx, cache_leftpad, rotary_interleaved, q_rotary_per_token, k_descale, v_descale,
        slot_mapping, rotary_positions,
    )  # fmt: skip


flash_attn_func = partial(_ops.flash_attn_func, _attend=_attend)
flash_attn_varlen_func = partial(_ops.flash_attn_varlen_func, _attend=_attend)
flash_attn_with_kvcache = partial(_cache.flash_attn_with_kvcache, _attend=_attend, _append=append_kv)
