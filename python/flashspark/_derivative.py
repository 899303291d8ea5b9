"""Reverse-mode derivatives of score graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ._graph import FLOAT_DTYPES, Builder, Node, walk

_Gradients = tuple[Node | None, ...]  # one per operand; None where it is zero everywhere


class Derivative(NamedTuple):
    """results: f32 nodes [d/dscore, d/d(loads[0]), d/d(loads[1]), ..], a graph together with the function's own.

    loads: the load nodes of floating tensors, in the order of the function's text. Their operands are the indices.
    """

    results: list[Node]
    loads: list[Node]


def derivative(result: Node) -> Derivative:
    """The derivatives of an f32 node with respect to the score and to each element of a floating tensor it loads.

    Those of floor, ceil, round, trunc, sign, comparisons and integers are zero; that of abs is sign; equal operands
    of min and max get a half each. Raises TypeError if `result` is not f32.
    """
    if result.type != "f32":
        raise TypeError(f"derivative of {result.type}: must be f32")
    nodes = walk([result])
    rules = _Rules(Builder([result]))
    loads = [node for node in nodes if node.op == "load" and node.attributes[1] in FLOAT_DTYPES]
    zero = rules.const(0.0)
    gradients: dict[int, Node] = {id(result): rules.const(1.0)}
    for node in reversed(nodes):
        gradient = gradients.get(id(node))
        if gradient is None or not node.operands or node.type != "f32":
            continue
        for operand, part in zip(node.operands, rules(node, gradient)):
            if part is not None and operand.type == "f32":
                before = gradients.get(id(operand))
                gradients[id(operand)] = part if before is None else rules.build("add", before, part)
    score = next((node for node in nodes if node.op == "score"), None)
    wanted = [score, *loads]
    return Derivative([zero if node is None else gradients.get(id(node), zero) for node in wanted], loads)


class _Rules:
    """The gradients of an operation's operands from the gradient of its result."""

    def __init__(self, build: Builder) -> None:
        self.build = build

    def const(self, value: float) -> Node:
        return self.build.const("f32", value)

    def mul(self, a: Node, b: Node) -> Node:
        """a * b; just one of them if the other is 1."""
        if a.value == 1:
            return b
        return a if b.value == 1 else self.build("mul", a, b)

    def neg(self, a: Node) -> Node:
        return self.build("neg", a)

    def __call__(self, node: Node, g: Node) -> _Gradients:
        op = node.op
        if op in _UNARY:
            return (self.mul(g, _UNARY[op](self, node.operands[0], node)),)
        if op in _OTHER:
            return _OTHER[op](self, node, g)
        return (None,) * len(node.operands)  # piecewise constant

    def square(self, x: Node) -> Node:
        return self.build("mul", x, x)

    def one_minus(self, x: Node) -> Node:
        return self.build("sub", self.const(1.0), x)

    def over(self, x: Node) -> Node:
        return self.build("div", self.const(1.0), x)

    def where(self, condition: Node, yes: Node | None, no: Node | None) -> Node:
        zero = self.const(0.0)
        return self.build.where(condition, zero if yes is None else yes, zero if no is None else no)


def _product(r: _Rules, node: Node, g: Node) -> _Gradients:
    a, b = node.operands
    return r.mul(g, b), r.mul(g, a)


def _quotient(r: _Rules, node: Node, g: Node) -> _Gradients:
    b = node.operands[1]
    part = r.build("div", g, b)
    return part, r.neg(r.mul(part, node))


def _power(r: _Rules, node: Node, g: Node) -> _Gradients:
    a, b = node.operands
    less = r.build("pow", a, r.build("sub", b, r.const(1.0)))
    by_base = r.where(r.build("eq", b, r.const(0.0)), None, r.mul(g, r.mul(b, less)))
    flat = r.build("and", r.build("eq", a, r.const(0.0)), r.build("ge", b, r.const(0.0)))
    return by_base, r.where(flat, None, r.mul(g, r.mul(node, r.build("log", a))))


def _arc(r: _Rules, node: Node, g: Node) -> _Gradients:
    y, x = node.operands
    part = r.build("div", g, r.build("add", r.square(x), r.square(y)))
    return r.mul(part, x), r.neg(r.mul(part, y))


def _extremum(r: _Rules, node: Node, g: Node) -> _Gradients:
    a, b = node.operands
    half = r.where(r.build("eq", a, b), r.mul(g, r.const(0.5)), None)
    first, second = ("lt", "gt") if node.op == "min" else ("gt", "lt")
    return r.where(r.build(first, a, b), g, half), r.where(r.build(second, a, b), g, half)


def _remainder(r: _Rules, node: Node, g: Node) -> _Gradients:
    return g, r.neg(r.mul(g, r.build("floordiv", *node.operands)))


_OTHER: dict[str, Callable[[_Rules, Node, Node], _Gradients]] = {
    "add": lambda r, node, g: (g, g),
    "sub": lambda r, node, g: (g, r.neg(g)),
    "neg": lambda r, node, g: (r.neg(g),),
    "where": lambda r, node, g: (None, r.where(node.operands[0], g, None), r.where(node.operands[0], None, g)),
    **{"mul": _product, "div": _quotient, "pow": _power, "atan2": _arc, "mod": _remainder},
    **{"min": _extremum, "max": _extremum},
}

# The derivative from the operand x and the result y.
_UNARY: dict[str, Callable[[_Rules, Node, Node], Node]] = {
    "abs": lambda r, x, y: r.build("sign", x),
    "exp": lambda r, x, y: y,
    "exp2": lambda r, x, y: r.mul(y, r.const(math.log(2))),
    "expm1": lambda r, x, y: r.build("add", y, r.const(1.0)),
    "log": lambda r, x, y: r.over(x),
    "log2": lambda r, x, y: r.build("div", r.const(1 / math.log(2)), x),
    "log1p": lambda r, x, y: r.over(r.build("add", x, r.const(1.0))),
    "sqrt": lambda r, x, y: r.build("div", r.const(0.5), y),
    "rsqrt": lambda r, x, y: r.mul(r.const(-0.5), r.mul(y, r.square(y))),
    "sin": lambda r, x, y: r.build("cos", x),
    "cos": lambda r, x, y: r.neg(r.build("sin", x)),
    "tan": lambda r, x, y: r.build("add", r.const(1.0), r.square(y)),
    "asin": lambda r, x, y: r.build("rsqrt", r.one_minus(r.square(x))),
    "acos": lambda r, x, y: r.neg(r.build("rsqrt", r.one_minus(r.square(x)))),
    "atan": lambda r, x, y: r.over(r.build("add", r.const(1.0), r.square(x))),
    "sinh": lambda r, x, y: r.build("cosh", x),
    "cosh": lambda r, x, y: r.build("sinh", x),
    "tanh": lambda r, x, y: r.one_minus(r.square(y)),
    "sigmoid": lambda r, x, y: r.mul(y, r.one_minus(y)),
    "erf": lambda r, x, y: r.mul(r.const(2 / math.sqrt(math.pi)), r.build("exp", r.neg(r.square(x)))),
}
