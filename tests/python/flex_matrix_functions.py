"""Thirty score functions and five mask functions for the matrix of test_flex_matrix.py: each operation of a graph, and
each type and rank of captured tensors, at least once.

A function's arguments are the captured tensors `t`, those of a score_mod, and the lengths `n` (seqlen_q, seqlen_k,
offset_q, offset_k). It computes on NumPy arrays, which is the truth, and on the symbols of a trace.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np

MOST_HEADS, MOST_SEQUENCES, TOKENS = 8, 3, 2000
NAMES = (
    *("slopes", "table", "cube", "buckets", "factors", "bias", "levels", "scale"),
    *("documents", "offsets", "small", "short", "tiny", "flags", "prompts"),
)


def captured() -> dict[str, np.ndarray]:
    """What the functions read, by name; at most 16, which a call may give."""
    rng = np.random.default_rng(7)

    def normal(*shape, dtype=np.float32):
        return rng.standard_normal(shape).astype(dtype)

    def whole(low, high, *shape, dtype):
        return rng.integers(low, high, shape).astype(dtype)

    values = (
        *((rng.random(MOST_HEADS) * 0.02).astype(np.float32), normal(MOST_HEADS, TOKENS, dtype=ml_dtypes.bfloat16)),
        *(normal(MOST_SEQUENCES, MOST_HEADS, TOKENS, dtype=np.float16), normal(32, MOST_HEADS)),
        *(normal(MOST_SEQUENCES, 4, 2) * 0.25 + 1, normal(32, 48, dtype=np.float64), normal(TOKENS), np.float32(1.25)),
        np.sort(whole(0, 6, MOST_SEQUENCES, TOKENS, dtype=np.int32)),
        *(whole(-3, 4, TOKENS, dtype=np.int64), whole(0, 200, TOKENS, dtype=np.uint8)),
        *(whole(-90, 90, TOKENS, 2, dtype=np.int16), whole(-100, 100, MOST_HEADS, 16, dtype=np.int8)),
        *(rng.random(TOKENS) < 0.5, np.array([40, 7, 100], np.int32)),
    )
    return {name: np.asarray(value) for name, value in zip(NAMES, values)}


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x) if isinstance(x, np.ndarray) else x.erf()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x)) if isinstance(x, np.ndarray) else x.sigmoid()


def _rsqrt(x):
    return 1 / np.sqrt(x) if isinstance(x, np.ndarray) else x.rsqrt()


def alibi(t, s, b, h, q, k, n):
    return s + t.slopes[h] * (k - q)


def relative(t, s, b, h, q, k, n):
    return s - 0.01 * abs(q - k)


def softcap(t, s, b, h, q, k, n):
    return 15 * np.tanh(s / 15)


def by_key(t, s, b, h, q, k, n):
    return np.where(k % 3 == 0, s * t.scale, s + t.table[h, k])


def gated(t, s, b, h, q, k, n):
    return s + t.cube[b, h, k] * _sigmoid(s)


def waves(t, s, b, h, q, k, n):
    return s + np.sin(0.1 * (q - k)) * np.exp(-abs(s)) + np.sqrt(1.0 + k) * 0.01


def integers(t, s, b, h, q, k, n):
    return s + ((q // 7 + t.offsets[k]) % 5 - 2) * 0.25 + np.maximum(np.minimum(q - k, 9), -9) * 0.02


def minus_infinity(t, s, b, h, q, k, n):
    return np.where((q + k) % 5 == 2, -np.inf, s)


def bits(t, s, b, h, q, k, n):
    return s + ((q & 7) | ((k ^ 3) & 5)) * 0.05 - (~k & 3) * 0.1


def shifts(t, s, b, h, q, k, n):
    return s + ((k >> 2) % 4 + (1 << (q & 3))) * 0.05 - (-q % 3) * 0.02


def exponentials(t, s, b, h, q, k, n):
    return np.exp(s / 4) - np.expm1(s / 8) + np.exp2(-abs(s))


def logarithms(t, s, b, h, q, k, n):
    return np.log(s * s + 1) + np.log2(abs(s) + 0.5) / 2 - np.log1p(s * s) / 3


def circle(t, s, b, h, q, k, n):
    return np.sin(s) + np.cos(2 * s) + np.tan(s / 8)


def arcs(t, s, b, h, q, k, n):
    return np.arcsin(np.sin(s) / 2) + np.arccos(np.cos(s) / 2) - np.arctan(s) + np.arctan2(s, 1.5) * 2


def hyperbolic(t, s, b, h, q, k, n):
    return np.sinh(s / 3) + np.cosh(s / 4) - np.tanh(s)


def roots(t, s, b, h, q, k, n):
    return np.sign(s) * np.sqrt(abs(s)) + _rsqrt(s * s + 1) + np.sign(q - k) * 0.25


def powers(t, s, b, h, q, k, n):
    return s**2 / 8 - s**3 / 64 + np.power(abs(s) + 0.5, s / 8)


def error_function(t, s, b, h, q, k, n):
    return s * (0.5 + _erf(s * 0.7) / 2)


def clipped(t, s, b, h, q, k, n):
    return np.minimum(np.maximum(s, -1.5), 2.0) + np.minimum(s / 2, t.levels[k]) - np.maximum(-s, t.levels[q]) / 4


def rounded_positions(t, s, b, h, q, k, n):
    return s + (np.floor(k / 4) % 4 + np.ceil(q / 8) % 3 + np.rint(k / 2) % 5 + np.trunc(q / -4) % 3) * 0.1


def float_remainders(t, s, b, h, q, k, n):
    return s + (k * 0.75) % 1.25 + (k * -0.5) // 0.75 % 7 / 10 + (q * 0.5).astype(np.int32) % 4 * 0.05


def not_a_number(t, s, b, h, q, k, n):
    return np.where(np.isnan(np.log(s * 0 - 1)) & ~np.isinf(s), s * 1.25, 0)


def comparisons(t, s, b, h, q, k, n):
    near = (q == k) * 2.0 + (k != 3) * 0.1 - (q < k) * 0.25
    return s + near + (q >= k + 9) * 0.3 + (k <= 5) * 0.2 + (k > q + 20) * 0.1


def flagged(t, s, b, h, q, k, n):
    return np.where(t.flags[k] ^ (h % 2 == 0) | np.logical_and(k % 4, q % 3), s * 1.5, s / 1.5)


def small_integers(t, s, b, h, q, k, n):
    return s + t.small[k] / 100.0 - t.short[q, 1] / 64.0 + t.tiny[h, k % 16] * 0.01


def three_dimensions(t, s, b, h, q, k, n):
    return s * t.factors[b, h % 4, k % 2] + t.bias[q % 32, k % 48]


def lengths(t, s, b, h, q, k, n):
    return s * (b + 1) * 0.5 + (q + n.seqlen_k - n.seqlen_q - k) * 0.01


def packed_rows(t, s, b, h, q, k, n):
    return s + t.levels[k + n.offset_k] / 2 - t.levels[q + n.offset_q] * s / 4


def learned(t, s, b, h, q, k, n):
    """T5's buckets: near keys have one each."""
    distance = np.maximum(q - k, 0)
    far = 16 + (np.log(np.maximum(distance, 1) / 16 + 0.001) * 7.5).astype(np.int32)
    return s + t.buckets[np.where(distance < 16, distance, np.minimum(far, 31)), h]


def long(t, s, b, h, q, k, n):
    return functools.reduce(lambda x, i: np.sin(x) + t.slopes[h] * i / 10 + x / 2, range(9), s)


SCORES = {
    f.__name__: f
    for f in (
        *(alibi, relative, softcap, by_key, gated, waves, integers, minus_infinity, bits, shifts, exponentials),
        *(logarithms, circle, arcs, hyperbolic, roots, powers, error_function, clipped, rounded_positions),
        *(float_remainders, not_a_number, comparisons, flagged, small_integers, three_dimensions, lengths),
        *(packed_rows, learned, long),
    )
}


def documents(t, b, h, q, k, n):
    return (t.documents[b, q] == t.documents[b, k]) & (q + 40 >= k)


def strided(t, b, h, q, k, n):
    """Some rows of the later heads keep only what the first keys give them."""
    return ((q - k) % (h + 1) == 0) | (k < 4)


def prefix(t, b, h, q, k, n):
    return (k < t.prompts[b]) | (k <= q + n.seqlen_k - n.seqlen_q)


def odd_rows(t, b, h, q, k, n):
    return (q % 2 == 1) & (abs(q - k) < 150)


def kept_flags(t, b, h, q, k, n):
    return t.flags[k] | (k == q)


MASKS = (documents, strided, prefix, odd_rows, kept_flags)


def named(arrays):
    return SimpleNamespace(**dict(zip(NAMES, arrays)))
