"""The backward pass on the CPU beside torch's: its speed, and how far 16-bit gradients are from those of float64.

    python bench/cpu_backward.py [--threads N] [--lengths 1024 4096] [--widths 64 128] [--types fp32 bf16 fp16]
    python bench/cpu_backward.py --errors [--lengths 1024]

Speed: one process, the same numbers for both, and calls in turns, so that other work on the machine disturbs both
alike. torch's is the kernel behind scaled_dot_product_attention's backward pass, called directly, with the layout that
it likes best (B, H, S, D); ours is `flash_attn_backward`. With one thread the clock is its own CPU time. A ratio
is the median of the ratios of neighbouring calls, and beside it stands that of the shortest times.

Errors: the largest of a gradient's elements against float64, and torch's math attention (autograd of matmul and softmax
in the same type) as the measure: ours may be twice as large.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashspark
import torch

HEADS = 8
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("dq", "dk", "dv")


def random_rows(length: int, width: int, dtype: torch.dtype, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(1, length, HEADS, width).to(dtype) for _ in range(count)]


def ours(q: Any, k: Any, v: Any, dout: Any, causal: bool, threads: int = 0) -> Callable[[], Any]:
    options = {"causal": causal, "num_threads": threads}
    out, lse, _ = flashspark.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    return lambda: flashspark.flash_attn_backward(dout, q, k, v, out, lse, **options)


def theirs(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> Callable[[], Any]:
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in (q, k, v, dout))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return lambda: backward(dout, q, k, v, out, lse, 0.0, causal)


def take_turns(calls: list[Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(), call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            time.sleep(0.002)  # threads of the call before spin for a while
            start = clock()
            call()
            found.append(clock() - start)
    return times


def speed(length: int, width: int, dtype: str, causal: bool, threads: int, seconds: float) -> None:
    rows = random_rows(length, width, TYPES[dtype])
    clock = time.thread_time if threads == 1 else time.perf_counter
    mine, peer = take_turns([ours(*rows, causal, threads), theirs(*rows, causal)], seconds, clock)
    ratio = statistics.median(b / a for a, b in zip(mine, peer, strict=True))
    flop = 10 * HEADS * width * (length * (length + 1) // 2 if causal else length**2)
    cells = [length, width, dtype, "causal" if causal else "full", len(mine)]
    cells += [f"{statistics.median(each) * 1e3:.1f}" for each in (mine, peer)]
    cells += [f"{flop / statistics.median(mine) / 1e9:.0f}", f"{ratio:.2f}", f"{min(peer) / min(mine):.2f}"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def math_gradients(rows: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """By autograd, one operation after the other, in the type of `rows`."""
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in rows[:3])
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    (scores.softmax(-1) @ v).backward(rows[3].transpose(1, 2))
    return [x.grad.transpose(1, 2) for x in (q, k, v)]


def errors(length: int, width: int, dtype: str, causal: bool) -> None:
    rows = random_rows(length, width, TYPES[dtype])
    truth = math_gradients([x.double() for x in rows], causal)
    found = {
        "flashspark": ours(*rows, causal)(),
        "flash": [x.transpose(1, 2) for x in theirs(*rows, causal)()],
        "math": math_gradients(rows, causal),
    }
    for n, name in enumerate(NAMES):
        most = {each: float((g[n].double() - truth[n]).abs().max()) for each, g in found.items()}
        cells = [length, width, dtype, "causal" if causal else "full", name, *(f"{x:.2e}" for x in most.values())]
        print("| " + " | ".join(map(str, [*cells, f"{most['flashspark'] / most['math']:.2f}"])) + " |", flush=True)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[:20] if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{found.get('model name')}, family {found.get('cpu family')} model {found.get('model')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["fp32", "bf16"])
    parser.add_argument("--masks", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--seconds", type=float, default=4, help="for each line (default 4)")
    parser.add_argument("--errors", action="store_true", help="errors instead of speed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{cpu_name()}; {args.threads} threads; {flashspark.cpu_target()}; torch {torch.__version__}\n")
    if args.errors:
        print("| S | D | type | mask | | flashspark | torch flash | torch math | ours / math |")
        print("|---|---|---|---|---|---:|---:|---:|---:|")
    else:
        print("| S | D | type | mask | calls | ms | torch ms | GFLOP/s | ratio | of shortest |")
        print("|---|---|---|---|---:|---:|---:|---:|---:|---:|")
    for length, width, dtype, mask in itertools.product(args.lengths, args.widths, args.types, args.masks):
        if args.errors:
            errors(length, width, dtype, mask == "causal")
        else:
            speed(length, width, dtype, mask == "causal", args.threads, args.seconds)


if __name__ == "__main__":
    main()
