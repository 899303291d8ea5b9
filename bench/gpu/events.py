"""Times a call by CUDA events. Needs torch alone, for programs that run without flashspark."""

from __future__ import annotations

from collections.abc import Callable

import torch


def event_seconds(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
