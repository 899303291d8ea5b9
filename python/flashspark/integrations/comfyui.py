"""flashspark as an attention of ComfyUI. The folder integrations/comfyui of the sources is a custom node around this::

    import flashspark.integrations.comfyui as flashspark_comfyui

    flashspark_comfyui.register()  # within ComfyUI: get_attention_function("flashspark")
    flashspark_comfyui.patched(model)  # a clone of a model (ModelPatcher) whose attention runs on flashspark

Inference. A call that flashspark does not compute goes to ComfyUI's attention with the arguments that it came with:
to attention_pytorch from the registered function, and from a patched model to whatever attention ComfyUI would have
run without the patch. Left to ComfyUI are masks, tensors that require gradients, types other than float16 and bfloat16
(and float32 on the CPU), head sizes above 512, devices other than the CPU and NVIDIA GPUs, shapes that do not fit
together, and arguments that are not known here. `calls` says how many calls ran where, and why.

attn_precision and low_precision_attention change nothing: they ask for scores in float32 and for no quantisation,
and flashspark holds scores in float32 and quantises nothing.

Under torch.compile the call stays in the graph as an operator of flashspark.torch_ops, and is not counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .compiling import traceable

NAME = "flashspark"  # of the attention function in ComfyUI's registry
OVERRIDE = "optimized_attention_override"  # its key in a model's transformer_options
_flash_attn_func = traceable("flash_attn_func")
_TYPES = {"cpu": (torch.float32, torch.float16, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
_MAX_HEAD_DIM = 512
# What ComfyUI passes along that is used here or does not change what is computed. Any other argument is left to it.
_ARGUMENTS = {
    *("scale", "enable_gqa", "low_precision_attention"),
    *("transformer_options", "preferred_attention", "_inside_attn_wrapper"),
}
_REFUSALS = (NotImplementedError, ValueError, TypeError)  # flashspark raises them before it computes anything
_calls: Counter[str] = Counter()
_log = logging.getLogger(__name__)

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k and v, each (batch, length, heads, head_dim)


def _rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool, gqa: bool) -> Rows | None:
    """Views of what ComfyUI passes, (batch, length, heads * head_dim), or (batch, heads, length, head_dim) with
    skip_reshape. None if the shapes do not fit together: ComfyUI's attention then says so, or broadcasts them."""
    tensors = (q, k, v)
    if any(x.ndim != (4 if skip_reshape else 3) for x in tensors):
        return None
    if skip_reshape:
        q, k, v = (x.transpose(1, 2) for x in tensors)
    else:
        head_dim = q.shape[2] // heads
        if head_dim == 0 or any(x.shape[2] % head_dim for x in tensors):
            return None
        q, k, v = (x.unflatten(2, (-1, head_dim)) for x in tensors)
    heads_kv = k.shape[2] if gqa else heads
    fit = q.shape[2] == heads and k.shape[2] == heads_kv and heads % heads_kv == 0 and k.shape == v.shape
    return (q, k, v) if fit and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] else None


def _why_not_on(device: torch.device) -> str:
    if device.type == "cuda" and torch.version.hip:
        return "device cuda of ROCm"
    return "" if device.type in _TYPES else f"device {device.type}"


def _why_not(tensors: Rows, mask: torch.Tensor | None, options: Mapping[str, Any]) -> str:
    """Why flashspark does not compute a call; "" if it does."""
    q = tensors[0]
    if mask is not None:
        return "mask"
    for name, value in options.items():
        if name not in _ARGUMENTS and value is not None and value is not False:
            return f"argument {name}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "an argument requires gradients"
    if any(type(x) is not torch.Tensor for x in tensors):
        return "a subclass of torch.Tensor"
    if reason := _why_not_on(q.device):
        return reason
    if any(x.dtype not in _TYPES[q.device.type] or x.dtype != q.dtype for x in tensors):
        return f"dtype {q.dtype}" if q.dtype not in _TYPES[q.device.type] else "different dtypes"
    if any(x.numel() == 0 for x in tensors):
        return "no elements"
    return ""


def _computed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """ComfyUI's attention by flashspark, or None if flashspark does not compute this call. Counts it either way.

    Returns (batch, length, heads * head_dim), or (batch, heads, length, head_dim) with skip_output_reshape.
    """
    compiling = torch.compiler.is_compiling()
    out, reason = None, _why_not((q, k, v), mask, options)
    if not reason:
        rows = _rows(q, k, v, heads, skip_reshape, bool(options.get("enable_gqa", False)))
        if rows is None:
            reason = "shapes"
        elif rows[0].shape[3] > _MAX_HEAD_DIM:
            reason = f"head size {rows[0].shape[3]}"
        elif compiling:  # what flashspark refuses beyond this is an error of the compiled model
            out = _attend(rows, options)
        else:
            try:
                out = _attend(rows, options)
            except _REFUSALS as error:
                reason = str(error).partition("\n")[0][:200]
    if not compiling:
        _count(reason)
    if out is None:
        return None
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def _attend(rows: Rows, options: Mapping[str, Any]) -> torch.Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _flash_attn_func(*rows, softmax_scale=options.get("scale"), deterministic=deterministic)


def _count(reason: str) -> None:
    name = f"comfyui: {reason}" if reason else "flashspark"
    _calls[name] += 1
    if _calls[name] == 1 and reason:
        _log.debug("flashspark leaves such attention to ComfyUI: %s", reason)


def override(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An optimized_attention_override for transformer_options: ComfyUI calls it in place of `function`, its own
    attention, which gets the calls that flashspark does not compute."""
    out = _computed(*args, **kwargs)
    if out is not None:
        return out
    if function is attention:
        # It sees by its arguments that it is called within an attention, and asks for no override.
        from comfy.ldm.modules.attention import attention_pytorch as function
    return function(*args, **kwargs)


def attention(*args: Any, **kwargs: Any) -> Any:
    """The attention function for ComfyUI's registry, with the arguments of all functions there: q, k, v, heads,
    mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, and others by name."""
    return override(attention, *args, **kwargs)


def register() -> None:
    """Makes `attention` known to ComfyUI as "flashspark". Calling it again does nothing.

    Raises ImportError outside ComfyUI, and NotImplementedError where ComfyUI has no registry of attention functions.
    """
    try:
        from comfy.ldm.modules import attention as theirs
    except ImportError as error:
        raise ImportError(f"flashspark.integrations.comfyui must be called within ComfyUI: {error}") from error
    if not hasattr(theirs, "register_attention_function"):
        raise NotImplementedError(
            "this ComfyUI has no register_attention_function in comfy.ldm.modules.attention, which came together with "
            f"{OVERRIDE} in its pull request 9639 (2025); update ComfyUI"
        )
    if theirs.get_attention_function(NAME, None) is not None:
        return
    # The wrapper asks for overrides and opens ComfyUI's tensor containers.
    theirs.register_attention_function(NAME, theirs.wrap_attn(attention))
    _log.info("flashspark is registered as attention function %r", NAME)


def refusal(device: torch.device | str) -> str:
    """Why flashspark computes nothing on a device, in its own words; "" if it does. Tries one token."""
    device = torch.device(device)
    if reason := _why_not_on(device):
        return reason
    try:
        x = torch.zeros((1, 1, 1, 64), dtype=torch.bfloat16, device=device)
        _flash_attn_func(x, x, x)
    except _REFUSALS as error:
        return str(error).partition("\n")[0][:200]
    return ""


def patched(model: Any) -> Any:
    """A clone of a model (ComfyUI's ModelPatcher) whose attention runs on flashspark. The model itself is not changed.

    An override that the model has already is replaced, as by ComfyUI's own node for attention. On a device that
    flashspark has no kernels for, the clone keeps what the model had. Both are logged, once for each call of this.
    """
    clone = model.clone()
    device = getattr(model, "load_device", None)
    if device is not None and (reason := refusal(device)):
        _log.warning("the model keeps ComfyUI's attention: flashspark does not run on %s: %s", device, reason)
        return clone
    options = dict(clone.model_options.get("transformer_options", {}))
    if options.get(OVERRIDE, override) is not override:
        _log.warning("flashspark's attention replaces another override of the model's attention")
    clone.model_options = {**clone.model_options, "transformer_options": {**options, OVERRIDE: override}}
    return clone


def calls(reset: bool = False) -> dict[str, int]:
    """How many calls ran on flashspark ("flashspark"), and how many were left to ComfyUI's attention and why
    ("comfyui: mask", ...). reset: count from 0 again."""
    result = dict(_calls)
    if reset:
        _calls.clear()
    return result
