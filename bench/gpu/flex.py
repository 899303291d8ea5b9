"""FlexAttention: score functions and block masks, flashspark beside torch's compiled flex_attention.

    python bench/gpu/flex.py [--shapes ABC] [--only NAME ...] [--no-peer] [--out DIR]

One process, the same tensors for both, bf16, medians of CUDA events around five calls each, after warm-up. `plain` is
flashspark's causal kernel without functions on the same shape; `first` the first call, which compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import event_seconds

SHAPES = {"A": (4, 32, 8, 4096, 128), "B": (1, 16, 16, 8192, 64), "C": (1, 32, 8, 16384, 128)}
CALLS, ROUNDS = 5, 11


def microseconds(call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return statistics.median(1e6 * event_seconds(lambda: [call() for _ in range(CALLS)]) / CALLS for _ in range(ROUNDS))


def functions(heads: int) -> list[tuple[str, Any, Any]]:
    """(name, score_mod, mask_mod)."""
    slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)

    def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q >= kv

    def window(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (q - kv <= 1024)

    def document(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (q // 1024 == kv // 1024)

    def prefix(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) | (kv < 1024)

    def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + slopes[h] * (kv - q)

    def softcap(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return 30 * torch.tanh(score / 30)

    def relative(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + (q - kv)

    masks = [("causal", None, causal), ("window 1024", None, window), ("documents 1024", None, document)]
    masks.append(("prefix 1024", None, prefix))
    return [*masks, ("ALiBi", alibi, causal), ("relative", relative, causal), ("softcap 30", softcap, causal)]


def measure(shape: str, only: list[str] | None, with_peer: bool) -> list[dict[str, Any]]:
    import flashspark
    import torch.nn.attention.flex_attention as peer

    batch, heads, heads_kv, tokens, width = SHAPES[shape]
    make = dict(device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, heads, tokens, width, **make)
    k, v = (torch.randn(batch, heads_kv, tokens, width, **make) for _ in range(2))
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    plain = microseconds(lambda: flashspark.flash_attn_func(*rows, causal=True))
    compiled = torch.compile(peer.flex_attention, dynamic=False)
    found = []
    for name, score_mod, mask_mod in functions(heads):
        if only and name not in only:
            continue
        mask = flashspark.create_block_mask(mask_mod, None, None, tokens, tokens)
        ours = lambda: flashspark.flex_attention(q, k, v, score_mod, mask, enable_gqa=True)  # noqa: B023, E731
        start = time.perf_counter()
        ours()
        torch.cuda.synchronize()
        row: dict[str, Any] = {"shape": shape, "name": name, "first": time.perf_counter() - start, "plain": plain}
        row["ours"] = microseconds(ours)
        row["density"] = 1 - mask.sparsity() / 100
        if with_peer:
            torch._dynamo.reset()  # dynamo gives up after so many functions
            theirs = peer.create_block_mask(mask_mod, None, None, tokens, tokens, device="cuda")
            row["peer"] = microseconds(lambda: compiled(q, k, v, score_mod, theirs, enable_gqa=True))  # noqa: B023
            row["ratio"] = row["peer"] / row["ours"]
        found.append(row)
        print(" ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
        sys.stdout.flush()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="ABC")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)  # what tools/dev/gpu.sh passes to every bench
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    found = [row for shape in arguments.shapes for row in measure(shape, arguments.only, not arguments.no_peer)]
    if arguments.out:
        (arguments.out / "flex.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
