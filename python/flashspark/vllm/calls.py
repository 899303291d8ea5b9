"""The functions that take the place of vLLM's: attention calls, questions about versions and dtypes, mask factories.

Each maker takes the stock function and returns the replacement, which hands everything that is not ours to the stock
function unchanged. A layer is ours when `get_flash_attn_version` has answered 4 for it, which the attention calls then
see as fa_version=4.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any

from flashspark import mods

from . import report
from .features import FEATURES

VERSION = 4
Function = Callable[..., Any]

# Arguments of the attention calls that change nothing for us at any value: knobs of other kernels.
_IGNORED = frozenset(
    {
        *("scheduler_metadata", "deterministic", "aux_tensor_leading_dims", "cp_rank", "fa_version", "min_seqlen_k"),
        *("pack_gqa", "seqlen_k_per_split", "disable_scheduler_metadata", "score_mod_bwd"),
    }
)
# Arguments that must have this value; any other one would change the result.
_FIXED = {"cp_world_size": 1, "dropout_p": 0.0}
# What _attend takes.
KNOWN = frozenset(
    {
        *("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "seqused_k", "softmax_scale"),
        *("causal", "window_size", "softcap", "alibi_slopes", "return_attn_probs", "block_table"),
        *("return_softmax_lse", "out", "q_descale", "k_descale", "v_descale", "num_splits", "output_scale", "s_aux"),
        *("mask_mod", "aux_tensors", "dynamic_causal", "score_mod"),
    }
)


def _named(stock: Function) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """All arguments of a call by name, in the stock function's order of parameters."""
    names = tuple(inspect.signature(stock).parameters)
    name = getattr(stock, "__name__", "function")

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        if len(args) > len(names):
            raise TypeError(f"{name}() takes {len(names)} positional arguments but {len(args)} were given")
        given = dict(zip(names, args))
        if twice := given.keys() & kwargs.keys():
            raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
        return given | kwargs

    return by_name


def varlen(stock: Function) -> Function:
    """vllm_flash_attn.flash_attn_varlen_func: ours for fa_version 4, stock for every other version."""
    by_name = _named(stock)

    @functools.wraps(stock)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        given = by_name(args, kwargs)
        if given.get("fa_version") != VERSION:
            return stock(*args, **kwargs)
        lse = given.pop("return_softmax_lse", False) or given.get("return_attn_probs", False)
        if (window := given.get("window_size")) is not None:
            # To vLLM's function every negative side is open; to FlashAttention 4's own some of them shift the window.
            given = given | {"window_size": [None if side is None or side < 0 else side for side in window]}
        result = _attend(want_lse=lse, **given)
        return result if lse else result[0]

    return flash_attn_varlen_func


def cute_varlen(stock: Function) -> Function:
    """cute.flash_attn_varlen_func, FlashAttention 4's own face: ours unless a mask or score function is unknown.

    Inkling calls it, with its relative bias; warm-ups call it with fake tensors and get empty results.
    """
    by_name = _named(stock)
    renamed = {"page_table": "block_table", "learnable_sink": "s_aux"}

    @functools.wraps(stock)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        given = by_name(args, kwargs)
        if not all(_is_tag(given.get(name)) for name in ("score_mod", "mask_mod")):
            return stock(*args, **kwargs)
        given = {renamed.get(name, name): value for name, value in given.items()}
        lse = given.pop("return_lse", False)
        given = {"cu_seqlens_q": None, "max_seqlen_q": None, "max_seqlen_k": None} | given
        return _attend(want_lse=lse, **given)

    return flash_attn_varlen_func


def _is_tag(mod: Any) -> bool:
    return mod is None or isinstance(mod, (mods.RelBias, mods.MmPrefix, mods.RSwa))


def _attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    want_lse: bool,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = None,
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    return_attn_probs: bool = False,
    block_table: Any = None,
    out: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    num_splits: int = 0,
    output_scale: Any = None,
    s_aux: Any = None,
    mask_mod: Any = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
    dynamic_causal: Any = None,
    **others: Any,
) -> Any:
    """(out, lse or None). The arguments are vLLM's; shapes and meaning as in flashspark._fwd."""
    for name, value in others.items():
        if value is None or value is False or name in _IGNORED or _FIXED.get(name, ...) == value:
            continue
        raise NotImplementedError(f"{name} = {_short(value)}: must be {_FIXED.get(name)}, flashspark has no use for it")
    if not (mask_mod is score_mod is None) and not (_is_tag(mask_mod) and _is_tag(score_mod)):
        name, mod = ("score_mod", score_mod) if _is_tag(mask_mod) else ("mask_mod", mask_mod)
        raise NotImplementedError(f"{name} = {_short(mod)}: must be a mask that flashspark knows, or None")
    left, right = (None, None) if window_size is None else window_size
    q_type, v_type = q.dtype, v.dtype
    if v_type.itemsize != 1:
        q_descale = k_descale = v_descale = None  # vLLM passes ones with 16-bit caches
    arguments = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": None if block_table is not None else cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "page_table": block_table,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "softcap": softcap or None,
        "window_size_left": left,
        "window_size_right": right,
        "learnable_sink": s_aux,
        "num_splits": num_splits,
        "deterministic": batch_invariant(),
        "score_mod": score_mod,
        "mask_mod": mask_mod,
        "aux_tensors": aux_tensors,
        "return_lse": want_lse,
        "out": out,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "output_scale": output_scale,
        "dynamic_causal": dynamic_causal,
        "alibi_slopes": alibi_slopes,
        "scheduler_metadata": getattr(forward, "schedule", None) if block_table is not None else None,
    }
    kind = (
        *(q.shape[-1], v.shape[-1], q_type, v_type, block_table is None, causal, left, right, softcap, s_aux is None),
        *(alibi_slopes is None, mask_mod, score_mod, dynamic_causal is None),
    )
    if kind not in _known:
        _known.add(kind)
        _describe(q, k, v, arguments)
    return _forward()(q, k, v, **arguments)


# Of the forward in progress, what its metadata knows and vLLM's call does not say: rswa_window, an int, and schedule.
forward = threading.local()
_known: set[tuple[Any, ...]] = set()  # kinds of calls that the log has a line for


@functools.cache
def _forward() -> Function:
    """Loads the native library: not before the first call."""
    from flashspark._fwd import _flash_attn_fwd

    return _flash_attn_fwd


def _short(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"tensor {tuple(value.shape)}"
    return getattr(value, "__name__", None) or f"{value!r:.60}"


def _describe(q: Any, k: Any, v: Any, given: dict[str, Any]) -> None:
    """The log line of a new kind of call: what it asks, and what runs it."""
    from flashspark._fwd import _is_fake

    if _is_fake(q):
        return
    sizes = f"{q.shape[-1]}" if q.shape[-1] == v.shape[-1] else f"{q.shape[-1]}/{v.shape[-1]}"
    types = {str(x.dtype).removeprefix("torch.") for x in (q, v)}
    words = [f"head_dim {sizes}", " q, ".join(sorted(types)), "paged" if given["page_table"] is not None else "unpaged"]
    left, right = given["window_size_left"], given["window_size_right"]
    masks = [type(mod).__name__ for mod in (given["mask_mod"], given["score_mod"]) if mod is not None]
    if not masks or given["score_mod"] is not None:
        causal = (
            "causal per request" if given["dynamic_causal"] is not None else "causal" if given["causal"] else "full"
        )
        masks.insert(0, causal)
    if (left or -1) >= 0:
        masks.append(f"window {left}" if (right or 0) <= 0 else f"window {left}, {right}")
    for name, word in (("softcap", "softcap"), ("learnable_sink", "sinks"), ("alibi_slopes", "ALiBi")):
        if given[name] is not None:
            masks.append(word)
    text = _forward()(q, k, v, **given, explain=True)
    chosen = next((line for line in text.splitlines() if ": chosen" in line), text.strip())
    report.info(f"serves {', '.join([*words, *masks])}; by {chosen.partition(':')[0]}")


def version(stock: Function) -> Function:
    """fa_utils.get_flash_attn_version: 4 for what the kernels serve, else what stock says."""
    by_name = _named(stock)
    parameters = frozenset(inspect.signature(stock).parameters)
    foreign = not getattr(stock, "__module__", "").startswith("vllm.")
    asked = ("head_size", "head_size_v", "requires_alibi", "has_sinks", "requires_softcap", "kv_cache_block_size")

    @functools.wraps(stock)
    def get_flash_attn_version(*args: Any, **kwargs: Any) -> int | None:
        given = by_name(args, kwargs)
        layer = {name: given[name] for name in asked if given.get(name) is not None}
        reason = override() or FEATURES.lack(**layer)
        if reason is None:
            return VERSION
        report.kept(", ".join(f"{n} {v}" for n, v in layer.items() if v is not False) or "every layer", reason)
        if foreign:  # another shim's answer may be 4, which is ours to serve
            return 2
        return stock(*args, **{name: value for name, value in kwargs.items() if name in parameters})

    return get_flash_attn_version


def batch_invariant() -> bool:
    """Whether the user wants every row's result independent of the rest of its batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0").strip().lower() in {"1", "true"}


def override() -> str | None:
    """What the user asked for that is not version 4, if anything: all layers are stock's then."""
    if not FEATURES.batch_invariance and batch_invariant():
        return "VLLM_BATCH_INVARIANT is set"
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    chosen = getattr(getattr(config, "attention_config", None), "flash_attn_version", None)
    if chosen in (None, VERSION):
        return None
    return f"attention_config.flash_attn_version is {chosen}"


def version_supported(stock: Function) -> Function:
    """fa_utils.is_fa_version_supported: version 4 is flashspark, unless the user wants another one."""

    @functools.wraps(stock)
    def is_fa_version_supported(fa_version: int) -> bool:
        return (fa_version == VERSION and override() is None) or stock(fa_version)

    return is_fa_version_supported


def sinks_gate(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_sinks; up to 0.19 its answer knows of version 3 only."""

    @functools.wraps(stock)
    def flash_attn_supports_sinks(*args: Any, **kwargs: Any) -> bool:
        return (FEATURES.sinks and override() is None) or stock(*args, **kwargs)

    return flash_attn_supports_sinks


def fp8_gate(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_fp8 (up to 0.21): whether a layer may keep an fp8 cache."""

    @functools.wraps(stock)
    def flash_attn_supports_fp8(*args: Any, **kwargs: Any) -> bool:
        return FEATURES.supports_kv_cache_dtype("fp8") or stock(*args, **kwargs)

    return flash_attn_supports_fp8


def kv_cache_gate(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_kv_cache_dtype (from 0.27)."""
    by_name = _named(stock)

    @functools.wraps(stock)
    def flash_attn_supports_kv_cache_dtype(*args: Any, **kwargs: Any) -> bool:
        dtype = by_name(args, kwargs).get("kv_cache_dtype", "fp8_e4m3")
        return FEATURES.supports_kv_cache_dtype(dtype) or stock(*args, **kwargs)

    return flash_attn_supports_kv_cache_dtype


def quant_query(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_quant_query_input: whether q comes as e4m3 beside an fp8 cache."""

    @functools.wraps(stock)
    def flash_attn_supports_quant_query_input(*args: Any, **kwargs: Any) -> bool:
        return FEATURES.fp8_query and stock(*args, **kwargs)

    return flash_attn_supports_quant_query_input


def compile_specs(stock: Function) -> Function:
    """compile_flash_attn_varlen_func_from_specs: at version 4 there is nothing to compile."""
    by_name = _named(stock)

    @functools.wraps(stock)
    def compile_flash_attn_varlen_func_from_specs(*args: Any, **kwargs: Any) -> Any:
        if by_name(args, kwargs).get("fa_version") == VERSION:
            return None
        return stock(*args, **kwargs)

    return compile_flash_attn_varlen_func_from_specs


def no_warmup(stock: Any) -> Any:
    """flash_attn._FA4_DENSE_ATTENTION_KERNEL (from 0.30): calls go through it as ever, but it has nothing to compile.

    It is asked at version 4 only, and would build FlashAttention's combine kernel past compile_specs on SM90.
    """
    kernel = copy.copy(stock)
    kernel.get_warmup_keys = lambda *_, **__: []
    return kernel


def mla_prefill(stock: type) -> type:
    """mla.prefill.flash_attn.FlashAttnPrefillBackend (from 0.22), where FlashAttention 4's limits are not ours."""

    @functools.wraps(stock, updated=())
    class FlashAttnPrefillBackend(stock):
        @classmethod
        def supports_mla_dimensions(cls, mla_dimensions: Any) -> bool:
            """0.26 leaves out GLM's 256 at version 4; elsewhere than on SM100 no other backend is left then."""
            if super().supports_mla_dimensions(mla_dimensions):
                return True
            head_size = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
            lack = override() or FEATURES.lack(head_size=head_size, head_size_v=mla_dimensions.v_head_dim)
            return lack is None

        def get_cutedsl_warmup_compile_units(self) -> tuple[Any, ...]:
            """0.25 and 0.26: nothing to compile at version 4; stock's list raises ValueError on SM121."""
            if self.vllm_flash_attn_version == VERSION:
                return ()
            return super().get_cutedsl_warmup_compile_units()

    return FlashAttnPrefillBackend


def mm_prefix_factory(stock: Function) -> Function:
    """flash_attn._make_mm_prefix_mask_mod: a tag instead of a CuTe function.

    sliding_window_left counts the query's own key, so the inclusive window is one less. Up to 0.24 the factory knows
    no window: the call's own stays in force.
    """
    by_name = _named(stock)

    @functools.wraps(stock)
    def _make_mm_prefix_mask_mod(*args: Any, **kwargs: Any) -> mods.MmPrefix:
        given = by_name(args, kwargs)
        width = given.get("sliding_window_left")
        return mods.MmPrefix(
            window_left=None if width is None else width - 1,
            clamp_window=bool(given.get("sliding_window", 0)),
        )

    return _make_mm_prefix_mask_mod


def rswa_factory(stock: Function) -> Function:
    """flash_attn._make_rswa_mask_mod: a tag with the window, so that no tensor has to be read back."""

    @functools.wraps(stock)
    def _make_rswa_mask_mod() -> mods.RSwa:
        window = getattr(forward, "rswa_window", None)
        if window is None:
            raise NotImplementedError("R-SWA outside flashspark's FLASH_ATTN backend: its window is not known there")
        return mods.RSwa(window=window)

    return _make_rswa_mask_mod


def rel_bias_factory(stock: Function) -> Function:
    """Inkling's _get_score_mod: a tag; the bias itself comes in aux_tensors."""

    @functools.wraps(stock)
    def _get_score_mod(rel_extent: int) -> mods.RelBias:
        return mods.RelBias()

    return _get_score_mod
