"""Random training batches: masks, packed sequences, grouped heads, dropout and the rest of test_backward.py's cases.

FLASHSPARK_TRAINING_CASES: number of batches (100). FLASHSPARK_PART=n/count: every count-th of them from the n-th on. A
failure prints its seed and its Case; FLASHSPARK_TRAINING_SEED=n with one batch reproduces it.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
from problem import ON_CPU
from test_backward import Case, check, random_case

CASES = int(os.environ.get("FLASHSPARK_TRAINING_CASES", "12" if ON_CPU else "100"))
FIRST = int(os.environ.get("FLASHSPARK_TRAINING_SEED", "0"))
PART, PARTS = map(int, os.environ.get("FLASHSPARK_PART", "0/1").split("/"))
SEEDS = range(FIRST + PART, FIRST + CASES, PARTS)
CHUNKS = min(len(SEEDS), 10)


def draw(seed: int) -> Case:
    return random_case(random.Random(f"training {seed}"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_training_batches(chunk, device):
    for seed in SEEDS[chunk::CHUNKS]:
        case = draw(seed)
        try:
            check(case, seed, device)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{case}") from error


@pytest.mark.parametrize("seed", [477, 1185])
def test_sums_in_which_nearly_all_cancels(seed, device):
    """Gradients of ALiBi slopes of wide heads in fp16, for which 16 bits of a probability were not enough."""
    case = draw(seed)
    assert case.alibi and max(case.width) > 128 and case.dtype == torch.float16
    check(case, seed, device)


def test_what_the_batches_cover():
    found: Counter[str] = Counter()
    for case in map(draw, range(2000)):
        window = case.options.get("window_size", (-1, -1))
        used = {
            "causal": case.options.get("causal", False),
            "window": max(window) >= 0,
            "causal window": case.options.get("causal", False) and window[0] >= 0,
            "softcap": "softcap" in case.options,
            "softcap and dropout": "softcap" in case.options and case.p > 0,
            "dropout": case.p > 0,
            "dropout alone, d128": case.p > 0
            and 96 < max(case.width) <= 128
            and not (case.alibi or case.rel or case.prefix or case.rswa)
            and not {"softcap", "attention_chunk"} & set(case.options),
            "sinks": case.sinks,
            "gradient of lse": case.dlse,
            "varlen": case.varlen,
            "dense batch": not case.varlen and len(case.lengths) > 1,
            "varlen, grouped heads, dropout": case.varlen and case.heads[0] > case.heads[1] and case.p > 0,
            "head sizes": case.width[0] != case.width[1],
            "more rows than keys": any(rows > keys for rows, keys in case.lengths),
        }
        found += Counter(name for name, value in used.items() if value)
        found[f"group of {case.heads[0] // case.heads[1]}"] += 1
        found[str(case.dtype)] += 1
    assert len([name for name in found if name.startswith("group of ")]) >= 4
    assert {"torch.float16", "torch.bfloat16"} <= set(found)
    assert len(found) >= 13 + 4 + 2 and min(found.values()) >= 20, found
