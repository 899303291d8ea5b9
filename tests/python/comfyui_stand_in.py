"""A stand-in for ComfyUI's comfy.ldm.modules.attention and ModelPatcher, for tests.

Written from the interface that ComfyUI's repository has at commit 05080f6, none of its code: names, arguments,
layouts, the registry, and when a wrapped function asks for an override. No package on PyPI was found that has these.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter

import torch
from torch.nn.functional import scaled_dot_product_attention

REGISTERED_ATTENTION_FUNCTIONS = {}
ran = Counter()  # by name of the attention function: how many times it computed something


def register_attention_function(name, func):
    if name in REGISTERED_ATTENTION_FUNCTIONS:
        logging.warning("%s is there already", name)
        return
    REGISTERED_ATTENTION_FUNCTIONS[name] = func


def get_attention_function(name, default=...):
    if default is ...:
        return REGISTERED_ATTENTION_FUNCTIONS[name]
    return REGISTERED_ATTENTION_FUNCTIONS.get(name, default)


class AttentionTensorContainer:
    """Holds a tensor until the attention takes it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def wrap_attn(func):
    """The outermost wrapped function of a call asks transformer_options for an override, which is given what was
    wrapped; all of them open containers."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        kwargs.pop("preferred_attention", None)
        args = [x.take() if isinstance(x, AttentionTensorContainer) else x for x in args]
        options = kwargs.get("transformer_options") or {}
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            if "optimized_attention_override" in options:
                return options["optimized_attention_override"](func, *args, **kwargs)
        return func(*args, **kwargs)

    wrapper.container_function = None
    return wrapper


def _plain(name, q, k, v, heads, mask, skip_reshape, skip_output_reshape, options):
    ran[name] += 1
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        heads_kv = k.shape[-1] // head_dim if options.get("enable_gqa") else heads
        split = ((q, heads), (k, heads_kv), (v, heads_kv))
        q, k, v = (x.reshape(len(x), -1, n, head_dim).transpose(1, 2) for x, n in split)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim != 3 else mask[:, None]
    options = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@wrap_attn
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    return _plain("pytorch", q, k, v, heads, mask, skip_reshape, skip_output_reshape, kwargs)


@wrap_attn
def attention_sub_quad(
    query, key, value, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    return _plain("sub_quad", query, key, value, heads, mask, skip_reshape, skip_output_reshape, kwargs)


register_attention_function("pytorch", attention_pytorch)
register_attention_function("sub_quad", attention_sub_quad)
optimized_attention = attention_pytorch


class ModelPatcher:
    """What nodes call MODEL: clone() copies the options' dictionaries, and shares what they hold."""

    def __init__(self, options=None, load_device="cpu"):
        self.model_options = {"transformer_options": {}} if options is None else options
        self.load_device = torch.device(load_device)

    def clone(self):
        options = {**self.model_options, "transformer_options": copy.copy(self.model_options["transformer_options"])}
        return ModelPatcher(options, self.load_device)

    def set_model_optimized_attention(self, function):
        def override(_, *args, **kwargs):
            return function(*args, **kwargs)

        self.model_options["transformer_options"]["optimized_attention_override"] = override


class Block(torch.nn.Module):
    """A self-attention layer as a diffusion model has them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.project = torch.nn.Linear(width, 3 * width)

    def forward(self, x, transformer_options=None):
        q, k, v = map(AttentionTensorContainer, self.project(x).chunk(3, -1))
        return optimized_attention(q, k, v, self.heads, transformer_options=transformer_options)
