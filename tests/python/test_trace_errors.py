"""What cannot be traced, and that the error names the line and the rewrite."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from flashspark._trace import TraceError, trace

SLOPES, LINE, BIAS = np.ones(3), np.arange(16.0), np.ones((3, 16))
NUMBER = 3


def bad_if(s, b, h, q, k):
    if q >= k:  # here
        return s
    return 0.0


def bad_and(s, b, h, q, k):
    return np.where(q > k and h > 2, s, 0)  # here


def bad_min(s, b, h, q, k):
    return min(s, 1.0)  # here


def bad_chain(s, b, h, q, k):
    return np.where(0 < q < k, s, 0)  # here


def bad_int(s, b, h, q, k):
    return s + int(q)  # here


def bad_math(s, b, h, q, k):
    return math.exp(s)  # here


def bad_item(s, b, h, q, k):
    return s * SLOPES[h].item()  # here


def bad_loop(s, b, h, q, k):
    for x in q:  # here
        s = s + x
    return s


def bad_ufunc(s, b, h, q, k):
    return np.nextafter(s, 1.0)  # here


def bad_function(s, b, h, q, k):
    return np.cumsum(s)  # here


def bad_attribute(s, b, h, q, k):
    return s.softmax()  # here


def bad_partial_index(s, b, h, q, k):
    return s + BIAS[h]  # here


def bad_whole(s, b, h, q, k):
    return s + SLOPES  # here


def bad_store(s, b, h, q, k):
    LINE[q] = s  # here
    return s


def bad_in_place(s, b, h, q, k):
    return s.add_(1)  # here


def bad_float_index(s, b, h, q, k):
    return s + LINE[s]  # here


def bad_indices(s, b, h, q, k):
    return s + SLOPES[h, q]  # here


def bad_constant_index(s, b, h, q, k):
    return s + SLOPES[17]  # here


def bad_bits(s, b, h, q, k):
    return s & 1  # here


def bad_division(s, b, h, q, k):
    return s + 1 / (NUMBER - 3)  # here


def bad_local_array(s, b, h, q, k):
    return s + np.arange(16.0)[q]  # here


def bad_helper(s, b, h, q, k):
    return bad_if(s, b, h, q, k)


BAD = {
    bad_if: r"torch\.where",
    bad_and: r"\(a\) & \(b\)",
    bad_min: r"torch\.minimum",
    bad_chain: r"\(a < b\) & \(b < c\)",
    bad_int: r"int\(\)",
    bad_math: r"torch\.exp",
    bad_item: r"\.item\(\)",
    bad_loop: "iteration",
    bad_ufunc: r"np\.nextafter",
    bad_function: r"np\.cumsum",
    bad_attribute: r"\.softmax",
    bad_partial_index: r"shape \(3, 16\) with 1 dimensions left",
    bad_whole: r"shape \(3,\)",
    bad_store: "side effects",
    bad_in_place: r"x = x\.add\(",
    bad_float_index: "index of type f32",
    bad_indices: "2 indices",
    bad_constant_index: "index 17",
    bad_bits: "bitwise",
    bad_division: "ZeroDivisionError",
    bad_local_array: "outside of the function",
    bad_helper: r"torch\.where",
}


@pytest.mark.parametrize("function", BAD, ids=lambda f: f.__name__)
def test_errors(function):
    with pytest.raises(TraceError, match=BAD[function]) as error:
        trace(function, "score")
    marked = bad_if if function is bad_helper else function
    lines, first = inspect.getsourcelines(marked)
    line = first + next(i for i, text in enumerate(lines) if "# here" in text)
    assert error.value.lineno == line and f"{__file__}:{line}: " in str(error.value)
    assert lines[line - first].strip() in str(error.value)


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda b, h, q, k: q - k, "mask", "mask function returns i32: must return one bool"),
        (lambda s, b, h, q, k: None, "score", "returns NoneType: must return one number"),
        (lambda s, b, h, q, k: (s, s), "score", "returns tuple"),
        (lambda s, b, h, q, k: "x", "score", "returns str"),
        (lambda s, b, h: s, "score", "TypeError.*positional"),
    ],
)
def test_wrong_results(function, kind, words):
    with pytest.raises(TraceError, match=words):
        trace(function, kind)
    with pytest.raises(TypeError, match="must be callable"):
        trace(3, kind)


def test_errors_are_type_errors():
    assert issubclass(TraceError, TypeError)
