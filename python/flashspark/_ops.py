"""flash_attn_func, flash_attn_varlen_func and the explanation of what would run.

Keyword arguments that both functions (and flash_attn_with_kvcache) share, beyond flash-attention's own:

sinks : (num_heads,) float32, float16 or bfloat16
    Logits that only enter the softmax denominator, one for each head. Not scaled.
out : like the result
    Written in place and returned; any strides with a contiguous last dimension. Allocated when None.
lse : float32, as below
    Written in place; allocated when None and asked for.
return_softmax_lse : bool
    Return (out, lse). lse is the natural logarithm of the softmax denominator, the sink included:
    (num_seqs, num_heads, seqlen_q), or (num_heads, total_q) with cu_seqlens_q. -inf for a row without keys.
seqused_q, seqused_k : (num_seqs,) int32
    Rows and keys in use. Rows past seqused_q are left untouched.
q_descale, k_descale, v_descale : float32 (num_seqs, num_heads_kv), any strides, or one element
    What a float8_e4m3 tensor is multiplied by; ignored for other types. None: 1.
output_scale : float32, one element
    Makes the result float8_e4m3, divided by it.
rel_logits : (num_seqs, seqlen_q, num_heads, extent) or (total_q, num_heads, extent)
    Relative-position bias: entry pos - j is added to the scaled score of key j where 0 <= pos - j < extent.
prefix_ranges : int32 (num_seqs, num_ranges, 2), or (total_q, 2) for each query
    PrefixLM: inclusive [first, last] keys. A query whose position lies in a range also sees all of that range.
    (-1, -1) is an unused slot.
prefix_clamp_window : bool
    A range, too, keeps only keys within window_size[0] of the query.
rswa_prefix_lens, rswa_window : (num_seqs,) int32, int
    With rswa_window > 0 a query sees keys up to its position that are among the first rswa_prefix_lens of the
    sequence, or less than rswa_window away.
causal_per_seq : (num_seqs,) int32
    1: this sequence is causal, 0: it is not. Takes the place of `causal`.
num_splits : int
    Parts that the keys are cut into, for short queries on long caches. 0: chosen (on a GPU from the lengths of the
    whole batch: the same bits on every run, but the last ones depend on the other sequences), 1: not cut.
implementation : str
    One of flashspark.implementations(), by force. None: the best that fits.
num_threads : int
    CPU threads; 0: all.
explain : bool
    Compute nothing; return the text that says which implementation would run and why.

Every function raises ValueError (a shape, stride, length, page, device or number breaks its rule), TypeError (a dtype
or the kind of an argument) or NotImplementedError (legal, but no implementation here has it; the text lists what each
one lacks). The text names the argument, its value and the rule. Nothing has been computed or written then.

Types: float32, float16 and bfloat16; float8_e4m3 for k and v, with any of the 16-bit types or e4m3 for q. bfloat16 and
float8_e4m3fn arrays of NumPy come from ml_dtypes. Inputs are never copied: the last dimension must be contiguous, the
other strides are free. head_dim is a multiple of 8 up to 512, and v's may differ from q's. The number of query heads
is a multiple of the number of KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._call import FUNC, Array, attend, refuse_dropout, window


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_softmax_lse: bool = False,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
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
    num_splits: int = 0,
    implementation: str | None = None,
    num_threads: int = 0,
    explain: bool = False,
    _attend: Callable[..., Any] = attend,
) -> Any:
    """Attention of a batch of sequences of one length.

    q: (num_seqs, seqlen_q, num_heads, head_dim). k: (num_seqs, seqlen_k, num_heads_kv, head_dim). v: the same with its
    own head size.
    dropout_p: must be 0. softmax_scale: None means head_dim ** -0.5.
    causal: query i sees key j when j <= i + seqlen_k - seqlen_q: the last query sees every key.
    window_size: (left, right) keys around that position, inclusive; -1 or None: open.
    softcap: scores become softcap * tanh(score / softcap); 0: off.
    alibi_slopes: float32 (num_heads,) or (num_seqs, num_heads); subtracts slope * distance.
    deterministic: bit-identical on every run, and independent of the other sequences of the batch.
    return_attn_probs: return (out, lse, None), the arity of flash-attention, whose third result is for dropout tests.

    Returns out (num_seqs, seqlen_q, num_heads, head_dim of v) in q's type (bfloat16 for a float8_e4m3 q), or (out, lse)
    with return_softmax_lse. The keyword arguments and the errors are described in flashspark._ops.
    """
    if dropout_p:
        refuse_dropout(dropout_p)
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else window(window_size)
    want_lse = return_softmax_lse or return_attn_probs
    # fmt: off
    if (
        sinks is None and alibi_slopes is None and seqused_q is None and seqused_k is None and q_descale is None
        and k_descale is None and v_descale is None and output_scale is None and rel_logits is None
        and causal_per_seq is None and prefix_ranges is None and rswa_prefix_lens is None and not rswa_window
    ):
        tail: tuple[Any, ...] = ()
    else:
        tail = (
            None, None, None, None, seqused_q, seqused_k, None, None, None, sinks, alibi_slopes, q_descale, k_descale,
            v_descale, output_scale, rel_logits, causal_per_seq, prefix_ranges, prefix_clamp_window, rswa_prefix_lens,
            rswa_window,
        )
    result = _attend(
        FUNC, (q, k, v), out, lse, want_lse, explain,
        (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads), tail,
    )
    # fmt: on
    if explain:
        return result
    if want_lse:
        return (*result, None) if return_attn_probs else result
    return result[0]


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None,
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
    block_table: Array | None = None,
    *,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_softmax_lse: bool = False,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
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
    num_splits: int = 0,
    implementation: str | None = None,
    num_threads: int = 0,
    explain: bool = False,
    _attend: Callable[..., Any] = attend,
) -> Any:
    """Attention of sequences of different lengths, laid end to end.

    q: (total_q, num_heads, head_dim). k: (total_k, num_heads_kv, head_dim), v the same with its own head size; or, with
    block_table, pages: (num_pages, page_size, num_heads_kv, ..), page_size a multiple of 16.
    cu_seqlens_q, cu_seqlens_k: int32 (num_seqs + 1,): where each sequence starts and the last one ends. With
    block_table, cu_seqlens_k only gives lengths, and may be None when seqused_k is given.
    max_seqlen_q, max_seqlen_k: int, upper bounds of the lengths; None: taken from the shapes.
    block_table: int32 (num_seqs, pages per sequence), any row stride; entries past a sequence's end are never read.
    scheduler_metadata: int32, from get_scheduler_metadata: decoding on a GPU starts sooner.
    The other arguments are flash_attn_func's.

    Returns out (total_q, num_heads, head_dim of v), or (out, lse) with lse (num_heads, total_q).
    """
    if dropout_p:
        refuse_dropout(dropout_p)
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else window(window_size)
    if cu_seqlens_q is None:
        raise TypeError("cu_seqlens_q = None: must be an int32 array (num_seqs + 1,)")
    if block_table is not None and cu_seqlens_k is not None:
        if seqused_k is None:
            seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        cu_seqlens_k = None
    want_lse = return_softmax_lse or return_attn_probs
    # fmt: off
    result = _attend(
        FUNC, (q, k, v), out, lse, want_lse, explain,
        (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads),
        (
            cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, seqused_q, seqused_k, block_table, None, None,
            sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, causal_per_seq,
            prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, scheduler_metadata,
        ),
    )
    # fmt: on
    if explain:
        return result
    if want_lse:
        return (*result, None) if return_attn_probs else result
    return result[0]


def attention_explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which implementation a call would get and why, or what each one lacks; computes nothing.

    attention_explain(flash_attn_func, q, k, v, causal=True): the call's own arguments, and its errors for bad ones.
    """
    return str(function(*args, **kwargs, explain=True))
