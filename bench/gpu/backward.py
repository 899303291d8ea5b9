"""Times the backward pass beside torch's FlashAttention-2, in one process.

usage: backward.py [--quick] [--fa2-99kb] [--out TABLE.md] [--only TEXT,..]

CUDA events around replays of a CUDA graph, which take turns; medians. A backward pass counts 2.5 times the forward
FLOP, causal half of that. Rows of 4096 tokens have dropout 0.1, too, beside the call without. `eager` rows are calls
from Python back to back, as the first ones of a training step are.

--fa2-99kb adds torch's FlashAttention-2 as it is on a GPU that grants a block 99 KB of shared memory, as SM12x does:
its tiles need up to 176 KB, and where it does not find them, it takes others (fa2_smem.c). A process of its own before
the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import flashspark
import torch
from fa2_backward import ROWS, Call, captured, copies_of, fa2_backward, row_name, times

HERE = Path(__file__).resolve().parent


def times_at_99_kb(options: list[str]) -> dict[str, float]:
    """Microseconds of each row."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fa2_smem.so"
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", str(HERE / "fa2_smem.c"), "-o", str(library), "-ldl"], check=True
        )
        text = subprocess.run(
            [sys.executable, str(HERE / "fa2_backward.py"), *options],
            env={**os.environ, "LD_PRELOAD": str(library)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    rows = (line.split(":") for line in text.splitlines())
    return {name: float(us.split()[0]) for name, us in rows}


def calls_of(batch: int, heads: int, heads_kv: int, tokens: int, width: int, causal: bool) -> dict[str, Call]:
    def normal(n: int) -> torch.Tensor:
        return torch.randn(batch, tokens, n, width, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = normal(heads), normal(heads_kv), normal(heads_kv), normal(heads)
    out, lse = flashspark.flash_attn_func(q, k, v, causal=causal, return_softmax_lse=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def ours(out: torch.Tensor = out, lse: torch.Tensor = lse, **options: object) -> object:
        return flashspark.flash_attn_backward(dout, q, k, v, out, lse, causal=causal, dq=dq, dk=dk, dv=dv, **options)

    theirs = fa2_backward(q, k, v, dout, causal)
    ours()
    theirs_dq = theirs()[0].transpose(1, 2)
    worst = (dq.float() - theirs_dq.float()).abs().max().item() / theirs_dq.float().abs().max().item()
    assert worst < 0.03, f"dq differs from torch's by {worst} of its largest element"
    calls = {"flashspark": ours, "deterministic": partial(ours, deterministic=True), "torch FA2": theirs}
    if tokens == 4096:
        options = {"dropout_p": 0.1, "rng_state": (1, 2)}
        calls["dropout"] = partial(
            ours, *flashspark.flash_attn_func(q, k, v, causal=causal, return_softmax_lse=True, **options), **options
        )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="only rows whose name has one of these texts")
    parser.add_argument("--fa2-99kb", action="store_true", help="torch's FA2 with 99 KB of shared memory, too")
    arguments = parser.parse_args()
    options = [*(["--quick"] if arguments.quick else []), "--only", arguments.only]
    limited = times_at_99_kb(options) if arguments.fa2_99kb else {}
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, medians of CUDA graph replays in turn",
        "",
        "| shape | flashspark us / TF | torch FA2 us / TF | ratio | must | deterministic: us, ratio to the other form "
        "| dropout 0.1: us, its cost "
        "| eager us: flashspark, torch FA2 |" + (" torch FA2 limited to 99 KB us / TF, ratio |" if limited else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if limited else ""),
    ]
    for batch, heads, heads_kv, tokens, width, full, half in ROWS:
        for causal, must in ((False, full), (True, half)):
            name = row_name(batch, heads, heads_kv, tokens, width, causal)
            if not any(text in name for text in arguments.only.split(",")):
                continue
            calls = calls_of(batch, heads, heads_kv, tokens, width, causal)
            once = times(calls, 3)["flashspark"]
            copies = copies_of(once)
            rounds = 7 if arguments.quick else 21
            eager = times(calls, rounds)
            graphs = {key: captured(call, copies) for key, call in calls.items()}
            us = {key: x / copies for key, x in times(graphs, rounds).items()}
            flop = 2.5 * 4 * batch * heads * tokens * tokens * width / (2 if causal else 1)
            mine, other = us["flashspark"], us["torch FA2"]
            dropout = f"{us['dropout']:.0f}, {100 * (us['dropout'] / mine - 1):+.1f}%" if "dropout" in us else "-"
            lines.append(
                f"| {name} | {mine:.0f} / {flop / mine / 1e6:.0f} | {other:.0f} / {flop / other / 1e6:.0f} "
                f"| {other / mine:.2f} | {must} | {us['deterministic']:.0f}, {mine / us['deterministic']:.2f} "
                f"| {dropout} "
                f"| {eager['flashspark']:.0f}, {eager['torch FA2']:.0f} |"
            )
            if limited:
                peer = limited[name]
                lines[-1] += f" {peer:.0f} / {flop / peer / 1e6:.0f}, {peer / mine:.2f} |"
            print(lines[-1], flush=True)
            del calls, graphs
            torch.cuda.empty_cache()
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
