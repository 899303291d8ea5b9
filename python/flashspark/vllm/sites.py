"""The table of vLLM's functions that are replaced, and by what. A release that lacks a name skips its row."""

from __future__ import annotations

from dataclasses import dataclass

from . import attention, gates, mod_factories, replace, warmups
from .features import FEATURES
from .names import CUTE, FA_UTILS, FLASH_ATTN, INKLING, INTERFACE, MLA_PREFILL


@dataclass(frozen=True)
class Site:
    """`module.name`, every by-name copy included, is replaced by make(stock)."""

    module: str
    name: str
    make: replace.Function
    wanted: bool = True


FP8_CACHE = FEATURES.supports_kv_cache_dtype("fp8")
SITES = (
    Site(INTERFACE, "flash_attn_varlen_func", attention.varlen),
    Site(INTERFACE, "compile_flash_attn_varlen_func_from_specs", warmups.compile_specs),
    Site(FA_UTILS, "get_flash_attn_version", gates.version),
    Site(FA_UTILS, "is_fa_version_supported", gates.version_supported),
    Site(FA_UTILS, "flash_attn_supports_sinks", gates.sinks),
    Site(FA_UTILS, "flash_attn_supports_fp8", gates.fp8),
    Site(FA_UTILS, "flash_attn_supports_kv_cache_dtype", gates.kv_cache_dtype),
    Site(
        FA_UTILS,
        "flash_attn_supports_quant_query_input",
        gates.quantized_query,
        FEATURES.supports_kv_cache_dtype("fp8"),
    ),
    Site(FLASH_ATTN, "_make_mm_prefix_mask_mod", mod_factories.mm_prefix, FEATURES.mm_prefix),
    Site(FLASH_ATTN, "_make_rswa_mask_mod", mod_factories.rswa, FEATURES.rswa),
    Site(FLASH_ATTN, "_FA4_DENSE_ATTENTION_KERNEL", warmups.dense_kernel),
    Site(MLA_PREFILL, "FlashAttnPrefillBackend", gates.mla_prefill),
    Site(CUTE, "flash_attn_varlen_func", attention.cute_varlen),
    Site(INKLING, "_get_score_mod", mod_factories.rel_bias, FEATURES.relative_bias),
)


def apply() -> None:
    """Replaces what is loaded. Called again whenever more has been loaded."""
    for site in SITES:
        if site.wanted:
            replace.put(site.module, site.name, site.make)
