"""A sample of flash-attention's grids of gradients on the CPU, the same points every time. Skipped without torch."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")

from gradient_grid import GRIDS, check, sample  # noqa: E402 - it needs torch

POINTS = sample(int(os.environ.get("FLASHSPARK_GRADIENT_POINTS", "48")), 1 << 15)


@pytest.mark.parametrize("point", POINTS, ids=[f"{p.grid}-{p.seed}" for p in POINTS])
def test_flash_attentions_rule(point):
    try:
        check(point, torch.device("cpu"))
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{point}") from error


def test_large_samples_have_every_value_of_every_axis():
    points = sample(2800)
    assert 2700 <= len(points) <= 2900
    assert len(set(points)) == len(points)
    for grid, (_, axes, _) in GRIDS.items():
        of_grid = [p for p in points if p.grid == grid]
        for name, values in axes.items():
            assert {getattr(p, name) for p in of_grid} == set(values), f"{name} of {grid}"


def test_the_rule_sees_a_wrong_gradient(monkeypatch):
    """dv without the first half of the keys, and dq too large by half."""
    import gradient_grid

    right = gradient_grid.call
    wrong = {
        "causal": lambda p, x, q, k, v: right(p, x, q, k, torch.cat([v[: len(v) // 2].detach(), v[len(v) // 2 :]])),
        "output": lambda p, x, q, k, v: right(p, x, q.detach() + (q - q.detach()) * 1.5, k, v),
    }
    for point in sample(12, 1 << 15):
        if point.grid not in wrong:
            continue
        monkeypatch.setattr(gradient_grid, "call", wrong[point.grid])
        with pytest.raises(AssertionError):
            check(point, torch.device("cpu"))
