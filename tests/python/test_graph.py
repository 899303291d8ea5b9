"""Graphs of score functions: their text, the interpreter, and derivatives against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flashspark._derivative import derivative
from flashspark._graph import LIMIT, RULES, Builder, evaluate, to_text
from flashspark._trace import trace

SLOPES = np.array([0.5, -0.25, 0.125, 1.0], np.float64)
BIAS = np.linspace(-1, 1, 4 * 6).reshape(4, 6)
DOCUMENTS = np.array([0, 0, 1, 1, 2, 2], np.int32)


def test_text():
    build = Builder()
    score, h, q, kv = map(build.input, ("score", "h", "q_idx", "kv_idx"))
    bias = build("mul", build.load(0, "f32", [h]), build.convert("f32", build("sub", kv, q)))
    lines = to_text([build("add", score, bias)]).splitlines()
    assert lines[0] == "flashspark-graph 1" and lines[-1] == "return 8"
    assert lines[1:-1] == [
        "score",
        "h",
        "load 0 f32 1 1",
        "kv_idx",
        "q_idx",
        "sub 3 4",
        "to_f32 5",
        "mul 2 6",
        "add 0 7",
    ]


def test_constants():
    build = Builder()
    texts = [to_text([build.const("f32", x)]).splitlines()[1] for x in (1.5, math.inf, -math.inf, math.nan, 1e300)]
    assert [x.split()[2] for x in texts] == ["0x1.8000000000000p+0", "inf", "-inf", "nan", "inf"]
    assert build.const("f32", 0.1).value == np.float32(0.1) and build.const("f32", -0.0) is not build.const("f32", 0.0)
    assert build.const("i64", 2**40).attributes == (str(2**40),) and build.const("bool", 1).value is True
    with pytest.raises(OverflowError):
        build.const("i32", 2**31)


def test_nodes_are_shared_and_immutable():
    build = Builder()
    assert build("add", *[build.input("b")] * 2) is build("add", *[build.input("b")] * 2)
    with pytest.raises(AttributeError):
        build.input("b").op = "h"
    assert Builder([build.input("b")]).input("b") is build.input("b")


@pytest.mark.parametrize("op", ["exp", "and", "shl"])
def test_type_rules(op):
    build = Builder()
    wrong = build.input("q_idx") if op == "exp" else build.input("score")
    with pytest.raises(TypeError, match=op):
        build(op, *[wrong] * RULES[op][0])
    with pytest.raises(TypeError):
        build("add", build.input("q_idx"), build.input("score"))


def test_too_large():
    build = Builder()
    node = build.input("score")
    for i in range(LIMIT):
        node = build("add", node, build.const("f32", i))
    with pytest.raises(ValueError, match="must be at most 4096"):
        to_text([node])


def run(op, *values, type="f32"):
    build = Builder()
    (result,) = evaluate([build(op, *(build.const(type, x) for x in values))], {})
    return result[()]


@pytest.mark.parametrize(
    ("op", "values", "type", "want"),
    [
        *[("floordiv", (7, 0), "i32", 0), ("mod", (7, 0), "i32", 0), ("floordiv", (-7, 2), "i64", -4)],
        *[("mod", (-7, 2), "i32", 1), ("mod", (-7.5, 2.0), "f32", 0.5), ("floordiv", (-7.5, 2.0), "f32", -4.0)],
        *[("shl", (1, 33), "i32", 2), ("shl", (1, 33), "i64", 2**33), ("shr", (-8, 1), "i32", -4)],
        *[("add", (2**31 - 1, 1), "i32", -(2**31)), ("mul", (2**62, 2), "i64", -(2**63))],
        *[("round", (2.5,), "f32", 2.0), ("round", (-1.5,), "f32", -2.0), ("trunc", (-1.5,), "f32", -1.0)],
        *[("to_i32", (1e10,), "f32", 2**31 - 1), ("to_i32", (-1e10,), "f32", -(2**31)), ("to_i32", (-1.9,), "f32", -1)],
        *[("to_i64", (1e30,), "f32", 2**63 - 1), ("to_i32", (math.nan,), "f32", 0), ("to_bool", (math.nan,), "f32", 1)],
        *[("to_i32", (2**32 + 5,), "i64", 5), ("to_f32", (1,), "bool", 1.0), ("not", (5,), "i32", -6)],
        *[("sign", (-3,), "i32", -1), ("rsqrt", (4.0,), "f32", 0.5), ("lt", (math.nan, 1.0), "f32", False)],
        *[
            ("ne", (math.nan, 1.0), "f32", True),
            ("sigmoid", (-800.0,), "f32", 0.0),
            ("isinf", (-math.inf,), "f32", True),
        ],
    ],
)
def test_meaning(op, values, type, want):
    assert run(op, *values, type=type) == want


def test_nan():
    assert all(math.isnan(run(op, *values)) for op in ("min", "max") for values in ((math.nan, 1.0), (1.0, math.nan)))
    assert math.isnan(run("sign", math.nan))


def test_loads_near_the_edges():
    build = Builder()
    index = build.input("q_idx")
    node = build.load(0, "f32", [index])
    (values,) = evaluate([node], {"q_idx": np.array([-6, -5, -1, 0, 3, 4, 99])}, [np.arange(5.0)])
    assert values.tolist() == [0, 0, 4, 0, 3, 4, 4]
    with pytest.raises(IndexError, match="no elements"):
        evaluate([node], {"q_idx": 0}, [np.zeros(0)])


SMOOTH = {
    "softcap": lambda s, b, h, q, k: 3.0 * np.tanh(s / 3.0),
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "products": lambda s, b, h, q, k: s * SLOPES[h] * BIAS[h, k] + s * s * BIAS[h, q],
    "quotient": lambda s, b, h, q, k: SLOPES[h] / (s * s + 1.5) - s / (BIAS[h, k] + 3.0),
    "exponentials": lambda s, b, h, q, k: np.exp(s * 0.5) + np.exp2(SLOPES[h]) + np.expm1(s * BIAS[h, k]),
    "logarithms": lambda s, b, h, q, k: np.log(s * s + 1) + np.log2(s * s + 2) + np.log1p(s * s),
    "roots": lambda s, b, h, q, k: np.sqrt(s * s + 1) + (s * s + 2).rsqrt() + np.reciprocal(s * s + 2),
    "circle": lambda s, b, h, q, k: np.sin(s) * np.cos(SLOPES[h]) + np.tan(s * 0.25),
    "arcs": lambda s, b, h, q, k: (
        np.arcsin(s * 0.125) + np.arccos(s * 0.0625) + np.arctan(s) + np.arctan2(s, SLOPES[h])
    ),
    "hyperbolic": lambda s, b, h, q, k: np.sinh(s * 0.5) - np.cosh(s * 0.25),
    "sigmoid": lambda s, b, h, q, k: s.sigmoid() + s.erf() * BIAS[h, k] - s.gelu() + s.silu(),
    "power": lambda s, b, h, q, k: (s * s + 1.0) ** SLOPES[h] + (s * s + 1.0) ** 2.5,
    "pieces": lambda s, b, h, q, k: np.minimum(s, SLOPES[h]) + np.maximum(s, BIAS[h, k]) - abs(s) * 2,
    "steps": lambda s, b, h, q, k: s + np.floor(s) + np.ceil(s) + np.round(s) + np.trunc(s) + np.sign(s),
    "modulus": lambda s, b, h, q, k: s % 0.75 + s % (SLOPES[h] * SLOPES[h] + 0.3),
    "where": lambda s, b, h, q, k: np.where(DOCUMENTS[q] == DOCUMENTS[k], s * SLOPES[h], -s + BIAS[h, q]),
    "integers": lambda s, b, h, q, k: s * (q % 3) + DOCUMENTS[k],
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative(name, rng):
    found = trace(SMOOTH[name], "score")
    result = derivative(found.result)
    tensors = [np.array(x, np.float64) if x.dtype.kind == "f" else x for x in found.tensors]
    for _ in range(5):
        point = {"b": 0, "h": rng.integers(4), "q_idx": rng.integers(6), "kv_idx": rng.integers(6)}
        point["score"] = rng.uniform(-2, 2)
        values = evaluate(result.results, point, tensors)
        assert values[0] == pytest.approx(slope(found.result, point, tensors, None), rel=1e-5, abs=1e-6)
        total = {}
        for load, value in zip(result.loads, values[1:]):
            place = tuple(int(x) for x in evaluate(load.operands, point, tensors))
            key = (load.attributes[0], place)
            total[key] = total.get(key, 0) + value
        for key, value in total.items():
            assert value == pytest.approx(slope(found.result, point, tensors, key), rel=1e-5, abs=1e-6)


def slope(result, point, tensors, key, step=1e-6):
    """The difference quotient with respect to the score, or to element key[1] of tensor key[0]."""
    ends = []
    for sign in (1, -1):
        moved, at = [x.copy() for x in tensors], dict(point)
        if key is None:
            at["score"] += sign * step
        else:
            moved[key[0]][key[1]] += sign * step
        ends.append(evaluate([result], at, moved)[0])
    return (ends[0] - ends[1]) / (2 * step)


def test_derivative_of_equal_operands():
    found = trace(lambda s, b, h, q, k: np.minimum(s, 1.0) + np.maximum(s, 1.0) * 2, "score")
    assert evaluate(derivative(found.result).results, {"score": 1.0})[0] == 1.5


def test_derivative_of_a_mask_is_refused():
    with pytest.raises(TypeError, match="must be f32"):
        derivative(trace(lambda b, h, q, k: q >= k, "mask").result)
