"""Traces score functions and mask functions: each is run once with symbols, and what it does becomes a graph.

Two forms of functions are known ("faces"):

======  =========================================================================================================
flex    score_mod(score, b, h, q_idx, kv_idx); mask_mod(b, h, q_idx, kv_idx). Arrays are captured.
fa4     score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors[, aux_scalars]);
        mask_mod(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors[, aux_scalars]). Arrays are captured, too.
======  =========================================================================================================
"""

from __future__ import annotations

import contextlib
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ._captures import Captures, Guards, is_module, unwrapped
from ._functions import FUNCTIONS
from ._graph import INTEGERS, Node, to_text, walk
from ._symbol import PACKAGE, Symbol, TraceError, Tracer
from .mods import Scalar, scalar

__all__ = ["Scalar", "TraceError", "Traced", "scalar", "trace", "traced"]


class _AuxScalar(NamedTuple):
    """Number `place` of aux_scalars."""

    value: float
    place: int


@dataclass(frozen=True, eq=False)
class Traced:
    """A function as a graph.

    kind: "score" or "mask". text: the graph. tensors: the captured arrays in order of number. location: "file:line".
    sources: for each tensor its place in aux_tensors, or None if it is captured. result: the graph's node. detaches:
    whether the function stops a gradient somewhere, which the graph does not say.
    """

    kind: str
    face: str
    text: str
    result: Node
    tensors: list[Any]
    sources: tuple[int | None, ...]
    location: str
    guards: Guards = field(repr=False)
    numbers: list[Scalar | _AuxScalar] = field(repr=False)
    detaches: bool = False

    @property
    def scalars(self) -> list[float]:
        """The numbers of the graph's `scalar` nodes, as they are now."""
        return [number.value for number in self.numbers]

    @property
    def key(self) -> tuple[str, str]:
        """Equal for functions that compile to the same code."""
        return self.kind, self.text


class _Lengths:
    """FlashAttention-4's seqlen_info."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __getattr__(self, name: str) -> Symbol:
        if name in ("seqlen_q", "seqlen_k", "offset_q", "offset_k"):
            return self._tracer.symbol(self._tracer.build.input(name))
        raise TraceError(f"seqlen_info.{name}: must be seqlen_q, seqlen_k, offset_q or offset_k")


class _Listed(tuple):  # noqa: SLOT001 - a name for errors
    """aux_tensors or aux_scalars, as a function sees them."""

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise TraceError(f"entry {index} of aux_tensors or aux_scalars: the call gives {len(self)}") from None


def trace(
    function: Callable[..., Any],
    kind: str,
    face: str = "flex",
    aux_tensors: Sequence[Any] | None = None,
    aux_scalars: Sequence[float] | None = None,
) -> Traced:
    """Runs `function` once with symbols.

    kind: "score" or "mask". face: "flex" or "fa4". aux_tensors, aux_scalars: of a call of the face "fa4".
    Raises TraceError, which names the file, the line and the rewrite, if the function cannot become a graph.
    """
    tracer = Tracer(FUNCTIONS, face)
    captures = Captures(tracer, Scalar)
    location = _location(function)
    rebuilt = _rebuilt(captures, function)
    arguments = [tracer.symbol(tracer.build.input(name)) for name in ("b", "h", "q_idx", "kv_idx")]
    if kind == "score":
        arguments.insert(0, tracer.symbol(tracer.build.input("score")))
    if face == "fa4":
        arguments += [_Lengths(tracer), _Listed(map(captures.replaced, aux_tensors or ()))]
        if aux_scalars is not None and _takes_scalars(function, len(arguments)):
            arguments.append(_Listed(_aux_scalars(tracer, captures, aux_scalars)))
    value = run_traced(rebuilt, arguments, location)
    if kind == "mask" and face == "fa4" and getattr(function, "__vec_size__", 1) > 1:
        value = _first_bit(value)
    result = _result(tracer, value, kind, location)
    return _finished(tracer, captures, result, kind, face, location, aux_tensors)


def _first_bit(value: Any) -> Any:
    """Of a vectorised mask_mod's value, whose bit i is that of key kv_idx + i: that of kv_idx."""
    integer = isinstance(value, Symbol) and value.node.type in INTEGERS
    return (value & 1) != 0 if integer else value


def _aux_scalars(tracer: Tracer, captures: Captures, values: Sequence[float]) -> list[Symbol]:
    symbols = []
    for i, value in enumerate(values):
        kind = "i32" if isinstance(value, (int, np.integer, np.bool_)) else "f32"
        symbols.append(tracer.symbol(tracer.build.scalar(len(captures.scalars), kind)))
        captures.scalars.append(_AuxScalar(value, i))
    return symbols


def run_traced(function: Callable[..., Any], arguments: list[Any], location: tuple[str, int]) -> Any:
    """The function's result. Errors other than TraceError are given the place in the function where they arose."""
    try:
        return function(*arguments)
    except TraceError:
        raise
    except Exception as error:
        trace = error.__traceback__
        place = location
        while trace is not None:
            name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
            if name not in (PACKAGE, "torch", "numpy", "cupy", "jax"):
                place = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
        raise TraceError(f"{type(error).__name__}: {str(error)[:300]}", place) from error


def _result(tracer: Tracer, value: Any, kind: str, location: tuple[str, int]) -> Node:
    try:
        node = tracer.lift(value)
    except TypeError:
        shown = type(value).__name__
        raise TraceError(f"the function returns {shown}: must return {_WANTED[kind]}", location) from None
    if kind == "mask" and node.type != "bool":
        raise TraceError(f"the mask function returns {node.type}: must return {_WANTED[kind]}", location)
    return node if kind == "mask" else tracer.build.convert("f32", node)


_MOST_CAPTURED = 16  # kMaxTensors and kMaxScalars of src/graph/graph.hpp
_WANTED = {"mask": "one bool, true where the key is kept", "score": "one number, the new score"}


def _finished(
    tracer: Tracer,
    captures: Captures,
    result: Node,
    kind: str,
    face: str,
    location: tuple[str, int],
    aux_tensors: Sequence[Any] | None,
) -> Traced:
    """The trace with its tensors and scalars numbered in the order in which the result needs them."""
    order: list[int] = []
    numbers: list[int] = []
    for node in walk([result]):
        chosen = order if node.op == "load" else numbers
        if node.op in ("load", "scalar") and node.attributes[0] not in chosen:
            chosen.append(node.attributes[0])
    for used, what in ((order, "tensors"), (numbers, "numbers")):
        if len(used) > _MOST_CAPTURED:
            raise TraceError(f"the function reads {len(used)} {what}: must be at most {_MOST_CAPTURED}", location)
    result = _renumbered(tracer, result, order, numbers)
    tensors = [tracer.tensors[number] for number in order]
    aux = list(aux_tensors or ())
    sources = tuple(next((i for i, x in enumerate(aux) if x is tensor), None) for tensor in tensors)
    captures.guards.leave_out(aux)
    try:
        text = to_text([result])
    except ValueError as error:
        raise TraceError(str(error), location) from None
    held = [captures.scalars[number] for number in numbers]
    place = "{}:{}".format(*location)
    return Traced(kind, face, text, result, tensors, sources, place, captures.guards, held, tracer.detaches)


def _renumbered(tracer: Tracer, result: Node, tensors: list[int], scalars: list[int]) -> Node:
    if tensors == list(range(len(tensors))) and scalars == list(range(len(scalars))):
        return result
    build, new = tracer.build, {}
    for node in walk([result]):
        operands = [new[id(operand)] for operand in node.operands]
        if node.op == "load":
            made = build.load(tensors.index(node.attributes[0]), node.attributes[1], operands)
        elif node.op == "scalar":
            made = build.scalar(scalars.index(node.attributes[0]), node.type)
        elif not operands:
            made = node
        else:
            made = build._node(node.op, node.type, tuple(operands), node.attributes)
        new[id(node)] = made
    return new[id(result)]


def _location(function: Any) -> tuple[str, int]:
    """(file, line) of the function's definition."""
    inner = unwrapped(function)
    while hasattr(inner, "func"):
        inner = unwrapped(inner.func)
    for found in (inner, *(getattr(type(inner), name, None) for name in ("forward", "__call__"))):
        code = getattr(found, "__code__", None)
        if code is not None:
            return code.co_filename, code.co_firstlineno
    return repr(function), 0


def _rebuilt(captures: Captures, function: Any) -> Callable[..., Any]:
    if not callable(function):
        raise TypeError(f"a score function or mask function is {type(function).__name__}: must be callable")
    inner = unwrapped(function)
    if isinstance(inner, types.FunctionType):
        return captures.function(inner)
    if is_module(inner) or not isinstance(inner, (types.BuiltinFunctionType, type)):
        return captures.replaced(inner)
    return inner


def _takes_scalars(function: Any, before: int) -> bool:
    """Whether a function has a parameter behind the `before` that every function has."""
    try:
        parameters = list(inspect.signature(unwrapped(function)).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) > before or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def anchor_of(function: Any) -> tuple[Any, Any]:
    """(key, object) by which a function is known: a bound method is made anew at each access."""
    if type(function) is types.MethodType:
        return (id(function.__self__), id(function.__func__)), function.__self__
    return id(function), function


def _nothing() -> None:
    """In place of a weak reference to None."""


def reference(x: Any, known: dict[Any, Any], key: Any) -> Callable[[], Any]:
    """A weak reference with which an entry of `known` goes. Raises TypeError for objects that have none."""
    return _nothing if x is None else weakref.ref(x, lambda _: known.pop(key, None))


# Functions that were traced, by identity. An entry goes with its function.
_known: dict[tuple[Any, ...], tuple[Callable[[], Any], Traced]] = {}


def traced(
    function: Callable[..., Any],
    kind: str,
    face: str = "flex",
    aux_tensors: Sequence[Any] | None = None,
    aux_scalars: Sequence[float] | None = None,
) -> Traced:
    """As trace(), but remembers the function's graph until something that it captures is another object.

    Captured arrays may change their contents, and a Scalar its value. Arrays of aux_tensors may be others of the same
    type and rank.
    """
    name, anchor = anchor_of(function)
    key: tuple[Any, ...] = (name, kind, face)
    if face == "fa4":
        aux = list(aux_tensors or ())
        same = (next(i for i, y in enumerate(aux) if y is x) for x in aux)
        kinds = tuple((x.dtype, len(x.shape), i) for x, i in zip(aux, same))
        key += kinds + tuple(map(type, aux_scalars or ())) + (aux_scalars is None,)
    entry = _known.get(key)
    if entry is not None and entry[0]() is anchor and entry[1].guards.holds():
        found = entry[1]
        if face == "flex":
            return found
        bound = _bound(found, aux_tensors, aux_scalars)
        if bound is not None:
            return bound
    made = trace(function, kind, face, aux_tensors, aux_scalars)
    with contextlib.suppress(TypeError):  # an object that cannot be referred to weakly is traced at each call
        kept = without_aux(made) if face == "fa4" else made
        _known[key] = (reference(anchor, _known, key), kept)
    return made


def without_aux(made: Traced) -> Traced:
    """The trace without the tensors of aux_tensors, which belong to one call."""
    return replace(made, tensors=[x if place is None else None for x, place in zip(made.tensors, made.sources)])


def _bound(found: Traced, aux_tensors: Sequence[Any] | None, aux_scalars: Sequence[float] | None) -> Traced | None:
    """A trace with the tensors and numbers of another call; None if a shape that it depends on is another one."""
    new = [aux_tensors[source] for source in found.sources if source is not None] if aux_tensors is not None else []
    for place, shape in found.guards.aux_shapes.items():
        if aux_tensors is None or tuple(aux_tensors[place].shape) != shape:
            return None
    values = iter(new)
    tensors = [x if source is None else next(values) for x, source in zip(found.tensors, found.sources)]
    numbers = [
        _AuxScalar(aux_scalars[x.place], x.place) if isinstance(x, _AuxScalar) and aux_scalars is not None else x
        for x in found.numbers
    ]
    bound = object.__new__(Traced)  # what dataclasses.replace() makes, in a tenth of its time
    bound.__dict__.update(found.__dict__, tensors=tensors, numbers=numbers)
    return bound
