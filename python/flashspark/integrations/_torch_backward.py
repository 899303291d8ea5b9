"""The backward passes of torch's flash attention operators on flashspark, and what both passes ask of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _backward

_TYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_REFUSALS = (NotImplementedError, ValueError, TypeError)  # flashspark raises them before it computes anything
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LeftToTorch(Exception):
    """Its text says why flashspark does not compute a call."""


def demand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, **given: Any) -> None:
    """Raises LeftToTorch unless flashspark computes such calls. given: arguments that must be None or False."""
    if dropout_p:
        raise LeftToTorch("dropout")
    for name, x in given.items():
        if x is not None and x is not False:
            raise LeftToTorch(name)
    if query.dtype not in _TYPES or key.dtype is not query.dtype or value.dtype is not query.dtype:
        raise LeftToTorch(f"dtype {query.dtype}")
    if query.numel() == 0 or key.numel() == 0:
        raise LeftToTorch("no elements")


def cut_for_cpu(
    rows: int, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor, bool, tuple[int, int]]:
    """(key, value, causal, window) that mean here what is_causal means for torch's operator for the CPU.

    There query i sees keys 0 to i, from the top left corner on. flashspark counts from the bottom right corner. The two
    agree on square problems, which this becomes if the keys that no query sees are cut off; where there are more
    queries than keys, a window moves the diagonal.
    """
    keys = key.shape[2]
    if not is_causal or rows == keys:
        return key, value, is_causal, (-1, -1)
    if rows < keys:
        return key[:, :, :rows], value[:, :, :rows], True, (-1, -1)
    return key, value, False, (-1, rows - keys)


def computed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One call of flashspark, whose refusals become reasons to leave the call to torch. Autograd's node is torch's."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with torch.no_grad():
            return function(*args, deterministic=deterministic, **kwargs)
    except _REFUSALS as error:
        raise LeftToTorch(str(error).partition("\n")[0][:200]) from None


def _dense(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
) -> _Gradients:
    """Of tensors (batch, heads, length, head_dim); lse (batch, heads, length)."""
    dout, q, k, v, result = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    found = computed(
        _backward.flash_attn_backward, dout, q, k, v, result, lse, softmax_scale=scale, causal=causal,
        window_size=window,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


def _for_cpu(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> _Gradients:
    """_scaled_dot_product_flash_attention_for_cpu_backward."""
    demand(query, key, value, dropout_p, attn_mask=attn_mask)
    k, v, causal, window = cut_for_cpu(query.shape[2], key, value, is_causal)
    dq, dk, dv = _dense(grad_out, query, k, v, out, logsumexp, scale, causal, window)
    if k.shape[2] == key.shape[2]:
        return dq, dk, dv
    pad = (0, 0, 0, key.shape[2] - k.shape[2])  # keys that no query sees
    return dq, torch.nn.functional.pad(dk, pad), torch.nn.functional.pad(dv, pad)


def _for_cuda(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> _Gradients:
    """_scaled_dot_product_flash_attention_backward."""
    demand(query, key, value, dropout_p, cum_seq_q=cum_seq_q, cum_seq_k=cum_seq_k)
    return _dense(grad_out, query, key, value, out, logsumexp, scale, is_causal)


def _varlen(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unknown: Any,
) -> _Gradients:
    """_flash_attention_backward: (batch, length, heads, head_dim), or (total, heads, head_dim) with cum_seq_q."""
    demand(query, key, value, dropout_p, **unknown)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": tuple(-1 if side is None else side for side in (window_size_left, window_size_right)),
    }
    tensors = (grad_out, query, key, value, out, logsumexp)
    if cum_seq_q is None:
        found = computed(_backward.flash_attn_backward, *tensors, **options)
    else:
        lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
        found = computed(_backward.flash_attn_varlen_backward, *tensors, *lengths, **options)
    dq, dk, dv = found
    return dq, dk, dv


# By dispatch key: operator, implementation.
CPU = {"_scaled_dot_product_flash_attention_for_cpu_backward": _for_cpu, "_flash_attention_backward": _varlen}
CUDA = {"_scaled_dot_product_flash_attention_backward": _for_cuda, "_flash_attention_backward": _varlen}
