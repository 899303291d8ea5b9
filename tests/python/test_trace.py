"""Tracing: functions run on NumPy arrays and through their graphs, captures, types, and remembered traces."""

from __future__ import annotations

import functools
import gc
import inspect
import types

import ml_dtypes
import numpy as np
import pytest
from flashspark._graph import evaluate
from flashspark._trace import Scalar, scalar, trace, traced

B, H, Q, K = 2, 3, 7, 9
rng = np.random.default_rng(0)
SLOPES = rng.standard_normal(H)
DOCS = rng.integers(0, 3, 16).astype(np.int32)
LONG = rng.integers(0, 5, (B, 16))
BIAS = rng.standard_normal((H, 16))
CUBE = rng.standard_normal((B, H, 16))
FLAGS = rng.integers(0, 2, 16).astype(bool)
LIMITS = np.array([3, 5], np.uint8)
LINE = np.arange(16.0)
NUMBER = 3
PAIR = (SLOPES, {"docs": DOCS, "list": [BIAS, 2.5]})


def grid():
    at = np.ix_(*(np.arange(n, dtype=np.int32) for n in (B, H, Q, K)))
    names = ("b", "h", "q_idx", "kv_idx")
    score = np.random.default_rng(1).standard_normal((B, H, Q, K))
    return score, dict(zip(names, at))


def both(function, kind="score", rtol=1e-6):
    """Runs a function on arrays and through its graph, and compares."""
    score, at = grid()
    found = trace(function, kind)
    with np.errstate(all="ignore"):
        want = function(*([score] if kind == "score" else []), *at.values())
    (got,) = evaluate([found.result], {"score": score, **at}, found.tensors, found.scalars)
    np.testing.assert_allclose(got + np.zeros_like(score), want + np.zeros_like(score), rtol=rtol, atol=1e-6)
    return found


FUNCTIONS = {
    "identity": lambda s, b, h, q, k: s,
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "softcap": lambda s, b, h, q, k: 20.0 * np.tanh(s / 20.0),
    "relative": lambda s, b, h, q, k: s - 0.125 * np.abs(q - k),
    "two indices": lambda s, b, h, q, k: s + BIAS[h, k] - BIAS[h, q],
    "three indices": lambda s, b, h, q, k: s * CUBE[b, h, q] + CUBE[1, h, k] + CUBE[b, -1, 2],
    "chained": lambda s, b, h, q, k: s + CUBE[1][2][5] + BIAS[2][k],
    "slices": lambda s, b, h, q, k: s + BIAS[:, 2:12:3][1, k % 4] + LINE[3:][k % 5] - LINE[::-1][q],
    "ellipsis": lambda s, b, h, q, k: s + CUBE[..., 3][b, h] + CUBE[1, ...][h, k],
    "documents": lambda s, b, h, q, k: np.where(DOCS[q] == DOCS[k], s, -np.inf),
    "long": lambda s, b, h, q, k: s + (LONG[b, k] + q) % 4,
    "flags": lambda s, b, h, q, k: np.where(FLAGS[k] | (q >= k), s, -1e4),
    "small integers": lambda s, b, h, q, k: s * (LIMITS[b].astype(np.int32) - q),
    "containers": lambda s, b, h, q, k: (
        s + PAIR[0][h] * PAIR[1]["docs"][k] + PAIR[1]["list"][0][h, q] * PAIR[1]["list"][1]
    ),
    "shape": lambda s, b, h, q, k: s / BIAS.shape[1] + len(LINE) * CUBE.ndim,
    "integer arithmetic": lambda s, b, h, q, k: s + (q * 3 - k + NUMBER) // 2 + (-k) % 4 - (+q),
    "division": lambda s, b, h, q, k: s + (q + 1) / (k + 2) + 7 / (q + 1) + 7 // (q + 1) + 7 % (k + 1),
    "float division": lambda s, b, h, q, k: s // 0.75 + s % 0.75,
    "powers": lambda s, b, h, q, k: s**2 + s**3 + (q**2) * 0.5 + 2.0**k + abs(s) ** 1.5 + k**3,
    "reflected": lambda s, b, h, q, k: 1 - s + 2 * q - (3 - k) + 1 / (2 + s * s),
    "bits": lambda s, b, h, q, k: s + ((q & 3) | (k ^ 5)) - (~q) + (q << 2) + (k >> 1) + (1 << (k & 3)),
    "comparisons": lambda s, b, h, q, k: np.where((q < k) & (q <= 5) | (k > 7) ^ (s >= 0.5), s, 0.0),
    "equality": lambda s, b, h, q, k: np.where((q == k) | (q + 1 != k) & ~(k == 3), s * 2, 1),
    "rounding": lambda s, b, h, q, k: np.floor(s) + np.ceil(s * 2) + np.trunc(s * 3) + np.round(s * 4) + np.rint(s),
    "functions": lambda s, b, h, q, k: (
        np.exp(s) + np.exp2(s) + np.expm1(s) + np.log(k + 1) + np.log2(q + 1.0) + np.log1p(q)
    ),
    "roots": lambda s, b, h, q, k: np.sqrt(k) + np.square(s) + np.reciprocal(k + 1.0) + np.hypot(s, 1.0),
    "trigonometry": lambda s, b, h, q, k: np.sin(s) + np.cos(s) + np.tan(s / 4) + np.arcsin(s / 8) + np.arccos(s / 8),
    "arctangents": lambda s, b, h, q, k: np.arctan(s) + np.arctan2(s, k + 1) + np.sinh(s / 2) + np.cosh(s / 2),
    "extremes": lambda s, b, h, q, k: np.minimum(s, 0.5) + np.maximum(q, k) + np.clip(s, -1, 1) + np.fmin(s, 0.25),
    "signs": lambda s, b, h, q, k: (
        np.sign(s) + np.sign(q - k) - np.negative(s) + np.absolute(q - k) + np.fmod(q - k, 3)
    ),
    "logic": lambda s, b, h, q, k: np.where(
        np.logical_and(q > 2, np.logical_not(k > 2)), s, np.logical_xor(q > 1, k > 1) * 1.0
    ),
    "nan": lambda s, b, h, q, k: np.where(np.isnan(s / s * 0) | np.isinf(s) | ~np.isfinite(s), 0.0, s) + np.isneginf(s),
    "like": lambda s, b, h, q, k: s + np.zeros_like(s) + np.ones_like(q) + np.full_like(s, 2.5),
    "types": lambda s, b, h, q, k: (s * 10).astype(np.int32) + q.astype(np.float64) / 2 + (q > 2).astype(np.int64),
    "big number": lambda s, b, h, q, k: np.where(q.astype(np.int64) * 2**33 >= 2**34, s, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    both(FUNCTIONS[name])


def test_every_node_kind_is_made():
    from flashspark._graph import RULES

    extra = [
        lambda s, b, h, q, k: (
            s.rsqrt() + s.sigmoid() + s.erf() + np.tanh(s).long() + (q > k).int() + (q & 7).to(np.int64)
        ),
        lambda s, b, h, q, k: s + s.to(bool) + np.arctan2(s, s) + s % s,
    ]
    texts = "".join(trace(f, "score").text for f in [*FUNCTIONS.values(), *extra])
    made = {line.split()[0] for line in texts.splitlines()}
    assert {*RULES, "where", "load", "const", "score", "b", "h", "q_idx", "kv_idx"} <= made


class Expression:
    """Random expressions as Python source. Their constants are exact in single precision."""

    def __init__(self, rng):
        self.rng = rng

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def number(self, depth):
        if depth == 0:
            return self.pick(
                "s",
                "s",
                "SLOPES[h]",
                f"BIAS[h, {self.index()}]",
                "LINE[q]",
                f"np.where(q < 99, {self.rng.integers(-16, 16) / 8}, 0.5)",
            )
        a, b = self.number(depth - 1), self.number(depth - 1)
        return self.pick(
            *(f"({a} {op} {b})" for op in ("+", "-", "*", "/", "//", "%")),
            *(
                f"np.{f}({a})"
                for f in ("tanh", "sin", "cos", "floor", "ceil", "rint", "trunc", "sign", "abs", "arctan")
            ),
            *(f"np.{f}({a}, {b})" for f in ("minimum", "maximum", "arctan2")),
            *(f"np.sqrt(np.abs({a}))", f"np.exp(-np.abs({a}))", f"({self.integer(depth - 1)} * {a})"),
            *(f"np.where({self.truth(depth - 1)}, {a}, {b})", f"(-{a})", f"({a} * {a})"),
        )

    def integer(self, depth):
        if depth == 0:
            return self.pick("q", "k", "b", "h", "DOCS[k]", "DOCS[q]", "LONG[b, k]")
        a, b = self.integer(depth - 1), self.integer(depth - 1)
        return self.pick(
            *(f"({a} {op} {b})" for op in ("+", "-", "*", "//", "%", "&", "|", "^")),
            *(f"np.minimum({a}, {b})", f"np.maximum({a}, {b})", f"np.abs({a})", f"(~{a})", f"({a} << ({b} & 7))"),
            *(f"({a} >> 2)", f"({a} + {self.rng.integers(-9, 9)})", f"np.where({self.truth(depth - 1)}, {a}, {b})"),
        )

    def index(self):
        return f"({self.integer(1)}) % 16"

    def truth(self, depth):
        if depth == 0:
            return self.pick("(q >= k)", "FLAGS[k]", "(h == 1)", "(DOCS[q] == DOCS[k])")
        a, b = self.pick(*[(f(depth - 1), f(depth - 1)) for f in (self.number, self.integer)])
        c, d = self.truth(depth - 1), self.truth(depth - 1)
        compared = [f"({a} {op} {b})" for op in ("<", "<=", ">", ">=", "==", "!=")]
        return self.pick(*compared, f"({c} & {d})", f"({c} | {d})", f"({c} ^ {d})", f"(~{c})")


@pytest.mark.parametrize("block", range(20))
def test_random_expressions(block):
    names = {name: globals()[name] for name in ("np", "SLOPES", "BIAS", "LINE", "DOCS", "LONG", "FLAGS")}
    score, at = grid()
    for i in range(50):
        source = Expression(np.random.default_rng((block, i))).number(3)
        function = eval(f"lambda s, b, h, q, k: {source}", dict(names))
        found = trace(function, "score")
        with np.errstate(all="ignore"):
            want = np.broadcast_to(np.asarray(function(score, *at.values()), np.float64), score.shape)
        (got,) = evaluate([found.result], {"score": score, **at}, found.tensors)
        np.testing.assert_allclose(np.broadcast_to(got, score.shape), want, rtol=1e-9, atol=1e-9, err_msg=source)


# Captures


def test_closures_defaults_partials_and_methods():
    def outer(bias, factor):
        def scaled(x):
            return x * factor

        def inner(s, b, h, q, k, extra=LINE):
            return scaled(s) + bias[h] + extra[k]

        return inner

    class Mod:
        def __init__(self):
            self.bias = SLOPES
            self.parts = [LINE]

        def __call__(self, s, b, h, q, k):
            return self.add(s, h) + self.parts[0][k]

        def add(self, s, h):
            return s + self.bias[h]

    def free(bias, s, b, h, q, k, *, line):
        return s + bias[h] + line[q]

    assert len(both(outer(SLOPES, 0.5)).tensors) == 2
    assert both(Mod()).tensors[0] is SLOPES
    assert both(functools.partial(free, SLOPES, line=LINE)).tensors[1] is LINE
    mod = Mod()
    found = trace(lambda s, b, h, q, k: mod.add(s, h), "score")
    assert found.tensors[0] is SLOPES


def test_numbers_of_tensors_follow_their_use():
    def f(s, b, h, q, k):
        LINE[q]  # not used
        return s + BIAS[h, q] + SLOPES[h] + BIAS[h, k]

    found = both(f)
    assert [x is y for x, y in zip(found.tensors, (BIAS, SLOPES))] == [True, True] and len(found.tensors) == 2


def test_captures_of_rank_0_are_loaded():
    cap = np.array(0.5)
    found = both(lambda s, b, h, q, k: s * cap)
    assert "load 0 f64 0\n" in found.text and found.tensors[0] is cap


def test_half_precision():
    half = SLOPES.astype(ml_dtypes.bfloat16)
    found = trace(lambda s, b, h, q, k: s + half[h], "score")
    assert "load 0 bf16 1 1" in found.text and found.result.operands[1].type == "f32"
    np.testing.assert_allclose(
        evaluate([found.result], {"score": 0.0, "h": np.arange(H)}, found.tensors)[0], half.astype(np.float64)
    )


def test_scalars():
    cap = scalar(2.0)
    found = trace(lambda s, b, h, q, k: s * cap, "score")
    assert "scalar 0 f32" in found.text and found.scalars == [2.0]
    cap.value = 3.0
    assert found.scalars == [3.0] and isinstance(cap, Scalar)
    assert "scalar 0 i32" in trace(lambda b, h, q, k: q - k < scalar_window, "mask").text


scalar_window = scalar(4)


def test_promotion():
    kinds = {
        "i32": [
            lambda q, s: q + 1,
            lambda q, s: q + True,
            lambda q, s: (q > 1) + (q > 2),
            lambda q, s: q**2,
            lambda q, s: -q,
        ],
        "i64": [
            lambda q, s: q + 2**40,
            lambda q, s: q + LONG[q, q],
            lambda q, s: q.long() + q,
            lambda q, s: LONG[q, q] * 2,
        ],
        "f32": [
            lambda q, s: q / 2,
            lambda q, s: q * 0.5,
            lambda q, s: s + q,
            lambda q, s: s * True,
            lambda q, s: np.exp(q),
        ],
        "bool": [lambda q, s: q > 1.5, lambda q, s: (q > 1) ^ True, lambda q, s: ~(s > q), lambda q, s: s.isnan()],
    }
    for kind, functions in kinds.items():
        for function in functions:
            result = trace(lambda s, b, h, q, k, function=function: function(q, s), "score").result
            found = result.operands[0].type if result.op == "to_f32" else result.type
            assert found == kind, inspect.getsource(function)


def test_constant_results():
    assert trace(lambda b, h, q, k: True, "mask").text.splitlines()[1] == "const bool 1"
    assert trace(lambda s, b, h, q, k: 0, "score").result.type == "f32"
    assert trace(lambda s, b, h, q, k: q, "score").result.op == "to_f32"


def test_a_library_that_does_not_know_symbols(monkeypatch):
    cupy = types.ModuleType("cupy")
    cupy.where, cupy.float32, cupy.tanh = np.where, np.float32, np.tanh
    both(lambda s, b, h, q, k: cupy.where(q >= k, s, cupy.float32(0)) + cupy.tanh(0.0))


# Remembered traces


def test_remembered():
    def make(bias):
        factor = 2.0

        def f(s, b, h, q, k):
            return s * factor + bias[h]

        def change(new):
            nonlocal factor
            factor = new

        return f, change

    f, change = make(SLOPES)
    first = traced(f, "score")
    assert traced(f, "score") is first
    change(3.0)
    second = traced(f, "score")
    assert second is not first and second.text != first.text
    global NUMBER  # noqa: PLW0603 - what a user may do
    g = FUNCTIONS["integer arithmetic"]
    before = traced(g, "score")
    NUMBER += 1
    try:
        assert traced(g, "score").text != before.text
    finally:
        NUMBER -= 1


def test_a_changed_list_or_attribute_is_seen():
    class Mod:
        window = 4

        def __call__(self, b, h, q, k):
            return q - k < self.window + limits[0]

    mod, limits = Mod(), [1]
    first = traced(mod, "mask")
    assert traced(mod, "mask") is first
    mod.window = 8
    second = traced(mod, "mask")
    limits[0] = 1000
    assert second.text != first.text and traced(mod, "mask").text != second.text


def test_an_entry_goes_with_its_function():
    from flashspark import _trace

    def f(b, h, q, k):
        return q >= k

    gc.collect()
    count = len(_trace._known)
    traced(f, "mask")
    assert len(_trace._known) == count + 1
    del f
    gc.collect()
    assert len(_trace._known) == count
