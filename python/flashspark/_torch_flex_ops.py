"""torch's flex_attention as operators of flashspark, which torch.compile keeps in its graphs, with their gradients.

flashspark::flex_attention takes the texts of the functions' graphs beside what these capture, so that it means the same
in another process. Its results are those of torch's higher-order operator, among them lse in units of log(2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ._autograd import below_transforms
from ._backward import ARGUMENTS, Forward, gradients
from ._call import FUNC, attend, respelling
from ._flex_call import WORDS as _NAMES
from ._tensors import in_forward_mode, refuse_tangents
from ._user_functions import Functions, Lists, arguments, empty_result, extras_of, native_of_text
from .torch_ops import NAMESPACE, _refuses_gradients

WORDS = ("query", "key", "value")
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, str score_graph, Tensor[] score_tensors, str mask_graph, "
    "Tensor[] mask_tensors, Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? full_kv_num_blocks, "
    "Tensor? full_kv_indices, SymInt block_size_q, SymInt block_size_k, float scale, float softcap, "
    "Tensor? alibi_slopes"
)
_ROWS, _SCORE, _MASK, _LISTS, _SLOPES = 3, 4, 6, 7, 15  # places of tensors among them
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(f"flex_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"flex_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}, bool[] wanted) "
    "-> Tensor[]"
)


@functools.lru_cache(maxsize=256)
def _native(kind: str, text: str) -> Any:
    return native_of_text(kind, text)


def _call(args: Sequence[Any]) -> tuple[Any, ...]:
    """q, k and v by tokens, head, tail, and what follows them in the native call."""
    query, key, value, score, score_tensors, mask, mask_tensors, *rest = args
    counts, indices, full_counts, full_indices, size_q, size_k, scale, softcap, slopes = rest
    functions = [
        (_native(kind, text) if text else None, tensors)
        for kind, text, tensors in (("score", score, score_tensors), ("mask", mask, mask_tensors))
    ]
    lists = None if counts is None else Lists((counts, indices), (full_counts, full_indices), (size_q, size_k))
    parameters = {"softcap": softcap, **({} if slopes is None else {"alibi": slopes})}
    head, tail = arguments(parameters, scale, None)
    key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    return tuple(x.transpose(1, 2) for x in (query, key, value)), head, tail, extras_of(functions, lists)


def _flex(*args):
    """out, lse in units of log(2) as torch's operator has it, and an empty tensor in place of max_scores."""
    tensors, head, tail, more = _call(args)
    out, lse, nothing = _results(args[0], args[2])
    function = Functions(lambda: (None, None, None), more)
    respelling(_NAMES, attend, FUNC, tensors, out.transpose(1, 2), lse, True, None, head, tail, function)
    return out, lse.div_(math.log(2)), nothing


def _fake(query, key, value, *_):
    return _results(query, value)


def _results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = empty_result(query, value)
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32), query.new_empty(0, dtype=torch.float32)


def _flex_backward(dout, dlse, out, lse, *args):
    """The wanted gradients, and empty tensors: of query, key, value, alibi_slopes, score_tensors."""
    *args, wanted = args
    tensors, head, tail, more = _call(args)
    forward = Forward(FUNC, tensors, out.transpose(1, 2), lse * math.log(2), head, tail, more, args[_SCORE])
    asked = [False] * len(ARGUMENTS)
    asked[:_ROWS], asked[ARGUMENTS.index("alibi_slopes")] = wanted[:_ROWS], wanted[_ROWS]
    dlse = None if dlse is None else dlse / math.log(2)
    found = respelling(_NAMES, gradients, forward, dout.transpose(1, 2), dlse, [*asked, *wanted[_ROWS + 1 :]])
    rows = [None if x is None else x.transpose(1, 2) for x in found[:_ROWS]]
    for i, x in enumerate(rows):
        if x is not None and args[i].shape[0] != x.shape[0]:  # keys of one sequence for all
            rows[i] = x.sum(0, keepdim=True)
    others = [found[ARGUMENTS.index("alibi_slopes")], *found[len(ARGUMENTS) :]]
    return [out.new_empty(0) if x is None else x.contiguous() for x in (*rows, *others)]


def _fake_backward(dout, dlse, out, lse, *args):
    *args, wanted = args
    rows = [x.new_empty(x.shape) if want else out.new_empty(0) for x, want in zip(args[:_ROWS], wanted)]
    others = zip((args[_SLOPES], *args[_SCORE]), wanted[_ROWS:])
    floats = [x.new_empty(x.shape, dtype=torch.float32) if want else out.new_empty(0) for x, want in others]
    return rows + floats


class _Problem:
    """A call whose passes are the operators: what Attention asks for (flashspark._autograd.Problem)."""

    def __init__(self, args: Sequence[Any]) -> None:
        leaves = [*args[:_ROWS], args[_SLOPES], *args[_SCORE], *args[_MASK], *args[_LISTS : _LISTS + 4]]
        self.given = [x is not None for x in leaves]
        self.counts = len(args[_SCORE]), len(args[_MASK])
        self.rest = [args[3], args[5], args[_LISTS + 4 : _SLOPES]]
        last = _ROWS + 1 + self.counts[0]
        places = [place for place, given in enumerate(self.given) if given]
        self.targets = [place if place < last else None for place in places]
        self.size = last

    @staticmethod
    def tensors(args: Sequence[Any]) -> list[torch.Tensor]:
        leaves = [*args[:_ROWS], args[_SLOPES], *args[_SCORE], *args[_MASK], *args[_LISTS : _LISTS + 4]]
        return [x for x in leaves if x is not None]

    def _args(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        rest = iter(tensors)
        leaves = [next(rest) if given else None for given in self.given]
        first = _ROWS + 1
        score, mask = leaves[first : first + self.counts[0]], leaves[first + self.counts[0] : -4]
        return (*leaves[:_ROWS], self.rest[0], score, self.rest[1], mask, *leaves[-4:], *self.rest[2], leaves[_ROWS])

    def word(self, number: int) -> str:
        """The caller's name of a tensor."""
        place = [place for place, given in enumerate(self.given) if given][number]
        return (*WORDS, "alibi_slopes")[place] if place <= _ROWS else "a captured tensor"

    def wanted(self, needed: Sequence[bool], tensors: Sequence[torch.Tensor]) -> list[bool]:
        wanted = [False] * self.size
        for target, need, x in zip(self.targets, needed, tensors):
            if target is not None and need and x.is_floating_point():
                wanted[target] = True
        return wanted

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, _ = operator(*self._args(tensors))
        return out, lse

    def require_backward(self, tensors: Sequence[torch.Tensor], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Nothing is asked: the operators are for torch.compile, which traces without memory to ask about."""

    def backward(self, wanted, dout, dlse, tensors, out, lse):
        return _backward_operator(dout, dlse, out, lse, *self._args(tensors), wanted)


def _differentiable(*args):
    """The kernel of flashspark::flex_attention for autograd."""
    tensors = _Problem.tensors(args)
    if in_forward_mode():
        refuse_tangents(map(_Problem(args).word, range(len(tensors))), tensors)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    out, lse = below_transforms(_Problem(args), *tensors)
    return out, lse, out.new_empty(0, dtype=torch.float32)


operator = getattr(torch.ops, NAMESPACE).flex_attention.default
_backward_operator = getattr(torch.ops, NAMESPACE).flex_attention_backward.default
for _device in ("CPU", "CUDA"):
    _library.impl("flex_attention", _flex, _device)
    _library.impl("flex_attention_backward", _flex_backward, _device)
torch.library.register_fake(f"{NAMESPACE}::flex_attention", _fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::flex_attention_backward", _fake_backward, lib=_library)
_library.impl("flex_attention", _differentiable, "Autograd")
_library.impl(
    "flex_attention_backward",
    _refuses_gradients(_backward_operator, lambda _: ("dout", "dlse", "out", "lse", *WORDS)),
    "Autograd",
)
