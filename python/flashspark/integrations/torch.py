"""torch.nn.functional.scaled_dot_product_attention on flashspark, without a change to the model.

Where torch itself would run its flash kernels, it then runs flashspark's, eagerly and under torch.compile::

    import flashspark.integrations.torch as flashspark_sdpa

    flashspark_sdpa.enable()  # until disable(); a no-operation if it is on already
    with flashspark_sdpa.enabled():  # or for some calls only; may be nested, and holds for all threads
        model(x)

torch's own way of choosing a flash implementation works as well, where torch has it::

    flashspark_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("FLASHSPARK")
    torch.nn.attention.restore_flash_attention_impl()  # torch 2.10 has no way back

All of these override torch's operators and need torch.library.get_kernel; tested are torch 2.10, 2.11 and 2.15, on the
CPU. On CUDA the operators are _scaled_dot_product_flash_attention and _flash_attention_forward, which nested tensors
and torch.nn.attention.varlen.varlen_attn call; on the CPU _scaled_dot_product_flash_attention_for_cpu. varlen_attn,
which torch has for CUDA only, then runs on the CPU, too.

Training, too: the operators' backward passes are overridden as well. A call goes to torch's own kernel, as if nothing
were switched on, if dropout is asked for, if there is a mask, or if flashspark does not support the types or sizes; the
results' shapes, types and strides are torch's either way. `calls` says how many calls ran where, and why. Each pass is
chosen for itself, as both implementations give the same two results, out and logsumexp, and take them: a forward pass
inside `enabled()` may have its backward pass outside.

torch asks its flash kernels only for what they can do: on CUDA 16-bit types, no mask, head_dim up to 256, and
is_causal only where both lengths are equal. The rest goes to its other kernels, here as ever.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import _ops
from . import _torch_backward
from ._torch_backward import LeftToTorch as _LeftToTorch
from ._torch_backward import computed, cut_for_cpu, demand

NAME = "FLASHSPARK"  # of the implementation, for torch.nn.attention.activate_flash_attention_impl
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # dispatch keys


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
) -> None:
    """Attention of tensors (batch, heads, length, head_dim) into out, of that shape, and lse (batch, heads, length)."""
    q, k, v, result = (x.transpose(1, 2) for x in (query, key, value, out))
    computed(_ops.flash_attn_func, q, k, v, softmax_scale=scale, causal=causal, window_size=window, out=result, lse=lse)


def _for_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """_scaled_dot_product_flash_attention_for_cpu."""
    demand(query, key, value, dropout_p, attn_mask=attn_mask)
    batch, heads, rows, _ = query.shape
    key, value, is_causal, window = cut_for_cpu(rows, key, value, is_causal)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, rows, heads), dtype=torch.float32).transpose(1, 2)
    _dense(query, key, value, out, lse, scale, is_causal, window)
    return out, lse


def _for_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """_scaled_dot_product_flash_attention, whose causal mask starts from the bottom right as flashspark's does."""
    demand(query, key, value, dropout_p, return_debug_mask=return_debug_mask)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _dense(query, key, value, out, lse, scale, is_causal)
    if is_causal and query.shape[2] > key.shape[2]:
        _as_torch_marks_empty_rows(lse)
    return (out, lse, None, None, query.shape[2], key.shape[2], *_no_dropout(query))


def _flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """_flash_attention_forward."""
    out = torch.empty_like(query)
    lse = _flash_forward_into(out, query, key, value, *args, **kwargs)
    return (out, lse, *_no_dropout(query))


def _flash_forward_into(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    **unknown: Any,
) -> torch.Tensor:
    """_flash_attention_forward_no_dropout_inplace: (batch, length, heads, head_dim), or (total, heads, head_dim) with
    cum_seq_q. Arguments that a later torch may add are left to torch."""
    demand(query, key, value, dropout_p, return_debug_mask=return_debug_mask, **unknown)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": tuple(-1 if side is None else side for side in (window_size_left, window_size_right)),
        "seqused_k": seqused_k,
        "alibi_slopes": alibi_slopes,
        "num_splits": num_splits or 0,
        "out": out,
    }
    if cum_seq_q is None:
        if block_table is not None or cum_seq_k is not None:
            raise _LeftToTorch("pages or offsets of the keys without offsets of the queries")
        lse = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)
        computed(_ops.flash_attn_func, query, key, value, lse=lse, **options)
    else:
        lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        lengths = None if block_table is not None and seqused_k is not None else cum_seq_k
        computed(
            _ops.flash_attn_varlen_func,
            *(query, key, value, cum_seq_q, lengths, max_q, max_k),
            **{**options, "block_table": block_table, "lse": lse},
        )
    full = cum_seq_q is None and seqused_k is None and options["window_size"] == (-1, -1)
    if not (full and (not is_causal or query.shape[1] <= key.shape[1])):
        _as_torch_marks_empty_rows(lse)
    return lse


def _as_torch_marks_empty_rows(lse: torch.Tensor) -> None:
    """torch's flash kernels give a row that sees no key a logsumexp of +inf, flashspark gives it -inf."""
    lse.masked_fill_(lse == -math.inf, math.inf)


def _no_dropout(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rng_state, the unused offset and the debug mask, as torch's kernels return them without dropout."""
    return (
        query.new_zeros((2,), dtype=torch.uint64),
        query.new_zeros((), dtype=torch.uint64),
        query.new_empty((0,)),
    )


# By dispatch key: operator, implementation. torch has the last one since 2.14 or so.
_VARLEN = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
}
_OPERATORS: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {"_scaled_dot_product_flash_attention_for_cpu": _for_cpu, **_VARLEN, **_torch_backward.CPU},
    "CUDA": {"_scaled_dot_product_flash_attention": _for_cuda, **_VARLEN, **_torch_backward.CUDA},
}
_calls: Counter[str] = Counter()


def _kernel(key: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel that replaces torch's own, which it keeps for the calls that `function` leaves to it."""
    try:
        own = torch.library.get_kernel(f"aten::{name}", key)
    except RuntimeError:  # torch has none for this device
        own = None

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except _LeftToTorch as reason:
            if own is None:
                raise NotImplementedError(f"aten::{name}: {reason}: torch has no kernel for {key} itself") from None
            _calls[f"torch: {reason}"] += 1
            return own.call_boxed(keys, *args, **kwargs)
        _calls["flashspark"] += 1
        return result

    return kernel


def _override(key: str) -> Any:
    """torch.library.Library whose life is that of the override."""
    if not hasattr(torch.library, "get_kernel"):
        raise NotImplementedError(
            f"torch = {torch.__version__}: must have torch.library.get_kernel (2.10), to keep its own kernels"
        )
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid", category=UserWarning)
        for name, function in _OPERATORS[key].items():
            if hasattr(torch.ops.aten, name):
                kernel = _kernel(key, name, function)
                library.impl(name, kernel, key, with_keyset=True, allow_override=True)
    return library


_lock = threading.Lock()
_holders: Counter[str] = Counter()  # how many switches and context managers want the override of each dispatch key
_libraries: dict[str, Any] = {}


class Handle:
    """An override that is in force until remove() is called. torch.nn.attention keeps one while it is active."""

    def __init__(self, devices: Iterable[str]) -> None:
        self._keys = _keys(devices)
        with _lock:
            for key in self._keys:
                if not _holders[key]:
                    _libraries[key] = _override(key)
                _holders[key] += 1

    def remove(self) -> None:
        """Restores torch's kernels, unless another handle is in force. A second call does nothing."""
        with _lock:
            for key in self._keys:
                _holders[key] -= 1
                if not _holders[key]:
                    _libraries.pop(key)._destroy()
            self._keys = ()


def _keys(devices: Iterable[str]) -> tuple[str, ...]:
    names = (devices,) if isinstance(devices, str) else tuple(devices)
    for name in names:
        if name not in _DEVICES:
            raise ValueError(f"devices = {name!r}: must be of {', '.join(_DEVICES)}")
    return tuple(_DEVICES[name] for name in dict.fromkeys(names))


_switches: list[Handle] = []  # none or one


def enable(devices: Iterable[str] = ("cpu", "cuda")) -> None:
    """Lets torch's attention run on flashspark, in all threads, until `disable`.

    devices: "cpu", "cuda" or both. Another call replaces those of an earlier one.
    Raises ValueError for another device, and NotImplementedError for a torch without torch.library.get_kernel.
    """
    handle = Handle(devices)
    disable()
    _switches.append(handle)


def disable() -> None:
    """Takes back `enable`: torch's attention runs on torch's kernels again, but inside `enabled` and while an
    implementation of torch.nn.attention is active."""
    while _switches:
        _switches.pop().remove()


@contextmanager
def enabled(devices: Iterable[str] = ("cpu", "cuda")) -> Iterator[None]:
    """A context manager in which torch's attention runs on flashspark, in all threads. Arguments, errors: `enable`."""
    handle = Handle(devices)
    try:
        yield
    finally:
        handle.remove()


def is_enabled(device: str = "cuda") -> bool:
    """Whether torch's attention on "cpu" or "cuda" runs on flashspark now, however it was switched on."""
    return bool(_holders[_keys(device)[0]])


def register() -> None:
    """Makes "FLASHSPARK" known to torch.nn.attention, whose activate_flash_attention_impl then switches it on.

    Raises NotImplementedError where torch has no such registry; `enable` may work there.
    """
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            f"torch = {torch.__version__}: torch.nn.attention has no register_flash_attention_impl; "
            "use flashspark.integrations.torch.enable()"
        )
    attention.register_flash_attention_impl(NAME, register_fn=lambda: Handle(("cpu", "cuda")))


def calls(reset: bool = False) -> dict[str, int]:
    """How many calls of the overridden operators ran on flashspark ("flashspark"), and how many were left to torch's
    kernel and why ("torch: dropout", ...). reset: count from 0 again."""
    result = dict(_calls)
    if reset:
        _calls.clear()
    return result
