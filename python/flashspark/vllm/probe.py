"""Whether the installed vLLM has the shape that the takeover relies on, judged by its functions, not its version."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType
from typing import Any

from . import attention
from .features import VERSION
from .names import FA_UTILS, FLASH_ATTN, INTERFACE

# The arguments that the backends of every release pass to the attention function.
_PASSED = frozenset(
    {
        *("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "seqused_k", "softmax_scale"),
        *("causal", "window_size", "softcap", "block_table", "return_softmax_lse", "out", "num_splits", "fa_version"),
        "s_aux",
    }
)


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _required(function: Any) -> set[str]:
    empty, named = inspect.Parameter.empty, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n for n, p in parameters(function).items() if p.default is empty and p.kind in named}


def functions() -> str | None:
    """Why the functions of fa_utils and flash_attn_interface, both loaded, do not fit; None if they do."""
    utils, interface = sys.modules[FA_UTILS], sys.modules.get(INTERFACE)
    attend = getattr(interface, "flash_attn_varlen_func", None)
    if attend is None:
        return f"{INTERFACE}.flash_attn_varlen_func does not exist"
    if lost := _PASSED - parameters(attend).keys():
        return f"flash_attn_varlen_func has no {', '.join(sorted(lost))}"
    if new := _required(attend) - attention.KNOWN:
        return f"flash_attn_varlen_func requires {', '.join(sorted(new))}, which is unknown here"
    version = getattr(utils, "get_flash_attn_version", None)
    if version is None:
        return f"{FA_UTILS}.get_flash_attn_version does not exist"
    if new := _required(version):
        return f"get_flash_attn_version requires {', '.join(sorted(new))}, which is unknown here"
    if getattr(utils, "flash_attn_varlen_func", None) is not attend:
        return "fa_utils.flash_attn_varlen_func is not that of vllm_flash_attn"
    return None


def classes(module: ModuleType) -> str | None:
    """Why the classes of the FLASH_ATTN backend do not fit; None if they do."""
    for name in ("FlashAttentionBackend", "FlashAttentionImpl", "FlashAttentionMetadataBuilder"):
        if not isinstance(getattr(module, name, None), type):
            return f"{FLASH_ATTN}.{name} does not exist"
    if "vllm_flash_attn_version" not in module.FlashAttentionImpl.__init__.__code__.co_names:
        return "FlashAttentionImpl does not keep vllm_flash_attn_version"
    if not hasattr(module, "flash_attn_varlen_func"):
        return f"{FLASH_ATTN} does not call flash_attn_varlen_func"
    known = {"max_ranges", "sliding_window", "sliding_window_left"}
    factory = getattr(module, "_make_mm_prefix_mask_mod", None)
    if factory is not None and (new := parameters(factory).keys() - known):
        return f"_make_mm_prefix_mask_mod takes {', '.join(sorted(new))}, which is unknown here"
    factory = getattr(module, "_make_rswa_mask_mod", None)
    if factory is not None and parameters(factory):
        return "_make_rswa_mask_mod takes arguments, which are unknown here"
    return None


def graph_support(module: ModuleType) -> Any:
    """The CUDA-graph class that the stock builder states at version 4.

    The class body asks for the version when it runs, possibly before the takeover, so its expression is evaluated again
    here. Without source: UNIFORM_BATCH, which every release accepts.
    """
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):
        return module.AttentionCGSupport.UNIFORM_BATCH
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "FlashAttentionMetadataBuilder":
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                if any(isinstance(t, ast.Name) and t.id == "_cudagraph_support" for t in targets):
                    code = compile(ast.Expression(line.value), FLASH_ATTN, "eval")
                    return eval(code, {**vars(module), "get_flash_attn_version": lambda: VERSION})
    return module.AttentionCGSupport.UNIFORM_BATCH
