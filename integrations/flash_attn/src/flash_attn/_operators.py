"""The functions of flash-attention's compiled extension, with their positional arguments, as xformers calls them."""

from __future__ import annotations

from typing import Any

import flashspark
import torch

Tensor = torch.Tensor


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash_attn_func. Returns (out, lse, what dropout did or an empty tensor, the generator's state)."""
    state = _state(q, p_dropout, gen)
    result = flashspark.flash_attn_func(
        q, k, v, p_dropout, softmax_scale, is_causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        return_softmax_lse=True, return_attn_probs=return_softmax, rng_state=state, out=out,
    )  # fmt: skip
    return _as_the_extension(q, result, state)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash_attn_varlen_func. Returns what fwd does. Raises NotImplementedError for leftpad_k."""
    if leftpad_k is not None:
        raise NotImplementedError("leftpad_k = given: must be None; flash_attn_with_kvcache takes cache_leftpad")
    if zero_tensors and out is not None:
        out.zero_()
    state = _state(q, p_dropout, gen)
    result = flashspark.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, return_softmax_lse=True,
        return_attn_probs=return_softmax, rng_state=state, block_table=block_table, seqused_k=seqused_k, out=out,
    )  # fmt: skip
    return _as_the_extension(q, result, state)


def _state(q: Tensor, p_dropout: float, gen: Any) -> Tensor | None:
    """Seed and offset of dropout, int64 (2,) on q's device, so that they can be returned; None without dropout."""
    return torch.randint(2**62, (2,), device=q.device, generator=gen) if p_dropout else None


def _as_the_extension(
    q: Tensor, result: tuple[Any, ...], state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, *dropped = result
    if not dropped or dropped[0] is None:
        dropped = [q.new_empty(0)]
    return out, lse, dropped[0], torch.zeros(2, dtype=torch.int64, device=q.device) if state is None else state


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: Any,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of fwd's q, k and v, written into dq, dk and dv where these are given, and the sums of dout * out
    over the head size. gen is not looked at: rng_state says what was dropped."""
    given = flashspark.flash_attn_backward(
        dout, q, k, v, out, softmax_lse, p_dropout, softmax_scale, is_causal, (window_size_left, window_size_right),
        softcap, alibi_slopes, deterministic, rng_state if p_dropout else None, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return (*given, _sums(dout, out).transpose(1, 2))


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: Any,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As bwd, of varlen_fwd. zero_tensors changes nothing: rows of no sequence have gradients of 0."""
    given = flashspark.flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, alibi_slopes, deterministic,
        rng_state if p_dropout else None, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return (*given, _sums(dout, out).transpose(0, 1))


def _sums(dout: Tensor, out: Tensor) -> Tensor:
    return torch.linalg.vecdot(dout.float(), out.float())
