"""5,000 random functions on the GPU, against float64.

A kernel has 16 of them in create_block_mask, which takes some 3 s of one core to compile, and 8 in an attention kernel,
some 4 s. FLASHSPARK_RANDOM_PART=2/16 runs every sixteenth kernel, from the third on, so that processes may share them;
FLASHSPARK_RANDOM_SEED: the first group's number (0), for other functions.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from problem import ON_CPU

sys.path.insert(1, str(Path(__file__).parents[1] / "python"))
from flex_random import BlockGroup, Group  # noqa: E402
from torch_arrays import back, moved  # noqa: E402

PART, PARTS = map(int, os.environ.get("FLASHSPARK_RANDOM_PART", "0/1").split("/"))
SEED = int(os.environ.get("FLASHSPARK_RANDOM_SEED", "0"))
IN_A_BLOCK_MASK, IN_ATTENTION = 16, 8  # functions of one kernel
BLOCK_GROUPS, GROUPS = (6, 6) if ON_CPU else (270, 90)  # 4,320 and 720 functions


def here(count: int) -> list[int]:
    return [SEED + n for n in range(PART, count, PARTS)]


def in_order(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """x on the device, its dimensions in the order in memory that they have."""
    if x.ndim > 1 and x.flags.f_contiguous:
        return moved(x.T, device).permute(*reversed(range(x.ndim)))
    return moved(x, device)


@pytest.mark.parametrize("seed", here(BLOCK_GROUPS))
def test_in_a_block_mask(seed, device):
    group = BlockGroup(seed, IN_A_BLOCK_MASK, wild=not ON_CPU)
    group.check(back(group.run(lambda x: in_order(x, device))))


@pytest.mark.parametrize("seed", here(GROUPS))
def test_in_attention(seed, device):
    group = Group(seed, IN_ATTENTION, wild=not ON_CPU)
    group.check(back(group.run(lambda x: in_order(x, device))))
