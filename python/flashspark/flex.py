"""FlexAttention: attention with functions of scores and positions, written in Python, compiled for the GPU at run time.

The names, layout, defaults and meaning are those of torch.nn.attention.flex_attention::

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    def sliding(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 1024)

    mask = flashspark.create_block_mask(sliding, None, None, S, S)
    out = flashspark.flex_attention(q, k, v, score_mod=alibi, block_mask=mask, enable_gqa=True)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._call import FUNC, Mode, attend, learn_torch, respelling
from ._flex_call import WORDS, needs, remember, warm
from ._tensors import Array, array, differentiable, empty_like, is_cupy, is_jax, is_torch
from ._user_functions import Functions, arguments, empty_result


class AuxOutput(NamedTuple):
    """What return_aux asks for, as torch's class of this name."""

    lse: Array | None = None
    max_scores: Array | None = None


def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
    implementation: str | None = None,
) -> Any:
    """Attention with a score function and a block mask.

    query: (B, Hq, L, D). key: (B or 1, Hkv, S, D). value: (B or 1, Hkv, S, Dv). float32, float16 or bfloat16 on the
    CPU, 16 bits on a GPU; NumPy arrays, torch, CuPy or JAX tensors. score_mod(score, b, h, q_idx, kv_idx) gives the new
    score. block_mask: of create_block_mask, flashspark's or torch's. scale: 1 / sqrt(D). enable_gqa: allows Hkv < Hq.
    kernel_options: accepted and ignored. return_aux: torch's AuxRequest; max_scores is not supported.
    implementation: "cpu-engine", "cpu-reference" or "cuda"; None chooses.

    Returns out (B, Hq, L, Dv), with return_lse (out, lse), with return_aux (out, AuxOutput): lse (B, Hq, L), natural
    logarithm, float32. A row that keeps no key gives 0 and -inf. Raises TraceError for a function that cannot become a
    graph, ValueError for what does not fit together. torch tensors that require gradients get them, also those that
    score_mod captures.
    """
    del kernel_options
    want_lse = bool(return_lse)
    if return_aux is not None:
        if return_lse:
            raise ValueError("return_lse = True: must be False with return_aux, which asks for the same")
        if getattr(return_aux, "max_scores", False):
            raise NotImplementedError("return_aux.max_scores = True: must be False, it is not supported")
        want_lse = bool(getattr(return_aux, "lse", False))
    options = (score_mod, block_mask, scale, enable_gqa, want_lse, implementation)
    result = warm(query, key, value, *options)
    out, lse = _run((query, key, value), *options, None) if result is None else result
    if return_aux is not None:
        return out, AuxOutput(lse)
    return (out, lse) if return_lse else out


def flex_explain(
    query: Array,
    key: Array,
    value: Array,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
    implementation: str | None = None,
) -> str:
    """What flex_attention with the same arguments would run, as text."""
    del kernel_options
    want_lse = bool(return_lse or getattr(return_aux, "lse", False))
    mode = Mode(explain=True)
    tensors = (query, key, value)
    return str(_run(tensors, score_mod, block_mask, scale, enable_gqa, want_lse, implementation, mode))


def _run(
    tensors: tuple[Array, Array, Array],
    score_mod: Callable[..., Any] | None,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    want_lse: bool,
    implementation: str | None,
    mode: Mode | None,
) -> Any:
    query, key, value = _checked(*tensors, enable_gqa)
    learn_torch(query)
    needed = needs(score_mod, block_mask, query, key)
    function = Functions.of(needed.score, needed.mask, needed.lists, mode)
    head, tail = arguments(needed.parameters, scale, implementation)
    token_major = tuple(_tokens_first(x) for x in (query, key, value))
    if mode is None and any(map(differentiable, (query, key, value, *tail, *function.captured))):
        from ._autograd import attend as attend_with_gradients

        out, lse = respelling(
            WORDS, attend_with_gradients, FUNC, token_major, None, None, True, None, head, tail, function, True
        )
        return _tokens_first(out), lse
    if is_jax(query):  # whose views are copies
        batch, heads, rows, _ = query.shape
        out = memory = empty_like(query, (batch, rows, heads, value.shape[-1]), query.dtype)
    else:
        out = empty_result(query, value)
        memory = _tokens_first(out)
    result = respelling(WORDS, attend, FUNC, token_major, memory, None, want_lse, mode, head, tail, function)
    if mode is not None:
        return result
    remember(score_mod, block_mask, query, key, needed)
    return (_tokens_first(out) if is_jax(query) else out), result[1]


def redirect_torch_flex_attention() -> Any:
    """Sends torch.nn.attention.flex_attention.flex_attention to flashspark, from now on or in a `with` statement.

    Models that call it need no change: eagerly and under torch.compile, whatever name they know it by, in training as
    well, on the CPU, too. Calls that flashspark cannot compute are torch's own, with a RuntimeWarning: functions that
    cannot become a graph, other types. What was compiled before stays as it is (torch._dynamo.reset() forgets it).
    Returns an object whose undo() ends it.
    """
    from ._torch_flex import Redirection

    return Redirection(flex_attention)


def _tokens_first(x: Array) -> Array:
    """(B, H, S, D) as (B, S, H, D), or back: a view."""
    return x.transpose(1, 2) if is_torch(x) else x.transpose(0, 2, 1, 3)


def _checked(query: Array, key: Array, value: Array, enable_gqa: bool) -> tuple[Array, Array, Array]:
    """The tensors, key and value with as many sequences as query. Raises ValueError or TypeError."""
    given = (("query", query), ("key", key), ("value", value))
    query, key, value = (x if differentiable(x) else array(name, x) for name, x in given)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if is_jax(x) and isinstance(x, sys.modules["jax"].core.Tracer):
            raise TypeError(f"{name} = a tracer of jax.jit or another transformation: must be an array with memory")
        if len(x.shape) != 4:
            raise ValueError(f"{name}.shape = {tuple(x.shape)}: must be (batch, heads, tokens, head size)")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}.dtype = {x.dtype}: must be query's, {query.dtype}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"key.shape[1] = {kv_heads}: must be query's {heads}, or enable_gqa must be True")
    batch = query.shape[0]
    return query, _for_batch("key", key, batch), _for_batch("value", value, batch)


def _for_batch(name: str, x: Array, batch: int) -> Array:
    """x, where there is one sequence for all, with a stride of 0."""
    if x.shape[0] == batch:
        return x
    if x.shape[0] != 1:
        raise ValueError(f"{name}.shape[0] = {x.shape[0]}: must be query's {batch}, or 1")
    if is_torch(x):
        return x.expand(batch, -1, -1, -1)
    if is_cupy(x) or is_jax(x):
        return x.repeat(batch, 0)
    return np.broadcast_to(x, (batch, *x.shape[1:]))
