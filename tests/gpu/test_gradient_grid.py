"""flash-attention's grids of gradients on the GPU.

FLASHSPARK_GRADIENT_POINTS: points of all grids together (200). FLASHSPARK_PART=n/count runs every count-th of them from
the n-th on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from problem import ON_CPU

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
from gradient_grid import check, sample  # noqa: E402

COUNT = int(os.environ.get("FLASHSPARK_GRADIENT_POINTS", "24" if ON_CPU else "200"))
PART, PARTS = map(int, os.environ.get("FLASHSPARK_PART", "0/1").split("/"))
POINTS = sample(COUNT, 1 << 15 if ON_CPU else 1 << 22)[PART::PARTS]


@pytest.mark.parametrize("point", POINTS, ids=[f"{p.grid}-{p.seed}" for p in POINTS])
def test_flash_attentions_rule(point, device):
    try:
        check(point, device)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{point}") from error
    if device.type == "cuda" and torch.cuda.memory_reserved() > 4 << 30:  # several processes share the GPU
        torch.cuda.empty_cache()
