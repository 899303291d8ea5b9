"""flash-attention's functions of q, k and v in one tensor. Its parts are read in place.

All of them take flash_attn_func's or flash_attn_varlen_func's other arguments as well, and raise what those raise;
ValueError names qkv or kv if its shape breaks the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._kinds import integer
from ._ops import flash_attn_func, flash_attn_varlen_func
from ._tensors import Array


def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    _function: Callable[..., Any] = flash_attn_func,
    **options: Any,
) -> Any:
    """flash_attn_func of the parts of qkv: (num_seqs, seqlen, 3, num_heads, head_dim).

    num_heads_q: qkv is (num_seqs, seqlen, num_heads_q + 2 * num_heads_kv, head_dim), as FlashAttention 3 packs grouped
    heads.
    Returns out (num_seqs, seqlen, num_heads, head_dim), or what flash_attn_func returns beside it.
    """
    q, k, v = _three(qkv, 4, num_heads_q)
    return _function(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **options,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    _function: Callable[..., Any] = flash_attn_func,
    **options: Any,
) -> Any:
    """flash_attn_func of q (num_seqs, seqlen_q, num_heads, head_dim) and the parts of kv: (num_seqs, seqlen_k, 2,
    num_heads_kv, head_dim).

    Returns out, like q, or what flash_attn_func returns beside it.
    """
    k, v = _parts("kv", kv, 5, 2)
    return _function(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **options,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    _function: Callable[..., Any] = flash_attn_varlen_func,
    **options: Any,
) -> Any:
    """flash_attn_varlen_func of the parts of qkv: (total, 3, num_heads, head_dim).

    cu_seqlens: int32 (num_seqs + 1,), of queries and keys. max_seqlen: an upper bound of the lengths, or None.
    num_heads_q: qkv is (total, num_heads_q + 2 * num_heads_kv, head_dim).
    Returns out (total, num_heads, head_dim), or what flash_attn_varlen_func returns beside it.
    """
    q, k, v = _three(qkv, 3, num_heads_q)
    return _function(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, **options,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    _function: Callable[..., Any] = flash_attn_varlen_func,
    **options: Any,
) -> Any:
    """flash_attn_varlen_func of q (total_q, num_heads, head_dim) and the parts of kv: (total_k, 2, num_heads_kv,
    head_dim).

    Returns out, like q, or what flash_attn_varlen_func returns beside it.
    """
    k, v = _parts("kv", kv, 4, 2)
    return _function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **options,
    )  # fmt: skip


def _three(qkv: Any, dimensions: int, num_heads_q: int | None) -> tuple[Any, Any, Any]:
    """q, k and v of `dimensions` each."""
    if num_heads_q is None:
        q, k, v = _parts("qkv", qkv, dimensions + 1, 3)
        return q, k, v
    shape = _shape("qkv", qkv, dimensions)
    heads = integer("num_heads_q", num_heads_q)
    if not 0 < heads < shape[-2] or (shape[-2] - heads) % 2:
        raise ValueError(
            f"num_heads_q = {heads}: must leave an even number of qkv's {shape[-2]} heads for keys and values"
        )
    end = (heads + shape[-2]) // 2
    return qkv[..., :heads, :], qkv[..., heads:end, :], qkv[..., end:, :]


def _parts(name: str, packed: Any, dimensions: int, count: int) -> list[Any]:
    shape = _shape(name, packed, dimensions)
    if shape[-3] != count:
        raise ValueError(f"{name}.shape[{dimensions - 3}] = {shape[-3]}: must be {count}")
    return [packed[..., part, :, :] for part in range(count)]


def _shape(name: str, packed: Any, dimensions: int) -> tuple[int, ...]:
    shape = getattr(packed, "shape", None)
    if shape is None:
        raise TypeError(f"{name} = {type(packed).__name__}: must be an array or a tensor")
    if len(shape) != dimensions:
        raise ValueError(f"{name}.shape = {tuple(shape)}: must be of {dimensions} dimensions")
    return tuple(shape)
