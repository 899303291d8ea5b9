"""Graphs of typed operations: what a score function or mask function does to one score (docs/design/score-graph.md).

A graph is one or several result nodes and everything below them. Nodes are immutable; within one Builder, two nodes
that mean the same are the same object, so that `is` compares expressions.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._tensors import is_cupy, is_torch

LIMIT = 4096  # nodes of one graph
HEADER = "flashspark-graph 1"
INTEGERS = ("i32", "i64")
NUMBERS = ("i32", "i64", "f32")
INPUTS = {name: "i32" for name in ("b", "h", "q_idx", "kv_idx", "seqlen_q", "seqlen_k", "offset_q", "offset_k")}
INPUTS["score"] = "f32"
LOADED = {  # type of an element of a captured tensor -> type of the load
    **{"bool": "bool", "u8": "i32", "i8": "i32", "i16": "i32", "i32": "i32", "i64": "i64"},
    **{"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f32"},
}
FLOAT_DTYPES = ("f16", "bf16", "f32", "f64")
_RANGE = {"i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}


class Node:
    """One operation. `attributes`: ("0x1p+0",) of a const, (number,) of a scalar, (number, dtype, rank) of a load."""

    __slots__ = ("attributes", "op", "operands", "type")

    def __init__(self, op: str, type: str, operands: tuple[Node, ...], attributes: tuple[Any, ...]) -> None:
        for name, value in (("op", op), ("type", type), ("operands", operands), ("attributes", attributes)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Node.{name}: nodes are immutable")

    def __repr__(self) -> str:
        return f"Node({' '.join([self.op, *map(str, self.attributes)])} -> {self.type})"

    @property
    def value(self) -> bool | int | float | None:
        """The number of a const; None for other nodes."""
        if self.op != "const":
            return None
        text = self.attributes[0]
        if self.type == "f32":
            return float.fromhex(text)
        return text == "1" if self.type == "bool" else int(text)


def _rules() -> dict[str, tuple[int, tuple[str, ...], str | None]]:
    """op -> (number of operands, their possible types, type of the result or None for the operands')."""
    rules: dict[str, tuple[int, tuple[str, ...], str | None]] = {}
    bits = ("bool", *INTEGERS)
    for count, types, result, names in (
        (2, NUMBERS, None, "add sub mul min max floordiv mod"),
        (2, ("f32",), None, "div pow atan2"),
        (2, bits, None, "and or xor"),
        (2, INTEGERS, None, "shl shr"),
        (2, NUMBERS, "bool", "lt le gt ge"),
        (2, ("bool", *NUMBERS), "bool", "eq ne"),
        (1, NUMBERS, None, "neg abs sign"),
        (1, bits, None, "not"),
        (1, ("f32",), None, "exp exp2 expm1 log log2 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh"),
        (1, ("f32",), None, "sigmoid erf floor ceil round trunc"),
        (1, ("f32",), "bool", "isnan isinf"),
        *((1, ("bool", *NUMBERS), name, f"to_{name}") for name in ("bool", *NUMBERS)),
    ):
        rules.update(dict.fromkeys(names.split(), (count, types, result)))
    return rules


RULES = _rules()


def constant_text(type: str, value: float) -> str:
    """A number as the text of a const. Floats are rounded to single precision. Raises OverflowError for integers."""
    if type == "bool":
        return "1" if value else "0"
    if type == "f32":
        value = rounded(float(value))
        if math.isfinite(value):
            return value.hex()
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    low, high = _RANGE[type]
    if not low <= value <= high:
        raise OverflowError(f"{value} does not fit in {type}")
    return str(int(value))


def rounded(value: float) -> float:
    """The nearest value in single precision; infinity beyond its range."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


class Builder:
    """Makes nodes, each of them once. Raises TypeError where operands have other types than the operation takes."""

    def __init__(self, adopted: Iterable[Node] = ()) -> None:
        """adopted: results of an existing graph, whose nodes this builder shares."""
        self._nodes: dict[tuple[Any, ...], Node] = {}
        for node in walk(adopted):
            self._nodes[self._key(node.op, node.type, node.operands, node.attributes)] = node

    @staticmethod
    def _key(op: str, type: str, operands: tuple[Node, ...], attributes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (op, type, tuple(map(id, operands)), attributes)

    def _node(self, op: str, type: str, operands: tuple[Node, ...] = (), attributes: tuple[Any, ...] = ()) -> Node:
        key = self._key(op, type, operands, attributes)
        if key not in self._nodes:
            self._nodes[key] = Node(op, type, operands, attributes)
        return self._nodes[key]

    def input(self, name: str) -> Node:
        return self._node(name, INPUTS[name])

    def const(self, type: str, value: float) -> Node:
        return self._node("const", type, (), (constant_text(type, value),))

    def scalar(self, number: int, type: str) -> Node:
        return self._node("scalar", type, (), (number,))

    def load(self, number: int, dtype: str, indices: Sequence[Node]) -> Node:
        if any(index.type not in INTEGERS for index in indices):
            raise TypeError(f"load: indices are {[index.type for index in indices]}: must be i32 or i64")
        return self._node("load", LOADED[dtype], tuple(indices), (number, dtype, len(indices)))

    def where(self, condition: Node, yes: Node, no: Node) -> Node:
        if condition.type != "bool" or yes.type != no.type:
            raise TypeError(f"where of {condition.type}, {yes.type}, {no.type}: must be bool and two of one type")
        return self._node("where", yes.type, (condition, yes, no))

    def convert(self, type: str, node: Node) -> Node:
        """`node` in this type. Constants that the type holds are converted here."""
        if node.type == type:
            return node
        value = node.value
        if value is not None and (type in ("bool", "f32") or (node.type != "f32" and _fits(type, value))):
            return self.const(type, value)
        return self._node(f"to_{type}", type, (node,))

    def __call__(self, op: str, *operands: Node) -> Node:
        """The node of a unary or binary operation."""
        count, types, result = RULES[op]
        kinds = {operand.type for operand in operands}
        if len(operands) != count or len(kinds) != 1 or not kinds <= set(types):
            raise TypeError(f"{op} of {[operand.type for operand in operands]}: must be {count} of {types}, one type")
        return self._node(op, result or operands[0].type, operands)


def _fits(type: str, value: float) -> bool:
    low, high = _RANGE[type]
    return low <= value <= high


def walk(results: Iterable[Node]) -> list[Node]:
    """All nodes at and below `results`, operands in front of the nodes that take them."""
    order: dict[int, Node] = {}
    stack = [(node, False) for node in reversed(list(results))]
    while stack:
        node, ready = stack.pop()
        if id(node) in order:
            continue
        if ready:
            order[id(node)] = node
        else:
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(node.operands))
    return list(order.values())


def to_text(results: Sequence[Node]) -> str:
    """The graph of `results` as text. Raises ValueError if it has more than 4096 nodes."""
    nodes = walk(results)
    if len(nodes) > LIMIT:
        raise ValueError(f"the function makes {len(nodes)} operations: must be at most {LIMIT}")
    number = {id(node): i for i, node in enumerate(nodes)}
    lines = [HEADER]
    for node in nodes:
        before = [node.type, *node.attributes] if node.op == "const" else list(node.attributes)
        after = [node.type] if node.op == "scalar" else []
        lines.append(" ".join(map(str, [node.op, *before, *after, *(number[id(x)] for x in node.operands)])))
    lines.append(" ".join(["return", *(str(number[id(node)]) for node in results)]))
    return "\n".join(lines) + "\n"


# The interpreter.

_NUMPY = {"bool": np.bool_, "i32": np.int32, "i64": np.int64, "f32": np.float64}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _shift(shift: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, count: shift(x, count & np.asarray(x.dtype.itemsize * 8 - 1, x.dtype))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum},
    **{"floordiv": np.floor_divide, "mod": np.remainder, "div": np.divide, "pow": np.power, "atan2": np.arctan2},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert},
    **{"shl": _shift(np.left_shift), "shr": _shift(np.right_shift)},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"eq": np.equal, "ne": np.not_equal, "neg": np.negative, "abs": np.absolute, "sign": np.sign},
    **{name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt")},
    **{name: getattr(np, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{"asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "rsqrt": lambda x: 1 / np.sqrt(x)},
    **{"floor": np.floor, "ceil": np.ceil, "round": np.rint, "trunc": np.trunc},
    **{"isnan": np.isnan, "isinf": np.isinf, "where": np.where, "sigmoid": _sigmoid},
    "erf": lambda x: np.frompyfunc(math.erf, 1, 1)(x).astype(np.float64) if np.ndim(x) else np.float64(math.erf(x)),
}


def host_array(x: Any) -> np.ndarray:
    """An array or tensor of any library as a NumPy array; bfloat16 of torch becomes float32."""
    if is_torch(x):
        x = x.detach().cpu()
        return (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return x.get() if is_cupy(x) else np.asarray(x)


def _converted(type: str, x: np.ndarray) -> np.ndarray:
    """Saturates floats; wraps integers."""
    if type in INTEGERS and x.dtype == np.float64:
        low, high = _RANGE[type]
        inside = np.where(np.isnan(x) | (x < low) | (x >= high), 0, x).astype(np.int64)
        x = np.where(x >= high, high, np.where(x < low, low, inside))
    return x != 0 if type == "bool" else np.asarray(x).astype(_NUMPY[type])


def _loaded(tensor: np.ndarray, indices: Sequence[np.ndarray], type: str) -> np.ndarray:
    """Elements of a tensor. Negative indices count from the end; those out of range read the nearest element."""
    if 0 in tensor.shape:
        raise IndexError(f"load from a tensor of shape {tensor.shape}: has no elements")
    wide = [index.astype(np.int64) for index in indices]
    inside = [np.clip(np.where(i < 0, i + size, i), 0, size - 1) for i, size in zip(wide, tensor.shape)]
    return np.asarray(tensor[tuple(inside)]).astype(_NUMPY[type])


def evaluate(
    results: Sequence[Node],
    inputs: Mapping[str, Any],
    tensors: Sequence[Any] = (),
    scalars: Sequence[float] = (),
) -> list[np.ndarray]:
    """The values of `results`: bool, int32, int64 or, for f32, float64 arrays.

    inputs: numbers or NumPy arrays by name, broadcast against each other; only those that the graph has are read.
    tensors: the captured tensors in order of number. scalars: the numbers of the call.
    """
    nodes = walk(results)
    held = {node.attributes[0]: host_array(tensors[node.attributes[0]]) for node in nodes if node.op == "load"}
    values: dict[int, np.ndarray] = {}
    uses = Counter(id(operand) for node in nodes for operand in node.operands) + Counter(map(id, results))
    with np.errstate(all="ignore"):
        for node in nodes:
            operands = [values[id(operand)] for operand in node.operands]
            values[id(node)] = _value(node, operands, inputs, held, scalars)
            for operand in node.operands:
                uses[id(operand)] -= 1
                if not uses[id(operand)]:
                    del values[id(operand)]
    return [values[id(node)] for node in results]


def _value(
    node: Node, operands: list[np.ndarray], inputs: Mapping[str, Any], tensors: Mapping[int, Any], scalars: Any
) -> np.ndarray:
    kind = _NUMPY[node.type]
    if node.op == "const":
        return np.asarray(node.value, kind)
    if node.op == "scalar":
        return np.asarray(scalars[node.attributes[0]], kind)
    if node.op == "load":
        return _loaded(tensors[node.attributes[0]], operands, node.type)
    if node.op in INPUTS:
        return np.asarray(inputs[node.op]).astype(kind)
    if node.op.startswith("to_"):
        return _converted(node.type, operands[0])
    return np.asarray(_FUNCTIONS[node.op](*operands))
