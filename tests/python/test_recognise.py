"""Functions that mean what a built-in parameter means, and near misses."""

from __future__ import annotations

import inspect

import flashspark
import numpy as np
import pytest
from flashspark._recognise import built_in, recognise
from flashspark._trace import trace
from flex_reference import check, kept_by

DOCS = np.array([0, 0, 1, 1, 2, 2, 2, 3], np.int32)
SLOPES = np.array([0.5, 0.25, 0.125])
W = 1024
CAUSAL = [
    lambda b, h, q, k: q >= k,
    lambda b, h, q, k: k <= q,
    lambda b, h, q, k: q - k >= 0,
    lambda b, h, q, k: ~(q < k),
    lambda b, h, q, k: k < q + 1,
    lambda b, h, q, k: np.logical_not(k - q > 0),
    lambda b, h, q, k: 2 * q + 1 > 2 * k,
    lambda b, h, q, k: (q >= k) & (q + 5 >= k),
    lambda b, h, q, k: ~((q < k) | (q < k - 3)),
    lambda b, h, q, k: np.where(q >= k, True, False),
    lambda b, h, q, k: q.astype(np.int64) >= k.astype(np.int64),
]
SLIDING = [
    lambda b, h, q, k: (q >= k) & (q - k < W),
    lambda b, h, q, k: (q >= k) & (q - k <= W - 1),
    lambda b, h, q, k: (k <= q) & (k > q - W),
    lambda b, h, q, k: np.logical_and(q - k < W, q - k >= 0),
    lambda b, h, q, k: (k >= np.maximum(q - (W - 1), q - 2 * W)) & (q >= k),
]


@pytest.mark.parametrize("function", CAUSAL)
def test_causal(function):
    found = recognise(trace(function, "mask"))
    assert found == {"causal": True, "condition": 0, "bounds": ("first", None, 0)}
    assert built_in(found, 5, 5) == {"causal": True}
    assert built_in(found, 9, 5) == {"window_right": 4} and built_in(found, 5, 9) is None


@pytest.mark.parametrize("function", SLIDING)
def test_sliding(function):
    found = recognise(trace(function, "mask"))
    assert found["causal"] is True and found["window_left"] == W - 1 and found["condition"] == 0


def test_offset_by_lengths():
    def causal(b, h, q, k, info, aux):
        return k <= q + info.seqlen_k - info.seqlen_q

    def window(b, h, q, k, info, aux):
        center = q + (info.seqlen_k - info.seqlen_q)
        return (k >= center - 7) & (k <= center + 3)

    found = recognise(trace(causal, "mask", "fa4"))
    assert found == {"causal": True, "bounds": ("last", None, 0)} and built_in(found, 3, 9) == {"causal": True}
    found = recognise(trace(window, "mask", "fa4"))
    assert built_in(found, 4, 100) == {"window_left": 7, "window_right": 3} and "condition" not in found


def test_two_sided_and_constant_offset():
    found = recognise(trace(lambda b, h, q, k: abs(q - k) <= 16, "mask"))
    assert found["window_left"] == found["window_right"] == 16 and "causal" not in found
    assert built_in(found, 8, 10) == {"window_left": 18, "window_right": 14}
    found = recognise(trace(lambda b, h, q, k: k <= q + 6, "mask"))
    assert found["causal"] is True and found["condition"] == 6
    assert built_in(found, 4, 10) == {"causal": True} and built_in(found, 4, 4) == {"window_right": 6}
    assert recognise(trace(lambda b, h, q, k: True, "mask")) == {"identity": True}
    assert recognise(trace(lambda b, h, q, k: q - k >= -(k - q), "mask")) == {"identity": True}


MASKED = [
    lambda s, b, h, q, k: np.where(q >= k, s, -np.inf),
    lambda s, b, h, q, k: np.where(q < k, float("-inf"), s),
]
SOFTCAP = [
    lambda s, b, h, q, k: 30.0 * np.tanh(s / 30.0),
    lambda s, b, h, q, k: np.tanh(s * (1 / 30)) * 30,
    lambda s, b, h, q, k: np.tanh(s / 30) / (1 / 30),
    lambda s, b, h, q, k: -30 * np.tanh(-(s / 30)),
    lambda s, b, h, q, k: np.tanh((s * 1.0 + 0.0) / 30) * 30,
]
SINGLE = SLOPES.astype(np.float32)
SIGNED = [
    lambda s, b, h, q, k: s + SINGLE[h] * (k - q),
    lambda s, b, h, q, k: s - SINGLE[h] * (q - k),
    lambda s, b, h, q, k: SINGLE[h] * (-(q - k)) + s,
    lambda s, b, h, q, k: s + (k - q) * SINGLE[h],
]
ABSOLUTE = [
    lambda s, b, h, q, k: s - SINGLE[h] * np.abs(q - k),
    lambda s, b, h, q, k: s + -SINGLE[h] * abs(k - q),
    lambda s, b, h, q, k: s - SINGLE[h] * abs((k - q) * 1.0),
]


def test_scores():
    assert recognise(trace(lambda s, b, h, q, k: s, "score")) == {"identity": True}
    assert recognise(trace(lambda s, b, h, q, k: s * 1.0 + 0, "score")) == {"identity": True}
    for f in SOFTCAP:
        found = recognise(trace(f, "score"))
        assert list(found) == ["softcap"] and found["softcap"] == pytest.approx(30, rel=1e-6)
    for f in SIGNED:
        assert recognise(trace(f, "score")) == {"alibi": 0, "condition": 0, "alibi_needs_causal": True}
    for f in ABSOLUTE:
        assert recognise(trace(f, "score")) == {"alibi": 0, "condition": 0}
    for f in MASKED:
        assert recognise(trace(f, "score")) == {"causal": True, "condition": 0, "bounds": ("first", None, 0)}
    both = recognise(trace(lambda s, b, h, q, k: np.where(q >= k, 5 * np.tanh(s / 5), -np.inf), "score"))
    assert both["softcap"] == 5 and both["causal"]


NOT_MASKS = [
    lambda b, h, q, k: q > k,
    lambda b, h, q, k: q >= k + 1,
    lambda b, h, q, k: k >= q,
    lambda b, h, q, k: (q >= k) | (k < 5),
    lambda b, h, q, k: (q >= k) & (k != 3),
    lambda b, h, q, k: q * 1.0 >= k,
    lambda b, h, q, k: abs(q - k) >= 4,
    lambda b, h, q, k: q + k >= 0,
    lambda b, h, q, k: (q >= k) & (h < 2),
    lambda b, h, q, k: q // 2 >= k // 2,
    lambda b, h, q, k: q * 2**20 >= k * 2**20,
    lambda b, h, q, k: q >= DOCS[k],
    lambda b, h, q, k: False,
    lambda b, h, q, k: 2 * q >= k,
    lambda b, h, q, k: (q >= k) ^ (q >= k + 1),
]
NOT_SCORES = [
    lambda s, b, h, q, k: 30 * np.tanh(s / 31),
    lambda s, b, h, q, k: np.tanh(s) * 2,
    lambda s, b, h, q, k: 30 * np.tanh(s / 30) + 1,
    lambda s, b, h, q, k: 30 * np.tanh(s / -30),
    lambda s, b, h, q, k: s * 2,
    lambda s, b, h, q, k: -s,
    lambda s, b, h, q, k: s + SINGLE[h] * abs(q - k),
    lambda s, b, h, q, k: s + SINGLE[h] * (q - k),
    lambda s, b, h, q, k: s + 2 * SINGLE[h] * (k - q),
    lambda s, b, h, q, k: s + SINGLE[h] * (k - q + 1),
    lambda s, b, h, q, k: s + SINGLE[b] * (k - q),
    lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    lambda s, b, h, q, k: SINGLE[h] * (k - q) - s,
    lambda s, b, h, q, k: np.where(q >= k, s, -1e30),
    lambda s, b, h, q, k: np.where(q >= k, s, np.inf),
    lambda s, b, h, q, k: np.where(q > k, s, -np.inf),
]


def test_near_misses():
    for f in NOT_MASKS:
        found = recognise(trace(f, "mask"))
        if found is not None:  # right where the lengths differ by the condition, and only there
            assert built_in(found, 6, 6) is None or not found.get("causal"), inspect.getsource(f)
    for f in NOT_SCORES:
        found = recognise(trace(f, "score"))
        assert found is None or built_in(found, 6, 6) is None, inspect.getsource(f)


@pytest.mark.parametrize("lengths", [(6, 6), (5, 8), (8, 5)])
def test_recognised_masks_are_right(lengths):
    """Whatever is recognised, compared key by key."""
    shift = lengths[1] - lengths[0]
    q, k = np.ix_(np.arange(lengths[0], dtype=np.int32), np.arange(lengths[1], dtype=np.int32))
    extra = [
        lambda b, h, q, k: k <= q + 3,
        lambda b, h, q, k: (k <= q + 3) & (k >= q - 1),
        lambda b, h, q, k: k >= q - 2,
    ]
    tried = 0
    for f in [*CAUSAL, *SLIDING, *NOT_MASKS, *extra]:
        found = recognise(trace(f, "mask"))
        served = found and built_in(found, *lengths)
        if not served:
            continue
        tried += 1
        right = 0 if served.get("causal") else served.get("window_right", 100)
        kept = (k <= q + shift + right) & (k >= q + shift - served.get("window_left", 10000))
        np.testing.assert_array_equal(kept, np.broadcast_to(f(0, 0, q, k), kept.shape), inspect.getsource(f))
    assert tried >= 3


def test_large_functions_are_not_walked_for_ever():
    def doubled(s, b, h, q, k):
        for _ in range(60):
            q = q + q
        return s + q

    def many(b, h, q, k):
        kept = q >= k
        for i in range(1000):
            kept = kept | (q == i)
        return kept

    assert recognise(trace(doubled, "score")) is None and recognise(trace(many, "mask")) is None


S, WINDOW, CHUNK = 48, 9, 16
PROMPT, LENGTHS = np.array([10, 21], np.int32), np.array([5, 0], np.int32)
TABLE = np.linspace(-1, 1, 2 * S * 3).reshape(3, -1).astype(np.float32)
# docs/flex.md has the same list: what the package has built in, written as a function -> (score function, mask
# function, what explain says that the call requires of an implementation).
BUILT_IN = {
    "causal": (None, lambda b, h, q, k: q >= k, {"causal"}),
    "window": (None, lambda b, h, q, k: abs(q - k) <= WINDOW, {"window"}),
    "causal window": (None, lambda b, h, q, k: (q >= k) & (q - k < WINDOW), {"causal", "window"}),
    "causal, as a score function": (lambda s, b, h, q, k: np.where(q >= k, s, -np.inf), None, {"causal"}),
    "no mask": (None, lambda b, h, q, k: True, set()),
    "soft-capping": (lambda s, b, h, q, k: 20 * np.tanh(s / 20), None, {"softcap"}),
    "ALiBi": (lambda s, b, h, q, k: s - SINGLE[h] * abs(q - k), None, {"alibi"}),
    "causal ALiBi": (lambda s, b, h, q, k: s + SINGLE[h] * (k - q), lambda b, h, q, k: q >= k, {"alibi", "causal"}),
    "all of them": (
        lambda s, b, h, q, k: np.where(q >= k, 5 * np.tanh(s / 5), -np.inf),
        lambda b, h, q, k: q - k < WINDOW,
        {"softcap", "causal", "window"},
    ),
}
COMPILED = {
    "PrefixLM": (None, lambda b, h, q, k: (k < PROMPT[b]) | (q >= k), {"mask_mod", "block lists"}),
    "R-SWA": (
        None,
        lambda b, h, q, k: (q >= k) & ((k < LENGTHS[b]) | (q - k < WINDOW)),
        {"mask_mod", "block lists"},
    ),
    "chunks": (None, lambda b, h, q, k: (q >= k) & (q // CHUNK == k // CHUNK), {"mask_mod", "block lists"}),
    "sink tokens": (None, lambda b, h, q, k: (q >= k) & ((q - k < WINDOW) | (k < 4)), {"mask_mod", "block lists"}),
    "relative bias": (lambda s, b, h, q, k: s + TABLE[h, q - k + S], None, {"score_mod"}),
    "ALiBi of half its slopes": (lambda s, b, h, q, k: s - SINGLE[h] / 2 * abs(q - k), None, {"score_mod"}),
    "soft-capping with a captured number": (
        lambda s, b, h, q, k: SINGLE[0] * np.tanh(s / SINGLE[0]),
        None,
        {"score_mod"},
    ),
}


@pytest.mark.parametrize("name", [*BUILT_IN, *COMPILED])
def test_what_explain_says(normal, name):
    """Built-in ones are served without a function; others are the user's own, which a GPU compiles."""
    score, mask, wanted = (BUILT_IN | COMPILED)[name]
    tensors = [normal(2, 3, S, 16) for _ in range(3)]
    blocks = mask and flashspark.create_block_mask(mask, 2, None, S, S, "numpy", 16)
    text = flashspark.flex_explain(*tensors, score_mod=score, block_mask=blocks)
    line = next(line for line in text.splitlines() if line.startswith("required: "))
    assert {x.strip() for x in line.removeprefix("required: ").split(",")} - {"float32"} == wanted
    out, lse = flashspark.flex_attention(*tensors, score, blocks, return_lse=True)
    check(out, *tensors, score, kept_by(mask, 2, 3, S, S), lse=lse)
