"""`attn_implementation="flashspark"` for Hugging Face models that use the AttentionInterface. Importing registers it.

Covers inference with causal or full attention, dense KV caches, grouped heads and left-padded batches.
"""

from typing import Any

import flashspark
import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function


def flashspark_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """Replaces the mask: int32 (B), the number of padding tokens at the start of each sequence, or None if there are
    none."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError("mask_function: flashspark's example knows causal and full attention only")
    if mask_function is causal_mask_function and int(q_offset) + q_length != kv_offset + kv_length:
        raise NotImplementedError(f"kv_length = {kv_length}: the cache holds rows past the last query (a static cache)")
    if attention_mask is None or attention_mask.all():
        return None
    kept = attention_mask[:, -kv_length:].bool()
    padding = kept.int().argmax(dim=1)
    if not torch.equal(kept, torch.arange(kv_length, device=kept.device) >= padding[:, None]):
        raise ValueError("attention_mask: must hide tokens at the start of a sequence only (padding_side='left')")
    return padding.int()


def flashspark_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, heads, Tq, D), key and value (B, KV heads, Tk, D). flashspark takes the strided views as they are."""
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise NotImplementedError("flashspark computes the forward pass: use torch.no_grad() and no dropout")
    out = flashspark.flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_leftpad=attention_mask,
        softmax_scale=scaling,
        causal=module.is_causal if is_causal is None else is_causal,
    )
    return out, None  # (B, Tq, heads, D), and no attention weights


_known = modeling_flash_attention_utils._lazy_imports


def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Stops transformers 5 from importing a package, as it does for every name that contains "flash".

    The last two results pack and unpack batches; only transformers' own wrappers call them.
    """
    if implementation == "flashspark":
        functions = (flashspark.flash_attn_func, flashspark.flash_attn_varlen_func, flashspark.flash_attn_with_kvcache)
        return (*functions, modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input)
    return _known(implementation, *args, **kwargs)


modeling_flash_attention_utils._lazy_imports = _lazy_imports
AttentionInterface.register("flashspark", flashspark_attention)
AttentionMaskInterface.register("flashspark", flashspark_mask)
