"""FlashAttention-4's mods use the CuTe DSL (`cute`, `cutlass`, `utils`). This stands for the parts that are arithmetic.

A traced function finds these in place of the DSL's modules, functions and types, so that nothing of the DSL runs.
"""

from __future__ import annotations

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
        if isinstance(value, (bool, int, float)):
            kind = type_of_dtype(self.name)
            return bool(value) if kind == "bool" else (float(value) if kind == "f32" else int(value))
        return converted(value, self.name)


class Fragment:
    """A register tensor of one element."""

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
    if shape not in (1, (1,)):
        raise TraceError(f"a fragment of {shape} elements: must be 1: a function handles one score at a time")
    return Fragment(dtype)


def _first(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _like(_: Any, dtype: Any = None, **__: Any) -> Fragment:
    return Fragment(dtype)


def _scalar_to_ssa(value: Any, dtype: Any) -> Any:
    return converted(value, dtype) if isinstance(value, Symbol) else Type(getattr(dtype, "name", str(dtype)))(value)


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
    **{"const_expr": _first, "Constexpr": _first, "range_constexpr": lambda *args, **_: range(*args)},
}
_TYPES = ("Float32", "Float16", "BFloat16", "Float64", "Int64", "Int32", "Int16", "Int8", "Uint8", "Boolean")


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
