"""vLLM's factories of mask and score functions, which give flashspark's tags instead of functions in CuTe.

Each function takes a stock factory of vLLM and returns its replacement.
"""

from __future__ import annotations

import functools
from typing import Any

from flashspark import mods

from .replace import Function, arguments_by_name


def mm_prefix(stock: Function) -> Function:
    """flash_attn._make_mm_prefix_mask_mod.

    sliding_window_left counts the query's own key, so the inclusive window is one less. Up to 0.24 the factory has no
    window, and the call's own stays in force.
    """
    by_name = arguments_by_name(stock)

    @functools.wraps(stock)
    def _make_mm_prefix_mask_mod(*args: Any, **kwargs: Any) -> mods.MmPrefix:
        given = by_name(args, kwargs)
        width = given.get("sliding_window_left")
        return mods.MmPrefix(
            window_left=None if width is None else width - 1,
            clamp_window=bool(given.get("sliding_window", 0)),
        )

    return _make_mm_prefix_mask_mod


def rswa(stock: Function) -> Function:
    """flash_attn._make_rswa_mask_mod. The window comes in aux_tensors."""

    @functools.wraps(stock)
    def _make_rswa_mask_mod() -> mods.RSwa:
        return mods.RSwa()

    return _make_rswa_mask_mod


def rel_bias(stock: Function) -> Function:
    """Inkling's _get_score_mod. The bias comes in aux_tensors."""

    @functools.wraps(stock)
    def _get_score_mod(rel_extent: int) -> mods.RelBias:
        return mods.RelBias()

    return _get_score_mod
