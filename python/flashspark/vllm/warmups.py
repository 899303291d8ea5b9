"""vLLM's compilation of FlashAttention 4 at start-up: at version 4 flashspark runs, and there is nothing to compile.

Each function takes a stock function or object of vLLM and returns its replacement.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from .features import VERSION
from .replace import Function, arguments_by_name


def compile_specs(stock: Function) -> Function:
    """flash_attn_interface.compile_flash_attn_varlen_func_from_specs."""
    by_name = arguments_by_name(stock)

    @functools.wraps(stock)
    def compile_flash_attn_varlen_func_from_specs(*args: Any, **kwargs: Any) -> Any:
        if by_name(args, kwargs).get("fa_version") == VERSION:
            return None
        return stock(*args, **kwargs)

    return compile_flash_attn_varlen_func_from_specs


def dense_kernel(stock: Any) -> Any:
    """flash_attn._FA4_DENSE_ATTENTION_KERNEL (from 0.30): attention calls still go through it, warm-ups find no keys.

    It is used at version 4 only, and its warm-up would build FlashAttention's combine kernel without asking
    compile_flash_attn_varlen_func_from_specs on SM90.
    """
    kernel = copy.copy(stock)
    kernel.get_warmup_keys = lambda *_, **__: []
    return kernel
