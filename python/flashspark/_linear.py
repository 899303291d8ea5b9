"""Conditions on indices as linear inequalities: what a mask function says, independent of how it is written."""

from __future__ import annotations

from math import gcd

from ._graph import INTEGERS, Node

Linear = dict[Node | None, int]  # coefficients by term; that of None is the constant
_COEFFICIENT, _CONSTANT = 64, 2**30  # beyond these, 32-bit arithmetic might wrap
_INPUTS = ("q_idx", "kv_idx", "seqlen_q", "seqlen_k")
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def linear(node: Node) -> Linear | None:
    """An integer expression as a sum; abs, min and max are terms of their own. None if it is not one."""
    if node.type not in INTEGERS:
        return None
    if node.op == "const":
        return {None: int(node.value or 0)}
    if node.op in (*_INPUTS, "abs", "min", "max"):
        return {node: 1}
    if node.op == "to_i64":
        return linear(node.operands[0])
    if node.op == "neg":
        return scaled(linear(node.operands[0]), -1)
    if node.op in ("add", "sub"):
        a, b = map(linear, node.operands)
        return summed(a, scaled(b, 1 if node.op == "add" else -1))
    if node.op == "mul":
        for factor, other in (node.operands, node.operands[::-1]):
            number = constant(factor)
            if number is not None:
                return scaled(linear(other), number)
    return None


def constant(node: Node) -> int | None:
    terms = linear(node)
    return terms.get(None, 0) if terms is not None and not any(k is not None and v for k, v in terms.items()) else None


def scaled(a: Linear | None, factor: int) -> Linear | None:
    return None if a is None else _bounded({term: value * factor for term, value in a.items()})


def summed(a: Linear | None, b: Linear | None) -> Linear | None:
    if a is None or b is None:
        return None
    return _bounded({term: a.get(term, 0) + b.get(term, 0) for term in {**a, **b}})


def _bounded(a: Linear) -> Linear | None:
    """Without terms of coefficient 0; None where numbers are so large that 32 bits might wrap."""
    small = all(abs(value) <= (_CONSTANT if term is None else _COEFFICIENT) for term, value in a.items())
    return {term: value for term, value in a.items() if value} if small else None


def conjunction(node: Node, negated: bool = False) -> list[Linear] | None:
    """Sums that must all be >= 0 for a condition to hold (or, negated, not to hold). None if it is not of this form."""
    value = node.value
    if value is not None:
        return [] if bool(value) != negated else [{None: -1}]
    if node.op == "not":
        return conjunction(node.operands[0], not negated)
    if node.op == ("or" if negated else "and"):
        return _both(*(conjunction(operand, negated) for operand in node.operands))
    if node.op == "where" and node.type == "bool":
        return _chosen(node, negated)
    if node.op in (*_OPPOSITE, "eq", "ne") and node.operands[0].type in INTEGERS:
        return _compared(node, negated)
    return None


def _chosen(node: Node, negated: bool) -> list[Linear] | None:
    """where(c, a, b) with one of a and b constant: c & a, ~c & b, or their opposites."""
    condition, yes, no = node.operands
    if no.value is negated:  # false when c is false
        return _both(conjunction(condition), conjunction(yes, negated))
    if yes.value is negated:
        return _both(conjunction(condition, True), conjunction(no, negated))
    return None


def _both(a: list[Linear] | None, b: list[Linear] | None) -> list[Linear] | None:
    return None if a is None or b is None else a + b


def _compared(node: Node, negated: bool) -> list[Linear] | None:
    a, b = map(linear, node.operands)
    op = _OPPOSITE.get(node.op, node.op) if negated else node.op
    rising, falling = summed(a, scaled(b, -1)), summed(b, scaled(a, -1))
    if op in ("eq", "ne"):
        return _both(_split(rising), _split(falling)) if (op == "eq") != negated else None
    strict = {None: -1} if op in ("lt", "gt") else {}
    return _split(summed(rising if op in ("ge", "gt") else falling, strict))


def _split(a: Linear | None) -> list[Linear] | None:
    """a >= 0 without abs, min and max. None where that would need an `or`."""
    if a is None:
        return None
    for term, factor in a.items():
        if term is None or term.op in _INPUTS:
            continue
        rest = {other: value for other, value in a.items() if other is not term}
        if term.op == "abs" and factor < 0:
            inner = linear(term.operands[0])
            parts = [summed(rest, scaled(inner, factor)), summed(rest, scaled(inner, -factor))]
        elif (term.op == "min") == (factor > 0) and term.op != "abs":
            parts = [summed(rest, scaled(linear(operand), factor)) for operand in term.operands]
        else:
            return None
        return _both(*map(_split, parts))
    return [a]


def by_names(a: Linear) -> tuple[tuple[tuple[str, int], ...], int]:
    """(coefficients by name, constant) of a sum >= 0, divided by the coefficients' greatest common divisor."""
    named = {term.op: value for term, value in a.items() if term is not None}
    divisor = gcd(*named.values()) or 1
    number = a.get(None, 0) // divisor
    return tuple(sorted((name, value // divisor) for name, value in named.items())), number
