"""Dropout of flash_attn_func and flash_attn_varlen_func: its random state, and the probabilities that tests ask for.

docs/design/dropout.md says which probabilities a seed and an offset drop. Only calls with dropout load this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from ._kinds import integer, real
from ._signature import NO_TAIL, in_tail
from ._tensors import Array, empty_like, is_cupy, is_torch, out_dtype

_PAST = 2**63 - 1  # draws are below it: an int64 holds them
_DROPOUT = in_tail("dropout_p")
_SCALES = frozenset({in_tail("v_descale"), in_tail("output_scale")})  # they change results, not probabilities
_LENGTHS = tuple(in_tail(f"{what}_{side}") for what in ("cu_seqlens", "max_seqlen", "seqused") for side in "qk")
_CU_Q, _CU_K, _MAX_Q, _MAX_K, _, _ = _LENGTHS
_PAGES = in_tail("page_table")


def dropping(
    base: Callable[..., Any], plain: Callable[..., Any], dropout_p: Any, rng_state: Any, want_probabilities: bool
) -> Callable[..., Any]:
    """A function like `attend` for a call with dropout; with want_probabilities it returns (out, lse, S_dmask).

    base: what the call uses without dropout. plain: the same without the user's functions.
    """
    p = 0.0 if dropout_p is None else real("dropout_p", dropout_p)
    if p == 0 and rng_state is None:
        return base

    def run(
        face: int, tensors: Any, out: Any, lse: Any, want_lse: bool, mode: Any, head: Any, tail: tuple[Any, ...]
    ) -> Any:
        explains = mode is not None and mode.explain
        nothing_drawn = rng_state is None and explains
        state = None if nothing_drawn else _state(tensors[0], rng_state)
        dropout = (p, state)
        result = base(face, tensors, out, lse, want_lse, mode, head, (*_filled(tail), *dropout))
        if explains or p == 0 or not want_probabilities:
            return result
        with sys.modules["torch"].no_grad() if is_torch(tensors[0]) else nullcontext():  # they have no gradient
            return (*result, _signed_probabilities(base, plain, face, tensors, head, _filled(tail), dropout))

    return run


def _filled(tail: tuple[Any, ...]) -> list[Any]:
    """The arguments of the tail before dropout's, without those that were left out."""
    return [*tail, *NO_TAIL[len(tail) : _DROPOUT]]


def _state(q: Array, rng_state: Any) -> Array:
    """Seed and offset as int64 (2,) beside q: given, or drawn by the library that q is from."""
    if rng_state is None:
        return _drawn(q)
    if not isinstance(rng_state, (tuple, list)):
        return rng_state
    if len(rng_state) != 2:
        raise ValueError(f"rng_state = {len(rng_state)} values: must be two, seed and offset")
    numbers = [integer(f"rng_state[{i}]", x) for i, x in enumerate(rng_state)]
    if not (is_torch(q) or is_cupy(q)):
        return np.array(numbers, np.int64)
    state = empty_like(q, (2,), sys.modules["torch"].int64 if is_torch(q) else np.int64)
    # Filled on the device: a copy from the host would wait, and no graph could capture it. torch's assignment to one
    # element is such a copy.
    for i, number in enumerate(numbers):
        (state[i].fill_ if is_torch(q) else state[i].fill)(number)
    return state


def _drawn(q: Array) -> Array:
    if is_torch(q):
        # A public function of torch, which draws from the default generator of the device: torch.manual_seed
        # reproduces it, every replay of a CUDA graph draws anew, and torch.compile keeps it in its graph.
        torch = sys.modules["torch"]
        return torch.randint(0, _PAST, (2,), dtype=torch.int64, device=q.device)
    if is_cupy(q):
        with q.device:
            return sys.modules["cupy"].random.randint(0, _PAST, 2, dtype=np.int64)
    if isinstance(q, np.ndarray):
        return np.random.randint(0, _PAST, 2, np.int64)
    if hasattr(q, "__dlpack__"):  # JAX has no generator of its own to draw from
        raise ValueError(f"rng_state = None: must be given, two integers, for a q that is {type(q).__name__}")
    return np.zeros(2, np.int64)  # the call refuses q


class _Keys(NamedTuple):
    """The keys of a call, in sequences that nothing else shares."""

    k: Array
    places: Array  # of each row of k in its sequence
    count: int  # of the longest sequence


def _signed_probabilities(
    base: Callable[..., Any],
    plain: Callable[..., Any],
    face: int,
    tensors: tuple[Array, Array, Array],
    head: tuple[Any, ...],
    tail: list[Any],
    dropout: tuple[float, Array],
) -> Array:
    """S_dmask of flash-attention: the probabilities before dropout, negative where they are dropped.

    A value whose column c is 1 for key c alone makes attention return the probability of each key, so a few calls
    without dropout give all of them, one for every head_dim_v keys. Which ones are dropped is read from attention
    without masks and with queries of zeros, in which every key of a sequence has the same probability: those that
    its result has without dropout and lacks with it.
    """
    q, k, v = tensors
    if not (is_torch(q) or is_cupy(q) or isinstance(q, np.ndarray)):
        raise NotImplementedError(
            f"return_attn_probs = True: must be False with dropout_p and a q that is {type(q).__name__}"
        )
    xp = sys.modules["torch" if is_torch(q) else "cupy" if is_cupy(q) else "numpy"]
    with q.device if is_cupy(q) else nullcontext():
        tail = [None if i in _SCALES else x for i, x in enumerate(tail)]
        keys = _keys(xp, k, tail)
        tail[_PAGES] = None
        flat = [x if i in _LENGTHS else NO_TAIL[i] for i, x in enumerate(tail)]
        flat_head = (1.0, False, -1, -1, 0.0, *head[5:])
        zeros = xp.zeros_like(q), xp.zeros_like(keys.k)
        shape, dtype = (*q.shape[:-1], v.shape[-1]), out_dtype(q, None)

        def attention(run: Callable[..., Any], q: Array, k: Array, v: Array, head: Any, tail: list[Any]) -> Array:
            out = empty_like(q, shape, dtype)
            out[...] = 0  # rows past seqused_q are not written
            return run(face, (q, k, v), out, None, False, None, head, tuple(tail))[0]

        blocks = []
        for first in range(0, max(keys.count, 1), v.shape[-1]):
            one_hot = _one_hot(xp, keys, first, v)
            p = attention(base, q, keys.k, one_hot, head, tail)
            exists = attention(plain, *zeros, one_hot, flat_head, flat) != 0
            kept = attention(plain, *zeros, one_hot, flat_head, [*flat, *dropout]) != 0
            blocks.append(xp.where(exists & ~kept, -xp.maximum(p, xp.full_like(p, _least(p))), p))
        result = xp.concatenate(blocks, -1)[..., : keys.count]
        if tail[_CU_Q] is not None:
            result = _by_sequence(xp, result, xp.asarray(tail[_CU_Q]), tail[_MAX_Q])
        return xp.moveaxis(result, -2, 1)


def _least(p: Array) -> float:
    """What stands for a dropped probability that is 0 in p's type: -0.0 is not below 0."""
    return 2.0**-24 if str(p.dtype).removeprefix("torch.") == "float16" else 2.0**-126


def _arange(xp: Any, first: int, past: int, like: Array) -> Array:
    """int32 numbers on the device of `like`."""
    where = {"device": like.device} if is_torch(like) else {}
    return xp.arange(first, past, dtype=xp.int32, **where)


def _longest(xp: Any, name: str, given: Any, offsets: Array) -> int:
    """The bound that the caller gave, or the greatest length, which is read from the device."""
    if given is not None:
        return integer(name, given)
    return int((offsets[1:] - offsets[:-1]).max()) if len(offsets) > 1 else 0


def _keys(xp: Any, k: Array, tail: list[Any]) -> _Keys:
    if tail[_PAGES] is not None:
        # Sequences may share pages, at other places: a page cannot say which key of its sequence it holds.
        table = xp.clip(xp.asarray(tail[_PAGES]), 0, max(k.shape[0] - 1, 0))
        k = k[table].reshape(table.shape[0], table.shape[1] * k.shape[1], *k.shape[2:])
    if k.ndim == 4:
        count = k.shape[1] if tail[_MAX_K] is None else integer("max_seqlen_k", tail[_MAX_K])
        return _Keys(k, _arange(xp, 0, k.shape[1], k), count)
    offsets = xp.asarray(tail[_CU_K])
    rows = _arange(xp, 0, k.shape[0], k)
    places = rows - offsets[xp.searchsorted(offsets, rows, side="right") - 1]
    return _Keys(k, places, _longest(xp, "max_seqlen_k", tail[_MAX_K], offsets))


def _one_hot(xp: Any, keys: _Keys, first: int, v: Array) -> Array:
    """Values for keys.k of v's type and width: key first + c of each sequence has a 1 in column c, and else zeros."""
    columns = _arange(xp, first, first + v.shape[-1], keys.k)
    hot = keys.places[:, None, None] == columns
    values = empty_like(v, (*keys.k.shape[:-1], v.shape[-1]), v.dtype)
    values[...] = hot.to(v.dtype) if is_torch(v) else hot.astype(v.dtype)
    return values


def _by_sequence(xp: Any, rows: Array, offsets: Array, longest: Any) -> Array:
    """(total_q, ..) as (num_seqs, longest, ..), with zeros behind the end of a sequence."""
    count = _longest(xp, "max_seqlen_q", longest, offsets)
    at = offsets[:-1, None] + _arange(xp, 0, count, rows)
    inside = (at < offsets[1:, None])[..., None, None]
    if len(rows) == 0:
        result = empty_like(rows, (*at.shape, *rows.shape[1:]), rows.dtype)
        result[...] = 0
        return result
    result = rows[xp.clip(at, 0, len(rows) - 1)]
    return xp.where(inside, result, xp.zeros_like(result))
