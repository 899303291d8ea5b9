"""FlashAttention-4's mods use the CuTe DSL (`cute`, `cutlass`, `utils`). This stands for the parts that are arithmetic.

A traced function finds these in place of the DSL's modules, functions and types, so that nothing of the DSL runs.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

from ._functions import FUNCTIONS, converted, full_like, type_of_dtype
from ._symbol import Symbol, TraceError

_PACKAGES = ("cutlass", "flash_attn.cute", "quack", "vllm.vllm_flash_attn.cute")
_SUBMODULES = frozenset({"cute", "math", "arch", "utils", "dialects", "_mlir", "arith", "cutlass_dsl", "typing"})
_HINT = (
    "write it with Python's operators: torch.where or cute.where, q_idx - kv_idx, tensor[h_idx], x.to(cutlass.Float32)"
)


class Type:
    """A number type of the DSL; called, it converts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inf = float("inf")

    def __call__(self, value: Any) -> Any:
        if self.name == "Uint32":
            return _unsigned(value)
        if isinstance(value, (bool, int, float)):
            kind = type_of_dtype(self.name)
            return bool(value) if kind == "bool" else (float(value) if kind == "f32" else int(value))
        return converted(value, self.name)


def _unsigned(value: Any) -> Any:
    """32 bits without a sign, in 64 with one."""
    return (value if isinstance(value, int) else converted(value, "int64")) & 0xFFFFFFFF


class Fragment:
    """A register tensor of one element."""

    shape = (1,)

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._value: Any = None

    def store(self, value: Any) -> None:
        self._value = value

    def load(self) -> Any:
        if self._value is None:
            raise TraceError("a fragment is read before it is written")
        known = isinstance(self._value, Symbol) and self._dtype is not None and type_of_dtype(self._dtype) is not None
        return converted(self._value, self._dtype) if known else self._value

    def fill(self, value: Any) -> None:
        self._value = value

    def _check(self, index: Any) -> None:
        if index != 0:
            raise TraceError(f"fragment[{index!r}]: must be [0]: a function handles one score at a time")

    def __getitem__(self, index: Any) -> Any:
        self._check(index)
        return self.load()

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check(index)
        self._value = value


def _fragment(shape: Any, dtype: Any = None, *_: Any, **__: Any) -> Fragment:
    if shape not in (1, (1,), ()):  # a symbol's shape is ()
        raise TraceError(f"a fragment of {shape} elements: must be 1: a function handles one score at a time")
    return Fragment(dtype)


def _first(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _like(_: Any, dtype: Any = None, **__: Any) -> Fragment:
    return Fragment(dtype)


def _scalar_to_ssa(value: Any, dtype: Any) -> Any:
    return converted(value, dtype) if isinstance(value, Symbol) else Type(getattr(dtype, "name", str(dtype)))(value)


def _size(x: Any, *_: Any, **__: Any) -> int:
    shape = x if isinstance(x, (int, tuple)) else x.shape
    return shape if isinstance(shape, int) else math.prod(shape)


def _shift(name: str) -> Callable[..., Any]:
    """PTX's shift of 32 bits without a sign: 0 for counts above 31."""

    def function(value: Any, count: Any, *_: Any, **__: Any) -> Any:
        value, count = _unsigned(value), _unsigned(count)
        if isinstance(value, int) and isinstance(count, int):
            return _unsigned(value << count if name == "shl" else value >> count) if count < 32 else 0
        shifted = FUNCTIONS["bitwise_left_shift" if name == "shl" else "bitwise_right_shift"](value, count)
        return FUNCTIONS["where"](count < 32, _unsigned(shifted), 0)

    return function


def _extreme(builtin: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Python's max or min, which the DSL compiles: of symbols, too."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Symbol) for x in args) and not kwargs:
            return functools.reduce(FUNCTIONS[name], args)
        return builtin(*args, **kwargs)

    return function


BUILTINS = {"max": _extreme(max, "maximum"), "min": _extreme(min, "minimum")}  # of a function that uses the DSL


def _plain(name: str) -> Callable[..., Any]:
    """One of the symbols' functions without the DSL's own options, such as fastmath."""
    return lambda *args, **_: FUNCTIONS[name](*args)


_MATH = ("exp", "exp2", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan")
_NAMES: dict[str, Callable[..., Any]] = {
    **{name: _plain(name) for name in (*_MATH, "atan2", "tanh", "erf", "floor", "ceil", "where", "abs", "pow")},
    **{name: _plain("abs") for name in ("absi", "absf", "fabs")},
    **{name: _plain("minimum") for name in ("min", "fmin", "minsi")},
    **{name: _plain("maximum") for name in ("max", "fmax", "maxsi")},
    **{
        "full_like": full_like,
        "zeros_like": lambda x, **_: full_like(x, 0),
        "ones_like": lambda x, **_: full_like(x, 1),
    },
    **{"make_fragment": _fragment, "make_rmem_tensor": _fragment, "make_fragment_like": _like},
    **{"make_rmem_tensor_like": _like, "scalar_to_ssa": _scalar_to_ssa, "ssa_to_scalar": _first, "TensorSSA": _first},
    **{"size": _size, "shl_u32": _shift("shl"), "shr_u32": _shift("shr")},
    **{"const_expr": _first, "Constexpr": _first, "range_constexpr": lambda *args, **_: range(*args)},
}
_TYPES = ("Float32", "Float16", "BFloat16", "Float64", "Int64", "Int32", "Int16", "Int8", "Uint8", "Uint32", "Boolean")


class Module:
    """Stands for a module of the DSL."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = _named(name)
        if found is None and name in _SUBMODULES:
            return Module(f"{self._name}.{name}")
        if found is None:
            raise TraceError(f"{self._name}.{name}: is not supported in a score function or mask function ({_HINT})")
        return found


def _named(name: str) -> Any:
    return Type(name) if name in _TYPES else _NAMES.get(name)


def _is_dsl(module: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in _PACKAGES)


def replaced(value: Any) -> Any:
    """What stands for a module, function or type of the DSL; any other value unchanged."""
    if isinstance(value, types.ModuleType):
        return Module(value.__name__) if _is_dsl(value.__name__) else value
    if not _is_dsl(str(getattr(value, "__module__", ""))):
        return value
    found = _named(getattr(value, "__name__", ""))
    return value if found is None else found
