"""flash-attention's parameter grids on the CPU: fixed samples, and new ones every day.

FLASHSPARK_GRID_SEED=n repeats the samples of another day (they are named seed-number). FLASHSPARK_GRID_CASES: samples
of each kind and seed.
"""

from __future__ import annotations

import os

import flashspark
import pytest
from flash_attn_grid import HEAD_DIMS, KINDS, PAGE_SIZES, Call, compare, draw, make, today

CASES = int(os.environ.get("FLASHSPARK_GRID_CASES", "36"))
SIZES = [(1, 128), (1, 239), (3, 270), (16, 300), (64, 128), (128, 128), (113, 203), (108, 256), (256, 113), (17, 16)]
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn"]
SAMPLES = [(kind, seed, n) for kind in KINDS for seed in (0, today()) for n in range(CASES)]


def run(call: Call) -> None:
    arrays, options = dict(call.arrays), dict(call.options)
    if "scheduler_metadata" in options:
        options["scheduler_metadata"] = schedule(call, options["scheduler_metadata"])
    out, lse = getattr(flashspark, call.function)(**arrays, **options)
    compare(call, out, lse, arrays)


def schedule(call: Call, asked: dict) -> object:
    case = call.case
    return flashspark.get_scheduler_metadata(
        case.batch, case.longest[0], asked["longest"], *case.heads, case.dims[0], asked["lengths"],
        headdim_v=case.dims[1], cu_seqlens_q=call.arrays.get("cu_seqlens_q"), causal=case.causal,
        window_size=case.window, num_splits=case.num_splits, attention_chunk=case.chunk,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "seed", "number"), SAMPLES, ids=[f"{k}-{s}-{n}" for k, s, n in SAMPLES])
def test_sample(kind, seed, number):
    case = draw(kind, number, seed, SIZES, DTYPES)
    try:
        run(make(case))
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error


def test_what_the_samples_cover():
    cases = [draw(kind, n, 0, SIZES, DTYPES) for kind in KINDS for n in range(CASES)]
    assert {c.dims[0] for c in cases} >= set(HEAD_DIMS)
    assert {c.page_size for c in cases} >= set(PAGE_SIZES)
    for name in ("leftpad", "batch_idx", "varlen_q", "metadata", "rotary_seqlens", "interleaved", "unused", "chunk"):
        assert sum(bool(getattr(c, name)) for c in cases) >= 4, name
    assert {c.rotary for c in cases} == {0.0, 0.5, 1.0}
    assert any(c.new not in (0, c.longest[0]) for c in cases)
