"""flashspark: FlashAttention for NVIDIA SM12x GPUs and for any CPU.

Attention with flash-attention's names, defaults and meaning, on NumPy arrays and torch tensors, without copies::

    import numpy as np
    import flashspark

    q = np.random.randn(2, 128, 16, 64).astype(np.float32)  # (num_seqs, seqlen_q, num_heads, head_dim)
    k = np.random.randn(2, 128, 8, 64).astype(np.float32)  # (num_seqs, seqlen_k, num_heads_kv, head_dim)
    v = np.random.randn(2, 128, 8, 64).astype(np.float32)
    out = flashspark.flash_attn_func(q, k, v, causal=True)  # (2, 128, 16, 64)

Importing this package loads nothing else; the native library is loaded when the first function is used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers treat it as typing.TYPE_CHECKING, whose import would take most of ours
if TYPE_CHECKING:
    from typing import Any

    from . import flex, mods
    from ._backward import flash_attn_backward, flash_attn_varlen_backward
    from ._block_mask import BlockMask, BlockSparseTensors, and_masks, create_block_mask, noop_mask, or_masks
    from ._cache import append_kv, flash_attn_with_kvcache
    from ._fwd import _flash_attn_fwd as _flash_attn_fwd
    from ._info import cpu_target, cpu_threads, implementations, native_version
    from ._ops import attention_explain, flash_attn_func, flash_attn_varlen_func
    from ._packed import (
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from ._scheduler_metadata import get_scheduler_metadata
    from ._trace import TraceError
    from .flex import flex_attention, flex_explain

    __version__: str

_HOME = {
    "BlockMask": "_block_mask",
    "BlockSparseTensors": "_block_mask",
    "TraceError": "_trace",
    "and_masks": "_block_mask",
    "append_kv": "_cache",
    "attention_explain": "_ops",
    "cpu_target": "_info",
    "cpu_threads": "_info",
    "create_block_mask": "_block_mask",
    "flash_attn_backward": "_backward",
    "flash_attn_func": "_ops",
    "flash_attn_kvpacked_func": "_packed",
    "flash_attn_qkvpacked_func": "_packed",
    "flash_attn_varlen_backward": "_backward",
    "flash_attn_varlen_func": "_ops",
    "flash_attn_varlen_kvpacked_func": "_packed",
    "flash_attn_varlen_qkvpacked_func": "_packed",
    "flash_attn_with_kvcache": "_cache",
    "flex_attention": "flex",
    "flex_explain": "flex",
    "_flash_attn_fwd": "_fwd",
    "get_scheduler_metadata": "_scheduler_metadata",
    "implementations": "_info",
    "native_version": "_info",
    "noop_mask": "_block_mask",
    "or_masks": "_block_mask",
}
_MODULES = frozenset({"flex", "integrations", "interface", "jax", "mods", "torch_ops"})

__all__ = [
    "BlockMask",
    "BlockSparseTensors",
    "TraceError",
    "__version__",
    "and_masks",
    "append_kv",
    "attention_explain",
    "cpu_target",
    "cpu_threads",
    "create_block_mask",
    "flash_attn_backward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_backward",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex",
    "flex_attention",
    "flex_explain",
    "get_scheduler_metadata",
    "implementations",
    "mods",
    "native_version",
    "noop_mask",
    "or_masks",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        value = getattr(import_module("." + _HOME[name], __name__), name)
    elif name in _MODULES:
        value = import_module("." + name, __name__)
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version(__name__)
        except PackageNotFoundError:  # imported by the Hugging Face loader, without an installation
            value = import_module("._info", __name__).native_version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "_flash_attn_fwd", "torch_ops"})
