"""`_flash_attn_fwd`: the function that every call of FlashAttention 4 ends in, with its names and meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import mods
from ._call import FORWARD, Mode, attend, rare_options
from ._kinds import any_flag, flag, integer, refuse_qv
from ._tensors import Array, empty_lse, empty_out

# Arguments that tune FlashAttention 4's own kernels: they do not change the result, so any value is accepted.
_TUNING = frozenset(
    {
        *("tile_mn", "m_block_size", "n_block_size", "mma_pv_is_rs", "intra_wg_overlap", "num_threads", "pack_gqa"),
        *("_arch", "_compute_capability", "fp8_kv_dequant", "seqlen_k_per_split"),
        *("disable_scheduler_metadata", "min_seqlen_k", "aux_tensor_leading_dims"),
    }
)
# Arguments that would change the result.
_UNSUPPORTED = frozenset({"gather_kv_indices", "gather_kv_valid_length"})


class _Native(NamedTuple):
    """The native arguments that a tag of flashspark.mods and its aux_tensors stand for."""

    rel_logits: Array | None = None
    prefix_ranges: Array | None = None
    prefix_clamp_window: bool = False
    rswa_prefix_lens: Array | None = None
    rswa_window: int = 0


_NO_MODS = _Native()
_TAGS = (mods.RelBias, mods.MmPrefix, mods.RSwa)


def _flash_attn_fwd(
    q: Array,
    k: Array,
    v: Array,
    qv: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Array | None = None,
    num_splits: int = 1,
    score_mod: mods.RelBias | Callable[..., Any] | None = None,
    mask_mod: mods.MmPrefix | mods.RSwa | Callable[..., Any] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    lse: Array | None = None,
    aux_tensors: Sequence[Array] | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    output_scale: Array | None = None,
    dynamic_causal: Array | None = None,
    compile_only: bool = False,
    *,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    scheduler_metadata: Array | None = None,
    implementation: str | None = None,
    attention_chunk: int = 0,
    check_device: bool = False,
    strict: bool = False,
    explain: bool = False,
    aux_scalars: Sequence[float] | None = None,
    block_sparse_tensors: Any = None,
    **others: Any,
) -> Any:
    """Attention with the interface of FlashAttention 4's forward.

    q: (total_q, num_heads, head_dim) with cu_seqlens_q, else (num_seqs, seqlen_q, num_heads, head_dim).
    k, v: (total_k, num_heads_kv, ..) with cu_seqlens_k, pages (num_pages, page_size, num_heads_kv, ..) with page_table,
    else (num_seqs, seqlen_k, num_heads_kv, ..).
    max_seqlen_q, max_seqlen_k: upper bounds; None: taken from the shapes. page_table without seqused_k: all of its
    pages are in use.
    window_size_left, window_size_right: inclusive; None: open. As in FlashAttention 4, both sides are open if their sum
    is negative (causal counts as a right side of 0). Other negative sides shift the window there; they raise
    NotImplementedError here. softcap: None or 0: off.
    learnable_sink: (num_heads,) sinks. dynamic_causal: int32 (num_seqs,), replaces `causal`.
    score_mod, mask_mod: None, a tag of flashspark.mods with its data in aux_tensors, or a function in FlashAttention
    4's form, as in flashspark._ops. As there, causal and the window are ignored beside a mask function.
    q_descale, k_descale, v_descale: float32 (num_seqs, num_heads_kv), for float8_e4m3 tensors.
    deterministic: the same bits on every run, whatever the rest of the batch.
    attention_chunk, check_device, strict, and what is copied: as in flashspark._ops.
    scheduler_metadata: int32, from get_scheduler_metadata; FlashAttention 4's own is ignored.
    compile_only: allocate the results and return without computing. torch's fake tensors have the same effect.
    Arguments that tune FlashAttention 4's kernels are accepted and ignored. One that would change the result and is not
    supported raises NotImplementedError, and one of an unknown name raises TypeError, unless it is None or False.

    Returns (out, lse); lse is None unless return_lse or lse is given.
    """
    refuse_qv(qv)
    for name, value in others.items():
        if value is None or value is False or name in _TUNING:
            continue
        if name in _UNSUPPORTED:
            raise NotImplementedError(f"{name} = given: must be None, it is not supported")
        raise TypeError(f"{name} = {value!r:.80}: flashspark's _flash_attn_fwd has no such argument")
    mode = None
    if return_lse is not False or explain is not False or strict is not False or compile_only is not False:
        return_lse, compile_only = any_flag(return_lse=return_lse), any_flag(compile_only=compile_only)
        explain, strict = any_flag(explain=explain), any_flag(strict=strict)
        mode = Mode(explain, strict) if explain or strict else None
    native, run = _NO_MODS, attend
    if isinstance(score_mod, _TAGS) or isinstance(mask_mod, _TAGS):
        native = _native_arguments(score_mod, mask_mod, aux_tensors)
        if aux_scalars or block_sparse_tensors is not None:
            raise NotImplementedError("aux_scalars, block_sparse_tensors = given: must be None with flashspark.mods")
    elif (
        score_mod is not None or mask_mod is not None or aux_tensors is not None or block_sparse_tensors is not None
        or aux_scalars is not None
    ):  # fmt: skip
        from ._user_functions import attending

        run = attending(attend, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    if compile_only or is_fake(q):
        out = out if out is not None else empty_out(q, v, output_scale)
        return out, lse if lse is not None or not return_lse else empty_lse(q, cu_seqlens_q is not None)
    left, right = window_size_left, window_size_right
    if mask_mod is not None and not isinstance(mask_mod, _TAGS):
        causal, left, right = False, None, None
    if left is not None or right is not None:
        left, right = _window(causal, left, right, mask_mod is not None)
    if isinstance(mask_mod, _TAGS):  # both masks are causal, and PrefixLM's tag may have a window of its own
        causal, left = True, left if getattr(mask_mod, "window_left", None) is None else mask_mod.window_left
    rel_logits, prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window = native
    # fmt: off
    tail: tuple[Any, ...] = (
        cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, seqused_q, seqused_k, page_table, None, None,
        scheduler_metadata if hasattr(scheduler_metadata, "dtype") else None,
    )
    tail += rare_options(
        learnable_sink, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, dynamic_causal,
        prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, attention_chunk, check_device,
    )
    # fmt: on
    head = (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, 0)
    return run(FORWARD, (q, k, v), out, lse, return_lse, mode, head, tail)


def _window(causal: Any, left: Any, right: Any, masked: bool) -> tuple[int | None, int | None]:
    """The window with negative sides read as FlashAttention 4 does: open, or shifting it, which is not supported."""
    left = None if left is None else integer("window_size_left", left)
    right = None if right is None else integer("window_size_right", right)
    if (left is None or left >= 0) and (right is None or right >= 0):
        return left, right
    if masked:  # FlashAttention 4 applies no window beside a mask function
        return None if left is None or left < 0 else left, None if right is None or right < 0 else right
    if flag("causal", causal):
        right = 0
    if left is not None and right is not None and left + right < 0:
        return None, None
    for name, side in (("window_size_left", left), ("window_size_right", right)):
        if side is not None and side < 0:
            raise NotImplementedError(f"{name} = {side}: a negative side, which shifts the window, is not supported")
    return left, right


def _native_arguments(score_mod: Any, mask_mod: Any, aux_tensors: Sequence[Array] | None) -> _Native:
    if aux_tensors is not None and not isinstance(aux_tensors, (list, tuple)):
        raise TypeError(f"aux_tensors = {_describe(aux_tensors)}: must be a list of tensors, or None")
    aux = list(aux_tensors or ())
    if score_mod is not None and mask_mod is not None:
        raise NotImplementedError("score_mod = given: must be None with mask_mod, they share aux_tensors")
    if score_mod is not None:
        if not isinstance(score_mod, mods.RelBias):
            raise TypeError(f"score_mod = {_describe(score_mod)}: must be flashspark.mods.RelBias or a function")
        _require_aux(aux, (1,), "[rel_logits]")
        return _Native(rel_logits=aux[0])
    if isinstance(mask_mod, mods.MmPrefix):
        # Ranges for each query come with cu_seqlens_q, which the call has as an argument already.
        _require_aux(aux, (1, 2), "[ranges] or [ranges, cu_seqlens_q]")
        return _Native(prefix_ranges=aux[0], prefix_clamp_window=mask_mod.clamp_window)
    if isinstance(mask_mod, mods.RSwa):
        _require_aux(aux, (2,) if mask_mod.window is None else (1, 2), "[prefix_lens, window]")
        width = mask_mod.window if mask_mod.window is not None else int(aux[1][0])
        return _Native(rswa_prefix_lens=aux[0], rswa_window=width)
    raise TypeError(f"mask_mod = {_describe(mask_mod)}: must be MmPrefix or RSwa of flashspark.mods, or a function")


def _require_aux(aux: list[Array], counts: tuple[int, ...], meaning: str) -> None:
    if len(aux) not in counts:
        raise ValueError(f"aux_tensors = {len(aux)} tensors: must be {meaning}")


def _describe(mod: Any) -> str:
    return getattr(mod, "__name__", None) or type(mod).__name__


def is_fake(q: Array) -> bool:
    return type(q).__name__ == "FakeTensor" and type(q).__module__.startswith("torch.")
