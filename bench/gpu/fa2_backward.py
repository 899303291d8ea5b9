"""Times the backward pass of torch's FlashAttention-2 alone: the peer of backward.py, without flashspark.

usage: fa2_backward.py [--quick] [--only TEXT,..]

With LD_PRELOAD=fa2_smem.so (fa2_smem.c) it takes the tiles that it takes where a block has 99 KB of shared memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from events import event_seconds

# batch, query heads, KV heads, tokens, head size, and what the issue asks: full, causal
ROWS = [
    (4, 32, 32, 4096, 128, 1.08, 1.15),
    (4, 32, 8, 4096, 128, 1.08, 1.15),
    (1, 32, 8, 16384, 128, 1.08, 1.15),
    (1, 16, 8, 2048, 128, 1.3, 1.3),
    (1, 16, 8, 1024, 128, 1.3, 1.3),
    (4, 32, 32, 4096, 64, 1.10, 1.10),
    (8, 16, 16, 512, 64, 1.3, 1.3),
    (2, 16, 16, 4096, 256, 1.10, 1.10),
]
Call = Callable[[], object]


def row_name(batch: int, heads: int, heads_kv: int, tokens: int, width: int, causal: bool) -> str:
    return f"B{batch} {heads}/{heads_kv} S{tokens} D{width} {'causal' if causal else 'full'}"


def captured(call: Call, copies: int) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            call()
    return graph.replay


def times(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Microseconds a call; the calls take turns, so that the clock's drift is everybody's."""
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(1e6 * event_seconds(call))
    return {name: statistics.median(x) for name, x in taken.items()}


def fa2_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool) -> Call:
    """torch's kernel takes expanded heads; what sums dk and dv up is not in its time, as in the issue's figures."""
    group = q.shape[2] // k.shape[2]
    rows = [x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))]
    # The operators, since a graph cannot capture autograd on another stream than the forward pass ran on.
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    out, lse, cu_q, cu_k, longest_q, longest_k, seed, offset, _ = forward(*rows, 0.0, causal)
    grad = dout.transpose(1, 2)
    return lambda: backward(grad, *rows, out, lse, cu_q, cu_k, longest_q, longest_k, 0.0, causal, seed, offset)


def copies_of(us: float) -> int:
    """Calls in a graph."""
    return max(1, min(20, int(8000 / us)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", default="", help="only rows whose name has one of these texts, TEXT,TEXT..")
    arguments = parser.parse_args()
    for batch, heads, heads_kv, tokens, width, *_ in ROWS:
        for causal in (False, True):
            name = row_name(batch, heads, heads_kv, tokens, width, causal)
            if not any(text in name for text in arguments.only.split(",")):
                continue
            q, k, v, dout = (
                torch.randn(batch, tokens, n, width, device="cuda", dtype=torch.bfloat16)
                for n in (heads, heads_kv, heads_kv, heads)
            )
            call = fa2_backward(q, k, v, dout, causal)
            copies = copies_of(times({"": call}, 3)[""])
            us = times({"": captured(call, copies)}, 7 if arguments.quick else 21)[""] / copies
            print(f"{name}: {us:.1f} us", flush=True)


if __name__ == "__main__":
    main()
