"""Trains the small GPT on this repository's documents; with --compare also by torch's attention, on the same batches.

    python examples/train/train.py --steps 20                         # on the CPU
    python examples/train/train.py --device cuda --dtype bfloat16 --tokens 32768 --steps 600 --compile --compare \
        --json bench/results/training.json --plot bench/results/training.svg

Prints the loss and the speed; --json writes both for every step, --plot draws the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from documents import batches, texts
from gpt import GPT, Config, flashspark_attention, torch_attention

ATTENTION = {"flashspark": flashspark_attention, "torch": torch_attention}


def train(
    attention: str,
    steps: int,
    tokens: int = 2048,
    device: str = "cpu",
    dtype: str = "float32",
    rate: float = 1e-3,
    seed: int = 0,
    compiled: bool = False,
    config: Config | None = None,
    quiet: bool = True,
) -> dict:
    """Trains from the start. Returns {"attention", "parameters", "losses", "tokens_per_second"}."""
    torch.manual_seed(seed)
    config = config or Config()
    model = GPT(config, ATTENTION[attention]).to(device)
    step_model = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(steps // 20, 1)
    source, losses, times = batches(texts(), tokens, config.longest, seed, device), [], []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        inputs, targets, packed = next(source)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = step_model(inputs, packed)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        if not quiet and (step % max(steps // 20, 1) == 0 or step == steps - 1):
            print(
                f"{attention:10}  step {step:5}  loss {losses[-1]:.4f}  {tokens / times[-1]:10.0f} tokens/s", flush=True
            )
    settled = sorted(times[len(times) // 4 :])  # the first steps compile, allocate and load
    return {
        "attention": attention,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "tokens_per_second": tokens / settled[len(settled) // 2],
    }


def plot(runs: list[dict], title: str) -> str:
    """The losses as SVG, smoothed over a fiftieth of the steps."""
    width, height, left, top = 720, 360, 50, 40
    most, least = max(max(run["losses"]) for run in runs), min(min(run["losses"]) for run in runs)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append(
        f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="22" font-size="14">{title}</text>'
    )
    for i in range(5):
        value = least + (most - least) * i / 4
        y = height - 30 - (height - 30 - top) * i / 4
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y + 4:.1f}" font-size="11">{value:.2f}</text>')
    for run, colour in zip(runs, ("#76b900", "#ee4c2c")):
        losses = run["losses"]
        span, points = max(len(losses) // 50, 1), []
        for i in range(len(losses)):
            mean = sum(losses[max(i - span + 1, 0) : i + 1]) / min(i + 1, span)
            x = left + (width - 20 - left) * i / max(len(losses) - 1, 1)
            y = height - 30 - (height - 30 - top) * (mean - least) / max(most - least, 1e-9)
            points.append(f"{x:.1f},{y:.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        row = 16 * runs.index(run)
        label = f"{run['attention']}: {run['tokens_per_second']:.0f} tokens/s"
        parts.append(f'<text x="{width - 260}" y="{top + 20 + row}" font-size="12" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", choices=list(ATTENTION), default="flashspark")
    parser.add_argument("--compare", action="store_true", help="train by both, one after the other")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    names = list(ATTENTION) if given.compare else [given.attention]
    device = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
    runs = [
        train(
            name, given.steps, given.tokens, given.device, given.dtype, given.rate, compiled=given.compile, quiet=False
        )
        for name in names
    ]
    for run in runs:
        last = run["losses"][-max(given.steps // 10, 1) :]
        print(
            f"{run['attention']:10}  last losses {sum(last) / len(last):.4f}  {run['tokens_per_second']:.0f} tokens/s"
        )
    if given.json:
        facts = {"device": device, "torch": torch.__version__, "dtype": given.dtype, "tokens": given.tokens}
        given.json.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
    if given.plot:
        given.plot.write_text(plot(runs, f"{runs[0]['parameters'] / 1e6:.1f} M parameters, {device}, {given.dtype}"))


if __name__ == "__main__":
    main()
