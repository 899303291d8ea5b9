"""Finds traced functions that mean what a built-in parameter means, so that the built-in code serves them.

A result is a dict of parameters. Windows count as flash-attention's do, from the diagonal that ends at the last query
and last key, as causal does. A function that counts from the first query and key means the same only where the lengths
differ by `condition`:

=====================================  ============================================================================
key                                    meaning
=====================================  ============================================================================
identity                               changes nothing; a mask that keeps every key
causal                                 keys at or before the query's position
window_left, window_right              keys within this many before and behind it; absent: open
condition                              all of the above holds only if seqlen_k - seqlen_q is this number
softcap                                c * tanh(score / c)
alibi                                  number of the captured f32 tensor of slopes, (heads,) or (sequences, heads)
alibi_needs_causal                     the bias is right for keys at or before the query's position only
bounds                                 ("first" or "last", left, right): the window as built_in() takes it
=====================================  ============================================================================
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from ._graph import Node, walk
from ._linear import by_names, conjunction, linear

_LAST = (("kv_idx", -1), ("q_idx", 1), ("seqlen_k", 1), ("seqlen_q", -1))  # q - kv + seqlen_k - seqlen_q
_FIRST = (("kv_idx", -1), ("q_idx", 1))  # q - kv
_LARGEST = 400  # nodes; the built-in forms are short
_ROUNDING = 2.0**-22  # of two constants in single precision whose product is 1


def recognise(traced: Any) -> dict[str, Any] | None:
    """The built-in parameters that mean the same as a traced function; None if there are none."""
    size: dict[int, int] = {}  # of the expression below a node when it is written out
    for node in walk([traced.result]):
        size[id(node)] = 1 + sum(size[id(operand)] for operand in node.operands)
    if size[id(traced.result)] > _LARGEST:
        return None
    return _mask(traced.result) if traced.kind == "mask" else _score(traced.result)


def built_in(found: dict[str, Any], seqlen_q: int, seqlen_k: int) -> dict[str, Any] | None:
    """recognise()'s result for sequences of these lengths, without a condition; None where it does not hold.

    A window that counts from the first query and key is shifted by the difference of the lengths.
    """
    result = {key: value for key, value in found.items() if key not in _WINDOW}
    if "bounds" not in found:
        return result if found.get("condition", seqlen_k - seqlen_q) == seqlen_k - seqlen_q else None
    if "alibi" in found and seqlen_k != seqlen_q:
        return None
    origin, left, right = found["bounds"]
    shift = seqlen_k - seqlen_q if origin == "first" else 0
    window = _window(None if left is None else left + shift, None if right is None else right - shift)
    return None if window is None else {**result, **window}


_WINDOW = ("bounds", "condition", "causal", "window_left", "window_right")
_PARAMETERS = frozenset({"identity", "causal", "window_left", "window_right", "softcap", "alibi"})


def served(
    score: Any, mask: Any, replaces_mask: bool, seqlen_q: int, seqlen_k: int, *slopes: tuple[int, ...]
) -> tuple[Any, Any, dict[str, Any]]:
    """(score, mask, parameters) for traced functions: None for one that the parameters stand for.

    replaces_mask: whether a window may stand for the mask. Without it only a mask that keeps every key goes.
    slopes: the shapes that alibi's tensor may have; the parameter is that tensor.
    """
    parameters: dict[str, Any] = {}
    found = _built_in_or_none(mask, seqlen_q, seqlen_k)
    if found is not None and (replaces_mask or "identity" in found):
        parameters, mask = found, None
    found = _built_in_or_none(score, seqlen_q, seqlen_k)
    if found is not None:
        both = _both(parameters, found)
        needs_causal = both.pop("alibi_needs_causal", False)
        if "alibi" in both:
            both["alibi"] = score.tensors[both["alibi"]]
        fits = "alibi" not in both or tuple(both["alibi"].shape) in slopes
        if fits and _PARAMETERS.issuperset(both) and ("causal" in both or not needs_causal):
            parameters, score = both, None
    return score, mask, parameters


_found: weakref.WeakKeyDictionary[Any, dict[str, Any] | None] = weakref.WeakKeyDictionary()


def found_in(traced: Any) -> dict[str, Any] | None:
    """recognise(), once for a trace."""
    if traced not in _found:
        _found[traced] = recognise(traced)
    return _found[traced]


def _built_in_or_none(traced: Any, seqlen_q: int, seqlen_k: int) -> dict[str, Any] | None:
    found = None if traced is None else found_in(traced)
    return None if found is None else built_in(found, seqlen_q, seqlen_k)


def _both(mask: dict[str, Any], score: dict[str, Any]) -> dict[str, Any]:
    """Parameters that keep only what both keep; a score function may contain a mask, too."""
    both = {**mask, **score}
    for side in ("window_left", "window_right"):
        if side in mask and side in score:
            both[side] = min(mask[side], score[side])
    if "causal" in both:
        both.pop("window_right", None)
    return both


def _window(left: int | None, right: int | None) -> dict[str, Any] | None:
    """The parameters of a window; None if a side is negative, which flash-attention takes for an open one."""
    if (left or 0) < 0 or (right or 0) < 0:
        return None
    result: dict[str, Any] = {"causal": True} if right == 0 else {}
    if left is not None:
        result["window_left"] = left
    if right is not None and right > 0:
        result["window_right"] = right
    return result


def _mask(result: Node, negated: bool = False) -> dict[str, Any] | None:
    sums = conjunction(result, negated)
    if sums is None:
        return None
    sides: dict[tuple[str, str], int] = {}
    for terms, number in map(by_names, sums):
        if not terms:
            if number < 0:
                return None  # keeps nothing
            continue
        side = _side(terms)
        if side is None:
            return None
        sides[side] = min(number, sides.get(side, number))
    if not sides:
        return {"identity": True}
    origins = {origin for origin, _ in sides}
    if len(origins) > 1:
        return None
    origin = origins.pop()
    left, right = sides.get((origin, "left")), sides.get((origin, "right"))
    shift = 0
    window = _window(left, right)
    if origin == "first" and right is not None and (left is None or window is None):
        shift = right  # causal where the lengths differ by this
        window = _window(None if left is None else left + right, 0)
    if window is None:
        return None
    condition = {"condition": shift} if origin == "first" else {}
    return {**window, **condition, "bounds": (origin, left, right)}


def _side(terms: tuple[tuple[str, int], ...]) -> tuple[str, str] | None:
    """(where the mask counts from, which side it bounds) of a sum of indices that must not be negative."""
    opposite = tuple((name, -factor) for name, factor in terms)
    for origin, diagonal in (("first", _FIRST), ("last", _LAST)):
        if terms == diagonal:
            return origin, "right"
        if opposite == diagonal:
            return origin, "left"
    return None


def _score(result: Node) -> dict[str, Any] | None:
    if result.op == "where":
        return _masked(result)
    node = _bare(result)
    if node.op == "score":
        return {"identity": True}
    return _softcap(node) or _alibi(node)


def _masked(result: Node) -> dict[str, Any] | None:
    """where(mask, score function, -inf)."""
    condition, yes, no = result.operands
    if no.value == -math.inf:
        mask, score = _mask(condition), _score(yes)
    elif yes.value == -math.inf:
        mask, score = _mask(condition, negated=True), _score(no)
    else:
        return None
    if mask is None or score is None or "bounds" in score:
        return None
    if "alibi" in score and mask.get("condition", 0) != 0:
        return None  # the two hold for different lengths
    both = {**score, **mask}
    if "identity" in both and ("identity" not in mask or "identity" not in score):
        del both["identity"]
    return both


def _bare(node: Node) -> Node:
    """Without additions of 0 and multiplications by 1."""
    if node.op in ("add", "sub") and node.operands[1].value == 0:
        return _bare(node.operands[0])
    if node.op in ("mul", "div") and node.operands[1].value == 1:
        return _bare(node.operands[0])
    if (node.op == "add" and node.operands[0].value == 0) or (node.op == "mul" and node.operands[0].value == 1):
        return _bare(node.operands[1])
    return node


def _factors(node: Node) -> tuple[float, Node]:
    """(number, rest) whose product an f32 expression is. More than one number is multiplied as in the function."""
    node = _bare(node)
    if node.op == "neg":
        number, rest = _factors(node.operands[0])
        return -number, rest
    if node.op == "mul":
        for factor, other in (node.operands, node.operands[::-1]):
            if factor.value is not None:
                number, rest = _factors(other)
                return number * factor.value, rest
    if node.op == "div" and node.operands[1].value:
        number, rest = _factors(node.operands[0])
        return number / node.operands[1].value, rest
    return 1.0, node


def _softcap(node: Node) -> dict[str, Any] | None:
    outer, tanh = _factors(node)
    if tanh.op != "tanh":
        return None
    inner, score = _factors(tanh.operands[0])
    if score.op != "score" or not math.isfinite(outer) or abs(outer * inner - 1) > _ROUNDING:
        return None
    return {"softcap": abs(outer)}


def _alibi(node: Node) -> dict[str, Any] | None:
    """score - slopes[h] * |q - kv|, or score + slopes[h] * (kv - q), which is the same for causal attention."""
    if node.op not in ("add", "sub"):
        return None
    for score, bias in (node.operands, node.operands[::-1])[: 2 if node.op == "add" else 1]:
        if _bare(score).op == "score":
            return _bias(bias, -1 if node.op == "sub" else 1)
    return None


def _bias(bias: Node, sign: int) -> dict[str, Any] | None:
    number, product = _factors(bias)
    if product.op != "mul":
        return None
    for slopes, distance in (product.operands, product.operands[::-1]):
        factor, load = _factors(slopes)
        if not _is_slopes(load):
            continue
        kind, weight = _distance(distance)
        total = sign * number * factor * weight
        if kind is None or total != -1:
            return None
        found: dict[str, Any] = {"alibi": load.attributes[0], "condition": 0}
        return found if kind == "abs" else {**found, "alibi_needs_causal": True}
    return None


def _is_slopes(load: Node) -> bool:
    places = tuple(index.op for index in load.operands)
    return load.op == "load" and load.attributes[1] == "f32" and places in (("h",), ("b", "h"))


def _distance(node: Node) -> tuple[str | None, float]:
    """("abs" or "signed", w) for w * |q - kv| or w * (q - kv) in f32; (None, 0) for others."""
    weight, node = _factors(node)
    kind = "signed"
    if node.op == "abs":
        kind, node = "abs", _bare(node.operands[0])
    if node.op == "to_f32" and node.operands[0].op == "abs":
        kind, node = "abs", node.operands[0].operands[0]
    elif node.op == "to_f32":
        node = node.operands[0]
    terms = linear(node)
    if terms is None:
        return None, 0.0
    named, number = {term.op: value for term, value in terms.items() if term is not None}, terms.get(None, 0)
    if number or set(named) != {"q_idx", "kv_idx"} or named["q_idx"] != -named["kv_idx"] or abs(named["q_idx"]) != 1:
        return None, 0.0
    return kind, weight if kind == "abs" else weight * named["q_idx"]
