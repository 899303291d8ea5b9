"""flashspark as an attention of Hugging Face transformers::

    import flashspark.integrations.transformers
    flashspark.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashspark")

Padded batches (left, right, both), packed ones, sliding windows, softcap, attention sinks, static caches, continuous
batching (as "paged|flashspark", which transformers chooses by itself), and masks that flash-attention cannot express,
such as Gemma 3's for images, which are read as they are. Inference and training. docs/integrations.md says more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

NAME = "flashspark"


def register() -> None:
    """Makes attn_implementation="flashspark" known to transformers (5.0 or newer). Calling it again does nothing.

    Raises ImportError where transformers or torch is not installed, or has not the interfaces that this needs.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers import modeling_flash_attention_utils as flash

        from . import _transformers_attention as ours
        from ._transformers_masks import mask
    except (ImportError, AttributeError) as error:
        raise ImportError(f"flashspark.integrations.transformers needs transformers >= 5 and torch: {error}") from error
    if getattr(flash._lazy_imports, "_flashspark", False):
        return
    flash._lazy_imports = _with_our_functions(flash)
    PreTrainedModel._check_and_adjust_attn_implementation = _without_fallback(PreTrainedModel, flash)
    _allow_block_tables()
    AttentionMaskInterface.register(NAME, mask)
    AttentionInterface.register(NAME, ours.attention)
    AttentionInterface.register(f"paged|{NAME}", ours.paged_attention)


def _is_ours(implementation: str | None) -> bool:
    return implementation is not None and implementation.removeprefix("paged|") == NAME


def _with_our_functions(flash: Any) -> Callable[..., Any]:
    """transformers loads a package or a kernel from the hub for every name that contains "flash"; for ours there is
    nothing to load."""
    theirs = flash._lazy_imports

    @wraps(theirs)
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not _is_ours(implementation):
            return theirs(implementation, *args, **kwargs)
        from . import _transformers_attention as ours

        functions = (ours.flash_attn_func, ours.flash_attn_varlen_func, ours.flash_attn_with_kvcache)
        return (*functions, flash._pad_input, flash._unpad_input)

    lazy_imports._flashspark = True  # type: ignore[attr-defined]
    return lazy_imports


def _without_fallback(model: Any, flash: Any) -> Callable[..., Any]:
    """Models with attention sinks (gpt-oss) list the flash attentions that have them, and replace all others by one
    from the hub. Ours has them. A model whose list has no flash attention at all needs something else, and keeps it."""
    theirs = model._check_and_adjust_attn_implementation

    @wraps(theirs)
    def check(
        self: Any, attn_implementation: str | None, is_init_check: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        listed = getattr(self, "_compatible_flash_implementations", None)
        if _is_ours(attn_implementation) and any("flash" in name for name in listed or ()):
            attn_implementation = self.get_correct_attn_implementation(attn_implementation, is_init_check)
            flash.lazy_import_flash_attention(attn_implementation)
            return attn_implementation
        return theirs(self, attn_implementation, is_init_check, *args, **kwargs)

    return check


def _allow_block_tables() -> None:
    """Continuous batching decodes from its pages in place only for names that contain "flash" and then a 2 or a 3."""
    try:
        from transformers.generation.continuous_batching import initialization

        theirs = initialization.is_flash_attention_requested
    except (ImportError, AttributeError):
        return  # another release: keys are gathered, which is slower and as right

    @wraps(theirs)
    def requested(
        config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return True if _is_ours(name) else theirs(config, requested_attention_implementation, version)

    initialization.is_flash_attention_requested = requested
