"""torch's flex_attention on flashspark: an operator that torch.compile keeps, and what sends torch's own calls to it.

torch.nn.attention.flex_attention.flex_attention ends in a higher-order operator whose score and mask functions are
graphs. Where torch would compute it eagerly or put it into a compiled graph, `Redirection` puts the operator
flashspark::flex_attention in its place: the graphs are traced as a user's functions are, and the operator holds their
texts, so that it means the same in another process. What flashspark cannot do is left to torch, with a warning.
"""

from __future__ import annotations

import functools
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
from ._recognise import served
from ._symbol import TraceError
from ._torch_flex_ops import WORDS as _WORDS
from ._torch_flex_ops import operator as _operator
from ._trace import Traced, trace

_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NO_BLOCKS = 1 << 30  # torch's size of blocks for a call without a mask
_UNSUPPORTED = (TraceError, NotImplementedError)


def _traced(graph: Callable[..., Any], kind: str, buffers: Sequence[Any]) -> Traced:
    """The trace of one of the higher-order operator's graphs, which take captured tensors behind the positions."""
    aten, held = AtenGraph(graph), tuple(int(x) if isinstance(x, torch.SymInt) else x for x in buffers)

    def function(*at: Any) -> Any:
        return aten(*at, *held)

    return trace(function, kind)


def _aten(function: Callable[..., Any], query: torch.Tensor, count: int, buffers: Sequence[Any], make: Any) -> Any:
    """A graph of ATen's operations."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex(), torch.no_grad():
        if make is None:
            return _aten_aside(function, query, count, buffers)
        return make(function)(*_examples(query, count), *buffers)


def _examples(query: torch.Tensor, count: int) -> list[torch.Tensor]:
    examples = [query.new_zeros((), dtype=torch.int) for _ in range(4)]
    return examples if count == 4 else [query.new_zeros(()), *examples]


def _aten_aside(function: Callable[..., Any], query: torch.Tensor, count: int, buffers: Sequence[Any]) -> Any:
    """The same outside of whatever torch is tracing at the moment, with fake tensors in place of the buffers."""
    from torch._dispatch.python import suspend_functionalization
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import disable_functional_mode
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    def like(x: Any) -> Any:
        return (
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
            if isinstance(x, torch.Tensor)
            else x
        )

    with suspend_functionalization(), disable_functional_mode(), disable_proxy_modes_tracing():
        with detect_fake_mode([query, *buffers]) or FakeTensorMode(allow_non_fake_inputs=True):
            scalar = torch.zeros((), dtype=query.dtype, device=query.device)
            examples, held = _examples(scalar, count), [like(x) for x in buffers]
        return make_fx(function)(*examples, *held)


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
    # On a GPU ALiBi stays a function: beside lists and other functions there are no gradients of built-in slopes.
    slopes = () if query.is_cuda else ((heads,), (query.shape[0], heads))
    left = served(score, mask, False, query.shape[2], key.shape[2], *slopes)
    if {"causal", "window_left", "window_right"} & set(left[2]):  # which the operator does not have
        left = (score, left[1], {})
    score, mask, parameters = left
    lists = (counts, indices, full_counts, full_indices, size_q, size_k)
    if mask is None and min(size_q, size_k) >= _NO_BLOCKS:
        lists = (None, None, None, None, 0, 0)
    if score is not None and score.detaches and torch.is_grad_enabled():
        raise NotImplementedError("score_mod calls detach(), which a graph does not have")
    texts = [part for x in (score, mask) for part in (("", []) if x is None else (x.text, list(x.tensors)))]
    softcap = float(parameters.get("softcap", 0.0))
    return (query, key, value, *texts, *lists, float(scale), softcap, parameters.get("alibi"))


_training = threading.local()  # .active: within a call whose gradient torch computes, so that all of it is torch's


def _with_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the higher-order operator's rule for gradients, above the other two."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if needed:
            try:
                return _operator(*_operands(None, *args, **kwargs))
            except _UNSUPPORTED as error:
                _left_to_torch(error)
        before = getattr(_training, "active", False)
        _training.active = needed
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
        return original(query, key, value, score_mod, block_mask, *args, **kwargs)

    return flex_attention


def _any_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of torch's check, which refuses calls on the CPU that need gradients."""

    def validate_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.device.type != "cpu":
            original(query, key, value)

    return validate_device


def _is_ours(*tensors: Any) -> bool:
    """Whether an eager call is computed here: plain tensors."""
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype in _TYPES
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
    if hasattr(theirs, "_validate_device"):
        put(theirs, "_validate_device", _any_device(theirs._validate_device), False)
    put(theirs, "flex_attention", _called(theirs.flex_attention, ours), False)
    higher_order._dispatch_cache.clear()
    undo.append(higher_order._dispatch_cache.clear)
    undo.insert(0, undo.pop())  # after the others
