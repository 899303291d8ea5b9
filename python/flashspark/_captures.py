"""What a traced function refers to: arrays become stand-ins, and the function is rebuilt with them in its place.

Closures, globals, defaults, partial arguments, bound objects' attributes, lists, tuples and dicts are walked, and so
are the plain Python functions among them. Each thing found is noted, so that a later call sees whether it changed.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ._cute import BUILTINS as CUTE_BUILTINS
from ._cute import replaced as cute_replaced
from ._functions import FUNCTIONS
from ._symbol import Dispatched, TraceError, Tracer
from ._tensor_proxy import TensorProxy, is_array

_LIBRARIES = frozenset({"torch", "numpy", "cupy", "jax", "jaxlib", "ml_dtypes", *sys.stdlib_module_names}) - {
    "__main__",
}


class Guards:
    """What the trace depends on. holds(): whether all of it is as it was."""

    def __init__(self) -> None:
        self.cells: list[tuple[Any, Any]] = []
        self.names: list[tuple[dict[str, Any], str, Any]] = []
        self.attributes: list[tuple[Callable[[], Any], str, Any]] = []  # owners weakly: a trace keeps none alive
        self.sequences: list[tuple[Any, list[Any]]] = []
        self.arrays: list[tuple[Any, Any, int]] = []
        self.shapes: list[tuple[Any, tuple[int, ...]]] = []
        self.aux_shapes: dict[int, tuple[int, ...]] = {}  # by the place in aux_tensors
        self.native: Any = None  # the function's native form (flashspark._user_functions), once it has one

    def leave_out(self, aux: list[Any]) -> None:
        """Keeps only the shapes of the arrays of aux_tensors, which the next call replaces by others."""
        self.aux_shapes = {i: shape for i, x in enumerate(aux) for array, shape in self.shapes if array is x}
        self.shapes = [(array, shape) for array, shape in self.shapes if all(array is not x for x in aux)]
        self.arrays = [entry for entry in self.arrays if all(entry[0] is not x for x in aux)]

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        try:
            self.attributes.append((weakref.ref(owner), name, value))
        except TypeError:
            self.attributes.append((lambda: owner, name, value))

    def holds(self) -> bool:
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                return False
        for table, name, value in self.names:
            if table.get(name) is not value:
                return False
        for owner, name, value in self.attributes:
            now = getattr(owner(), name, None)
            if now is not value and not (type(now) is type(value) and isinstance(now, (int, float)) and now == value):
                return False
        for array, dtype, rank in self.arrays:
            if array.dtype != dtype or array.ndim != rank:
                return False
        return not (self.sequences or self.shapes) or self._contents_hold()

    def _contents_hold(self) -> bool:
        for owner, values in self.sequences:
            now = list(owner.values()) if isinstance(owner, dict) else owner
            if len(now) != len(values) or any(a is not b for a, b in zip(now, values)):
                return False
        return all(tuple(array.shape) == shape for array, shape in self.shapes)


class Captures:
    """Replaces what a function refers to. One for each trace."""

    def __init__(self, tracer: Tracer, scalar_type: type) -> None:
        self.tracer = tracer
        self.guards = Guards()
        self.scalars: list[Any] = []
        self._scalar_type = scalar_type
        self._made: dict[int, tuple[Any, Any]] = {}  # id of the original -> (the original, what stands for it)
        tracer.loader = lambda _, array, index: self.replaced(array)[index]

    def replaced(self, value: Any) -> Any:
        """What stands for a captured value; the value itself if it needs none."""
        if isinstance(value, (bool, int, float, str, bytes, type(None), type, Dispatched, np.generic)):
            return cute_replaced(value) if isinstance(value, type) else value
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        if getattr(type(value), "_flashspark_opaque", False):
            return value
        if isinstance(value, self._scalar_type):
            self.scalars.append(value)
            kind = "f32" if isinstance(value.value, float) else "i32"
            return self._note(value, self.tracer.symbol(self.tracer.build.scalar(len(self.scalars) - 1, kind)))
        if is_array(value):
            self.guards.arrays.append((value, value.dtype, len(value.shape)))
            return self._note(value, TensorProxy.of(self.tracer, self.guards.shapes, value))
        stand_in = cute_replaced(value)
        if stand_in is not value:
            return stand_in
        if isinstance(value, (list, tuple, dict)):
            return self._container(value)
        return self._callable_or_object(value)

    def _note(self, original: Any, stand_in: Any) -> Any:
        self._made[id(original)] = (original, stand_in)
        return stand_in

    def _container(self, value: Any) -> Any:
        if type(value) not in (list, tuple, dict):
            return value
        if isinstance(value, dict):
            self.guards.sequences.append((value, list(value.values())))
            return self._note(value, {key: self.replaced(item) for key, item in value.items()})
        if isinstance(value, list):
            self.guards.sequences.append((value, list(value)))
        return self._note(value, type(value)(map(self.replaced, value)))

    def _callable_or_object(self, value: Any) -> Any:
        original = unwrapped(value)
        if isinstance(original, functools.partial):
            parts = (original.func, *original.args), original.keywords
            first, *rest = map(self.replaced, parts[0])
            return self._note(
                value, functools.partial(first, *rest, **{k: self.replaced(v) for k, v in parts[1].items()})
            )
        if isinstance(original, types.MethodType):
            return types.MethodType(self.function(original.__func__), self.object(original.__self__))
        if isinstance(original, types.FunctionType):
            return self.function(original) if _is_users(original) else value
        if isinstance(original, types.ModuleType):
            if original.__name__.partition(".")[0] in ("cupy", "jax"):
                return self._note(value, Library(original))
            return value if original.__name__.partition(".")[0] in _LIBRARIES else self.object(original)
        if type(original).__module__.partition(".")[0] in {"builtins", *_LIBRARIES} and not hasattr(value, "__dict__"):
            return value
        return self.object(original) if _holds_state(original) else value

    def object(self, value: Any) -> Any:
        known = self._made.get(id(value))
        return known[1] if known is not None else self._note(value, ObjectProxy(self, value))

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """A copy of a Python function whose globals, closure and defaults are replaced."""
        known = self._made.get(id(function))
        if known is not None:
            return known[1]
        names: dict[str, Any] = {"__name__": function.__globals__.get("__name__", "")}
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copy = types.FunctionType(function.__code__, names, function.__name__, None, cells)
        self._note(function, copy)
        names["__builtins__"] = function.__globals__.get("__builtins__", __builtins__)
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                value = function.__globals__[name]
                if not isinstance(value, types.ModuleType):
                    self.guards.names.append((function.__globals__, name, value))
                names[name] = self.replaced(value)
                _add_builtins_of_dsl(names, value)
        for cell, new in zip(function.__closure__ or (), cells):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.guards.cells.append((cell, value))
            new.cell_contents = self.replaced(value)
            _add_builtins_of_dsl(names, value)
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            if value is not None:
                self.guards.attribute(function, name, value)
                setattr(copy, name, self.replaced(value))
        self.guards.attribute(function, "__code__", function.__code__)
        return copy


def _add_builtins_of_dsl(names: dict[str, Any], value: Any) -> None:
    """Adds max and min as the DSL compiles them to the globals of a function that refers to one of its modules."""
    if isinstance(value, types.ModuleType) and cute_replaced(value) is not value:
        for name, stand_in in CUTE_BUILTINS.items():
            names.setdefault(name, stand_in)


def unwrapped(value: Any) -> Any:
    """The Python function behind wrappers of cute.jit, torch.compile and functools.lru_cache; others unchanged."""
    while True:
        inner = getattr(value, "_torchdynamo_orig_callable", None)
        if inner is None and isinstance(value, functools._lru_cache_wrapper):
            inner = value.__wrapped__
        if inner is None and callable(value) and _is_of_dsl(value):
            inner = getattr(value, "__wrapped__", None) or getattr(value, "_flashspark_original", None)
        if inner is None:
            return value
        value = inner


def _is_of_dsl(value: Any) -> bool:
    names = getattr(value, "__globals__", None)
    module = names.get("__name__", "") if names is not None else type(value).__module__
    return str(module).partition(".")[0] in ("cutlass", "nvidia_cutlass_dsl")


def _is_users(function: types.FunctionType) -> bool:
    """Whether a function is to be walked: not those of libraries, unless they close over something."""
    library = str(function.__globals__.get("__name__", "")).partition(".")[0] in _LIBRARIES
    return not library or bool(function.__closure__)


def _holds_state(value: Any) -> bool:
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The names that a function and those inside it may read from its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


class Library:
    """Stands for an array library whose functions do not know symbols."""

    def __init__(self, original: types.ModuleType) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        if isinstance(value, types.ModuleType):  # jax.numpy, jax.nn
            return Library(value)
        known = FUNCTIONS.get(name)
        if known is None or not callable(value) or isinstance(value, type):
            return value

        def function(*args: Any, **kwargs: Any) -> Any:
            symbolic = any(isinstance(x, Dispatched) for x in (*args, *kwargs.values()))
            return (known if symbolic else value)(*args, **kwargs)

        return function


class ObjectProxy:
    """Stands for an object or module whose attributes are read: arrays among them are replaced."""

    def __init__(self, captures: Captures, original: Any) -> None:
        object.__setattr__(self, "_captures", captures)
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> Any:
        captures, original = self._captures, self._original
        value = getattr(original, name)
        if isinstance(value, types.MethodType) and value.__self__ is original:
            return types.MethodType(captures.function(value.__func__), self)
        captures.guards.attribute(original, name, value)
        return captures.replaced(value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TraceError(f".{name} = ..: a score function cannot have side effects")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(type(self._original), "forward", None) if is_module(self._original) else None
        function = function or type(self._original).__call__
        if not isinstance(function, types.FunctionType):
            return self._original(*args, **kwargs)
        return self._captures.function(function)(self, *args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self._captures.replaced(self._original[index])

    def __len__(self) -> int:
        return len(self._original)


def is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
