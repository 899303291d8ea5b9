"""vLLM's questions about FlashAttention: which version a layer gets, and what that version supports.

Each function takes a stock function (or class) of vLLM and returns its replacement, which answers from the feature
table for what flashspark serves and asks the stock function otherwise.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from . import report, switches
from .features import FEATURES, VERSION
from .replace import Function, arguments_by_name


def override() -> str | None:
    """What the user asked for that is not version 4, if anything; then all layers keep vLLM's own attention."""
    if not FEATURES.batch_invariance and switches.batch_invariant():
        return "VLLM_BATCH_INVARIANT is set"
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    chosen = getattr(getattr(config, "attention_config", None), "flash_attn_version", None)
    if chosen in (None, VERSION):
        return None
    return f"attention_config.flash_attn_version is {chosen}"


def version(stock: Function) -> Function:
    """fa_utils.get_flash_attn_version: 4 for what the kernels serve, else what stock says."""
    by_name = arguments_by_name(stock)
    parameters = frozenset(inspect.signature(stock).parameters)
    foreign = not getattr(stock, "__module__", "").startswith("vllm.")
    asked = ("head_size", "head_size_v", "requires_alibi", "has_sinks", "requires_softcap", "kv_cache_block_size")

    @functools.wraps(stock)
    def get_flash_attn_version(*args: Any, **kwargs: Any) -> int | None:
        given = by_name(args, kwargs)
        layer = {name: given[name] for name in asked if given.get(name) is not None}
        reason = override() or FEATURES.unavailable_reason(**layer)
        if reason is None:
            return VERSION
        report.kept(", ".join(f"{n} {v}" for n, v in layer.items() if v is not False) or "every layer", reason)
        if foreign:  # another plug-in's answer could be 4, which would send the layer here
            return 2
        return stock(*args, **{name: value for name, value in kwargs.items() if name in parameters})

    return get_flash_attn_version


def version_supported(stock: Function) -> Function:
    """fa_utils.is_fa_version_supported: version 4 is flashspark, unless the user wants another one."""

    @functools.wraps(stock)
    def is_fa_version_supported(fa_version: int) -> bool:
        return (fa_version == VERSION and override() is None) or stock(fa_version)

    return is_fa_version_supported


def sinks(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_sinks, which up to 0.19 knows of version 3 only."""

    @functools.wraps(stock)
    def flash_attn_supports_sinks(*args: Any, **kwargs: Any) -> bool:
        return (FEATURES.sinks and override() is None) or stock(*args, **kwargs)

    return flash_attn_supports_sinks


def fp8(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_fp8 (up to 0.21): whether a layer may have an fp8 cache."""

    @functools.wraps(stock)
    def flash_attn_supports_fp8(*args: Any, **kwargs: Any) -> bool:
        return FEATURES.supports_kv_cache_dtype("fp8") or stock(*args, **kwargs)

    return flash_attn_supports_fp8


def kv_cache_dtype(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_kv_cache_dtype (from 0.27)."""
    by_name = arguments_by_name(stock)

    @functools.wraps(stock)
    def flash_attn_supports_kv_cache_dtype(*args: Any, **kwargs: Any) -> bool:
        dtype = by_name(args, kwargs).get("kv_cache_dtype", "fp8_e4m3")
        return FEATURES.supports_kv_cache_dtype(dtype) or stock(*args, **kwargs)

    return flash_attn_supports_kv_cache_dtype


def quantized_query(stock: Function) -> Function:
    """fa_utils.flash_attn_supports_quant_query_input: whether q is quantized to e4m3 beside an fp8 cache."""

    @functools.wraps(stock)
    def flash_attn_supports_quant_query_input(*args: Any, **kwargs: Any) -> bool:
        return FEATURES.fp8_query and stock(*args, **kwargs)

    return flash_attn_supports_quant_query_input


def mla_prefill(stock: type) -> type:
    """mla.prefill.flash_attn.FlashAttnPrefillBackend (from 0.22), without the limits of FlashAttention 4's kernels."""

    @functools.wraps(stock, updated=())
    class FlashAttnPrefillBackend(stock):
        @classmethod
        def supports_mla_dimensions(cls, mla_dimensions: Any) -> bool:
            """0.26 refuses GLM's 256 at version 4, for which only SM100 has another backend."""
            if super().supports_mla_dimensions(mla_dimensions):
                return True
            head_size = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
            head_size_v = mla_dimensions.v_head_dim
            return (override() or FEATURES.unavailable_reason(head_size=head_size, head_size_v=head_size_v)) is None

        def get_cutedsl_warmup_compile_units(self) -> tuple[Any, ...]:
            """Nothing to compile at version 4; stock's list (0.25 and 0.26) raises ValueError on SM121."""
            if self.vllm_flash_attn_version == VERSION:
                return ()
            return super().get_cutedsl_warmup_compile_units()

    return FlashAttnPrefillBackend
