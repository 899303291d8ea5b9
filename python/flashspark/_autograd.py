"""Calls on torch tensors that require gradients: torch's autograd gets a node whose backward pass is ours.

A call that a gradient flows through becomes one `Attention`, a torch.autograd.Function of the call's tensors; all else
about it is a `Problem`. Only such calls load this module. The operators of flashspark.torch_ops, which torch.compile
keeps in its graph, use the same Function with a problem of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from . import _call, _core
from ._backward import ARGUMENTS, Forward, gradients
from ._kinds import KINDS
from ._signature import ATTENTION, HEAD, TAIL, in_tail
from ._tensors import Array, differentiable
from ._user_functions import Functions, Lists, empty_result, extras_of, native

_ROWS = 3  # q, k and v
_DETERMINISTIC = ATTENTION.index("deterministic") - HEAD
_LENGTHS = frozenset(in_tail(name) for name in ("max_seqlen_q", "max_seqlen_k"))
# Arguments with which there is no backward pass; the last three are factors of float8_e4m3 tensors.
_WITHOUT = ("page_table", "leftpad_k", "kv_batch_index", "output_scale", "q_descale", "k_descale", "v_descale")
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_SCALARS = frozenset({bool, int, float, str, type(None)})
# Calls, without their sizes, whose gradients some implementation is known to have.
_supported: set[Any] = set()
_MOST_SUPPORTED = 1000


class Problem:
    """A call without its tensors, which are given to `Attention` in a row: those of q, k, v, the tail, what score_mod
    and mask_mod capture, and the block lists. Arrays of other libraries are kept here, as constants."""

    heads_first = False  # memory of the result is (num_seqs, heads, tokens, width)

    def __init__(
        self,
        face: int,
        tensors: Sequence[Array],
        mode: _call.Mode | None,
        head: Sequence[Any],
        tail: Sequence[Any],
        functions: Functions | None = None,
    ) -> None:
        self.face, self.head = face, tuple(head)
        self.mode = _call.Mode(strict=True) if mode is not None and mode.strict else None
        score, mask, lists = (None, None, None) if functions is None else functions.traces()
        self.functions = [None if x is None else native(x) for x in (score, mask)]
        self.scalars = [[] if x is None else list(x.scalars) for x in (score, mask)]  # which may change before backward
        self.block_size = None if lists is None else lists.size
        blocks = () if lists is None else (*lists.masked, *lists.full)
        parts = [tensors, tail, *(() if x is None else x.tensors for x in (score, mask)), blocks]
        self.ends = list(accumulate(map(len, parts)))
        values = [x for part in parts for x in part]
        self.places = [place for place, x in enumerate(values) if isinstance(x, torch.Tensor)]
        self.constants = [None if isinstance(x, torch.Tensor) else x for x in values]
        # For each tensor its place among what `gradients` gives.
        known = {_ROWS + in_tail(name): i for i, name in enumerate(ARGUMENTS) if i >= _ROWS}
        known |= {place: place for place in range(_ROWS)}
        known |= {place: len(ARGUMENTS) + n for n, place in enumerate(range(self.ends[1], self.ends[2]))}
        self.targets = [known.get(place) for place in self.places]

    def parts(self, tensors: Sequence[Array]) -> list[list[Any]]:
        """q, k, v; the tail; what score_mod captures; what mask_mod captures; block lists."""
        values = list(self.constants)
        for place, x in zip(self.places, tensors):
            values[place] = x
        return [values[start:end] for start, end in zip([0, *self.ends], self.ends)]

    def wanted(self, needed: Sequence[bool], tensors: Sequence[Array]) -> list[bool]:
        """As `gradients` takes it. needed: for each tensor, what autograd says."""
        wanted = [False] * (len(ARGUMENTS) + self.ends[2] - self.ends[1])
        for target, need, x in zip(self.targets, needed, tensors):
            if target is not None and need and x.is_floating_point():
                wanted[target] = True
        return wanted

    def _extras(self, parts: list[list[Any]]) -> tuple[Any, ...]:
        if self.block_size is None and self.functions == [None, None]:
            return ()
        a, b, c, d = parts[4] or [None] * 4
        lists = None if self.block_size is None else Lists((a, b), (c, d), self.block_size)
        return extras_of(list(zip(self.functions, parts[2:4])), lists, self.scalars)

    def forward(self, tensors: Sequence[Array]) -> tuple[Array, Array]:
        parts = self.parts(tensors)
        (q, k, v), tail, more, out = parts[0], tuple(parts[1]), self._extras(parts), None
        if self.heads_first:
            out = empty_result(q.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        function = Functions(lambda: (None, None, None), more) if more else _core.attention_forward
        result = _call.attend(self.face, (q, k, v), out, None, True, self.mode, self.head, tail, function)
        return result[0], result[1]

    def backward(
        self, wanted: list[bool], dout: Array, dlse: Array | None, tensors: Sequence[Array], out: Array, lse: Array
    ) -> list[Array | None]:
        return list(gradients(self._forward(self.parts(tensors), out, lse), dout, dlse, wanted))

    def _forward(self, parts: list[list[Any]], out: Array, lse: Array) -> Forward:
        q, k, v = parts[0]
        return Forward(self.face, (q, k, v), out, lse, self._head(), tuple(parts[1]), self._extras(parts), parts[2])

    def _head(self) -> tuple[Any, ...]:
        head = list(self.head)
        head[_DETERMINISTIC] = head[_DETERMINISTIC] or torch.are_deterministic_algorithms_enabled()
        return tuple(head)

    def require_backward(self, tensors: Sequence[Array], out: Array, lse: Array) -> None:
        """Raises NotImplementedError where no implementation has the gradients that backward() would ask for.

        Calls that differ only in sizes are asked about once; nothing is computed, and no memory of the device read.
        """
        wrapped = torch._is_functional_tensor(out) or torch._C._functorch.is_functorch_wrapped_tensor(out)
        if wrapped or type(out) is not torch.Tensor:
            return  # torch.compile traces, or torch.func does: there is no memory to ask about
        parts = self.parts(tensors)
        (q, k, v), tail = parts[0], parts[1]
        needed = tuple([x.requires_grad for x in tensors])
        kind = (self.face, q.device, q.dtype, k.dtype, v.dtype, q.shape[-1], v.shape[-1], needed, self.head)
        kind += (torch.are_deterministic_algorithms_enabled(), *self.functions, self.block_size)
        kind += tuple([x if type(x) in _SCALARS and n not in _LENGTHS else x is not None for n, x in enumerate(tail)])
        if kind in _supported:
            return
        wanted = self.wanted(needed, tensors)
        wanted[:_ROWS] = [False] * _ROWS  # which all have, and which would need memory
        try:
            gradients(self._forward(parts, out, lse), out, None, wanted, explain=True)
        except NotImplementedError as error:
            word = self._word(next((n for n, x in zip(self.places, tensors) if x.requires_grad), self.places[0]))
            text = f"{word}.requires_grad = True: must be False, or call under torch.no_grad(): {error}"
            raise NotImplementedError(text) from None
        if len(_supported) >= _MOST_SUPPORTED:
            _supported.clear()
        _supported.add(kind)

    def _word(self, place: int) -> str:
        """The caller's name of the tensor at a place of `parts`."""
        if place >= self.ends[1]:
            return "a captured tensor"
        return ATTENTION.words[self.face][place + (ATTENTION.index("q") if place < _ROWS else TAIL - _ROWS)]


class Attention(torch.autograd.Function):
    """(out, lse) of a problem's tensors."""

    @staticmethod
    def forward(problem: Problem, *tensors: Array) -> tuple[Array, Array]:
        result = problem.forward(tensors)
        problem.require_backward(tensors, *result)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, Array]) -> None:
        problem, *tensors = inputs
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, dout: Array | None, dlse: Array | None) -> tuple[Array | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        problem, needed = ctx.problem, ctx.needs_input_grad[1:]
        run = _Gradients.apply if torch.is_grad_enabled() else _Gradients.forward
        got = run(problem, problem.wanted(needed, tensors), dout, dlse, out, lse, *tensors)
        found: list[Array | None] = [None] * len(tensors)
        for place, (target, need) in enumerate(zip(problem.targets, needed)):
            if target is not None and need and got[target] is not None:
                found[place] = got[target].to(tensors[place].dtype)
        return None, *found


def below_transforms(problem: Any, *tensors: Array) -> tuple[Array, Array]:
    """Attention.apply for kernels of operators: there the dispatcher takes torch.func's transformations apart."""
    if not torch._C._are_functorch_transforms_active():
        return Attention.apply(problem, *tensors)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, Attention).apply(problem, *tensors)


class _Gradients(torch.autograd.Function):
    """A problem's gradients, as a function that has none itself."""

    @staticmethod
    def forward(
        problem: Problem, wanted: list[bool], dout: Array, dlse: Array | None, out: Array, lse: Array, *tensors: Array
    ) -> tuple[Array | None, ...]:
        return tuple(problem.backward(wanted, dout, dlse, tensors, out, lse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivatives()


def refuse_second_derivatives() -> None:
    raise NotImplementedError(
        "double backward: the gradients of flashspark's attention cannot be differentiated again "
        "(torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) can)"
    )


def attend(
    face: int,
    tensors: tuple[Array, Array, Array],
    out: Array | None,
    lse: Array | None,
    want_lse: bool,
    mode: _call.Mode | None,
    head: tuple[Any, ...],
    tail: tuple[Any, ...],
    function: Callable[..., Any],
    heads_first: bool = False,
) -> Any:
    """_call.attend, of tensors some of which a gradient flows through."""
    if mode is not None and mode.explain:
        with torch.no_grad():
            return _call.attend(face, tensors, out, lse, want_lse, mode, head, tail, function)
    words = ATTENTION.words[face]
    refuse(face, (*tensors, out, lse, *head, *tail))
    head = tuple(
        None if x is None else KINDS[kind](word, x)
        for kind, word, x in zip(ATTENTION.kinds[HEAD:TAIL], words[HEAD:TAIL], head)
    )
    functions = function if isinstance(function, Functions) else None
    if functions is not None and (score := functions.traces()[0]) is not None and score.detaches:
        raise NotImplementedError(
            f"score_mod = the function at {score.location}, which calls detach(): must not where a gradient is wanted; "
            "detach captured tensors outside of it"
        )
    problem = Problem(face, tensors, mode, head, tail, functions)
    problem.heads_first = heads_first
    captured = () if functions is None else [x for each in functions.traces()[:2] if each for x in each.tensors]
    lists = None if functions is None else functions.traces()[2]
    blocks = () if lists is None else (*lists.masked, *lists.full)
    given = [x for x in (*tensors, *tail, *captured, *blocks) if isinstance(x, torch.Tensor)]
    result, logs = Attention.apply(problem, *given)
    return result, logs if want_lse else None


def refuse(face: int, values: tuple[Any, ...]) -> None:
    """Raises ValueError where no gradient is computed: it names the argument that one would flow through.

    values: attention's from q on, in signature.def's order.
    """
    words = ATTENTION.words[face][ATTENTION.index("q") :]
    given = dict(zip(ATTENTION.names[ATTENTION.index("q") :], values))
    name, word = next(
        ((n, w) for n, w in zip(given, words) if differentiable(given[n]) and n not in ARGUMENTS),
        next(((n, w) for n, w in zip(given, words) if differentiable(given[n])), ("", "a captured tensor")),
    )
    text = f"{word}.requires_grad = True: must be False, or call under torch.no_grad(): no gradient is computed "
    if face == _call.CACHE:
        raise ValueError(text + "for flash_attn_with_kvcache")
    if name and name not in ARGUMENTS:
        raise ValueError(text + "for it")
    for other, theirs in zip(given, words):
        if given[other] is not None and other in (*_WITHOUT, "out", "lse"):
            raise ValueError(text + f"beside {theirs}")
    for row in ARGUMENTS[:_ROWS]:
        x = given[row]
        if isinstance(x, torch.Tensor) and x.dtype not in _TYPES:
            raise ValueError(text + f"for {row}.dtype = {str(x.dtype).removeprefix('torch.')}")
