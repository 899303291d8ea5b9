"""A vLLM platform plug-in: CUDA of compute capability FAKE_CAPABILITY, on a machine that has none.

vLLM resolves its platform through it in every process, as it does with a vendor's. The compiled extensions that its
Python files import are empty modules. FAKE_KERNELS=1: a flashspark that was built without nvcc counts as complete.
"""

from __future__ import annotations

import os
import sys
import types

EXTENSIONS = (
    *("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch", "vllm.cumem_allocator"),
    *("vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C"),
)


def platform() -> str | None:
    if not os.environ.get("FAKE_CAPABILITY"):
        return None
    for name in EXTENSIONS:
        sys.modules.setdefault(name, types.ModuleType(name))
    if os.environ.get("FAKE_KERNELS"):
        from flashspark.vllm import takeover

        takeover.NO_KERNELS = "no explanation says this"
        takeover.ARCHITECTURES = {9: "cpu-engine", 12: "cpu-engine"}  # every explanation says this
    return "fake_cuda_platform.FakeCuda"
