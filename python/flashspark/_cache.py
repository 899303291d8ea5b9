"""append_kv, which writes into a KV cache, and flash_attn_with_kvcache, attention over one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import _core
from ._call import (
    CACHE,
    Mode,
    as_torch_raises,
    attend,
    call,
    is_plain,
    learn_torch,
    rare_options,
    required,
    respelled,
    respelling,
)
from ._kinds import any_flag, flag, integer, is_open, one_spelling, pair, refuse_qv, settled
from ._layout import contiguous_rows, copied, hand_over
from ._signature import APPEND
from ._tensors import Array, array, bump, int32_full, is_torch, lengths, stored, sum_of

_NUMBERS = frozenset({int, bool})
_STORED = ("k", "v", "k_cache", "v_cache", "q", "rotary_cos", "rotary_sin")  # in the order of their bits in stored_as
_INDEX = {name: index for index, name in enumerate(APPEND.names)}


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
    rotary_seqlens: Array | None = None,
    cu_seqlens_q: Array | None = None,
    seqused_q: Array | None = None,
    check_device: bool = False,
    strict: bool = False,
    page_table: Array | None = None,
) -> None:
    """Writes new keys and values into a dense or paged cache, in place.

    k, v: (num_seqs, seqlen_new, num_heads_kv, head_dim), or (total, num_heads_kv, head_dim) with cu_seqlens_k_new.
    k_cache, v_cache: (num_seqs, seqlen_cache, num_heads_kv, head_dim), or pages with block_table (or its other name,
    page_table). Any strides with a contiguous last dimension; v_cache may lie inside k_cache's rows. A float8_e4m3
    cache takes rows of wider types and stores them divided by k_descale and v_descale. k and v must not overlap the
    caches, and no two rows may go to the same place.
    cache_seqlens: int32 (num_seqs,): keys in the cache before the call; row i goes to cache_seqlens + i. None: 0.
    cache_batch_idx: int32 (num_seqs,): the cache row, or the row of block_table, of each sequence.
    cache_leftpad: int32 (num_seqs,): accepted for symmetry with the attention, and ignored: as in flash-attention,
    rows are placed and rotated by positions in the cache, padding included.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotary embedding of the new keys, and of q **in place** if it
    is given. Row i of q is rotated by position cache_seqlens + i, or by cache_seqlens without q_rotary_per_token.
    rotary_interleaved: rotate pairs (0, 1), (2, 3) ..; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) ..
    rotary_seqlens: int32 (num_seqs,): replace cache_seqlens in these positions, for keys and queries.
    q: (num_seqs, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with cu_seqlens_q int32
    (num_seqs + 1,), whose None then means cu_seqlens_k_new. q may have more or fewer rows than k. seqused_q: int32
    (num_seqs,): rows to rotate; the rest are left untouched.
    slot_mapping: int64 (num_tokens,), instead of lengths and block_table: row t of k and v, which are (total,
    num_heads_kv, head_dim) with total >= num_tokens, goes to row slot_mapping[t] % page_size of page
    slot_mapping[t] // page_size; negative entries are skipped. Any page_size; descales are those of a single sequence.
    rotary_positions: int64, at least num_tokens: with slot_mapping and rotary_cos, the position by which row t of k and
    of q (total, num_heads_q, head_dim) is rotated; q's also where slot_mapping[t] is negative. With vLLM's
    cos_sin_cache: rotary_cos, rotary_sin = cos_sin_cache.chunk(2, -1).
    check_device: on a GPU, check lengths, pages and slots first, and raise ValueError as on the CPU. This waits for the
    GPU. Otherwise a GPU skips rows that have no place in the cache.
    strict: raise ValueError instead of copying k and v if their last dimension is not contiguous.
    """
    spelled: dict[str, str] = {}
    if page_table is not None:
        block_table = one_spelling(spelled, block_table=block_table, page_table=page_table)
    # fmt: off
    values = (
        0, k, v, k_cache, v_cache, cache_seqlens, q, rotary_cos, rotary_sin, cu_seqlens_k_new, block_table,
        cache_batch_idx, cache_leftpad, rotary_interleaved, q_rotary_per_token, k_descale, v_descale,
        slot_mapping, rotary_positions, rotary_seqlens, cu_seqlens_q, seqused_q, check_device,
    )
    # fmt: on
    strict = any_flag(strict=strict)
    if not _append_quickly(values):
        try:
            _append_any(values, strict)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise respelled(error, spelled) from None
    bump(k_cache, v_cache, q)


def _append_quickly(values: tuple[Any, ...]) -> bool:
    """Passes plain torch tensors on unconverted. False: nothing has been written, and the general path must follow."""
    if not all(x is None or type(x) in _NUMBERS or is_plain(x) for x in values):
        return False
    try:
        _core.append_kv(*values)
    except MemoryError as error:
        raise as_torch_raises(error) from None
    except Exception:  # noqa: BLE001 - the general path copies what must be copied, or reports what is wrong
        return False
    return True


def _append_any(values: tuple[Any, ...], strict: bool) -> None:
    learn_torch(values[_INDEX["k"]])
    args = settled(APPEND, 0, values)
    for name in ("k", "v", "k_cache", "v_cache"):
        required(name, args[_INDEX[name]])
    q = args[_INDEX["q"]]
    if not strict:
        for name in ("k", "v", "q"):
            args[_INDEX[name]] = contiguous_rows(args[_INDEX[name]])
    memory = args[_INDEX["q"]]
    for bits, name in enumerate(_STORED):
        args[_INDEX[name]], code = stored(args[_INDEX[name]], bits)
        args[0] |= code
    call(_core.append_kv, APPEND, tuple(args))
    hand_over(memory, q)


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
    rotary_seqlens: Array | None = None,
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
    attention_chunk: int = 0,
    causal_per_seq: Array | None = None,
    scheduler_metadata: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    num_threads: int = 0,
    check_device: bool = False,
    strict: bool = False,
    explain: bool = False,
    s_aux: Array | None = None,
    learnable_sink: Array | None = None,
    page_table: Array | None = None,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    qv: None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: Sequence[Array] | None = None,
    _attend: Callable[..., Any] = attend,
    _append: Callable[..., None] = append_kv,
) -> Any:
    """Attention over a KV cache. k and v, if given, are first written into the cache after the keys it holds.

    q: (num_seqs, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens_q.
    k_cache, v_cache: (num_rows, seqlen_cache, num_heads_kv, head_dim), or with block_table
    (num_pages, page_size, num_heads_kv, head_dim): pages of any size up to 2^20, fastest on a GPU in multiples of 16.
    Any strides; v_cache may lie inside k_cache's rows.
    k, v: (num_seqs, seqlen_new, num_heads_kv, head_dim), or (total, num_heads_kv, head_dim) with cu_seqlens_k_new.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotary embedding of row i of k by position cache_seqlens + i.
    Row i of q is rotated by the same position if the mask is causal, windowed or chunked, else every row by
    cache_seqlens. Needs k and v, than which q may have more or fewer rows. q itself is not changed. rotary_seqlens:
    int32 (num_seqs,): replace cache_seqlens in these positions.
    cache_seqlens: int32 (num_seqs,) or int: keys in the cache before the call. None: all of a cache or of the pages of
    block_table.
    cache_batch_idx: int32 (num_seqs,): the cache row of each sequence; with block_table, the row of it.
    cache_leftpad: int32 (num_seqs,): keys to skip at the start, counted in cache_seqlens and in rotary positions. A
    sequence that is all padding has no keys.
    block_table: int32 (num_seqs, pages per sequence); page_table is another name of this argument.
    scheduler_metadata: int32, from get_scheduler_metadata: saves time at the start of decoding on a GPU.
    score_mod, mask_mod, aux_tensors and the other arguments are flash_attn_func's. With explain nothing is written into
    the cache.

    Returns out, like q with v's head size; (out, lse) with return_softmax_lse, return_lse or return_attn_probs.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else pair(window_size)
    want_lse, mode, spelled = False, None, None
    if return_softmax_lse is not False or return_lse is not False or return_attn_probs is not False:
        want_lse = any_flag(
            return_softmax_lse=return_softmax_lse, return_lse=return_lse, return_attn_probs=return_attn_probs
        )
    if qv is not None or s_aux is not None or learnable_sink is not None or page_table is not None:
        refuse_qv(qv)
        sinks = one_spelling(spelled := {}, sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
        block_table = one_spelling(spelled, block_table=block_table, page_table=page_table)
    if explain is not False or strict is not False or spelled is not None:
        mode = Mode(any_flag(explain=explain), any_flag(strict=strict), spelled or {})
    if cache_seqlens is not None and getattr(cache_seqlens, "ndim", 0) == 0:
        cache_seqlens = _same_for_all(cache_seqlens, q, cu_seqlens_q)
    seqused_k = cache_seqlens
    # fmt: off
    if k is not None or v is not None:
        seqused_k = _lengths_with_new(k, v, cache_seqlens, cu_seqlens_k_new)
    elif (
        rotary_cos is not None or rotary_sin is not None or cu_seqlens_k_new is not None or rotary_seqlens is not None
    ):
        _refuse_without_keys(
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_seqlens=rotary_seqlens,
        )
    tail: tuple[Any, ...] = (
        cu_seqlens_q, max_seqlen_q, None, max_seqlen_k, seqused_q, seqused_k, block_table, cache_leftpad,
        cache_batch_idx, scheduler_metadata,
    )
    tail += rare_options(
        sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, causal_per_seq,
        prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, attention_chunk, check_device,
    )
    head = (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads)
    checks = _attend is attend
    if score_mod is not None or mask_mod is not None or aux_tensors is not None:
        from ._user_functions import attending

        _attend = attending(_attend, score_mod, mask_mod, aux_tensors)
    if k is not None and not (mode and mode.explain):
        if checks:
            # Checked before the new rows are written, so that a bad argument leaves the cache as it was.
            tensors = (q, k_cache, v_cache)
            _attend(CACHE, tensors, out, lse, want_lse, mode, head, tail, function=_core.attention_validate)
        rotates = rotary_cos is not None or rotary_sin is not None
        if rotates:
            q = copied("q", q)
        append = _append if spelled is None else partial(respelling, spelled, _append)
        append(
            k, v, k_cache, v_cache, cache_seqlens, q=q if rotary_cos is not None else None, rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, cu_seqlens_k_new=cu_seqlens_k_new, block_table=block_table,
            cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, rotary_interleaved=rotary_interleaved,
            q_rotary_per_token=rotates and (flag("causal", causal) or not _sees_all(left, right, attention_chunk)),
            k_descale=k_descale, v_descale=v_descale, rotary_seqlens=rotary_seqlens,
            cu_seqlens_q=cu_seqlens_q if rotates else None, seqused_q=seqused_q if rotates else None,
            check_device=check_device, strict=strict,
        )
    # fmt: on
    result = _attend(CACHE, (q, k_cache, v_cache), out, lse, want_lse, mode, head, tail)
    return result if want_lse or (mode and mode.explain) else result[0]


def _sees_all(left: Any, right: Any, attention_chunk: Any) -> bool:
    """Whether a mask that is not causal shows every key to every query; all rows of q then have the same position."""
    chunk = 0 if attention_chunk is None else integer("attention_chunk", attention_chunk)
    return chunk == 0 and is_open("window_size[0]", left) and is_open("window_size[1]", right)


def _same_for_all(value: Any, q: Array, cu_seqlens_q: Array | None) -> Array:
    """cache_seqlens, given as one number, as int32 (num_seqs,)."""
    number = integer("cache_seqlens", value)
    if not 0 <= number < 2**31:
        raise ValueError(f"cache_seqlens = {number}: must be from 0 to 2147483647")
    rows = q if cu_seqlens_q is None else cu_seqlens_q
    if not getattr(rows, "shape", None):
        array("q" if cu_seqlens_q is None else "cu_seqlens_q", rows)
        raise ValueError(f"{'q' if cu_seqlens_q is None else 'cu_seqlens_q'}.shape = (): must have a dimension")
    return int32_full(q, rows.shape[0] if cu_seqlens_q is None else max(rows.shape[0] - 1, 0), number)


def _refuse_without_keys(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} = given: must be None without k and v")


def _lengths_with_new(k: Array, v: Array, cache_seqlens: Any, cu_seqlens_k_new: Any) -> Array:
    """The length of each sequence including the new keys."""
    if k is None or v is None:
        raise ValueError(f"{'k' if k is None else 'v'} = None: k and v go together")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens = None: must be given with k and v")
    if cu_seqlens_k_new is not None:
        new = lengths("cu_seqlens_k_new", cu_seqlens_k_new)
        return sum_of(cache_seqlens=cache_seqlens, cu_seqlens_k_new=new)
    if k.is_nested if is_torch(k) else not hasattr(k, "shape"):
        array("k", k)  # raises, naming k
    return sum_of(cache_seqlens=cache_seqlens, k=k.shape[1] if len(k.shape) > 1 else 0)
