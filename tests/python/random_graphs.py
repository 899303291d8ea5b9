"""Random well-typed graphs (docs/design/score-graph.md), the same for the same seed, and how far apart two engines may
be that compute one.

Engines round differently, and a comparison, a step or an index may turn any difference into a large one. So each f32
node is known to be exact (a multiple of a power of two that single precision holds, in any engine) or not, and only
exact ones decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flashspark._graph import LOADED, Builder, Node, evaluate, walk

_TYPES = {
    **{"bool": np.bool_, "u8": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64},
    **{"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64},
}
DTYPES = (*_TYPES, "f32", "f32")  # of the tensors that all graphs of one Tensors read
SCALARS = ("f32", "i32", "i64")
_INTEGERS, _NUMBERS = ("i32", "i64"), ("i32", "i64", "f32")
_LARGEST = 12  # f32 nodes stay below 2 to this power
_PLACES = ("b", "h", "q_idx", "kv_idx", "q_idx", "kv_idx", "seqlen_q", "seqlen_k", "offset_q", "offset_k")


class Facts(NamedTuple):
    """Of a number: whether engines agree on it; it lies in +-2**size and is a multiple of 2**-fraction, if exact."""

    exact: bool = True
    size: int = 0
    fraction: int = 0


class Captured:
    """A tensor of each data type, of ranks 0 to 3 and any order of dimensions, and a number of each type."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.tensors, self.scalars = [], [quarter(rng), int(rng.integers(-20, 20)), int(rng.integers(-20, 20))]
        for n, dtype in enumerate(DTYPES):
            shape = tuple(int(x) for x in rng.integers(1, 8, int(rng.integers(n % 2, 4))))
            floats = np.vectorize(lambda _: quarter(rng), otypes=[np.float64])(np.zeros(shape))
            whole = rng.integers(-9, 10, shape)
            wide = rng.integers(-(2**63), 2**63 - 1, shape)
            values = floats if LOADED[dtype] == "f32" else np.where(rng.random(shape) < 0.7, whole, wide)
            if dtype == "bool":
                values = values & 1
            values = np.asarray(values).astype(_TYPES[dtype])
            turned = np.asfortranarray(values) if rng.random() < 0.5 else values
            self.tensors.append(turned)


def quarter(rng: np.random.Generator) -> float:
    """A multiple of 1/4 from -15.75 to 15.75, which every floating-point type holds."""
    return int(rng.integers(-63, 64)) / 4


class RandomGraph:
    """root: the graph's result, of `type`. Nodes are the builder's, which other graphs may share."""

    def __init__(
        self, seed: Any, build: Builder, captured: Captured, type: str, score: Node | None, wild: bool, most: int
    ) -> None:
        """score: a multiple of 1/4 within +-16. wild: some loads read outside of their tensors. most: nodes, about."""
        self._rng, self._build, self._captured, self._wild = np.random.default_rng(seed), build, captured, wild
        self._facts: dict[int, Facts] = {}
        self._nodes: list[Node] = []
        self._left, self._score = most, score
        self.root = self._of(type, int(self._rng.integers(1, 13)))

    def is_exact(self, node: Node) -> bool:
        return self._facts[id(node)].exact

    def _pick(self, values: Sequence[Any]) -> Any:
        return values[int(self._rng.integers(len(values)))]

    def _chance(self, percent: int) -> bool:
        return bool(self._rng.random() * 100 < percent)

    def _note(self, node: Node, facts: Facts = Facts()) -> Node:  # noqa: B008 - immutable
        if id(node) not in self._facts:
            self._facts[id(node)] = facts
            self._nodes.append(node)
            self._left -= 1
        return node

    def _of(self, type: str, depth: int) -> Node:
        enough = depth <= 0 or self._left <= 0
        if not enough and self._chance(10):
            known = [node for node in self._nodes if node.type == type]
            if known:
                return self._pick(known)
        if type == "bool":
            return self._bool_leaf() if enough else self._bool(depth - 1)
        if type != "f32":
            return self._integer_leaf(type) if enough else self._integer(type, depth - 1)
        if enough:
            return self._float_leaf()
        return self._exact(depth - 1) if self._chance(30) else self._smooth(depth - 1)

    def _certain(self, depth: int) -> Node:
        """An f32 node that may decide something."""
        return self._float_leaf() if depth <= 0 or self._left <= 0 else self._exact(depth - 1)

    # Leaves.

    def _constant(self, value: float) -> Node:
        return self._note(self._build.const("f32", value), Facts(True, 5, 2))

    def _float_leaf(self) -> Node:
        kind = int(self._rng.integers(5))
        if kind == 0:
            return self._note(self._build.scalar(0, "f32"), Facts(True, 4, 2))
        if kind == 1:
            return self._constant(quarter(self._rng))
        if kind == 2:
            return self._load("f32")
        if self._score is not None:
            return self._note(self._score, Facts(True, 4, 2))
        return self._constant(quarter(self._rng))

    def _integer_leaf(self, type: str) -> Node:
        if self._chance(20):
            return self._note(self._build.scalar(SCALARS.index(type), type), Facts(True, 5))
        width = int(type[1:])
        if type == "i64" or self._chance(30):
            small = self._chance(80)
            value = int(self._rng.integers(-100, 101)) if small else int(self._rng.integers(-(2**63), 2**63 - 1))
            value = value if width == 64 else (value + 2**31) % 2**32 - 2**31
            return self._note(self._build.const(type, value), Facts(True, 7 if small else width))
        return self._note(self._build.input(self._pick(_PLACES)), Facts(True, 9))

    def _bool_leaf(self) -> Node:
        if self._chance(30):
            return self._note(self._build.const("bool", self._chance(50)))
        operands = self._integer_leaf("i32"), self._integer_leaf("i32")
        return self._note(self._build(self._pick(("ge", "lt", "ne")), *operands))

    # Operations.

    def _bool(self, depth: int) -> Node:
        kind, build = int(self._rng.integers(7)), self._build
        if kind == 0:
            return self._note(build("not", self._of("bool", depth)))
        if kind == 1:
            operands = self._of("bool", depth), self._of("bool", depth)
            return self._note(build(self._pick(("and", "or", "xor", "eq", "ne")), *operands))
        if kind in (2, 3):
            type = self._pick(("i32", "i32", "i64"))
            operands = [self._of(type, depth) if kind == 2 else self._certain(depth) for _ in range(2)]
            return self._note(build(self._pick(("lt", "le", "gt", "ge", "eq", "ne")), *operands))
        if kind == 4:
            return self._note(build(self._pick(("isnan", "isinf", "to_bool")), self._certain(depth)))
        if kind == 5:
            return (
                self._load("bool")
                if self._chance(50)
                else self._note(build("to_bool", self._of(self._pick(_INTEGERS), depth)))
            )
        return self._select("bool", depth)

    def _select(self, type: str, depth: int) -> Node:
        condition, yes, no = self._of("bool", depth), self._of(type, depth), self._of(type, depth)
        return self._where(condition, yes, no)

    def _where(self, condition: Node, yes: Node, no: Node) -> Node:
        a, b = self._facts[id(yes)], self._facts[id(no)]
        facts = Facts(a.exact and b.exact, max(a.size, b.size), max(a.fraction, b.fraction))
        if facts.exact and yes.type == "f32" and facts.size + facts.fraction > 22:
            return yes
        return self._note(self._build.where(condition, yes, no), facts)

    def _integer(self, type: str, depth: int) -> Node:
        kind, width, build = int(self._rng.integers(6)), int(type[1:]), self._build
        if kind == 0:
            a = self._of(type, depth)
            size = min(self._facts[id(a)].size + 1, width)
            return self._note(build(self._pick(("neg", "abs", "sign", "not")), a), Facts(True, size))
        if kind == 1:
            return self._select(type, depth)
        if kind == 2:
            return self._load(type)
        if kind == 3:
            source = self._pick(tuple(x for x in ("bool", "f32", "i32", "i64") if x != type))
            a = self._certain(depth) if source == "f32" else self._of(source, depth)
            size = min(self._facts[id(a)].size + 1, width)
            return self._note(build.convert(type, a), Facts(True, size))
        a, b = self._of(type, depth), self._of(type, depth)
        op = self._pick(("add", "sub", "mul", "min", "max", "floordiv", "mod", "and", "or", "xor", "shl", "shr"))
        size = 64 if op == "shl" else self._facts[id(a)].size + self._facts[id(b)].size + 1
        return self._note(build(op, a, b), Facts(True, min(size, width)))

    def _exact(self, depth: int) -> Node:
        a = self._number(depth) if self._chance(25) else self._certain(depth)
        fa = self._facts[id(a)]
        if self._chance(30):
            op = self._pick(("neg", "abs", "sign", "floor", "ceil", "round", "trunc"))
            return self._note(self._build(op, a), Facts(True, fa.size + 1, fa.fraction if op in ("neg", "abs") else 0))
        b = self._certain(depth)
        op = self._pick(("add", "sub", "mul", "min", "max", "mod", "floordiv", "where"))
        if op == "where":
            return self._where(self._of("bool", depth), a, b)
        fb = self._facts[id(b)]
        facts = Facts(True, max(fa.size, fb.size) + 1, max(fa.fraction, fb.fraction))
        if op == "mul":
            facts = Facts(True, fa.size + fb.size, fa.fraction + fb.fraction)
        if op == "floordiv":
            facts = Facts(True, fa.size + fb.fraction + 1, 0)
        if facts.size + facts.fraction > 22 or facts.size > _LARGEST:
            return a
        if op in ("floordiv", "mod"):
            b = self._above(b, 0.5)
        return self._note(self._build(op, a, b), facts)

    def _number(self, depth: int) -> Node:
        """A whole number of few bits, as f32."""
        a = self._of(self._pick(("bool", *_INTEGERS)), depth)
        size = self._facts[id(a)].size
        if size > _LARGEST:
            return self._float_leaf()
        return self._note(self._build.convert("f32", a), Facts(True, max(size, 1)))

    def _above(self, x: Node, least: float) -> Node:
        """|x| + least."""
        f = self._facts[id(x)]
        facts = Facts(f.exact, f.size + 1, max(f.fraction, 2))
        size = self._note(self._build("abs", x), facts)
        return self._note(self._build("add", size, self._constant(least)), facts)

    def _bounded(self, x: Node, largest: float) -> Node:
        """largest * tanh(x)."""
        y = self._note(self._build("tanh", x), Facts(False, 1))
        return self._note(self._build("mul", y, self._constant(largest)), Facts(False, 3))

    def _smooth(self, depth: int) -> Node:
        """Functions without steps, where they are steady."""
        a, build, kind = self._of("f32", depth), self._build, int(self._rng.integers(8))
        size = self._facts[id(a)].size
        if kind == 0:
            op = self._pick(("sin", "cos", "atan", "tanh", "sigmoid", "erf"))
            return self._note(build(op, a), Facts(False, 1))
        if kind == 1:
            op = self._pick(("exp", "exp2", "expm1", "sinh", "cosh"))
            return self._note(build(op, self._bounded(a, 3.75)), Facts(False, 6))
        if kind == 2:
            op = self._pick(("log", "log2", "log1p", "rsqrt"))
            return self._note(build(op, self._above(a, 0.5)), Facts(False, 7))
        if kind == 3:
            return self._note(build(self._pick(("asin", "acos", "tan")), self._bounded(a, 0.75)), Facts(False, 2))
        if kind == 4:
            return self._note(build("sqrt", self._above(a, 0.25)), Facts(False, size // 2 + 2))
        if kind == 5:
            b = self._above(self._of("f32", depth), 0.5)
            return self._note(build(self._pick(("div", "atan2")), a, b), Facts(False, size + 1))
        if kind == 6:
            base, power = self._above(self._bounded(a, 2), 0.5), self._bounded(self._of("f32", depth), 3)
            return self._note(build("pow", base, power), Facts(False, 5))
        b = self._of("f32", depth)
        op = self._pick(("add", "sub", "mul", "min", "max", "where"))
        if op == "where":
            return self._where(self._of("bool", depth), a, b)
        both = size + self._facts[id(b)].size
        size = both if op == "mul" else max(size, self._facts[id(b)].size) + 1
        return a if size > _LARGEST else self._note(build(op, a, b), Facts(False, size))

    def _load(self, type: str) -> Node:
        number = self._pick([n for n, dtype in enumerate(DTYPES) if LOADED[dtype] == type])
        indices = []
        for size in self._captured.tensors[number].shape:
            of = "i64" if self._chance(25) else "i32"
            index = self._of(of, 1)
            if not self._wild or self._chance(80):
                limit = self._note(self._build.const(of, size), Facts(True, 4))
                index = self._note(self._build("mod", index, limit), Facts(True, 4))
            indices.append(index)
        dtype = DTYPES[number]
        facts = Facts(True, 4, 2) if type == "f32" else Facts(True, 8 * np.dtype(_TYPES[dtype]).itemsize)
        return self._note(self._build.load(number, dtype, indices), facts)


def allowed(graph: RandomGraph, inputs: dict[str, Any], captured: Captured, seed: Any) -> tuple[Any, Any]:
    """(the values in float64, by how much an engine in single precision may miss them).

    The same graph is computed several times with each inexact node a little off: a few units in the last place, and of
    1, as the GPU's instructions for elementary functions are. Sums may be taken in another order, too, which errs as
    their largest summand does.
    """
    rng = np.random.default_rng(seed)
    summands = _summands(graph.root)
    wanted, *sums = evaluate([graph.root, *summands], inputs, captured.tensors, captured.scalars)
    size = np.max([np.abs(np.broadcast_to(x, np.shape(wanted))) for x in (wanted, *sums)], axis=0)
    error = 1e-6 * (size + 1)
    if not graph.is_exact(graph.root):
        for _ in range(6):
            (value,) = evaluate([_shaken(graph, rng)], inputs, captured.tensors, captured.scalars)
            error = error + 2 * np.abs(value - wanted)
    return wanted, error


def _summands(node: Node) -> list[Node]:
    """What is added up to a node, or chosen among."""
    found, stack = {}, [node]
    while stack:
        at = stack.pop()
        if id(at) not in found and at.type == "f32":
            found[id(at)] = at
            if at.op in ("add", "sub", "neg", "where", "mul"):
                stack.extend(at.operands)
    return list(found.values())


def _shaken(graph: RandomGraph, rng: np.random.Generator) -> Node:
    build, new = Builder(), {}
    for node in walk([graph.root]):
        moved = build._node(node.op, node.type, tuple(new[id(x)] for x in node.operands), node.attributes)
        if node.type == "f32" and not graph.is_exact(node):
            factor, offset = 1 + rng.uniform(-1, 1) * 2.0**-21, rng.uniform(-1, 1) * 2.0**-21
            moved = build("add", build("mul", moved, _double(build, factor)), _double(build, offset))
        new[id(node)] = moved
    return new[id(graph.root)]


def _double(build: Builder, value: float) -> Node:
    """A constant that is not rounded to single precision."""
    return build._node("const", "f32", (), (value.hex(),))
