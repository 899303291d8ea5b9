"""vLLM's FlashAttention backend with flashspark's answers: the class on the FLASH_ATTN slot.

vLLM imports this module when it resolves the slot. Everything that is not overridden here is stock: the name
(FLASH_ATTN), the cache layout, and what forward does, which ends in a call of flash_attn_varlen_func, our replacement.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm.v1.attention.backends import flash_attn as stock

from . import gates, probe, report, scheduler_metadata
from .features import FEATURES, FP8_NAMES, VERSION


class FlashSparkMetadataBuilder(stock.FlashAttentionMetadataBuilder):
    """The stock builder, with the CUDA-graph class of version 4 and scheduler metadata for each step's decoding."""

    _cudagraph_support = probe.graph_support(stock)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flashspark_serves = ours()

    def build(self, *args: Any, **kwargs: Any) -> Any:
        metadata = super().build(*args, **kwargs)
        if self.flashspark_serves:
            metadata.flashspark_scheduler_metadata = scheduler_metadata.of_step(self, metadata)
        return metadata


class FlashSparkImpl(stock.FlashAttentionImpl):
    """The stock implementation at version 4."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kv_cache_dtype in FP8_NAMES and self.vllm_flash_attn_version == VERSION:
            self.supports_quant_query_input = FEATURES.fp8_query

    def forward(self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any,
                **kwargs: Any) -> Any:  # fmt: skip
        # Both values reach the attention call through its arguments: the window as a note on the tensor that vLLM
        # passes for it, and our scheduler metadata in the field that vLLM passes on. The field is set during the call
        # only, since vLLM takes whatever it finds there for FlashAttention 3's.
        if getattr(attn_metadata, "rswa_window_tensor", None) is not None:
            attn_metadata.rswa_window_tensor.flashspark_value = attn_metadata.rswa_window
        of_step = getattr(attn_metadata, "flashspark_scheduler_metadata", None)
        if of_step is None or self.vllm_flash_attn_version != VERSION:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        stock_metadata, attn_metadata.scheduler_metadata = attn_metadata.scheduler_metadata, of_step
        try:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        finally:
            attn_metadata.scheduler_metadata = stock_metadata


class FlashSparkBackend(stock.FlashAttentionBackend):
    """What vLLM asks before it gives a layer to FLASH_ATTN; every answer comes from the feature table."""

    @staticmethod
    def get_impl_cls() -> type[FlashSparkImpl]:
        return FlashSparkImpl

    @staticmethod
    def get_builder_cls() -> type[FlashSparkMetadataBuilder]:
        return FlashSparkMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return FEATURES.supports_head_size(head_size) if ours() else super().supports_head_size(head_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return (
            FEATURES.supports_kv_cache_dtype(kv_cache_dtype)
            if ours()
            else super().supports_kv_cache_dtype(kv_cache_dtype)
        )

    @classmethod
    def supports_sink(cls) -> bool:
        return FEATURES.sinks if ours() else super().supports_sink()

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return FEATURES.mm_prefix and hasattr(stock, "_make_mm_prefix_mask_mod") if ours() else False

    @classmethod
    def supports_rswa(cls) -> bool:
        return FEATURES.rswa and hasattr(stock, "_make_rswa_mask_mod") if ours() else super().supports_rswa()

    @classmethod
    def supports_non_causal(cls) -> bool:
        return FEATURES.non_causal if ours() else super().supports_non_causal()

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return FEATURES.per_head_scales if ours() else super().supports_per_head_quant_scales()

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        if not ours():
            return super().supports_combination(*args, **kwargs)
        asked = inspect.signature(super().supports_combination).bind(*args, **kwargs).arguments
        dtype = asked.get("dtype")
        reason = FEATURES.unavailable_reason(
            head_size=asked.get("head_size"),
            has_sinks=asked.get("has_sink", False),
            kv_cache_dtype=asked.get("kv_cache_dtype"),
            kv_cache_block_size=asked.get("block_size"),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            use_mm_prefix=asked.get("use_mm_prefix", False),
        )
        if reason is None:
            return None
        report.kept(f"FLASH_ATTN layer of head_size {asked.get('head_size')}", reason)
        return f"flashspark: {reason}"


def ours() -> bool:
    """Whether the user leaves the choice of version to vLLM; if not, the answers are stock's."""
    return gates.override() is None
