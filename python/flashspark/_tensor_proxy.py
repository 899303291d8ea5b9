"""Stands for a captured array while a function is traced: indexed, it becomes a load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ._graph import LOADED, Node
from ._symbol import Dispatched, Symbol, TraceAttributeError, TraceError, Tracer, constant_int
from ._tensors import is_torch

_DTYPES = {
    **{"bool": "bool", "uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64"},
    **{"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"},
}
_UNROLLED = 256


def is_array(x: object) -> bool:
    """Whether x is an array or tensor of any library; NumPy's scalars are none."""
    if isinstance(x, np.ndarray) or is_torch(x):
        return True
    if isinstance(x, (np.generic, type, Dispatched)) or not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return False
    return hasattr(x, "__dlpack__") or hasattr(x, "__array_interface__")


def dtype_of(x: Any) -> str:
    """The type of an array's elements as the graph names it; its own name if the graph has none."""
    name = str(x.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


class TensorProxy(Dispatched):
    """Stands for a captured array. Indexed down to one element it is a symbol; whole, it has only a shape.

    axes: for each dimension of the array either the node of its index, or (start, step, size) of what a slice left.
    """

    def __init__(self, tracer: Tracer, shapes: list[Any], array: Any, axes: tuple[Any, ...]) -> None:
        """shapes: receives (array, shape) if the trace depends on the shape."""
        self._tracer, self._shapes, self._array, self._axes = tracer, shapes, array, axes

    @classmethod
    def of(cls, tracer: Tracer, shapes: list[Any], array: Any) -> TensorProxy | Symbol:
        proxy = cls(tracer, shapes, array, tuple((0, 1, int(size)) for size in array.shape))
        return proxy if proxy._axes else proxy.as_symbol()

    def as_symbol(self) -> Symbol:
        """The element, where every dimension has an index."""
        free = [axis for axis in self._axes if isinstance(axis, tuple)]
        if free:
            raise TraceError(
                f"a captured tensor of shape {tuple(self._array.shape)} with {len(free)} dimensions left without an "
                "index: index it down to one element, as in t[h, q_idx]"
            )
        dtype = dtype_of(self._array)
        if dtype not in LOADED:
            mend = f"; x.view({dtype[1:]}) has the same bits" if dtype in ("uint16", "uint32", "uint64") else ""
            raise TraceError(f"a captured tensor of {dtype}: must be of bool, an integer, or float16 to float64{mend}")
        number = self._tracer.tensor_number(self._array)
        return self._tracer.symbol(self._tracer.build.load(number, dtype, self._axes))

    def __getitem__(self, index: Any) -> Any:
        parts = list(index) if isinstance(index, tuple) else [index]
        free = [i for i, axis in enumerate(self._axes) if isinstance(axis, tuple)]
        dots = [i for i, part in enumerate(parts) if part is Ellipsis]
        if dots:
            missing = len(free) - (len(parts) - 1)
            parts[dots[0] : dots[0] + 1] = [slice(None)] * missing
        if len(parts) > len(free) or len(dots) > 1:
            raise TraceError(f"{len(parts)} indices into a captured tensor that has {len(free)} dimensions left")
        axes = list(self._axes)
        for i, part in zip(free, parts):
            axes[i] = self._axis(axes[i], part)
        proxy = TensorProxy(self._tracer, self._shapes, self._array, tuple(axes))
        return proxy if any(isinstance(axis, tuple) for axis in axes) else proxy.as_symbol()

    def _axis(self, axis: tuple[int, int, int], part: Any) -> Any:
        start, step, size = axis
        if isinstance(part, slice):
            self._observe()
            if any(isinstance(x, Dispatched) for x in (part.start, part.stop, part.step)):
                raise TraceError("a slice with a symbol in it: index elements instead, as in t[start + kv_idx]")
            first, last, stride = part.indices(size)
            return start + first * step, step * stride, len(range(first, last, stride))
        number = constant_int(part)
        if number is not None:
            self._observe()
            if not -size <= number < size:
                raise TraceError(f"index {number}: is out of range for a dimension of size {size}")
            return self._tracer.build.const("i32", start + (number % size) * step)
        if part is None or isinstance(part, (bool, float, str, list)):
            raise TraceError(f"index {part!r} into a captured tensor: must be an integer or a symbol")
        node = self._tracer.lift(part)
        if node.type not in ("i32", "i64"):
            rewrite = "write t[i.long()]" if node.type == "f32" else "masks are not supported, write torch.where"
            raise TraceError(f"an index of type {node.type} into a captured tensor: must be an integer ({rewrite})")
        return node if (start, step) == (0, 1) and size == self._length_of(axis) else self._strided(axis, node)

    def _length_of(self, axis: tuple[int, int, int]) -> int:
        """The whole length of the dimension that this axis is."""
        return int(self._array.shape[next(i for i, other in enumerate(self._axes) if other is axis)])

    def _strided(self, axis: tuple[int, int, int], node: Node) -> Node:
        """The element's index in the array, for an index into a slice of it."""
        start, step, size = axis
        functions, i = self._tracer.functions, self._tracer.symbol(node)
        i = functions["where"](i < 0, i + size, i)
        return functions["add"](functions["clamp"](i, 0, size - 1) * step, start).node

    def _observe(self) -> None:
        if not any(array is self._array for array, _ in self._shapes):
            self._shapes.append((self._array, tuple(map(int, self._array.shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        self._observe()
        return tuple(axis[2] for axis in self._axes if isinstance(axis, tuple))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self._array.dtype

    element_type = dtype

    @property
    def device(self) -> Any:
        return getattr(self._array, "device", "cpu")

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if len(self) > _UNROLLED:
            raise TraceError(f"iteration over a captured tensor of length {len(self)}: must be at most {_UNROLLED}")
        return iter([self[i] for i in range(len(self))])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TraceError("assignment into a captured tensor: a score function cannot have side effects")

    def __bool__(self) -> bool:
        return bool(self.as_symbol())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceAttributeError(
            f".{name} of a captured tensor: only its elements, shape and dtype can be used; do the rest outside of "
            "the function, or index first"
        )

    __hash__ = object.__hash__


def _forwarded(name: str) -> Any:
    return lambda self, *args: getattr(self.as_symbol(), name)(*args)


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rand", "ror", "rxor", "rlshift", "rrshift"),
    *("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "round", "int", "float", "index"),
):
    setattr(TensorProxy, f"__{_name}__", _forwarded(f"__{_name}__"))
TensorProxy.__hash__ = object.__hash__  # type: ignore[method-assign]
