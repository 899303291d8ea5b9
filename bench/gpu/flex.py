"""FlexAttention: score functions and block masks, flashspark beside torch's compiled flex_attention.

    python bench/gpu/flex.py [--shapes ABC] [--only NAME ...] [--no-peer] [--backward] [--out DIR]

One process, the same tensors for both, bf16, medians of CUDA events around five calls each, after warm-up. `plain` is
flashspark's causal kernel without functions on the same shape; `first` the first call, which compiles. `native`: the
same by an argument of flash_attn_func. With --backward gradients of q, k and v are timed, by torch.autograd.grad.
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
from events import event_seconds

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


def native(name: str, heads: int) -> dict[str, Any] | None:
    """Arguments of flash_attn_func that say the same."""
    slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)
    known = {"causal": {}, "window 1024": {"window_size": (1024, 0)}, "softcap 30": {"softcap": 30.0}}
    known["ALiBi"] = {"alibi_slopes": slopes}
    return known[name] | {"causal": True} if name in known else None


def pass_of(call: Callable[[], Any], backward: bool, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """The call, or the backward pass of what it gives."""
    if not backward:
        return call
    out = call()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def measure(shape: str, only: list[str] | None, with_peer: bool, backward: bool) -> list[dict[str, Any]]:
    import flashspark
    import torch.nn.attention.flex_attention as peer

    batch, heads, heads_kv, tokens, width = SHAPES[shape]
    make = dict(device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, heads, tokens, width, **make)
    k, v = (torch.randn(batch, heads_kv, tokens, width, **make) for _ in range(2))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    rows = [x.transpose(1, 2) for x in inputs]
    plain = microseconds(pass_of(lambda: flashspark.flash_attn_func(*rows, causal=True), backward, inputs))
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
        row["ours"] = microseconds(pass_of(ours, backward, inputs))
        if (arguments := native(name, heads)) is not None:
            call = pass_of(lambda: flashspark.flash_attn_func(*rows, **arguments), backward, inputs)  # noqa: B023
            row["native"] = microseconds(call)
        row["density"] = 1 - mask.sparsity() / 100
        if with_peer:
            torch._dynamo.reset()  # dynamo gives up after so many functions
            theirs = peer.create_block_mask(mask_mod, None, None, tokens, tokens, device="cuda")
            call = pass_of(lambda: compiled(q, k, v, score_mod, theirs, enable_gqa=True), backward, inputs)  # noqa: B023
            row["peer"] = microseconds(call)
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
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)  # what tools/dev/gpu.sh passes to every bench
    arguments = parser.parse_args()
    names = [name for name, *_ in functions(1)]
    if unknown := [name for name in arguments.only or () if name not in names]:
        parser.error(f"--only: there is no {', '.join(unknown)}; choose from {', '.join(names)}")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    found = []
    for shape in arguments.shapes:
        found += measure(shape, arguments.only, not arguments.no_peer, arguments.backward)
    if arguments.out:
        (arguments.out / "flex.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
