"""What transformers' masks mean to flashspark: the mask function, and the facts that attention needs about a mask.

transformers builds the mask of a layer type once a forward pass by a function that is registered beside the attention,
and hands the result to every layer. Ours returns one of

    None                     nothing is hidden beyond causality and window, which the attention knows
    bool (B, T)              True: a token, False: padding. The queries are its last columns
    int32 (B, T)             packed sequences: tokens of equal number see each other
    bool (B, 1, Tq, Tk)      anything else, written out

and, since a forward pass may be given a mask that was already made, takes its own result for what it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import masking_utils as theirs

Result = TypeVar("Result")


class Memo(Generic[Result]):
    """Remembers a function's result for the last few tensors: the layers of a forward pass share their mask, and
    looking into it on a GPU waits for the GPU."""

    def __init__(self, function: Callable[..., Result], size: int = 4) -> None:
        self._function = function
        self._size = size
        self._known: list[tuple[weakref.ref[torch.Tensor], int, tuple[Any, ...], Result]] = []

    def __call__(self, x: torch.Tensor, *rest: Any) -> Result:
        if torch.compiler.is_compiling():
            return self._function(x, *rest)
        version = None if x.is_inference() else x._version  # inference tensors have no version
        for known, then, arguments, result in self._known:
            if known() is x and then == version and arguments == rest and version is not None:
                return result
        result = self._function(x, *rest)
        # A new list, so that another thread's loop goes on over the old one.
        kept = [entry for entry in self._known if entry[0]() is not None][-self._size + 1 :]
        self._known = [*kept, (weakref.ref(x), version, rest, result)]
        return result


# The code of a closure tells which of transformers' mask functions made it.
_AND = theirs.and_masks().__code__
_KNOWN = {
    theirs.causal_mask_function.__code__,
    theirs.bidirectional_mask_function.__code__,
    theirs.sliding_window_overlay(1).__code__,
    theirs.sliding_window_bidirectional_overlay(1).__code__,
    # transformers itself refuses sequences longer than one chunk for every name with "flash" in it.
    theirs.chunked_overlay(1, torch.empty(0)).__code__,
}
_PACKED = theirs.packed_sequence_mask_function(torch.empty(0)).__code__
_REMAPPED = None  # newer releases ask a mask function about positions within the sequences
if hasattr(theirs, "remap_positions_for_packed_sequence"):
    _REMAPPED = theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, torch.empty(0)).__code__


class _Pattern(NamedTuple):
    """A conjunction of transformers' mask functions."""

    known: bool  # false: there is another function among them
    causal: bool
    documents: torch.Tensor | None  # int (B, T): tokens of equal number see each other


def _pattern(function: Callable[..., Any]) -> _Pattern:
    code = getattr(function, "__code__", None)
    captured = {}
    if code is not None and code in (_AND, _PACKED, _REMAPPED):
        captured = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__)}
    if code is _AND:
        parts = [_pattern(part) for part in captured["mask_functions"]]
        documents = next((part.documents for part in parts if part.documents is not None), None)
        return _Pattern(all(part.known for part in parts), all(part.causal for part in parts), documents)
    if code is _PACKED:
        return _Pattern(True, True, captured["packed_sequence_mask"])
    if code is _REMAPPED and code is not None:
        inner = _pattern(captured["mask_function"])
        positions = captured["position_ids"]
        return inner._replace(documents=(torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1))
    return _Pattern(code in _KNOWN, function is not theirs.bidirectional_mask_function, None)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = theirs.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: see the head of this module for what is returned.

    attention_mask: bool (B, tokens seen so far), or None. Raises what transformers' own mask functions raise.
    """
    pattern = _pattern(mask_function)
    if not pattern.known:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return theirs.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if attention_mask.shape[1] < kv_length:
            return attention_mask  # a static cache: the mask says how much of it is in use
    elif pattern.documents is not None:
        return (pattern.documents + 1).int()
    if pattern.causal:
        # The keys end where the queries do. Only a static cache has an offset on the GPU, which this waits for.
        seen = int(q_offset) + q_length - kv_offset
        if seen < kv_length and attention_mask is None:
            return torch.ones((batch_size, seen), dtype=torch.bool, device=options.get("device", "cpu"))
        if seen < kv_length:
            return attention_mask[:, :seen]
    return None if attention_mask is None or attention_mask.all() else attention_mask


class Padding(NamedTuple):
    """A mask of padding, (B, T). Each sequence's tokens are first <= column < last if it is `whole`."""

    whole: bool
    on_the_right: bool
    first: torch.Tensor  # int32 (B,)
    last: torch.Tensor  # int32 (B,)


def _find_padding(kept: torch.Tensor) -> Padding:
    columns = kept.shape[1]
    flags = kept.int()
    count = flags.sum(dim=1)
    first = flags.argmax(dim=1)
    last = torch.where(count > 0, columns - flags.flip(1).argmax(dim=1), first)
    facts = torch.stack([(last - first == count).all(), (last < columns).any()])
    whole, on_the_right = facts.tolist()
    return Padding(whole, on_the_right, first.int(), last.int())


padding_of = Memo(_find_padding)


class Rows(NamedTuple):
    """Which rows of (B * T) belong to sequences, and where in that order each sequence starts."""

    indices: torch.Tensor  # int64 (total,)
    cu_seqlens: torch.Tensor  # int32 (B + 1,)
    longest: int


def _find_rows(kept: torch.Tensor, columns: int) -> Rows:
    kept = kept[:, kept.shape[1] - columns :]
    lengths = kept.sum(dim=1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Rows(kept.flatten().nonzero().flatten(), starts, int(lengths.max()))


rows_of = Memo(_find_rows)


def _find_documents(numbers: torch.Tensor) -> Rows:
    """numbers: int (B, T), 0 for padding. A change of the number starts a new sequence, and so does a row."""
    changes = torch.diff(numbers, dim=1, prepend=numbers[:, :1]) != 0
    changes[:, 0] = True
    kept = (numbers != 0).flatten()
    indices = kept.nonzero().flatten()
    starts = changes.flatten()[indices].nonzero().flatten()
    # Padding within a row is skipped, and what follows it has another number.
    starts = torch.cat([starts, starts.new_tensor([len(indices)])]).int()
    longest = int(starts.diff().max()) if len(starts) > 1 else 0
    return Rows(indices, starts, longest)


documents_of = Memo(_find_documents)


def _find_documents_of_positions(positions: torch.Tensor) -> Rows | None:
    """positions: int (1, T). None: one sequence. As transformers' own flash attention reads packed positions."""
    expected = torch.arange(positions.shape[1], device=positions.device) + positions.min()
    if bool((expected == positions).all()):
        return None
    return _find_documents((torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1) + 1)


documents_of_positions = Memo(_find_documents_of_positions)


def _is_documents(numbers: torch.Tensor) -> bool:
    return bool((numbers > 1).any())


is_documents = Memo(_is_documents)
