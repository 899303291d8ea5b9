"""Times the backward pass beside torch's FlashAttention-2, in one process.

usage: backward.py [--quick] [--out TABLE.md] [--only TEXT]

CUDA events around replays of a CUDA graph, which take turns; medians. A backward pass counts 2.5 times the forward
FLOP, causal half of that. `eager` rows are calls from Python back to back, as the first ones of a training step are.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flashspark
import torch
from measure import event_seconds

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


def calls_of(batch: int, heads: int, heads_kv: int, tokens: int, width: int, causal: bool) -> dict[str, Call]:
    def normal(n: int) -> torch.Tensor:
        return torch.randn(batch, tokens, n, width, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = normal(heads), normal(heads_kv), normal(heads_kv), normal(heads)
    out, lse = flashspark.flash_attn_func(q, k, v, causal=causal, return_softmax_lse=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def ours(deterministic: bool = False) -> object:
        return flashspark.flash_attn_backward(
            dout, q, k, v, out, lse, causal=causal, deterministic=deterministic, dq=dq, dk=dk, dv=dv
        )

    # torch's kernel takes expanded heads; what sums dk and dv up is not in its time, as in the figures.
    group = heads // heads_kv
    their_k, their_v = (x.repeat_interleave(group, 2) for x in (k, v))
    rows = [x.transpose(1, 2) for x in (q, their_k, their_v)]
    # The operators, since a graph cannot capture autograd on another stream than the forward pass ran on.
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    their_out, their_lse, cu_q, cu_k, longest_q, longest_k, seed, offset, _ = forward(*rows, 0.0, causal)
    their_dout = dout.transpose(1, 2)

    def theirs() -> tuple[torch.Tensor, ...]:
        return backward(
            their_dout, *rows, their_out, their_lse, cu_q, cu_k, longest_q, longest_k, 0.0, causal, seed, offset
        )

    ours()
    theirs_dq = theirs()[0].transpose(1, 2)
    worst = (dq.float() - theirs_dq.float()).abs().max().item() / theirs_dq.float().abs().max().item()
    assert worst < 0.03, f"dq differs from torch's by {worst} of its largest element"
    return {"flashspark": ours, "deterministic": partial(ours, deterministic=True), "torch FA2": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="only rows whose name has this text")
    arguments = parser.parse_args()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, medians of CUDA graph replays in turn",
        "",
        "| shape | flashspark us / TF | torch FA2 us / TF | ratio | must | deterministic: us, ratio to the other form "
        "| eager us: flashspark, torch FA2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, heads, heads_kv, tokens, width, full, half in ROWS:
        for causal, must in ((False, full), (True, half)):
            name = f"B{batch} {heads}/{heads_kv} S{tokens} D{width} {'causal' if causal else 'full'}"
            if arguments.only not in name:
                continue
            calls = calls_of(batch, heads, heads_kv, tokens, width, causal)
            once = times(calls, 3)["flashspark"]
            copies = max(1, min(20, int(8000 / once)))
            rounds = 7 if arguments.quick else 21
            eager = times(calls, rounds)
            graphs = {key: captured(call, copies) for key, call in calls.items()}
            us = {key: x / copies for key, x in times(graphs, rounds).items()}
            flop = 2.5 * 4 * batch * heads * tokens * tokens * width / (2 if causal else 1)
            mine, other = us["flashspark"], us["torch FA2"]
            lines.append(
                f"| {name} | {mine:.0f} / {flop / mine / 1e6:.0f} | {other:.0f} / {flop / other / 1e6:.0f} "
                f"| {other / mine:.2f} | {must} | {us['deterministic']:.0f}, {mine / us['deterministic']:.2f} "
                f"| {eager['flashspark']:.0f}, {eager['torch FA2']:.0f} |"
            )
            print(lines[-1], flush=True)
            del calls, graphs
            torch.cuda.empty_cache()
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
