"""A sample of the matrix of functions, layouts, masks and block lists on NumPy arrays, and what the matrix covers."""

from __future__ import annotations

import pytest
from flashspark._graph import RULES
from flex_matrix import CASES, LAYOUTS, PLAIN_MASKS, SMALL, Case, cases_of, compare, make, operations, run
from flex_matrix_functions import SCORES


def sample() -> list[Case]:
    """Two cases of each function, of other kernels: all layouts, masks and kinds of kernels are among them."""
    chosen = []
    for n, score in enumerate(SCORES):
        kernels = list(dict.fromkeys(case.kernel for case in cases_of(score)))
        for m in (0, 3):
            fitting = [case for case in cases_of(score) if case.kernel == kernels[(n + m) % len(kernels)]]
            chosen.append(fitting[(5 * n + m) % len(fitting)])
    return chosen


SAMPLE = sample()


@pytest.mark.parametrize("case", SAMPLE, ids=map(str, SAMPLE))
def test_sample(case):
    call = make(case, SMALL)
    for implementation in ("cpu-engine", "cpu-reference"):
        compare(call, *run(call, lambda x: x, implementation))


@pytest.mark.parametrize("case", SAMPLE[::6], ids=map(str, SAMPLE[::6]))
def test_a_small_mistake_is_found(case, monkeypatch):
    """Scores of odd keys that are a twentieth too large."""
    call, right = make(case, SMALL), SCORES[case.score]
    monkeypatch.setitem(SCORES, case.score, lambda t, s, b, h, q, k, n: right(t, s, b, h, q, k, n) + 0.05 * (k % 2))
    out, lse = run(call, lambda x: x)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="the error is"):
        compare(call, out, lse)


def test_what_the_sample_covers():
    for name, wanted in (("layout", LAYOUTS), ("mask", [*PLAIN_MASKS, "mask_mod"]), ("lists", [False, True])):
        assert {getattr(case, name) for case in SAMPLE} == set(wanted), name
    assert {case.kernel[1:] for case in SAMPLE} == {case.kernel[1:] for case in CASES}


def test_every_operation_is_in_the_matrix():
    inputs = {"score", "b", "h", "q_idx", "kv_idx", "seqlen_q", "seqlen_k", "offset_q", "offset_k"}
    loads = {f"load {x}" for x in ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")}
    wanted = {*RULES, *inputs, *loads, *(f"rank {n}" for n in range(4)), "where"}
    assert wanted - operations() == set()


def test_every_combination_is_in_the_matrix():
    combinations = {(case.layout, case.mask, case.lists) for case in CASES}
    wanted = {(layout, mask, lists) for layout in LAYOUTS for mask in (*PLAIN_MASKS, "mask_mod") for lists in (0, 1)}
    missing = wanted - combinations
    assert all(layout in ("flex", "fp8 paged") for layout, _, _ in missing), missing
    assert len({case.kernel for case in CASES}) <= 200 and len({case.score for case in CASES}) == 30
