"""Trains the small GPT on this repository's files; with --compare also by torch's attention, on the same batches.

    python examples/train/train.py --steps 20                         # on the CPU
    python examples/train/train.py --compare --seconds 90 --device cuda --out DIR
    python examples/train/train.py --attention flashspark torch torch-varlen --seconds 60 --device cuda --out DIR

Prints the loss and the speed. --out: training.json with both, and training.svg with the losses. On a GPU under autocast
to bfloat16, 32768 tokens a step. The speed of batches without packing is measured as well (--dense steps). attention.py
says what torch computes: with padding, or (torch-varlen) flash-attention 2 on packed documents.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from attention import ATTENTION
from documents import batches, texts
from gpt import GPT, Config

WARM = 20  # steps in which the learning rate rises, where the number of steps is not known


def learning_rate(rate: float, step: int, steps: int | None) -> float:
    """A cosine to a tenth of the rate; constant if the time and not the number of steps is limited."""
    if steps is None:
        return rate * min((step + 1) / WARM, 1.0)
    return rate * min((step + 1) / max(steps // 20, 1), 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def train(
    attention: str,
    steps: int | None,
    tokens: int = 2048,
    device: str = "cpu",
    dtype: str = "float32",
    rate: float = 1e-3,
    seed: int = 0,
    compiled: bool = False,
    config: Config | None = None,
    quiet: bool = True,
    seconds: float = math.inf,
    dense: bool = False,
) -> dict:
    """Trains from the start, for so many steps (None: without end) and seconds.

    Returns {"attention", "dense", "parameters", "losses", "tokens_per_second", "seconds"}: the last one of all steps.
    """
    torch.manual_seed(seed)
    config = config or Config()
    model = GPT(config, ATTENTION[attention]).to(device)
    step_model = torch.compile(model, dynamic=True) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    source, losses, times = batches(texts(), tokens, config.longest, seed, device, dense), [], []
    began = said = time.perf_counter()
    while len(losses) != steps and time.perf_counter() - began < seconds:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(rate, len(losses), steps if seconds == math.inf else None)
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
        if not quiet and (len(losses) == 1 or time.perf_counter() - said > 5):
            said = time.perf_counter()
            speed = tokens / times[-1]
            print(f"{attention:12}  step {len(losses):5}  loss {losses[-1]:.4f}  {speed:10.0f} tokens/s", flush=True)
    settled = sorted(times[len(times) // 4 :])  # the first steps compile, allocate and load
    return {
        "attention": attention,
        "dense": dense,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": [round(x, 5) for x in losses],
        "tokens_per_second": tokens / settled[len(settled) // 2],
        "seconds": time.perf_counter() - began,
    }


def plot(runs: list[dict], title: str) -> str:
    """The losses as SVG, smoothed over a fiftieth of the steps."""
    width, height, left, top = 720, 380, 50, 40
    right, bottom = width - 20, height - 50
    losses = [run["losses"] for run in runs]
    most, least, longest = max(map(max, losses)), min(map(min, losses)), max(map(len, losses))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    parts.append(f'<text x="{left}" y="22" font-size="14">Loss: {title}</text>')
    for i in range(5):
        y, x = bottom - (bottom - top) * i / 4, left + (right - left) * i / 4
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y + 4:.1f}" font-size="11">{least + (most - least) * i / 4:.2f}</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" font-size="11" text-anchor="middle">{longest * i // 4}</text>'
        )
    parts.append(f'<text x="{right}" y="{height - 10}" font-size="11" text-anchor="end">step</text>')
    for row, (run, colour) in enumerate(zip(runs, ("#76b900", "#ee4c2c", "#3366cc"))):
        points, span = [], max(longest // 50, 1)
        for i in range(len(run["losses"])):
            window = run["losses"][max(i - span + 1, 0) : i + 1]
            x = left + (right - left) * i / max(longest - 1, 1)
            y = bottom - (bottom - top) * (sum(window) / len(window) - least) / max(most - least, 1e-9)
            points.append(f"{x:.1f},{y:.1f}")
        every = max(len(points) // 1000, 1)
        line = " ".join([*points[::every], points[-1]])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f"{run['attention']}: {run['tokens_per_second']:,.0f} tokens/s"
        parts.append(f'<text x="{width - 260}" y="{top + 20 + 16 * row}" font-size="12" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def said_of(run: dict, common: int) -> str:
    """A line about a run; common: steps that all runs made."""
    means = []
    for losses in (run["losses"][:common], run["losses"]):
        last = losses[-max(len(losses) // 10, 1) :]
        means.append(sum(last) / len(last))
    batch = "dense" if run["dense"] else "packed"
    return (
        f"{run['attention']:12}  {batch:6}  {run['tokens_per_second']:10.0f} tokens/s  {len(run['losses'])} steps in "
        f"{run['seconds']:.0f} s; loss {means[0]:.4f} up to step {common}, {means[1]:.4f} at the end"
    )


def write(folder: Path, facts: dict, runs: list[dict], dense: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({**facts, "runs": runs, "dense": dense}) + "\n")
    size = f"{runs[0]['parameters'] / 1e6:.1f} M parameters, {facts['tokens']} tokens a step"
    (folder / "training.svg").write_text(plot(runs, f"{size}, {facts['device']}, {facts['dtype']}"))


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", choices=list(ATTENTION), default=["flashspark"])
    parser.add_argument("--compare", action="store_true", help="the same as --attention flashspark torch")
    parser.add_argument("--steps", type=int, help="100 unless --seconds is given")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each run")
    parser.add_argument("--dense", type=int, default=20, help="steps without packing, which are timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16: autocast, unless on the CPU")
    parser.add_argument("--tokens", type=int, help="of a step: 2048 on the CPU, 32768 on a GPU")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder")
    given = parser.parse_args()
    names = ["flashspark", "torch"] if given.compare else given.attention
    steps = 100 if given.steps is None and given.seconds == math.inf else given.steps
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    tokens = given.tokens or (2048 if given.device == "cpu" else 32768)
    options = {"dtype": dtype, "rate": given.rate, "compiled": given.compile, "quiet": False}
    device = "CPU" if given.device == "cpu" else torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "dtype": dtype, "tokens": tokens, "compiled": given.compile}
    runs: list[dict] = []
    dense: list[dict] = []
    for name in names:
        runs.append(train(name, steps, tokens, given.device, seconds=given.seconds, **options))
        if given.dense:
            whole = max(tokens // Config().longest, 1) * Config().longest
            dense.append(train(name, given.dense, whole, given.device, dense=True, **options))
        if given.out:  # after each, so that nothing is lost if a later one fails
            write(given.out, facts, runs, dense)
    for group in (runs, dense):
        for run in group:
            print(said_of(run, min(len(x["losses"]) for x in group)))


if __name__ == "__main__":
    main()
