"""An import hook by which vLLM's FlashAttention 4 is a kernel of a Hugging Face repository.

vLLM's wrapper imports `_flash_attn_fwd` from vllm.vllm_flash_attn.cute.interface inside each call for version 4. The
hook gives that module the functions of the kernel's `interface`, so that vLLM's own file, and the compiler that it
imports, are never loaded. flashspark itself is not installed where this runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "vllm.vllm_flash_attn.cute.interface"
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")  # what vLLM's package of that module imports from it


class KernelLoader(Loader):
    """calls: how many the forward function had, by the number of query tokens: one a sequence, or more."""

    def __init__(self, repository: str, backend: str | None) -> None:
        self.repository, self.backend, self.calls = repository, backend, Counter()

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from kernels import get_kernel

        interface = get_kernel(self.repository, version=0, backend=self.backend).interface
        for name in FUNCTIONS:
            setattr(module, name, getattr(interface, name))

        def forward(q: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls["decode" if kwargs.get("max_seqlen_q") == 1 else "prefill"] += 1
            return interface._flash_attn_fwd(q, *args, **kwargs)

        module._flash_attn_fwd = forward


class KernelFinder(MetaPathFinder):
    def __init__(self, loader: KernelLoader) -> None:
        self.loader = loader

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self.loader) if name == TARGET else None


def install(repository: str, backend: str | None = None) -> KernelLoader:
    """repository: its name; LOCAL_KERNELS=NAME=FOLDER in the environment says where it lies. backend: "cpu" for CPU
    tensors; None: torch's."""
    if TARGET in sys.modules:
        raise RuntimeError(f"{TARGET} is loaded already")
    loader = KernelLoader(repository, backend)
    sys.meta_path.insert(0, KernelFinder(loader))
    return loader
