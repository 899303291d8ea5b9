"""Calls on torch tensors that require gradients: torch's autograd gets a node whose backward pass is ours.

A call that a gradient flows through becomes one `Attention`, a torch.autograd.Function of the call's tensors; all else
about it is a `Problem`. Only such calls load this module. The operators of flashspark.torch_ops, which torch.compile
keeps in its graph, use the same Function with a problem of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from . import _call, _core
from ._backward import ARGUMENTS, Forward, gradients
from ._kinds import KINDS
from ._signature import ATTENTION, HEAD, TAIL, in_tail
from ._tensors import Array, differentiable, refuse_tangent
from ._user_functions import Functions, Lists, empty_result, extras_of, native

_ROWS = 3  # q, k and v
_DETERMINISTIC = ATTENTION.index("deterministic") - HEAD
_LENGTHS = frozenset(in_tail(name) for name in ("max_seqlen_q", "max_seqlen_k"))
# Arguments with which there is no backward pass; the last three are factors of float8_e4m3 tensors.
_WITHOUT = ("page_table", "leftpad_k", "kv_batch_index", "output_scale", "q_descale", "k_descale", "v_descale")
_WITHOUT_IN_TAIL = tuple(sorted(map(in_tail, _WITHOUT)))
_WITH_GRADIENT = frozenset(map(in_tail, ARGUMENTS[_ROWS:]))
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_SETTLED = frozenset({type(None), bool, int, float, str})  # arguments of these types need no conversion
_STRICT = _call.Mode(strict=True)
# Calls, without their sizes, whose gradients some implementation is known to have.
_supported: set[Any] = set()
_MOST_SUPPORTED = 1000
_NONE_FITS = "no implementation fits\n"  # where what explains a problem ends


class _Places(NamedTuple):
    """Where the tensors of a row stand among a problem's values."""

    parts: tuple[slice, ...]  # q, k, v; the tail; what score_mod captures; what mask_mod captures; block lists
    tensors: tuple[int, ...]  # the place of each among the values
    targets: tuple[int | None, ...]  # the place of each one's gradient among what `gradients` gives
    count: int  # of these


@lru_cache(maxsize=1024)
def _places(lengths: tuple[int, ...], given: tuple[bool, ...]) -> _Places:
    """lengths: of the parts. given: for each value, whether it is a tensor."""
    ends = list(accumulate(lengths))
    captured = range(ends[1], ends[2])
    known = {_ROWS + in_tail(name): i for i, name in enumerate(ARGUMENTS) if i >= _ROWS}
    known |= {place: place for place in range(_ROWS)}
    known |= {place: len(ARGUMENTS) + n for n, place in enumerate(captured)}
    tensors = tuple(place for place, is_tensor in enumerate(given) if is_tensor)
    return _Places(
        tuple(map(slice, [0, *ends], ends)), tensors, tuple(map(known.get, tensors)), len(ARGUMENTS) + len(captured)
    )


class Given(NamedTuple):
    """What a call's functions and block lists come to."""

    functions: Sequence[Any]  # native score_mod and mask_mod
    scalars: Sequence[Sequence[float]]
    captured: Sequence[Sequence[Array]]  # of both
    blocks: Sequence[Array | None]  # four arrays, or none
    block_size: tuple[int, int] | None


def _given(functions: Functions) -> Given:
    score, mask, lists = functions.traces()
    both = (score, mask)
    return Given(
        [None if x is None else native(x) for x in both],
        [[] if x is None else list(x.scalars) for x in both],
        [() if x is None else x.tensors for x in both],
        () if lists is None else (*lists.masked, *lists.full),
        None if lists is None else lists.size,
    )


class Problem:
    """A call without its tensors, which are given to `Attention` in a row: those of q, k, v, the tail, what score_mod
    and mask_mod capture, and the block lists. Arrays of other libraries are kept here, as constants."""

    heads_first = False  # memory of the result is (num_seqs, heads, tokens, width)
    functions: Sequence[Any] = (None, None)  # native score_mod and mask_mod
    scalars: Sequence[Sequence[float]] = ((), ())  # theirs, which may change before the backward pass
    block_size: tuple[int, int] | None = None

    def __init__(
        self,
        face: int,
        tensors: Sequence[Array],
        mode: _call.Mode | None,
        head: Sequence[Any],
        tail: Sequence[Any],
        functions: Functions | Given | None = None,
    ) -> None:
        self.face, self.head = face, tuple(head)
        self.mode = _STRICT if mode is not None and mode.strict else None
        lengths, values = (_ROWS, len(tail), 0, 0, 0), [*tensors, *tail]
        if functions is not None:
            given_functions = functions if isinstance(functions, Given) else _given(functions)
            self.functions, self.scalars, captured, blocks, self.block_size = given_functions
            parts = [*captured, blocks]
            lengths = (*lengths[:2], *map(len, parts))
            values += [x for part in parts for x in part]
        given = tuple([isinstance(x, torch.Tensor) for x in values])
        self.places = _places(lengths, given)
        self.targets = self.places.targets
        self.constants = [None if is_tensor else x for x, is_tensor in zip(values, given)]

    def parts(self, tensors: Sequence[Array]) -> list[list[Any]]:
        """The values in the parts of `_Places`."""
        values = self.constants.copy()
        for place, x in zip(self.places.tensors, tensors):
            values[place] = x
        return [values[part] for part in self.places.parts]

    def wanted(self, needed: Sequence[bool], tensors: Sequence[Array]) -> list[bool]:
        """As `gradients` takes it. needed: for each tensor, what autograd says."""
        wanted = [False] * self.places.count
        for target, need, x in zip(self.targets, needed, tensors):
            if need and target is not None and x.is_floating_point():
                wanted[target] = True
        return wanted

    def _extras(self, parts: list[list[Any]]) -> tuple[Any, ...]:
        if self.block_size is None and self.functions[0] is None and self.functions[1] is None:
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
        return gradients(self._forward(self.parts(tensors), out, lse), dout, dlse, wanted)

    def _forward(self, parts: list[list[Any]], out: Array, lse: Array) -> Forward:
        q, k, v = parts[0]
        head = self.head
        if torch.are_deterministic_algorithms_enabled():
            head = (*head[:_DETERMINISTIC], True, *head[_DETERMINISTIC + 1 :])
        return Forward(self.face, (q, k, v), out, lse, head, tuple(parts[1]), self._extras(parts), parts[2])

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
        kind += tuple([x if type(x) in _SETTLED and n not in _LENGTHS else x is not None for n, x in enumerate(tail)])
        if kind in _supported:
            return
        wanted = self.wanted(needed, tensors)
        wanted[:_ROWS] = [False] * _ROWS  # which all have, and which would need memory
        text = str(gradients(self._forward(parts, out, lse), out, None, wanted, explain=True))
        if text.endswith(_NONE_FITS):
            places = self.places.tensors
            word = self._word(next((n for n, x in zip(places, tensors) if x.requires_grad), places[0]))
            raise NotImplementedError(
                f"{word}.requires_grad = True: must be False, or call under torch.no_grad(): {_NONE_FITS}{text}"
            )
        if len(_supported) >= _MOST_SUPPORTED:
            _supported.clear()
        _supported.add(kind)

    def word(self, number: int) -> str:
        """The caller's name of a tensor."""
        return self._word(self.places.tensors[number])

    def _word(self, place: int) -> str:
        """The caller's name of the tensor at a place of the values."""
        if place >= self.places.parts[1].stop:
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
        wanted = problem.wanted(needed, tensors)
        if torch.is_grad_enabled():
            got = _Gradients.apply(problem, wanted, dout, dlse, out, lse, *tensors)
        else:
            got = problem.backward(wanted, dout, dlse, tensors, out, lse)
        found: list[Array | None] = [None]
        for x, target, need in zip(tensors, problem.targets, needed):
            gradient = got[target] if need and target is not None else None
            if gradient is not None and gradient.dtype is not x.dtype:
                gradient = gradient.to(x.dtype)
            found.append(gradient)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Array | None) -> Any:
        refuse_tangent(ctx.problem.word(next((n for n, x in enumerate(tangents) if x is not None), 0)))


# What Attention.apply ends in, where no transformation of torch.func is active. Before that it looks at the signature
# of `forward` and binds the arguments to it, which takes as long as all else about a call.
_apply = super(torch.autograd.Function, Attention).apply
_transforms_are_active, _unwrapped = torch._C._are_functorch_transforms_active, torch._C._functorch.unwrap_if_dead


def apply(problem: Any, tensors: Sequence[Array]) -> tuple[Array, Array]:
    """Attention.apply."""
    if _transforms_are_active():
        return Attention.apply(problem, *tensors)
    return _apply(problem, *map(_unwrapped, tensors))


def below_transforms(problem: Any, *tensors: Array) -> tuple[Array, Array]:
    """Attention.apply for kernels of operators: there the dispatcher takes torch.func's transformations apart."""
    if not _transforms_are_active():
        return apply(problem, tensors)
    with enable_single_level_autograd_function():
        return _apply(problem, *tensors)


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

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
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
    if out is not None or lse is not None or not _has_gradients(face, tensors, tail):
        refuse(face, (*tensors, out, lse, *head, *tail))
    if not _SETTLED.issuperset(map(type, head)):
        words = ATTENTION.words[face][HEAD:TAIL]
        head = tuple(
            None if x is None else KINDS[kind](word, x)
            for kind, word, x in zip(ATTENTION.kinds[HEAD:TAIL], words, head)
        )
    functions, given = None, (*tensors, *tail)
    if isinstance(function, Functions):
        functions = function
        score, _, lists = traces = functions.traces()
        if score is not None and score.detaches:
            raise NotImplementedError(
                f"score_mod = the function at {score.location}, which calls detach(): must not where a gradient is "
                "wanted; detach captured tensors outside of it"
            )
        given += tuple(x for each in traces[:2] if each for x in each.tensors)
        given += () if lists is None else (*lists.masked, *lists.full)
    problem = Problem(face, tensors, mode, head, tail, functions)
    problem.heads_first = heads_first
    result, logs = apply(problem, [x for x in given if isinstance(x, torch.Tensor)])
    return result, logs if want_lse else None


def _has_gradients(face: int, tensors: tuple[Array, Array, Array], tail: tuple[Any, ...]) -> bool:
    """Whether `refuse` has nothing to say, found fast."""
    q, k, v = tensors
    if face == _call.CACHE or not isinstance(q, torch.Tensor) or q.dtype not in _TYPES:
        return False
    if not (isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor) and k.dtype is v.dtype is q.dtype):
        return False
    if not tail:
        return True
    if any([tail[place] is not None for place in _WITHOUT_IN_TAIL if place < len(tail)]):
        return False
    others = [x for place, x in enumerate(tail) if x is not None and place not in _WITH_GRADIENT]
    return not any(map(differentiable, others))


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
