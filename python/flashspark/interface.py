"""The names of FlashAttention 4's interface module, which calls of it may be pointed to.

flash_attn_func and flash_attn_varlen_func have its lists of parameters and always return (out, lse), where lse is None
unless return_lse is given. _flash_attn_fwd, in which every call of it ends, returns the same two. The package's own
functions of the first two names have flash-attention 2's and 3's parameters, and return out alone unless asked.

Tensors that require gradients get them. Parameters that only a backward pass or FlashAttention 4's own kernels look at
are accepted and ignored. One that would change the result and is not supported (qv, gather_kv_indices) raises
NotImplementedError unless it is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ._fwd import _flash_attn_fwd
from ._kinds import pair
from ._tensors import Array

__all__ = ["_flash_attn_fwd", "flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    qv: Array | None = None,
    gather_kv_indices: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Array | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: Sequence[Array] | None = None,
    aux_scalars: Sequence[float] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Array, Array | None]:
    """Attention of a batch of sequences of the same length.

    q: (num_seqs, seqlen_q, num_heads, head_dim). k, v: (num_seqs, seqlen_k, num_heads_kv, ..). float16, bfloat16 or
    float32. The other arguments and the errors are _flash_attn_fwd's.

    Returns (out, lse): out like q with v's head size; lse float32 (num_seqs, num_heads, seqlen_q), or None.
    """
    left, right = pair(window_size)
    return _flash_attn_fwd(
        *(q, k, v, qv),
        softmax_scale=softmax_scale,
        causal=causal,
        softcap=softcap,
        window_size_left=left,
        window_size_right=right,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        score_mod=score_mod,
        mask_mod=mask_mod,
        return_lse=return_lse,
        aux_tensors=aux_tensors,
        deterministic=deterministic,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        gather_kv_indices=gather_kv_indices,
    )


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    qv: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    gather_kv_indices: Array | None = None,
    page_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Array | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Sequence[Array] | None = None,
    aux_scalars: Sequence[float] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Array, Array | None]:
    """Attention of sequences of different lengths.

    q: (total_q, num_heads, head_dim) with cu_seqlens_q int32 (num_seqs + 1,), else (num_seqs, seqlen_q, ..).
    k, v: (total_k, num_heads_kv, ..) with cu_seqlens_k, pages (num_pages, page_size, num_heads_kv, ..) with page_table
    int32 (num_seqs, pages), else (num_seqs, seqlen_k, ..). seqused_q, seqused_k: int32 (num_seqs,).
    The other arguments and the errors are _flash_attn_fwd's.

    Returns (out, lse): out like q with v's head size; lse float32 (num_heads, total_q), or (num_seqs, num_heads,
    seqlen_q) without cu_seqlens_q, or None.
    """
    left, right = pair(window_size)
    return _flash_attn_fwd(
        *(q, k, v, qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table),
        softmax_scale=softmax_scale,
        causal=causal,
        softcap=softcap,
        window_size_left=left,
        window_size_right=right,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        score_mod=score_mod,
        mask_mod=mask_mod,
        return_lse=return_lse,
        aux_tensors=aux_tensors,
        deterministic=deterministic,
        scheduler_metadata=scheduler_metadata,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        gather_kv_indices=gather_kv_indices,
    )
