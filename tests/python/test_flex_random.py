"""A few hundred random functions in calls from Python, against float64; tests/gpu/test_flex_random.py has 5,000."""

from __future__ import annotations

import numpy as np
import pytest
from flashspark._graph import RULES, walk
from flex_random import BlockGroup, Group

SEEDS = range(10)


def same(x):
    return x


@pytest.mark.parametrize("seed", SEEDS)
def test_in_attention(seed):
    group = Group(seed, 8, wild=False)
    for implementation in ("cpu-engine", "cpu-reference"):
        group.check(group.run(same, implementation))


@pytest.mark.parametrize("seed", SEEDS)
def test_in_a_block_mask(seed):
    group = BlockGroup(seed, 16, wild=False)
    group.check(group.run(same))


def test_a_wrong_value_is_found():
    for seed in SEEDS:
        group = Group(seed, 8, wild=False)
        lse = group.run(same)
        lse[3, 20] = np.where(np.isfinite(lse[3, 20]), -np.inf, 1) if group.kind == "mask" else lse[3, 20] * 1.03 + 0.1
        with pytest.raises(AssertionError, match=f"group {seed}, function 3 at"):
            group.check(lse)
        group = BlockGroup(seed, 4, wild=False)
        group.captured.tensors[-1] = group.captured.tensors[-1].copy()
        wrong = group.captured.tensors[-1][2, 1, 9]
        wrong[5] = ~wrong[5] if wrong.dtype == bool else wrong[5] - abs(wrong[5]) * 0.05 - 0.1
        with pytest.raises(AssertionError, match=f"group {seed}, function 2, sequence 1, queries from 0 on: 1 rows"):
            group.check(group.run(same))


def test_every_operation_is_among_them():
    groups = [BlockGroup(seed, 16, wild=True) for seed in SEEDS]
    found = {node.op for group in groups for graph in group.graphs for node in walk([graph.root])}
    assert {*RULES, "where", "load", "scalar", "const"} - found == set()
    depths = {depth_of(graph.root) for group in groups for graph in group.graphs}
    assert max(depths) >= 12


def depth_of(root) -> int:
    depth: dict[int, int] = {}
    for node in walk([root]):
        depth[id(node)] = 1 + max((depth[id(x)] for x in node.operands), default=-1)
    return depth[id(root)]
