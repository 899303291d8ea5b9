"""FlashAttention 4's functions and block lists in flashspark.torch_ops: the operators, and the functions' arguments.

flashspark::attention_functions, its gradients (.._backward) and flashspark::attention_functions_out are the operators
of attention with functions, as the texts of their graphs, what these capture, and lists of blocks. torch.compile keeps
them in its graph. A function is traced while the call is compiled. What it refers to is guarded, so that a change
compiles anew, but for the contents of tensors, which are inputs of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch

from . import _core
from ._autograd import Given, Problem, below_transforms, refuse
from ._backward import Forward
from ._call import Mode
from ._tensors import in_forward_mode, refuse_tangents
from ._trace import trace, traced
from ._user_functions import Lists, extras_of, native_of_text, padded
from .mods import Scalar

_FUNCTIONS = ", ".join(
    f"str {kind}_graph, Tensor[] {kind}_tensors, float[] {kind}_scalars" for kind in ("score", "mask")
)
_LISTS = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
_MORE = f"{_FUNCTIONS}, {', '.join(f'Tensor? {name}' for name in _LISTS)}, SymInt block_size_q, SymInt block_size_k"


class Base(NamedTuple):
    """What flashspark.torch_ops has for its own operators, which this module does not import.

    given: the schema of q, k, v and the options, `count` arguments; the options' tail begins at `first_tail`. results,
    compute, through, found_gradients, fake_gradients: its functions of these names. same_device, words: those that
    check devices and name arguments.
    """

    library: torch.library.Library
    namespace: str
    given: str
    count: int
    first_tail: int
    results: Callable[..., Any]
    compute: Callable[..., Any]
    through: Callable[..., Any]
    same_device: Callable[..., Any]
    words: Callable[..., Any]
    found_gradients: Callable[..., Any]
    fake_gradients: Callable[..., Any]


@functools.lru_cache(maxsize=256)
def _native(kind: str, text: str) -> Any:
    return native_of_text(kind, text)


def _given(more: Sequence[Any]) -> Given:
    """What an operator is given behind its options."""
    score, score_tensors, score_scalars, mask, mask_tensors, mask_scalars, *lists, size_q, size_k = more
    functions = [_native(kind, text) if text else None for kind, text in (("score", score), ("mask", mask))]
    captured, scalars = (score_tensors, mask_tensors), (score_scalars, mask_scalars)
    if lists[0] is None:
        return Given(functions, scalars, captured, (), None)
    return Given(functions, scalars, captured, lists, (size_q, size_k))


def _extras(given: Given) -> tuple[Any, ...]:
    """The same as native calls take it."""
    a, b, c, d = given.blocks or [None] * 4
    lists = None if given.block_size is None else Lists((a, b), (c, d), given.block_size)
    return extras_of(list(zip(given.functions, given.captured)), lists, given.scalars)


def _with_functions(more: Sequence[Any]) -> Callable[..., Any]:
    """The native call with what an operator is given behind its options."""
    extras = _extras(_given(more))
    return lambda *args: _core.attention_forward(*padded(args), *extras)


class _OnOperators(Problem):
    """A call whose passes are the operators with functions."""

    def __init__(self, base: Base, args: Sequence[Any]) -> None:
        (*given, _, face, strict), more = args[: base.count + 3], args[base.count + 3 :]
        head, tail = given[3 : base.first_tail], given[base.first_tail :]
        super().__init__(face, given[:3], Mode(strict=strict), head, tail, _given(more))
        self.operators, self.texts = getattr(torch.ops, base.namespace), (more[0], more[3])

    def _operands(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """q, k, v and the options, and what follows them."""
        rows, tail, score, mask, blocks = self.parts(tensors)
        more = [self.texts[0], score, self.scalars[0], self.texts[1], mask, self.scalars[1]]
        return [*rows, *self.head, *tail], [*more, *(blocks or [None] * 4), *(self.block_size or (0, 0))]

    def forward(self, tensors):
        given, more = self._operands(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return self.operators.attention_functions(*given, True, self.face, self.mode is not None, *more)

    def backward(self, wanted, dout, dlse, tensors, out, lse):
        given, more = self._operands(tensors)
        return self.operators.attention_functions_backward(dout, dlse, out, lse, *given, wanted, self.face, *more)


def register(base: Base) -> Callable[..., Any]:
    """Registers the operators, and returns what _user_functions.attending calls for calls through them."""
    count = base.count

    def functions(*args):
        (q, k, v, *options), (want_lse, face, strict, *more) = args[:count], args[count:]
        out, lse = base.results((q, k, v), options, want_lse, face)
        base.compute((q, k, v), options, out, lse if want_lse else None, face, strict, _with_functions(more))
        return out, lse

    def functions_out(*args):
        (q, k, v, *options), (out, lse, face, strict, *more) = args[:count], args[count:]
        base.compute((q, k, v), options, out, lse, face, strict, _with_functions(more))

    def fake_functions(*args):
        (q, k, v, *options), (want_lse, face, *_) = args[:count], args[count:]
        base.same_device(*_named(base, args, ("want_lse",)))
        return base.results((q, k, v), options, want_lse, face)

    def fake_functions_out(*args):
        base.same_device(*_named(base, args, ("out", "lse")))

    def differentiable(*args):
        """The kernel for autograd. With gradients lse is computed even if it is not wanted."""
        tensors = [x for x in _named(base, args, ("want_lse",))[0] if isinstance(x, torch.Tensor)]
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops, base.namespace).attention_functions(*args)
        refuse(args[count + 1], (*args[:3], None, None, *args[3:count]))
        return below_transforms(_OnOperators(base, args), *tensors)

    def backward(dout, dlse, out, lse, *args):
        (q, k, v, *options), (wanted, face, *more) = args[:count], args[count:]
        head, given = base.first_tail - 3, _given(more)
        forward = Forward(
            *(face, (q, k, v), out, lse, options[:head], options[head:]), _extras(given), given.captured[0]
        )
        return base.found_gradients(forward, dout, dlse, wanted)

    def fake_backward(dout, dlse, out, lse, *args):
        (q, k, v, *options), (wanted, _, *more) = args[:count], args[count:]
        return base.fake_gradients((q, k, v), options, wanted, more[1])

    schema = f"attention_functions({base.given}, bool want_lse, int face, bool strict, {_MORE}) -> (Tensor, Tensor)"
    _add(base, schema, functions, fake_functions, ("want_lse",), differentiable)
    given = f"Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {base.given}, bool[] wanted, int face"
    _add(base, f"attention_functions_backward({given}, {_MORE}) -> Tensor[]", backward, fake_backward, None)
    given = f"{base.given}, Tensor(a!) out, Tensor(b!)? lse"
    schema = f"attention_functions_out({given}, int face, bool strict, {_MORE}) -> ()"
    _add(base, schema, functions_out, fake_functions_out, ("out", "lse"))
    return functools.partial(_attending, base)


def _add(
    base: Base,
    schema: str,
    kernel: Any,
    fake: Any,
    others: tuple[str, ...] | None,
    differentiable: Callable[..., Any] | None = None,
) -> None:
    """others: the arguments between the options and face; None: of a backward pass, whose tensors have no names."""
    base.library.define(schema)
    name = schema.partition("(")[0]
    for device in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        base.library.impl(name, kernel, device)
    torch.library.register_fake(f"{base.namespace}::{name}", fake, lib=base.library)
    operator = getattr(getattr(torch.ops, base.namespace), name).default

    def named(args):
        return _named(base, args, others) if others else _flat(args, repeat("an argument"))

    def without_gradients(*args):
        if torch.is_grad_enabled():
            for x, word in zip(*named(args)):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    raise ValueError(
                        f"{word}.requires_grad = True: must be False, or call under torch.no_grad(): "
                        "no gradient is computed for it"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def autograd(*args):
        if in_forward_mode():
            values, words = named(args)
            refuse_tangents(words, values)
        return (differentiable or without_gradients)(*args)

    base.library.impl(name, autograd, "Autograd")


def _named(base: Base, args: tuple[Any, ...], others: tuple[str, ...]) -> tuple[list[Any], list[str]]:
    """An operator's arguments, those in lists one by one, and their names."""
    words = [*base.words(args[base.count + len(others)]), *others, "face", "strict"]
    words += [f"{kind}_mod's {what}" for kind in ("score", "mask") for what in ("graph", "tensor", "scalar")]
    words += [f"block_sparse_tensors.{name}" for name in _LISTS]
    return _flat(args, words)


def _flat(args: Iterable[Any], words: Iterable[str]) -> tuple[list[Any], list[str]]:
    """Arguments, those in lists one by one, and their names."""
    values: list[Any] = []
    names: list[str] = []
    for word, x in zip(words, args):
        for i, value in enumerate(x if isinstance(x, (list, tuple)) else (x,)):
            values.append(value)
            names.append(f"{word} {i}" if isinstance(x, (list, tuple)) else word)
    return values, names


def _attending(
    base: Base,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    aux_tensors: Sequence[torch.Tensor] | None,
    aux_scalars: Sequence[float] | None,
    lists: Lists | None,
) -> Callable[..., Any]:
    """A function like `attend` for a call through the operators; the arguments are those of _user_functions.attending.

    lists: block_sparse_tensors, as the native call takes them.
    """
    aux = list(aux_tensors or ())
    for i, x in enumerate(aux):
        _require_tensor(f"aux_tensors[{i}]", x)
    numbers = list(aux_scalars or ())
    score, detaching = _operands("score", score_mod, aux, numbers)
    more = [*score, *_operands("mask", mask_mod, aux, numbers)[0]]
    if lists is None:
        more += [None, None, None, None, 0, 0]
    else:
        more += [*lists.masked, *lists.full, *lists.size]
        for name, x in zip(_LISTS, more[6:10]):
            if x is not None:
                _require_tensor(f"block_sparse_tensors.{name}", x)

    def run(face, tensors, out, lse, want_lse, mode, head, tail):
        if detaching is not None and torch.is_grad_enabled():
            given = (*tensors, *tail, *more[1])
            if any([x.requires_grad for x in given if isinstance(x, torch.Tensor)]):
                raise NotImplementedError(
                    f"score_mod = the function at {detaching}, which calls detach(): must not where a gradient is "
                    "wanted; detach captured tensors outside of it"
                )
        operators = getattr(torch.ops, base.namespace)

        def operator(settled, out, lse, want_lse, strict):
            if out is None and lse is None:
                return operators.attention_functions(*settled, want_lse, face, strict, *more)
            operators.attention_functions_out(*settled, out, lse, face, strict, *more)
            return out, lse

        return base.through(operator, face, tensors, out, lse, want_lse, mode, head, tail)

    return run


def _require_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} = {type(x).__name__}: must be a torch tensor in flashspark.torch_ops")


def _operands(
    kind: str, function: Any, aux: list[torch.Tensor], numbers: list[float]
) -> tuple[tuple[str, list, list], str | None]:
    """A function's graph, tensors and scalars; and where it stands, if it calls detach()."""
    if function is None:
        return ("", [], []), None
    if not torch.compiler.is_dynamo_compiling():
        found = traced(function, kind, "fa4", aux, numbers or None)
        for x in found.tensors:
            _require_tensor(f"{kind}_mod's captured tensor", x)
        parts = found.text, list(found.tensors), [float(x) for x in found.scalars]
        return parts, found.location if found.detaches else None
    _watch(function)
    kinds = tuple((x.dtype, x.dim()) for x in aux)
    types = tuple(isinstance(x, int) for x in numbers)
    made = _graph(function, kind, kinds, types, None)
    if made is None:
        # A range has constants where torch.compile knows a symbol.
        shapes = tuple(tuple(range(size).stop for size in x.shape) for x in aux)
        made = _graph(function, kind, kinds, types, shapes)
    text, tensors, captured, scalars, detaching = made
    held = [captured[place] if own else aux[place] for own, place in tensors]
    return (text, held, [float(value) if place < 0 else float(numbers[place]) for place, value in scalars]), detaching


def _watch(function: Any) -> None:
    """Has torch.compile guard the numbers that a function closes over: another function may have the same code."""
    cells = _cells(function, _noted(function))
    if not cells:
        return
    for cell, (watched, value) in zip(function.__closure__, cells):
        if watched and cell.cell_contents != value:
            raise ValueError(f"a number that {function} captures changes from {value} to {cell.cell_contents}")


_last: list[Any] = [None]


@torch._dynamo.assume_constant_result
def _noted(function: Any) -> None:
    _last[0] = function


@torch._dynamo.assume_constant_result
def _cells(function: Any, _: None) -> tuple[tuple[bool, Any], ...]:
    """For each cell of a function's closure whether it holds a number or text, and that.

    Nothing for a function that is made in the code that is being compiled, whose numbers are guarded already: it is
    another object than _noted() was given just now.
    """
    noted, _last[0] = _last[0], None
    closure = getattr(function, "__closure__", None) if noted is function else None
    values = []
    for cell in closure or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled yet
            values.append(None)
    kinds = (bool, int, float, str)
    return tuple((isinstance(x, kinds), x if isinstance(x, kinds) else None) for x in values)


@torch._dynamo.assume_constant_result
def _graph(function: Any, kind: str, kinds: tuple, types: tuple[bool, ...], shapes: tuple | None) -> Any:
    """(text, for each tensor (whether it is captured, its place), captured tensors, for each scalar (place, value),
    where the function stands if it calls detach()).

    kinds: types and ranks of aux_tensors. types: for each of aux_scalars whether it is an int. None if the graph
    depends on the shapes of aux_tensors, which must then be given.
    """
    known = shapes is not None
    shapes = shapes if known else tuple((1,) * rank for _, rank in kinds)
    aux = [torch.empty(shape, dtype=dtype, device="meta") for shape, (dtype, _) in zip(shapes, kinds)]
    numbers = [int(whole) if whole else 0.5 for whole in types]
    found = trace(function, kind, "fa4", aux, numbers or None)
    if found.guards.aux_shapes and not known:
        return None
    captured: list[Any] = []
    tensors = []
    for x, place in zip(found.tensors, found.sources):
        if place is None:
            _require_tensor(f"{kind}_mod's captured tensor", x)
            captured.append(x)
        tensors.append((place is None, len(captured) - 1 if place is None else place))
    scalars = [(-1, x.value) if isinstance(x, Scalar) else (x.place, 0.0) for x in found.numbers]
    values = [x for x in found.numbers if isinstance(x, Scalar)]
    _guard(function, found.guards, values)
    return found.text, tuple(tensors), captured, tuple(scalars), found.location if found.detaches else None


def _guard(function: Any, guards: Any, scalars: Iterable[Scalar]) -> None:
    """Has torch.compile compile anew once something has changed that a trace depends on, or a Scalar's value.

    The function lives as long as the compiled code: one that was made in that code has no other owner.
    """
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    then = [(x, x.value) for x in scalars]

    def holds(_: Any, alive: Any = function) -> bool:
        return guards.holds() and all(x.value == value for x, value in then)

    def create(builder: Any, guard: Any) -> None:
        what = holds, ["flashspark: score_mod or mask_mod"]
        try:
            builder.guard_manager.root.add_lambda_guard(*what, guard.user_stack)
        except TypeError:  # torch before 2.10
            builder.guard_manager.root.add_lambda_guard(*what)

    install_guard(GlobalStateSource().make_guard(create))
