"""What a forward and a backward pass from torch cost beyond the native calls: microseconds of Python on the host.

    python bench/training_calls.py [--device cuda] [--profile] [--json FILE]

The problem is so small that it is nearly nothing but the call. A row says what autograd's forward and backward pass
take through a function, and what is left without the native calls, which are timed alone with arguments made before.
`torch.autograd.Function` is the least that a function written in Python costs: it copies nothing and calls nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashspark
import torch
from flashspark import _core

CALLS, ROUNDS = 20, 200


def microseconds(call: Callable[[], Any]) -> float:
    """The least of the means of many short rounds, one of which nothing else disturbs; on a GPU of what the host does
    before it waits."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return best * 1e6


class Nothing(torch.autograd.Function):
    """The shapes of attention's node, and no computation."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def native_calls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    tail: tuple[Any, ...] = (),
    backward_only: bool = False,
) -> float:
    """Both native calls alone, with all memory at hand."""
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]) if tail else (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    arguments = (0, 0, q, k, v, out, lse, None, True, -1, -1, 0.0, 0, False, None, 0, *tail)

    def both() -> None:
        _core.attention_forward(*arguments)
        backward()

    def backward() -> None:
        _core.attention_backward(dout, None, *gradients, None, None, None, *arguments)

    return microseconds(backward if backward_only else both)


def packed_lengths(device: str) -> torch.Tensor:
    return torch.tensor([0, 7, 16], dtype=torch.int32, device=device)


def cases(device: str) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Functions of q, k and v, and whether these are packed."""
    packed = (packed_lengths(device), packed_lengths(device), 9, 9)
    return {
        "flash_attn_func": (lambda *x: flashspark.flash_attn_func(*x, causal=True), False),
        "flash_attn_varlen_func": (lambda *x: flashspark.flash_attn_varlen_func(*x, *packed, causal=True), True),
        "torch SDPA": (sdpa, False),
        "torch.autograd.Function": (lambda *x: Nothing.apply(*x)[0], False),
    }


def measure(name: str, function: Callable[..., Any], varlen: bool, device: str, profile: bool) -> dict[str, Any]:
    shape = (16, 1, 64) if varlen else (1, 16, 1, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(function(q, k, v), (q, k, v), dout)

    both()
    row = {"call": name, "forward": microseconds(lambda: function(q, k, v)), "both": microseconds(both)}
    with torch.no_grad():
        row["without gradients"] = microseconds(lambda: function(q, k, v))
    if name.startswith("flash_attn"):
        tail = (packed_lengths(device), 9, packed_lengths(device), 9) if varlen else ()
        row["native"] = native_calls(*(x.detach() for x in (q, k, v)), dout, tail)
        row["Python"] = row["both"] - row["native"]
        if profile:
            profiler = cProfile.Profile()
            profiler.runcall(lambda: [both() for _ in range(3000)])
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return row


def measure_backward(device: str) -> dict[str, Any]:
    """flash_attn_backward, which is given memory for the gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, dout = (torch.randn(1, 16, 1, 64, device=device, dtype=dtype) for _ in range(4))
    out, lse = flashspark.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    memory = {name: torch.empty_like(q) for name in ("dq", "dk", "dv")}
    took = microseconds(lambda: flashspark.flash_attn_backward(dout, q, k, v, out, lse, causal=True, **memory))
    native = native_calls(q, k, v, dout, backward_only=True)
    return {"call": "flash_attn_backward", "both": took, "native": native, "Python": took - native}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="what each Python function takes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, *case, given.device, given.profile) for name, case in cases(given.device).items()]
    rows.append(measure_backward(given.device))
    columns = ["without gradients", "forward", "both", "native", "Python"]
    print("us a call".ljust(26) + "".join(f"{x:>19}" for x in columns))
    for row in rows:
        print(row["call"].ljust(26) + "".join(f"{row[x]:19.1f}" if x in row else " " * 19 for x in columns))
    if given.json:
        device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        given.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
