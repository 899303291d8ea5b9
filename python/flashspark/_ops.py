"""flash_attn_func, flash_attn_varlen_func and attention_explain.

The two functions and flash_attn_with_kvcache share these keyword arguments, beyond flash-attention's own; rng_state,
like dropout_p, is not for the latter:

sinks : (num_heads,) float32, float16 or bfloat16
    Logits that only enter the softmax denominator, one for each head, not scaled. s_aux (vLLM, transformers) and
    learnable_sink (FlashAttention 4) are other names of this argument.
out : like the result
    Written in place and returned; any strides. None: allocated.
lse : float32, as below
    Written in place. None: allocated if it is to be returned.
return_softmax_lse : bool
    Return (out, lse). lse is the natural logarithm of the softmax denominator, the sink included:
    (num_seqs, num_heads, seqlen_q), or (num_heads, total_q) with cu_seqlens_q. -inf for a row without keys. return_lse
    is another name of this argument.
seqused_q, seqused_k : (num_seqs,) int32
    Query rows and keys in use. The result's rows past seqused_q are left untouched.
q_descale, k_descale, v_descale : float32 (num_seqs, num_heads_kv), any strides, or one element
    Factors of float8_e4m3 tensors; ignored for other types. None: 1.
output_scale : float32, one element
    The result is divided by it and stored as float8_e4m3.
rel_logits : (num_seqs, seqlen_q, num_heads, extent) or (total_q, num_heads, extent)
    Relative-position bias: entry pos - j is added to the scaled score of key j where 0 <= pos - j < extent.
prefix_ranges : int32 (num_seqs, num_ranges, 2), or (total_q, 2) for each query
    PrefixLM: inclusive [first, last] keys. A query whose position lies in a range also sees all of that range.
    (-1, -1) marks an unused slot.
prefix_clamp_window : bool
    Ranges, too, keep only keys within window_size[0] of the query.
rswa_prefix_lens, rswa_window : (num_seqs,) int32, int
    With rswa_window > 0 a query sees keys up to its position that are among the first rswa_prefix_lens of the
    sequence, or less than rswa_window away.
attention_chunk : int
    Queries see only keys of their own chunk of this many positions (Llama 4). 0: off.
causal_per_seq : (num_seqs,) int32
    1: this sequence is causal, 0: it is not. Replaces `causal`.
num_splits : int
    Parts that the keys are split into, for short queries on long caches. 1: no split. 0: chosen automatically; on a GPU
    from the lengths of the whole batch, so that every run gives the same bits, but the last bits of a result may depend
    on the other sequences.
implementation : str
    One of flashspark.implementations(), which then must fit. None: the best one that fits.
num_threads : int
    CPU threads; 0: all.
check_device : bool
    On a GPU, check all lengths, offsets and page numbers before anything is computed, and raise ValueError for those
    out of range, as on the CPU. This waits for the GPU and is not possible while a graph is being captured.
    FLASHSPARK_CHECK=1 turns it on for every call. Without it a GPU reads and writes nothing outside the tensors, but
    its results for such metadata mean nothing.
strict : bool
    Raise ValueError where a tensor would have to be copied (see below).
explain : bool
    Compute nothing; return a text that says which implementation would run and why.
score_mod, mask_mod : functions in FlashAttention 4's form
    score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors[, aux_scalars]) gives the new score, from one
    that is scaled, capped and biased by the arguments above. mask_mod(b_idx, h_idx, .., the same) says which keys are
    kept, of those that the other masks keep. Positions count from 0 within each sequence; seqlen_info has seqlen_q,
    seqlen_k, offset_q and offset_k. @cute.jit functions are taken, too. See docs/flex.md.
aux_tensors, aux_scalars : list of tensors, list of numbers
    What the functions are given. Contents and numbers may change between calls without compiling.
block_sparse_tensors : FlashAttention 4's BlockSparseTensorsTorch, or flashspark.BlockSparseTensors
    Lists of key blocks for each block of queries; others are not computed. Full blocks do not ask mask_mod.
rng_state : int64 or uint64 (2,) on q's device, or a tuple of two ints
    Seed and offset of dropout: what they drop is the same on every implementation and device, for any lengths, tiles
    and splits, and a CUDA graph that was captured with a tensor drops what its contents then say. None: drawn anew for
    each call by the library that q is from: torch's default generator of the device (torch.manual_seed repeats it,
    every replay of a CUDA graph draws again), NumPy's (numpy.random.seed) or CuPy's. JAX has none: it must be given.
pack_gqa, sm_margin
    These tune FlashAttention 3's kernels and are ignored.
qv
    FlashAttention 3's second query, which is not supported: anything but None raises NotImplementedError.

An argument that has several names may be given under any of them; two different values raise ValueError.

Every function raises ValueError (a shape, stride, length, page, device or number breaks its rule), TypeError (a dtype
or the kind of an argument) or NotImplementedError (legal, but no implementation supports it; the text lists what each
one lacks). The text names the argument, its value and the rule. Nothing has been computed or written then.

Types: float32, float16 and bfloat16; float8_e4m3 for k and v, with a 16-bit type or e4m3 for q. NumPy's bfloat16 and
float8_e4m3fn come from ml_dtypes. head_dim may be anything up to 512, and v's may differ from q's. The number of query
heads is a multiple of the number of KV heads. Numbers may be NumPy scalars or 0-d arrays and tensors.

Nothing is copied if head_dim is a multiple of 8, the last dimension is contiguous and, on a GPU, every row is aligned
to 16 bytes (32 for float32); the other strides are free. All else is copied at every call: q, k and v whole, a paged
cache with all its pages, and the result. With strict such calls raise ValueError instead.

torch tensors that require gradients get them: q, k, v, sinks, alibi_slopes, rel_logits and aux_tensors, of out and of
lse. Where none is computed (other arguments; a cache, float8_e4m3, output_scale; out and lse as arguments) they raise
ValueError unless torch.no_grad() is in force. deterministic holds for the backward pass as well. The version counters
of tensors written in place are incremented, as torch expects.

The functions repeat their lists of parameters in full, since callers (transformers, inspect, editors) read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ._call import FUNC, Mode, attend, rare_options
from ._kinds import any_flag, one_spelling, pair, refuse_qv
from ._tensors import Array, lengths


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
    attention_chunk: int = 0,
    causal_per_seq: Array | None = None,
    scheduler_metadata: Array | None = None,
    num_splits: int = 0,
    implementation: str | None = None,
    num_threads: int = 0,
    check_device: bool = False,
    strict: bool = False,
    explain: bool = False,
    s_aux: Array | None = None,
    learnable_sink: Array | None = None,
    return_lse: bool = False,
    qv: None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: Sequence[Array] | None = None,
    aux_scalars: Sequence[float] | None = None,
    block_sparse_tensors: Any = None,
    rng_state: Array | tuple[int, int] | None = None,
    _attend: Callable[..., Any] = attend,
) -> Any:
    """Attention of a batch of sequences of the same length.

    q: (num_seqs, seqlen_q, num_heads, head_dim). k: (num_seqs, seqlen_k, num_heads_kv, head_dim). v: like k, with a
    head size of its own.
    dropout_p: 0 <= dropout_p < 1: the part of the probabilities, a multiple of 2^-15, that become 0; the others are
    divided by 1 - dropout_p. lse is that of all of them. softmax_scale: None: head_dim ** -0.5.
    causal: query i sees key j if j <= i + seqlen_k - seqlen_q: the last query sees every key.
    window_size: (left, right) keys around that position, inclusive; None or negative: open.
    softcap: scores become softcap * tanh(score / softcap); 0: off.
    alibi_slopes: float32 (num_heads,) or (num_seqs, num_heads); slope * distance is subtracted from scores.
    deterministic: a sequence's results are bitwise the same on every run, whatever the rest of the batch and the number
    of threads. On a GPU a row's bits depend on its own query and keys alone, so that a prompt may also be split into
    chunks; on the CPU the results of chunks may differ in the last bits of float32.
    return_attn_probs: return (out, lse, S_dmask). Without dropout S_dmask is None. With it, and for tests only, since
    it takes the memory and time that this function exists to save, it holds the probabilities (num_seqs, num_heads,
    seqlen_q, seqlen_k) in the result's type, before they are divided, and negative where they are dropped.

    Returns out (num_seqs, seqlen_q, num_heads, head_dim of v) in q's type (bfloat16 for a float8_e4m3 q), or (out, lse)
    with return_softmax_lse. The keyword arguments and the errors are described in flashspark._ops.
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else pair(window_size)
    want_lse, mode, spelled = False, None, None
    if return_softmax_lse is not False or return_attn_probs is not False or return_lse is not False:
        return_attn_probs = any_flag(return_attn_probs=return_attn_probs)
        want_lse = any_flag(return_softmax_lse=return_softmax_lse, return_lse=return_lse) or return_attn_probs
    if qv is not None or s_aux is not None or learnable_sink is not None:
        refuse_qv(qv)
        sinks = one_spelling(spelled := {}, sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
    # fmt: off
    tail = rare_options(
        sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, causal_per_seq,
        prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, attention_chunk, check_device,
    )
    if tail or seqused_q is not None or seqused_k is not None or scheduler_metadata is not None:
        tail = (None, None, None, None, seqused_q, seqused_k, None, None, None, scheduler_metadata, *tail)
    plain = _attend
    if (
        score_mod is not None or mask_mod is not None or aux_tensors is not None or aux_scalars is not None
        or block_sparse_tensors is not None
    ):
        _attend = _attending(_attend, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    # fmt: on
    if type(dropout_p) is not float or dropout_p or rng_state is not None:
        _attend = _dropping(_attend, plain, dropout_p, rng_state, return_attn_probs)
    head = (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads)
    if explain is not False or strict is not False or spelled is not None:
        mode = Mode(any_flag(explain=explain), any_flag(strict=strict), spelled or {})
    result = _attend(FUNC, (q, k, v), out, lse, want_lse, mode, head, tail)
    if mode and mode.explain:
        return result
    if want_lse:
        return (*result, None) if return_attn_probs and len(result) == 2 else result
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
    attention_chunk: int = 0,
    causal_per_seq: Array | None = None,
    scheduler_metadata: Array | None = None,
    num_splits: int = 0,
    implementation: str | None = None,
    num_threads: int = 0,
    check_device: bool = False,
    strict: bool = False,
    explain: bool = False,
    s_aux: Array | None = None,
    learnable_sink: Array | None = None,
    page_table: Array | None = None,
    return_lse: bool = False,
    qv: None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: Sequence[Array] | None = None,
    aux_scalars: Sequence[float] | None = None,
    block_sparse_tensors: Any = None,
    rng_state: Array | tuple[int, int] | None = None,
    _attend: Callable[..., Any] = attend,
) -> Any:
    """Attention of sequences of different lengths, packed end to end.

    q: (total_q, num_heads, head_dim). k: (total_k, num_heads_kv, head_dim), v the same with its own head size; or, with
    block_table, pages: (num_pages, page_size, num_heads_kv, ..) of any size up to 2^20, fastest on a GPU in multiples
    of 16.
    cu_seqlens_q, cu_seqlens_k: int32 (num_seqs + 1,): where each sequence starts and the last one ends. With
    block_table, cu_seqlens_k gives lengths only. If it is None, seqused_k gives them; without that, all pages of the
    table are in use.
    max_seqlen_q, max_seqlen_k: upper bounds of the lengths; None: taken from the shapes.
    block_table: int32 (num_seqs, pages per sequence), any row stride; entries past a sequence's end are never read.
    page_table is another name of this argument.
    scheduler_metadata: int32, from get_scheduler_metadata: saves time at the start of decoding on a GPU.
    The other arguments are flash_attn_func's; S_dmask is (num_seqs, num_heads, max_seqlen_q, max_seqlen_k), with zeros
    where a sequence is shorter.

    Returns out (total_q, num_heads, head_dim of v), or (out, lse) with lse (num_heads, total_q).
    """
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else pair(window_size)
    want_lse, mode, spelled = False, None, None
    if return_softmax_lse is not False or return_attn_probs is not False or return_lse is not False:
        return_attn_probs = any_flag(return_attn_probs=return_attn_probs)
        want_lse = any_flag(return_softmax_lse=return_softmax_lse, return_lse=return_lse) or return_attn_probs
    if qv is not None or s_aux is not None or learnable_sink is not None or page_table is not None:
        refuse_qv(qv)
        sinks = one_spelling(spelled := {}, sinks=sinks, s_aux=s_aux, learnable_sink=learnable_sink)
        block_table = one_spelling(spelled, block_table=block_table, page_table=page_table)
    if cu_seqlens_q is None:
        raise TypeError("cu_seqlens_q = None: must be an int32 array (num_seqs + 1,)")
    if block_table is not None and cu_seqlens_k is not None:
        if seqused_k is None:
            seqused_k = lengths("cu_seqlens_k", cu_seqlens_k)
            spelled = {**(spelled or {}), "seqused_k": "cu_seqlens_k"}
        cu_seqlens_k = None
    # fmt: off
    tail: tuple[Any, ...] = (
        cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, seqused_q, seqused_k, block_table, None, None,
        scheduler_metadata,
    )
    tail += rare_options(
        sinks, alibi_slopes, q_descale, k_descale, v_descale, output_scale, rel_logits, causal_per_seq,
        prefix_ranges, prefix_clamp_window, rswa_prefix_lens, rswa_window, attention_chunk, check_device,
    )
    plain = _attend
    if (
        score_mod is not None or mask_mod is not None or aux_tensors is not None or aux_scalars is not None
        or block_sparse_tensors is not None
    ):
        _attend = _attending(_attend, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    # fmt: on
    if type(dropout_p) is not float or dropout_p or rng_state is not None:
        _attend = _dropping(_attend, plain, dropout_p, rng_state, return_attn_probs)
    head = (softmax_scale, causal, left, right, softcap, num_splits, deterministic, implementation, num_threads)
    if explain is not False or strict is not False or spelled is not None:
        mode = Mode(any_flag(explain=explain), any_flag(strict=strict), spelled or {})
    result = _attend(FUNC, (q, k, v), out, lse, want_lse, mode, head, tail)
    if mode and mode.explain:
        return result
    if want_lse:
        return (*result, None) if return_attn_probs and len(result) == 2 else result
    return result[0]


def _dropping(*args: Any) -> Callable[..., Any]:
    from ._dropout import dropping  # loaded by calls that have dropout only

    return dropping(*args)


def _attending(*args: Any) -> Callable[..., Any]:
    from ._user_functions import attending  # loaded by calls that have functions only

    return attending(*args)


def attention_explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which implementation would run a call and why, or what each one lacks; computes nothing.

    attention_explain(flash_attn_func, q, k, v, causal=True): takes the call's arguments and raises its errors.
    """
    return str(function(*args, **kwargs, explain=True))
