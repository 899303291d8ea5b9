"""vLLM's attention calls, run by flashspark.

`varlen` and `cute_varlen` take a stock function of vLLM and return its replacement, which hands every call that is not
ours to the stock function unchanged. A layer is ours when `get_flash_attn_version` has answered 4 for it; its calls
then say fa_version=4.
"""

from __future__ import annotations

import functools
from typing import Any

from flashspark import mods

from . import report, switches
from .features import VERSION
from .replace import Function, arguments_by_name

# Arguments of a call that are passed on, and what flashspark._fwd calls them where the names differ.
_PASSED = {
    name: name
    for name in (
        *("cu_seqlens_k", "seqused_q", "seqused_k", "softmax_scale", "causal", "softcap", "alibi_slopes", "num_splits"),
        *("out", "q_descale", "k_descale", "v_descale", "output_scale", "mask_mod", "score_mod", "aux_tensors"),
        *("dynamic_causal", "scheduler_metadata"),
    )
} | {"block_table": "page_table", "s_aux": "learnable_sink"}
# Arguments that tune other kernels: they do not change the result, so any value is accepted.
_IGNORED = frozenset(
    {
        *("deterministic", "aux_tensor_leading_dims", "cp_rank", "fa_version", "min_seqlen_k", "pack_gqa"),
        *("seqlen_k_per_split", "disable_scheduler_metadata", "score_mod_bwd", "return_attn_probs"),
    }
)
# Arguments that would change the result at any other value.
_FIXED = {"cp_world_size": 1, "dropout_p": 0.0}
# All arguments that a call may require.
KNOWN = frozenset(
    {"q", "k", "v", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "window_size", "return_softmax_lse"}
    | _PASSED.keys()
    | {"return_attn_probs"}
)


def varlen(stock: Function) -> Function:
    """vllm_flash_attn.flash_attn_varlen_func: ours for fa_version 4, stock for every other version."""
    by_name = arguments_by_name(stock)

    @functools.wraps(stock)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        given = by_name(args, kwargs)
        if given.get("fa_version") != VERSION:
            return stock(*args, **kwargs)
        lse = given.pop("return_softmax_lse", False) or given.get("return_attn_probs", False)
        if (window := given.get("window_size")) is not None:
            # To vLLM's function every negative side is open; to FlashAttention 4's own some of them shift the window.
            given = given | {"window_size": [None if side is None or side < 0 else side for side in window]}
        result = _attend(want_lse=lse, **given)
        return result if lse else result[0]

    return flash_attn_varlen_func


def cute_varlen(stock: Function) -> Function:
    """cute.flash_attn_varlen_func, FlashAttention 4's own interface: ours unless a mask or score function is unknown.

    Inkling calls it with its relative bias. Warm-ups call it with fake tensors and get empty results.
    """
    by_name = arguments_by_name(stock)
    renamed = {"page_table": "block_table", "learnable_sink": "s_aux"}

    @functools.wraps(stock)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        given = by_name(args, kwargs)
        if not all(_is_tag(given.get(name)) for name in ("score_mod", "mask_mod")):
            return stock(*args, **kwargs)
        given = {renamed.get(name, name): value for name, value in given.items()}
        lse = given.pop("return_lse", False)
        given = {"cu_seqlens_q": None, "max_seqlen_q": None, "max_seqlen_k": None} | given
        return _attend(want_lse=lse, **given)

    return flash_attn_varlen_func


def _is_tag(mod: Any) -> bool:
    return mod is None or isinstance(mod, (mods.RelBias, mods.MmPrefix, mods.RSwa))


def _attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    want_lse: bool,
    window_size: Any = None,
    **given: Any,
) -> Any:
    """(out, lse or None) of one call. The arguments are vLLM's; shapes and meaning are those of flashspark._fwd."""
    left, right = (None, None) if window_size is None else window_size
    arguments = {
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "window_size_left": left,
        "window_size_right": right,
        "num_splits": 0,
        "return_lse": want_lse,
        "deterministic": switches.batch_invariant(),
    }
    for name, value in given.items():
        if value is None:
            continue
        if name in _PASSED:
            arguments[_PASSED[name]] = value
        elif value is not False and name not in _IGNORED and not (name in _FIXED and _FIXED[name] == value):
            raise NotImplementedError(
                f"{name} = {_short(value)}: must be {_FIXED.get(name)}, flashspark does not support it"
            )
    if "mask_mod" in arguments or "score_mod" in arguments:
        _check_mods(arguments)
    # Lengths come with the pages, and scheduler metadata serves nothing but paged calls.
    arguments.pop("cu_seqlens_k" if "page_table" in arguments else "scheduler_metadata", None)
    if v.dtype.itemsize != 1:  # vLLM passes factors beside 16-bit caches, too
        for name in ("q_descale", "k_descale", "v_descale"):
            arguments.pop(name, None)
    kind = (
        *(q.shape[-1], v.shape[-1], q.dtype, v.dtype, left, right),
        *map(arguments.get, ("causal", "softcap", "mask_mod", "score_mod")),
        *map(arguments.__contains__, ("page_table", "learnable_sink", "alibi_slopes", "dynamic_causal")),
    )
    if kind not in _logged:
        _logged.add(kind)
        _log(q, k, v, arguments)
    return _forward()(q, k, v, **arguments)


_logged: set[tuple[Any, ...]] = set()  # the kinds of calls that the log has a line for


@functools.cache
def _forward() -> Function:
    """Loads the native library, which must not happen before the first call."""
    from flashspark._fwd import _flash_attn_fwd

    return _flash_attn_fwd


def _check_mods(arguments: dict[str, Any]) -> None:
    """Refuses functions that are not flashspark's tags, and gives R-SWA's tag its window."""
    for name in ("mask_mod", "score_mod"):
        mod = arguments.get(name)
        if not _is_tag(mod):
            raise NotImplementedError(f"{name} = {_short(mod)}: must be a mask that flashspark knows, or None")
    if arguments.get("mask_mod") == mods.RSwa():
        # FlashSparkImpl.forward notes the value on the tensor, since reading the tensor would wait for the GPU.
        _, tensor = arguments["aux_tensors"]
        window = getattr(tensor, "flashspark_value", None)
        if window is None:
            raise NotImplementedError("R-SWA outside flashspark's FLASH_ATTN backend: its window is not known there")
        arguments["mask_mod"] = mods.RSwa(window=window)


def _short(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"tensor {tuple(value.shape)}"
    return getattr(value, "__name__", None) or f"{value!r:.60}"


def _log(q: Any, k: Any, v: Any, given: dict[str, Any]) -> None:
    """Writes the log line of a new kind of call: what it asks for, and what runs it."""
    from flashspark._fwd import is_fake

    if is_fake(q):
        return
    sizes = f"{q.shape[-1]}" if q.shape[-1] == v.shape[-1] else f"{q.shape[-1]}/{v.shape[-1]}"
    types = {str(x.dtype).removeprefix("torch.") for x in (q, v)}
    words = [f"head_dim {sizes}", " q, ".join(sorted(types)), "paged" if "page_table" in given else "unpaged"]
    left, right = given["window_size_left"], given["window_size_right"]
    masks = [type(given[name]).__name__ for name in ("mask_mod", "score_mod") if name in given]
    if "mask_mod" not in given:
        per_request = "dynamic_causal" in given
        masks.insert(0, "causal per request" if per_request else "causal" if given.get("causal") else "full")
    if (left or -1) >= 0:
        masks.append(f"window {left}" if (right or 0) <= 0 else f"window {left}, {right}")
    masks += ["softcap"] if given.get("softcap") else []
    masks += [word for name, word in (("learnable_sink", "sinks"), ("alibi_slopes", "ALiBi")) if name in given]
    text = _forward()(q, k, v, **given, explain=True)
    chosen = next((line for line in text.splitlines() if ": chosen" in line), text.strip())
    report.info(f"serves {', '.join([*words, *masks])}; by {chosen.partition(':')[0]}")
