"""Names of vLLM's modules that flashspark looks at or changes. Imports nothing: the start-up hook reads it."""

SELECTOR = "vllm.v1.attention.selector"
FA_UTILS = "vllm.v1.attention.backends.fa_utils"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
INTERFACE = "vllm.vllm_flash_attn.flash_attn_interface"
CUTE = "vllm.vllm_flash_attn.cute.interface"
MLA_PREFILL = "vllm.v1.attention.backends.mla.prefill.flash_attn"
MLA_PREFILL_SELECTOR = "vllm.v1.attention.backends.mla.prefill.selector"
INKLING = "vllm.models.inkling.nvidia.ops.fa4_rel_attention"
CUDA_PLATFORM = "vllm.platforms.cuda"

# The modules whose import the hook reports to the takeover.
WATCHED = frozenset({SELECTOR, FA_UTILS, FLASH_ATTN, CUTE, MLA_PREFILL, INKLING})
