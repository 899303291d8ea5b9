"""What of vLLM is replaced, and by what. A row whose name a release lacks does not apply to it."""

from __future__ import annotations

from dataclasses import dataclass

from flashspark._hook import CUTE, FA_UTILS, FLASH_ATTN, INKLING, MLA_PREFILL

from . import calls, replace
from .features import FEATURES

INTERFACE = "vllm.vllm_flash_attn.flash_attn_interface"


@dataclass(frozen=True)
class Site:
    """`module.name`, every by-name copy included, is replaced by make(stock)."""

    module: str
    name: str
    make: calls.Function
    wanted: bool = True


SITES = (
    Site(INTERFACE, "flash_attn_varlen_func", calls.varlen),
    Site(INTERFACE, "compile_flash_attn_varlen_func_from_specs", calls.compile_specs),
    Site(FA_UTILS, "get_flash_attn_version", calls.version),
    Site(FA_UTILS, "is_fa_version_supported", calls.version_supported),
    Site(FA_UTILS, "flash_attn_supports_sinks", calls.sinks_gate),
    Site(FA_UTILS, "flash_attn_supports_fp8", calls.fp8_gate),
    Site(FA_UTILS, "flash_attn_supports_kv_cache_dtype", calls.kv_cache_gate),
    Site(FA_UTILS, "flash_attn_supports_quant_query_input", calls.quant_query, FEATURES.supports_kv_cache_dtype("fp8")),
    Site(FLASH_ATTN, "_make_mm_prefix_mask_mod", calls.mm_prefix_factory, FEATURES.mm_prefix),
    Site(FLASH_ATTN, "_make_rswa_mask_mod", calls.rswa_factory, FEATURES.rswa),
    Site(FLASH_ATTN, "_FA4_DENSE_ATTENTION_KERNEL", calls.no_warmup),
    Site(MLA_PREFILL, "FlashAttnPrefillBackend", calls.mla_prefill),
    Site(CUTE, "flash_attn_varlen_func", calls.cute_varlen),
    Site(INKLING, "_get_score_mod", calls.rel_bias_factory, FEATURES.relative_bias),
)


def apply() -> None:
    """Replace what is loaded; again after more has been loaded."""
    for site in SITES:
        if site.wanted:
            replace.put(site.module, site.name, site.make)
