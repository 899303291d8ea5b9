"""torch's flex_attention on flashspark: an operator that torch.compile keeps, and what sends torch's own calls to it.

torch.nn.attention.flex_attention.flex_attention ends in a higher-order operator whose score and mask functions are
graphs. Where torch would compute it eagerly or put it into a compiled graph, `Redirection` puts the operator
flashspark::flex_attention in its place: the graphs are traced as a user's functions are, and the operator holds their
texts, so that it means the same in another process. What flashspark cannot do is left to torch, with a warning.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.attention.flex_attention as theirs
from torch._C import DispatchKey
from torch._higher_order_ops.flex_attention import flex_attention as higher_order
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree

from ._aten import AtenGraph
from ._call import FUNC, attend, respelling
from ._flex_call import WORDS
from ._recognise import served
from ._symbol import TraceError
from ._trace import Traced, trace
from ._user_functions import (
    Functions,
    Lists,
    arguments,
    empty_result,
    extras_of,
    native_of_text,
)
from .torch_ops import NAMESPACE, _refuses_gradients

_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NO_BLOCKS = 1 << 30  # torch's size of blocks for a call without a mask
_UNSUPPORTED = (TraceError, NotImplementedError)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "flex_attention(Tensor query, Tensor key, Tensor value, str score_graph, Tensor[] score_tensors, str mask_graph, "
    "Tensor[] mask_tensors, Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? full_kv_num_blocks, "
    "Tensor? full_kv_indices, SymInt block_size_q, SymInt block_size_k, float scale, float softcap, "
    "Tensor? alibi_slopes) -> (Tensor, Tensor, Tensor)"
)
_WORDS = ("query", "key", "value")


@functools.lru_cache(maxsize=256)
def _native(kind: str, text: str) -> Any:
    return native_of_text(kind, text)


def _flex(query, key, value, score, score_tensors, mask, mask_tensors, *rest):
    """out, lse in units of log(2) as torch's operator has it, and an empty tensor in place of max_scores."""
    counts, indices, full_counts, full_indices, size_q, size_k, scale, softcap, slopes = rest
    functions = [
        (_native(kind, text) if text else None, tensors)
        for kind, text, tensors in (("score", score, score_tensors), ("mask", mask, mask_tensors))
    ]
    lists = None if counts is None else Lists((counts, indices), (full_counts, full_indices), (size_q, size_k))
    parameters = {"softcap": softcap, **({} if slopes is None else {"alibi": slopes})}
    head, tail = arguments(parameters, scale, None)
    key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    out, lse, nothing = _results(query, value)
    tensors = tuple(x.transpose(1, 2) for x in (query, key, value))
    more = extras_of(functions, lists)
    respelling(
        WORDS,
        attend,
        FUNC,
        tensors,
        out.transpose(1, 2),
        lse,
        True,
        None,
        head,
        tail,
        Functions(lambda: (None, None, None), more),
    )
    return out, lse.div_(math.log(2)), nothing


def _fake(query, key, value, *_):
    return _results(query, value)


def _results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = empty_result(query, value)
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32), query.new_empty(0, dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    _library.impl("flex_attention", _flex, _device)
torch.library.register_fake(f"{NAMESPACE}::flex_attention", _fake, lib=_library)
_operator = getattr(torch.ops, NAMESPACE).flex_attention.default
_library.impl("flex_attention", _refuses_gradients(_operator, lambda _: _WORDS), "Autograd")


def _traced(graph: Callable[..., Any], kind: str, buffers: Sequence[Any]) -> Traced:
    """The trace of one of the higher-order operator's graphs, which take captured tensors behind the positions."""
    aten, held = AtenGraph(graph), tuple(int(x) if isinstance(x, torch.SymInt) else x for x in buffers)

    def function(*at: Any) -> Any:
        return aten(*at, *held)

    return trace(function, kind)


def _aten(function: Callable[..., Any], query: torch.Tensor, count: int, buffers: Sequence[Any], make: Any) -> Any:
    """A graph of ATen's operations."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    examples = [query.new_zeros((), dtype=torch.int) for _ in range(4)]
    if count == 5:
        examples.insert(0, query.new_zeros(()))
    with TransformGetItemToIndex():
        return make(function)(*examples, *buffers)


def _operands(make, query, key, value, score_mod, block_mask, scale, options, score_buffers=(), mask_buffers=()):
    """The operator's arguments for the higher-order operator's. Raises TraceError or NotImplementedError."""
    if options.get("OUTPUT_MAX"):
        raise NotImplementedError("max_scores: is not supported")
    _, _, counts, indices, full_counts, full_indices, *_, size_q, size_k, mask_mod = block_mask
    for name, x in zip(_WORDS, (query, key, value)):
        if x.dtype is not query.dtype or x.dtype not in _TYPES:
            raise NotImplementedError(f"{name}.dtype = {x.dtype}: must be query's, float32, float16 or bfloat16")
    score = _traced(_aten(score_mod, query, 5, score_buffers, make), "score", score_buffers)
    mask = _traced(_aten(mask_mod, query, 4, mask_buffers, make), "mask", mask_buffers)
    heads = query.shape[1]
    left = served(score, mask, False, query.shape[2], key.shape[2], (heads,), (query.shape[0], heads))
    if {"causal", "window_left", "window_right"} & set(left[2]):  # which the operator does not have
        left = (score, left[1], {})
    score, mask, parameters = left
    lists = (counts, indices, full_counts, full_indices, size_q, size_k)
    if mask is None and min(size_q, size_k) >= _NO_BLOCKS:
        lists = (None, None, None, None, 0, 0)
    texts = [part for x in (score, mask) for part in (("", []) if x is None else (x.text, list(x.tensors)))]
    softcap = float(parameters.get("softcap", 0.0))
    return (query, key, value, *texts, *lists, float(scale), softcap, parameters.get("alibi"))


_training = threading.local()  # .active: within a call whose gradient torch computes, so that all of it is torch's


def _with_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the higher-order operator's rule for gradients, above the other two."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = getattr(_training, "active", False)
        _training.active = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        try:
            return original(*args, **kwargs)
        finally:
            _training.active = before

    return kernel


def _in_a_graph(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the rule that puts the higher-order operator into a graph."""
    from torch._higher_order_ops.utils import reenter_make_fx

    def handler(mode: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(_training, "active", False):
            return original(mode, *args, **kwargs)
        try:
            operands = _operands(reenter_make_fx, *args, **kwargs)
        except _UNSUPPORTED as error:
            _left_to_torch(error)
            return original(mode, *args, **kwargs)
        results = _operator(*operands)
        proxies = pytree.tree_map(mode.tracer.unwrap_proxy, operands)
        proxy = mode.tracer.create_proxy("call_function", _operator, proxies, {})
        return track_tensor_tree(results, proxy, constant=None, tracer=mode.tracer)

    return handler


def _eagerly(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the kernel that computes the higher-order operator."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if getattr(_training, "active", False):
            return original(*args, **kwargs)
        try:
            return _operator(*_operands(make_fx, *args, **kwargs))
        except _UNSUPPORTED as error:
            _left_to_torch(error)
            return original(*args, **kwargs)

    return kernel


def _called(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """In place of torch.nn.attention.flex_attention.flex_attention. ours: the package's."""

    @functools.wraps(original)
    def flex_attention(query, key, value, score_mod=None, block_mask=None, *args, **kwargs):
        if torch.compiler.is_compiling() or not _is_ours(query, key, value):
            return original(query, key, value, score_mod, block_mask, *args, **kwargs)
        try:
            return ours(query, key, value, score_mod, block_mask, *args, **kwargs)
        except _UNSUPPORTED as error:
            _left_to_torch(error)
        except ValueError as error:
            if "requires_grad" not in str(error):
                raise
        return original(query, key, value, score_mod, block_mask, *args, **kwargs)

    return flex_attention


def _is_ours(*tensors: Any) -> bool:
    """Whether an eager call is computed here: plain tensors that need no gradient."""
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype in _TYPES
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors
    )


def _left_to_torch(error: Exception) -> None:
    text = str(error).partition("\n")[0]
    warnings.warn(f"flashspark leaves a call of flex_attention to torch: {text}", RuntimeWarning, stacklevel=3)


class Redirection:
    """While it holds, torch's flex_attention runs on flashspark. See flashspark.flex.redirect_torch_flex_attention."""

    _lock = threading.Lock()
    _active = 0
    _undo: list[Callable[[], None]] = []  # noqa: RUF012 - one for the process

    def __init__(self, ours: Callable[..., Any]) -> None:
        """ours: flashspark.flex_attention."""
        self._ours, self._holds = ours, False
        self.start()

    def start(self) -> None:
        with self._lock:
            if not self._holds:
                self._holds = True
                Redirection._active += 1
                if Redirection._active == 1:
                    _install(self._undo, self._ours)

    def undo(self) -> None:
        """Back to torch's own, unless another one holds. What was compiled meanwhile stays as it is."""
        with self._lock:
            if self._holds:
                self._holds = False
                Redirection._active -= 1
                while not Redirection._active and self._undo:
                    self._undo.pop()()

    def __enter__(self) -> Redirection:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _install(undo: list[Callable[[], None]], ours: Callable[..., Any]) -> None:
    def put(owner: Any, key: Any, value: Any, item: bool) -> None:
        old = owner[key] if item else getattr(owner, key)
        change = owner.__setitem__ if item else functools.partial(setattr, owner)
        change(key, value)
        undo.append(functools.partial(change, key, old))

    tables = (higher_order.python_key_table, higher_order.py_kernels)
    put(tables[0], ProxyTorchDispatchMode, _in_a_graph(tables[0][ProxyTorchDispatchMode]), True)
    composite = DispatchKey.CompositeExplicitAutograd
    put(tables[1], composite, _eagerly(tables[1][composite]), True)
    gradients = DispatchKey.Autograd
    put(tables[1], gradients, _with_gradients(tables[1][gradients]), True)
    put(higher_order, "_cacheable", False, False)  # torch's caches know graphs by the higher-order operator
    put(theirs, "flex_attention", _called(theirs.flex_attention, ours), False)
    higher_order._dispatch_cache.clear()
    undo.append(higher_order._dispatch_cache.clear)
    undo.insert(0, undo.pop())  # after the others
