"""A call of flex_attention: what its functions need, and the fast path of further calls with the same functions.

The first call traces, recognises and checks. What it finds is kept by the identity of the score function and of the
block mask, with what it depends on: the guards of the trace (_captures.py), the fields of the mask, shapes. Later calls
look at these alone and make one native call. Captured tensors are passed anew each time: their contents, and where
these lie, may change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _core
from ._block_lists import holds
from ._block_mask import BlockMask, as_block_mask
from ._call import _BF16, _FOUR_BF16, _U16, FUNC, HEADS_FIRST, as_torch_raises, is_direct
from ._call import TORCH as torch_functions
from ._recognise import found_in, served
from ._signature import NO_TAIL
from ._tensors import LAST_NUMPY_TYPE, Array, is_cupy, is_torch
from ._trace import Traced, anchor_of, reference, traced
from ._user_functions import Lists, arguments, direct_extras, empty_result

_ROWS, _KEYS = 2, 2  # dimensions of tokens in (B, H, S, D)
_MOST_SHAPES = 16  # of one pair of functions; a model has few at a time

# flex_attention's names for those of flash_attn_func, in errors. Its tensors have heads before tokens.
WORDS = {
    **{
        f"{short}.shape[{index}]": f"{name}.shape[{place}]"
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for index, place in ((-3, 2), (-2, 1), (1, 2), (2, 1))
    },
    **{"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"},
    **{
        f"block_sparse_tensors.{theirs}": f"block_mask.{ours}"
        for theirs, ours in (
            ("mask_block_cnt", "kv_num_blocks"),
            ("mask_block_idx", "kv_indices"),
            ("full_block_cnt", "full_kv_num_blocks"),
            ("full_block_idx", "full_kv_indices"),
            ("block_size", "BLOCK_SIZE"),
        )
    },
}


class Needs(NamedTuple):
    """What is left of a call's functions once those that are built in are.

    parameters: of the built-in ones, as flashspark._recognise names them. traces: of both functions. contents: lists
    that no parameter may stand for once they change, with what they were (flashspark._block_lists.contents).
    """

    score: Traced | None
    mask: Traced | None
    lists: Lists | None
    parameters: dict[str, Any]
    traces: tuple[Traced | None, Traced | None]
    contents: tuple[tuple[Array | None, Any], ...]


def needs(score_mod: Callable[..., Any] | None, block_mask: Any, query: Array, key: Array) -> Needs:
    """A call's functions and lists. query, key: (B, H, tokens, D)."""
    rows, keys = query.shape[_ROWS], key.shape[_KEYS]
    blocks = as_block_mask(block_mask) if block_mask is not None else None
    score = traced(score_mod, "score") if score_mod is not None else None
    mask = traced(blocks.mask_mod, "mask") if blocks is not None else None
    whole = blocks is not None and mask is not None and blocks.lists_are_whole(mask.text)
    heads, batch = query.shape[1], query.shape[0]
    # On a GPU a compiled score function is faster than the built-in one (docs/experiments.md, E69 and E73).
    built_in = None if _on_gpu(query) and not _is_identity(score) else score
    left, left_mask, parameters = served(built_in, mask, whole, rows, keys, (heads,), (batch, heads))
    left_score = score if built_in is None else left
    if blocks is None or (whole and left_mask is None):
        contents = tuple(zip(*blocks._whole[-2:])) if blocks is not None and blocks._whole is not None else ()
        return Needs(left_score, left_mask, None, parameters, (score, mask), contents)
    return Needs(left_score, left_mask, _lists(blocks, rows, keys), parameters, (score, mask), ())


def _on_gpu(x: Array) -> bool:
    return bool(x.is_cuda) if is_torch(x) else is_cupy(x)


def _is_identity(score: Traced | None) -> bool:
    return score is not None and "identity" in (found_in(score) or {})


def _lists(blocks: BlockMask, rows: int, keys: int) -> Lists:
    """The lists of a mask for exactly these lengths, or for others that end in the same blocks."""
    size = blocks.BLOCK_SIZE
    for place, step in enumerate(size):
        if step < 1:
            raise ValueError(f"block_mask.BLOCK_SIZE[{place}] = {step}: must be a multiple of 16, above 0")
    known = [-(-length // step) for length, step in zip(blocks.seq_lengths, size)]
    if [-(-length // step) for length, step in zip((rows, keys), size)] != known:
        raise ValueError(
            f"block_mask.seq_lengths = {tuple(blocks.seq_lengths)}: must be the lengths of query and key, "
            f"({rows}, {keys}); create another mask, or crop this one with block_mask._adjust({rows}, {keys})"
        )
    masked = (blocks.kv_num_blocks, blocks.kv_indices)
    return Lists(masked, (blocks.full_kv_num_blocks, blocks.full_kv_indices), (size[0], size[1]))


class _Prepared(NamedTuple):
    """The native call's arguments for tensors of some shapes.

    middle: those between scale and implementation. rest: those behind it, but for the scalars, whose values may change.
    """

    middle: tuple[Any, ...]
    rest: tuple[Any, ...]
    scalars: list[Any]
    tensors: list[Array]  # torch's, among those in rest: one that now requires a gradient is refused
    contents: tuple[tuple[Array | None, Any], ...]  # as in Needs
    alive: tuple[Any, ...]  # what the handles in rest belong to


class _Known:
    """What calls with one score function and one block mask have found."""

    __slots__ = ("fields", "guards", "mask", "prepared", "score")

    def __init__(self, score: Any, mask: Any, fields: tuple[Any, ...], guards: list[Any]) -> None:
        """score, mask: weak references."""
        self.score, self.mask, self.fields, self.guards = score, mask, fields, guards
        self.prepared: dict[tuple[Any, ...], _Prepared] = {}

    def hold(self, score: Any, mask: Any) -> bool:
        """Whether nothing has changed that the traces, and what the mask is, depend on."""
        if self.score() is not score or self.mask() is not mask:
            return False
        if mask is not None and not all(map(operator.is_, _FIELDS(mask), self.fields)):
            return False
        return all(guards.holds() for guards in self.guards)


_known: dict[tuple[Any, Any], _Known] = {}
_FIELDS = operator.attrgetter(
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths"
)


def remember(score_mod: Any, block_mask: Any, query: Array, key: Array, needed: Needs) -> None:
    """Keeps a call's native arguments for the next one.

    Nothing is kept where an array has to be converted, or where it could not be seen that something has changed.
    """
    lists = needed.lists
    arrays = [x for each in (needed.score, needed.mask) if each is not None for x in each.tensors]
    arrays += [needed.parameters["alibi"]] if "alibi" in needed.parameters else []
    arrays += [x for x in (*lists.masked, *lists.full) if x is not None] if lists is not None else []
    score_key, anchor = anchor_of(score_mod)
    known_as = (score_key, id(block_mask))
    known = _known.get(known_as)
    try:
        if not all(map(is_direct, arrays)):
            return
        if known is None or not known.hold(anchor, block_mask):
            fields = () if block_mask is None else _FIELDS(block_mask)
            if not all(type(x) is tuple for x in fields[-2:]):
                return
            guards = [x.guards for x in needed.traces if x is not None]
            references = [reference(x, _known, known_as) for x in (anchor, block_mask)]
            known = _Known(*references, fields, guards)
            _known[known_as] = known
    except (AttributeError, TypeError):  # other fields; an object without weak references
        return
    if len(known.prepared) >= _MOST_SHAPES:
        known.prepared.clear()
    known.prepared[query.shape, key.shape, _on_gpu(query)] = _prepared(needed, arrays)


def _prepared(needed: Needs, arrays: list[Array]) -> _Prepared:
    score, mask, lists = needed[:3]
    (_, *middle, _, threads), tail = arguments(needed.parameters, None, None)
    rest = (threads, *tail)
    if score is not None or mask is not None or lists is not None:
        rest = (threads, *tail, *NO_TAIL[len(tail) :], *direct_extras(score, mask, lists))
    scalars = [number for x in (score, mask) if x is not None for number in x.numbers]
    tensors = [x for x in arrays if is_torch(x)]
    return _Prepared(tuple(middle), rest, scalars, tensors, needed.contents, (score, mask))


def warm(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Any,
    block_mask: Any,
    scale: Any,
    enable_gqa: Any,
    want_lse: Any,
    implementation: Any,
) -> tuple[Array, Array | None] | None:
    """(out, lse) of a call like an earlier one; None where the general path has to look at it."""
    kind = type(query)
    if type(key) is not kind or type(value) is not kind:
        return None
    if kind is torch_functions.Tensor:
        on_gpu, numpy = query.is_cuda, False
        if query.is_neg() or key.is_neg() or value.is_neg():
            return None
    elif kind is np.ndarray:
        on_gpu, numpy = False, True
    else:
        return None
    score_key, anchor = anchor_of(score_mod)
    known = _known.get((score_key, id(block_mask)))
    if known is None:
        return None
    q_shape, k_shape, dtype = query.shape, key.shape, query.dtype
    prepared = known.prepared.get((q_shape, k_shape, on_gpu))
    if (
        prepared is None
        or key.dtype is not dtype
        or value.dtype is not dtype
        or (q_shape[1] != k_shape[1] and not enable_gqa)
        or not known.hold(anchor, block_mask)
        or not all(holds(x, then) for x, then in prepared.contents)
    ):
        return None
    rest = prepared.rest
    if prepared.scalars:
        rest = (*rest, *[float(x.value) for x in prepared.scalars])
    if numpy:
        return _run_numpy(query, key, value, want_lse, (scale, *prepared.middle, implementation, *rest))
    if torch_functions.forward_ad._current_level >= 0:
        return None
    if torch_functions.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or any(x.requires_grad for x in prepared.tensors)
    ):
        return None
    return _run_torch(query, key, value, want_lse, (scale, *prepared.middle, implementation, *rest))


def _run_numpy(query: Array, key: Array, value: Array, want_lse: Any, args: tuple[Any, ...]) -> Any:
    shape, number = query.shape, query.dtype.num
    try:
        out = np.empty((*shape[:3], value.shape[-1]), query.dtype)
        lse = np.empty(shape[:3], np.float32) if want_lse else None
        if number <= LAST_NUMPY_TYPE:
            _core.attention_forward(FUNC + HEADS_FIRST, 0, query, key, value, out, lse, *args)
        elif number == _BF16:
            views = (query.view(_U16), key.view(_U16), value.view(_U16), out.view(_U16))
            _core.attention_forward(FUNC + HEADS_FIRST, _FOUR_BF16, *views, lse, *args)
        else:
            return None
    except Exception:  # noqa: BLE001 - the general path reports it
        return None
    return out, lse


def _run_torch(query: Array, key: Array, value: Array, want_lse: Any, args: tuple[Any, ...]) -> Any:
    try:
        if query.shape[-1] == value.shape[-1] and query.is_contiguous():
            out = torch_functions.empty_like(query)
        else:
            out = empty_result(query, value)
        lse = query.new_empty(query.shape[:3], dtype=torch_functions.float32) if want_lse else None
        _core.attention_forward(FUNC + HEADS_FIRST, 0, query, key, value, out, lse, *args)
    except MemoryError as error:
        raise as_torch_raises(error) from None
    except Exception:  # noqa: BLE001 - the general path reports it
        return None
    return out, lse
