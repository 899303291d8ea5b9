"""Symbols: what a traced function gets in place of numbers. Each operation on them adds a node to the graph.

Types follow torch's rules for 0-dim tensors in brief: indices are i32; a Python int takes the other operand's type, and
i64 where it does not fit; a Python float makes f32; bool counts as i32 in arithmetic; i32 with i64 gives i64; an
integer with f32 gives f32; `/` gives f32.
"""

from __future__ import annotations

import linecache
import operator
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from ._graph import INTEGERS, Builder, Node
from ._tensors import is_torch

PACKAGE = __name__.partition(".")[0]
_INSIDE = frozenset({PACKAGE, "torch", "numpy", "functools", "operator", "cupy", "jax", "cutlass"})
_RANK = {"bool": 0, "i32": 1, "i64": 2, "f32": 3}


class TraceError(TypeError):
    """A score function or mask function does what cannot become a graph. Names the place, the line and the rewrite."""

    def __init__(self, message: str, place: tuple[str, int] | None = None) -> None:
        """place: (file, line); without it, the line of the traced function that runs."""
        frame = user_frame()
        if place is None and frame is not None:
            place = frame.f_code.co_filename, frame.f_lineno
        self.filename, self.lineno = place or (None, None)
        if place is not None:
            line = linecache.getline(*place).strip()
            message = f"{place[0]}:{place[1]}: {message}" + (f"\n    {line}" if line else "")
        super().__init__(message)


class TraceAttributeError(TraceError, AttributeError):
    """An unknown attribute; an AttributeError as well, so that hasattr() and getattr() with a default work."""


def user_frame() -> FrameType | None:
    """The innermost frame of the function that is being traced, outside of this package and array libraries."""
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if found is None and name not in _INSIDE:
            found = frame
        if name == PACKAGE and frame.f_code.co_name == "run_traced":
            return found
        frame = frame.f_back
    return None


def _truth_hint() -> str:
    """What to write in place of a construct that asks whether a symbol is true."""
    frame = user_frame()
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals) if frame else ""
    if re.search(r"\b(min|max)\(", line) and not re.search(r"\b(if|and|or|not)\b", line):
        return "min() and max(): write torch.minimum(a, b), np.minimum(a, b) or a.clamp(max=b)"
    if re.search(r"\b(and|or|not)\b", line):
        return "`and`, `or`, `not`: write (a) & (b), (a) | (b), ~(a)"
    if re.search(r"\b(if|while|assert)\b", line):
        return "`if`: write torch.where(condition, a, b) or np.where"
    return "a chained comparison or bool(): write (a < b) & (b < c), or torch.where(condition, a, b)"


class Tracer:
    """One run of a function: the graph that grows, the captured tensors in order of number, and the functions."""

    def __init__(self, functions: dict[str, Callable[..., Any]], face: str) -> None:
        self.build = Builder()
        self.functions = functions
        self.face = face
        self.tensors: list[Any] = []
        self.detaches = False  # whether the function stops a gradient
        self.loader: Callable[[Tracer, Any, Any], Any] | None = None

    def symbol(self, node: Node) -> Symbol:
        return Symbol(self, node)

    def tensor_number(self, array: Any) -> int:
        """The number of a captured tensor; it gets one on its first load."""
        for number, known in enumerate(self.tensors):
            if known is array:
                return number
        self.tensors.append(array)
        return len(self.tensors) - 1

    def lift(self, value: Any, like: str | None = None) -> Node:
        """The node of a symbol or number. `like`: the type that a Python int takes if it fits."""
        if isinstance(value, Symbol):
            return value.node
        if hasattr(type(value), "as_symbol"):  # a captured tensor without an index
            return value.as_symbol().node
        if is_torch(value) or isinstance(value, (np.ndarray, np.generic)):
            value = self._constant(value)
        if isinstance(value, bool):
            return self.build.const("bool", value)
        if isinstance(value, float) or (isinstance(value, int) and like == "f32"):
            return self.build.const("f32", float(value))
        if isinstance(value, int):
            wide = like == "i64" or not -(2**31) <= value < 2**31
            try:
                return self.build.const("i64" if wide else "i32", value)
            except OverflowError:
                raise TraceError(f"{value}: does not fit in 64 bits") from None
        raise TraceError(f"{type(value).__name__}: must be a symbol, a number or an element of a captured tensor")

    def _constant(self, value: Any) -> Any:
        """The number in a 0-d array that the function made itself: captured ones are stand-ins."""
        shape = tuple(value.shape)
        if shape:
            raise TraceError(f"a tensor of shape {shape} used whole: index it down to one element, as in t[h, q_idx]")
        return value.item()


def promoted(tracer: Tracer, values: tuple[Any, ...], least: str = "i32") -> tuple[Node, ...]:
    """The values as nodes of one type: the widest of theirs, `least` at least."""
    known = [type_of(tracer, value) for value in values]
    kind = max([least, *(k for k in known if k is not None)], key=_RANK.__getitem__)
    nodes = [tracer.lift(value, like=kind) for value in values]
    kind = max([kind, *(node.type for node in nodes)], key=_RANK.__getitem__)
    return tuple(tracer.build.convert(kind, node) for node in nodes)


def type_of(tracer: Tracer, value: Any) -> str | None:
    """The type of a value; None for a Python int, which takes that of the others."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return None
    return tracer.lift(value).type


def tracer_of(*values: Any) -> Tracer:
    for value in values:
        tracer = getattr(value, "_tracer", None)
        if isinstance(tracer, Tracer):
            return tracer
    raise TraceError("no symbol among the arguments")


def _binary(name: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    def forward(self: Symbol, other: Any) -> Any:
        return self._tracer.functions[name](self, other)

    def backward(self: Symbol, other: Any) -> Any:
        return self._tracer.functions[name](other, self)

    return forward, backward


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda self: self._tracer.functions[name](self)


def _refused(message: str) -> Callable[..., Any]:
    def refuse(self: Symbol, *_: Any, **__: Any) -> Any:
        raise TraceError(message)

    return refuse


class Dispatched:
    """Receives the calls of torch's and NumPy's functions on symbols and captured tensors."""

    __slots__ = ()
    __array_priority__ = 10000
    _tracer: Tracer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = tracer_of(*_flat(args), *(kwargs or {}).values())
        name = getattr(func, "__name__", str(func))
        if name == "__getitem__" and is_torch(args[0]) and tracer.loader is not None:
            return tracer.loader(tracer, args[0], args[1])
        if name == "__get__":
            raise TraceError("an attribute of a tensor that takes a symbol: is not supported")
        if is_torch(args[0] if args else None) and func is getattr(sys.modules["torch"].Tensor, name, None):
            name = f"method {name}" if f"method {name}" in tracer.functions else name
        return _called(tracer, f"torch.{name}", name, args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs.get("out") is not None:
            raise TraceError(f"np.{ufunc.__name__}.{method} or out=: must be a plain call")
        return _called(tracer_of(self), f"np.{ufunc.__name__}", ufunc.__name__, args, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _called(tracer_of(self), f"np.{func.__name__}", func.__name__, args, kwargs)


def _flat(values: Any) -> list[Any]:
    return [y for x in values for y in (_flat(x) if isinstance(x, (tuple, list)) else [x])]


def _called(tracer: Tracer, shown: str, name: str, args: Any, kwargs: Any) -> Any:
    spellings = (name, name.strip("_"), name.removeprefix("special_"))
    function = next((known for word in spellings if (known := tracer.functions.get(word)) is not None), None)
    if function is None:
        raise TraceError(f"{shown}: is not supported in a score function or mask function")
    return function(*args, **kwargs)


class Symbol(Dispatched):
    """A number that is not known yet: f32, i32, i64 or bool. Behaves as torch's 0-dim tensors do."""

    __slots__ = ("_tracer", "node")

    def __init__(self, tracer: Tracer, node: Node) -> None:
        self._tracer = tracer
        self.node = node

    def __repr__(self) -> str:
        return f"<symbol of type {self.node.type}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("shape", "ndim"):
            return () if name == "shape" else 0
        if name in ("dtype", "device"):
            return self._dtype() if name == "dtype" else "cpu"
        functions = self._tracer.functions
        function = functions.get(f"method {name}") or functions.get(name)
        if function is not None:
            return lambda *args, **kwargs: function(self, *args, **kwargs)
        if name.endswith("_") and name.strip("_") in self._tracer.functions:
            raise TraceAttributeError(f".{name}() changes its operand: write x = x.{name.strip('_')}(..)")
        raise TraceAttributeError(f".{name}: is no attribute of symbols")

    def _dtype(self) -> Any:
        name = {"bool": "bool", "i32": "int32", "i64": "int64", "f32": "float32"}[self.node.type]
        torch = sys.modules.get("torch")
        return np.dtype(name) if torch is None else getattr(torch, name)

    def __getitem__(self, index: Any) -> Symbol:
        if index in ((), Ellipsis) or (self._tracer.face == "fa4" and index == 0):
            return self
        raise TraceError("an index into a symbol: it is one number")

    def __round__(self, digits: int | None = None) -> Any:
        return self._tracer.functions["round"](self, decimals=digits or 0)

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("sub")
    __mul__, __rmul__ = _binary("mul")
    __truediv__, __rtruediv__ = _binary("div")
    __floordiv__, __rfloordiv__ = _binary("floor_divide")
    __mod__, __rmod__ = _binary("remainder")
    __pow__, __rpow__ = _binary("pow")
    __and__, __rand__ = _binary("bitwise_and")
    __or__, __ror__ = _binary("bitwise_or")
    __xor__, __rxor__ = _binary("bitwise_xor")
    __lshift__, __rlshift__ = _binary("bitwise_left_shift")
    __rshift__, __rrshift__ = _binary("bitwise_right_shift")
    __lt__, _ = _binary("lt")
    __le__, _ = _binary("le")
    __gt__, _ = _binary("gt")
    __ge__, _ = _binary("ge")
    __eq__, _ = _binary("eq")  # type: ignore[assignment]
    __ne__, _ = _binary("ne")  # type: ignore[assignment]
    __hash__ = object.__hash__
    __neg__, __pos__, __abs__, __invert__ = map(_unary, ("neg", "positive", "abs", "bitwise_not"))
    __floor__, __ceil__, __trunc__ = map(_unary, ("floor", "ceil", "trunc"))

    def __bool__(self) -> bool:
        raise TraceError(f"the truth of a symbol is not known yet ({_truth_hint()})")

    __int__ = _refused("int() of a symbol: write x.int() or x.to(torch.int32)")
    __index__ = __array__ = _refused(
        "a symbol where a Python or NumPy integer or array is needed: index captured arrays (those in closures, "
        "globals, defaults, lists, dicts and attributes) and make them outside of the function; for values write "
        "np.where, np.exp, .."
    )
    __float__ = _refused("float() or a function of `math` on a symbol: write x.float(), torch.exp(x), np.exp(x)")
    __complex__ = _refused("complex() of a symbol")
    __len__ = __iter__ = __contains__ = _refused("len(), iteration or `in` on a symbol: it is one number")
    __setitem__ = __delitem__ = _refused("assignment into a symbol: a score function cannot have side effects")
    __matmul__ = __rmatmul__ = __divmod__ = __rdivmod__ = _refused("@ and divmod(): are not supported on symbols")
    item = tolist = numpy = _refused(".item(), .tolist(), .numpy(): the value of a symbol is not known yet")


def constant_int(value: Any) -> int | None:
    """A Python or NumPy integer as an int; None for others."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        return None
    return operator.index(value)


def is_integer(node: Node) -> bool:
    return node.type in INTEGERS
