"""What flashspark's kernels can do for vLLM. Every answer to vLLM comes from here.

A feature that the kernels gain is switched on by changing its row, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = 4  # of FlashAttention: the number under which vLLM gets flashspark
FP8_NAMES = frozenset({"fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"})


@dataclass(frozen=True)
class Features:
    """One field for each feature; the tests walk through all of them."""

    dtypes: frozenset[str] = frozenset({"bfloat16", "float16"})
    head_size_step: int = 8
    max_head_size: int = 512
    page_step: int = 16
    kv_cache_dtypes: frozenset[str] = frozenset({"auto", "bfloat16", "float16", "fp8", "fp8_e4m3"})
    fp8_head_size_step: int = 16
    fp8_query: bool = False  # q beside an fp8 cache is e4m3, not of the model's type
    output_scale: bool = False  # results are written as e4m3
    sinks: bool = True
    alibi: bool = True
    softcap: bool = True
    unequal_head_sizes: bool = True  # DiffKV, MLA prefill without padding
    mm_prefix: bool = True
    rswa: bool = True
    relative_bias: bool = True
    causal_per_request: bool = True
    non_causal: bool = True
    per_head_scales: bool = True
    batch_invariance: bool = True  # a row's result depends neither on the rest of the batch nor on chunked prefill

    def supports_head_size(self, head_size: int | None) -> bool:
        return head_size is None or (head_size % self.head_size_step == 0 and 0 < head_size <= self.max_head_size)

    def supports_kv_cache_dtype(self, dtype: str | None) -> bool:
        return dtype is None or dtype in self.kv_cache_dtypes

    def unavailable_reason(
        self,
        *,
        head_size: int | None = None,
        head_size_v: int | None = None,
        requires_alibi: bool = False,
        has_sinks: bool = False,
        requires_softcap: bool = False,
        kv_cache_dtype: str | None = None,
        kv_cache_block_size: int | None = None,
        dtype: str | None = None,
        use_mm_prefix: bool = False,
    ) -> str | None:
        """Why the kernels cannot serve a layer; None if they can. What is unknown (None) does not count against it."""
        for name, size in (("head_size", head_size), ("head_size_v", head_size_v)):
            if not self.supports_head_size(size):
                return f"{name} {size}: must be a multiple of {self.head_size_step} up to {self.max_head_size}"
            step = self.fp8_head_size_step
            if kv_cache_dtype in FP8_NAMES and size is not None and size % step:
                return f"{name} {size} with an fp8 cache: must be a multiple of {step}"
        if None not in (head_size, head_size_v) and head_size != head_size_v and not self.unequal_head_sizes:
            return f"head sizes {head_size} and {head_size_v}: must be equal"
        for asked, has, what in (
            (requires_alibi, self.alibi, "ALiBi"),
            (has_sinks, self.sinks, "sinks"),
            (requires_softcap, self.softcap, "softcap"),
            (use_mm_prefix, self.mm_prefix, "PrefixLM masks"),
        ):
            if asked and not has:
                return f"{what}: not in the kernels"
        if dtype is not None and dtype not in self.dtypes:
            return f"dtype {dtype}: must be one of {', '.join(sorted(self.dtypes))}"
        if not self.supports_kv_cache_dtype(kv_cache_dtype):
            return f"KV cache dtype {kv_cache_dtype}: not in the kernels"
        if kv_cache_block_size is not None and kv_cache_block_size % self.page_step:
            return f"page size {kv_cache_block_size}: must be a multiple of {self.page_step}"
        return None


FEATURES = Features()
