"""flash-attention's parameter grids on the GPU.

FLASHSPARK_GRID_CASES: samples of each kind and seed (60). FLASHSPARK_GRID_SEED: repeats the samples of another day.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import flashspark
import pytest
import torch
from problem import ON_CPU

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
from flash_attn_grid import KINDS, Call, compare, draw, make, today  # noqa: E402
from torch_arrays import back, moved  # noqa: E402

CASES = int(os.environ.get("FLASHSPARK_GRID_CASES", "8" if ON_CPU else "60"))
SIZES = [
    *((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (128, 128), (256, 512), (113, 203), (108, 256)),
    *((256, 113), (1024, 1024), (1023, 1024), (512, 256), (640, 128), (239, 1), (2, 3), (1, 3131), (799, 3)),
]
if ON_CPU:
    SIZES = [s for s in SIZES if s[0] * s[1] < 1 << 15]
DTYPES = ["float16", "bfloat16", "bfloat16", "float8_e4m3fn"]
SAMPLES = [(kind, seed, n) for kind in KINDS for seed in (0, today()) for n in range(CASES)]


def schedule(call: Call, arrays: dict[str, torch.Tensor], asked: dict) -> torch.Tensor:
    case = call.case
    return flashspark.get_scheduler_metadata(
        case.batch, case.longest[0], asked["longest"], *case.heads, case.dims[0],
        moved(asked["lengths"], arrays["q"].device), arrays["k_cache"].dtype, case.dims[1], arrays.get("cu_seqlens_q"),
        cache_leftpad=arrays.get("cache_leftpad"), cache_batch_idx=arrays.get("cache_batch_idx"), causal=case.causal,
        window_size=case.window, has_softcap=case.softcap > 0, num_splits=case.num_splits,
        attention_chunk=case.chunk, deterministic=case.deterministic,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "seed", "number"), SAMPLES, ids=[f"{k}-{s}-{n}" for k, s, n in SAMPLES])
def test_sample(kind, seed, number, device):
    case = draw(kind, number, seed, SIZES, DTYPES)
    try:
        call = make(case)
        arrays = {name: moved(x, device) for name, x in call.arrays.items()}
        options = dict(call.options)
        if "scheduler_metadata" in options:
            options["scheduler_metadata"] = schedule(call, arrays, options["scheduler_metadata"])
        out, lse = getattr(flashspark, call.function)(**arrays, **options)
        compare(call, back(out), back(lse), {name: back(arrays[name]) for name in call.caches})
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error
