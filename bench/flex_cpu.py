"""flex_attention on the CPU: its speed beside the plain engine and torch's compiled one, and the host time of a call.

    python bench/flex_cpu.py [--threads N] [--lengths 1024 4096] [--no-peer]
    python bench/flex_cpu.py --host [--arrays numpy torch]

Speed: one process, the same tensors for all, calls in turns; medians of the wall time, and with one thread of the
thread's own CPU time, which a busy machine disturbs less. Every function comes with a causal mask. `of plain` is the
engine's speed with the function as a share of that of `flash_attn_func(causal=True)`, `of torch` a multiple of that of
torch.compile(flex_attention).

Host time: 16 tokens, one thread, so that little is computed: the fastest of many runs of 20 calls, in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import flashspark
import numpy as np
import torch

HEADS, TYPES = 8, {"f32": torch.float32, "bf16": torch.bfloat16}
Calls = dict[str, Callable[[], Any]]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def scores() -> dict[str, Any]:
    slopes = torch.exp2(-8 * torch.arange(1, HEADS + 1) / HEADS)
    return {
        "causal": None,
        "ALiBi": lambda s, b, h, q, kv: s + slopes[h] * (kv - q),
        "relative": lambda s, b, h, q, kv: s + (q - kv),
        "softcap 30": lambda s, b, h, q, kv: 30 * torch.tanh(s / 30),
    }


def in_turns(calls: Calls, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def speed(length: int, width: int, dtype: str, threads: int, with_peer: bool) -> None:
    import torch.nn.attention.flex_attention as peer

    q, k, v = (torch.randn(1, HEADS, length, width, dtype=TYPES[dtype]) for _ in range(3))
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    mask = flashspark.create_block_mask(causal, None, None, length, length, device="cpu")
    calls: Calls = {"plain": lambda: flashspark.flash_attn_func(*rows, causal=True)}
    torch._dynamo.reset()  # it gives up after so many functions
    theirs = peer.create_block_mask(causal, None, None, length, length, device="cpu") if with_peer else None
    for name, score in scores().items():
        calls[name] = lambda score=score: flashspark.flex_attention(q, k, v, score, mask)
        if with_peer:
            compiled = torch.compile(peer.flex_attention, dynamic=False)
            calls[f"torch {name}"] = lambda score=score, run=compiled: run(q, k, v, score, theirs)
    found = in_turns(calls, 15 if length < 4096 else 5, time.thread_time if threads == 1 else time.perf_counter)
    for name in scores():
        of_torch = f"{found[f'torch {name}'] / found[name]:.2f}" if with_peer else "-"
        torch_ms = f"{found[f'torch {name}'] * 1e3:.1f}" if with_peer else "-"
        print(
            f"| {length} | {width} | {dtype} | {name} | {found['plain'] * 1e3:.1f} | {found[name] * 1e3:.1f} | "
            f"{found['plain'] / found[name]:.2f} | {torch_ms} | {of_torch} |",
            flush=True,
        )


def host_calls(arrays: str) -> Calls:
    rng = np.random.default_rng(0)
    kind = torch.from_numpy if arrays == "torch" else np.asarray
    q, k, v = (kind(rng.standard_normal((1, 2, 16, 64)).astype(np.float32)) for _ in range(3))
    table = kind(rng.standard_normal(2).astype(np.float32))
    rows = [x.transpose(1, 2) if arrays == "torch" else x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    number = lambda s, b, h, q, kv: s * 1.5 + q  # noqa: E731
    tensor = lambda s, b, h, q, kv: s + table[h] * q * kv  # noqa: E731
    device = "cpu" if arrays == "torch" else "numpy"
    prefix = lambda b, h, q, kv: (q >= kv) | (kv < 3)  # noqa: E731
    mask, served = (flashspark.create_block_mask(x, None, None, 16, 16, device=device) for x in (prefix, causal))
    fa4 = lambda s, b, h, q, kv, seqlen_info, aux: s + aux[0][h] * q * kv  # noqa: E731
    flex, func = flashspark.flex_attention, flashspark.flash_attn_func
    return {
        "flash_attn_func": lambda: func(*rows),
        "flex_attention": lambda: flex(q, k, v),
        "score_mod": lambda: flex(q, k, v, number),
        "score_mod, captured tensor": lambda: flex(q, k, v, tensor),
        "BlockMask, causal": lambda: flex(q, k, v, None, served),
        "BlockMask": lambda: flex(q, k, v, None, mask),
        "both": lambda: flex(q, k, v, tensor, mask),
        "flash_attn_func, score_mod, aux_tensors": lambda: func(*rows, score_mod=fa4, aux_tensors=[table]),
    }


def host(arrays: str) -> None:
    calls = host_calls(arrays)
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(50):
            call()
    for _ in range(200):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(20):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / 20)
    for name, seconds in best.items():
        print(f"| {arrays} | {name} | {seconds * 1e6:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--arrays", nargs="+", default=["numpy", "torch"], choices=["numpy", "torch"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    threads = 1 if arguments.host else arguments.threads
    os.environ["FLASHSPARK_NUM_THREADS"] = str(threads)  # read at the first call
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if arguments.host:
        for arrays in arguments.arrays:
            host(arrays)
        return
    print("| S | D | type | function | plain ms | ms | of plain | torch ms | of torch |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|")
    for length, width, dtype in itertools.product(arguments.lengths, (64, 128), TYPES):
        speed(length, width, dtype, threads, not arguments.no_peer)


if __name__ == "__main__":
    main()
