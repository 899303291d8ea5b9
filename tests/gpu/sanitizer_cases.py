"""One small case of each kernel, for compute-sanitizer. Each is checked against the oracle, on the CPU.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitizer_cases.py [NAME ...]

Names are those of kernels/forward/instances.def; combine stands for split keys. With PYTORCH_NO_CUDA_MEMORY_CACHING=1
every tensor is an allocation of its own, so that memcheck sees what lies outside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from oracle import failures, poison_unseen
from problem import Problem, Spec, build, wild

INSTANCES = Path(__file__).resolve().parents[2] / "kernels/forward/instances.def"
PATTERN = re.compile(r"^FLASHSPARK_INSTANCE\((\w+), (\d+), (\d+), (\w+), (\w+),", re.M)

PREFILL = Spec([200, 65, 0, 300] * 12, [330, 65, 9, 300] * 12, (8, 4))  # rows enough to fill the largest GPU's SMs
SHORT_Q = Spec([1, 5, 0, 40], [200, 70, 9, 40], (4, 2))
DECODE = Spec([1, 5, 0, 8], [200, 70, 9, 300], (4, 2))
WILD = ("contiguous", "combine", "shares", "scheduled", "pages of 5", "table by index", "rswa", "dense")
SCORE_MODS = {"softcap": 20.0, "alibi": 1, "rel_extent": 40, "prefix": "per_seq", "window": (50, 0)}


def cases() -> dict[str, Spec]:
    """The tiling of a kernel decides what makes the host choose it: many rows, few, or features that need it."""
    found: dict[str, Spec] = {}
    for name, dim, dim_v, tiling, score_mod in PATTERN.findall(INSTANCES.read_text(encoding="utf-8")):
        shape = SHORT_Q if score_mod == "native" else {"prefill": PREFILL, "decode": DECODE}.get(tiling, SHORT_Q)
        spec = replace(shape, dims=(int(dim), int(dim_v)), num_splits=1)
        if score_mod == "native":
            spec = replace(spec, **SCORE_MODS)
        found[name] = spec
        if int(dim) <= 256:
            found[f"{name}_e4m3"] = replace(spec, fp8="kv")
    found["combine"] = replace(SHORT_Q, dims=(128, 128), num_splits=3, k_lens=[700, 300, 9, 400])
    # Blocks that go through several row tiles, and row tiles that several blocks meet in.
    found["shares"] = replace(DECODE, q_lens=[1, 0, 2] * 30, k_lens=[150, 7, 900] * 30, dims=(128, 128), num_splits=0)
    found["scheduled"] = replace(found["shares"], schedule="fresh")
    found["stale"] = replace(found["shares"], schedule="stale")
    found["contiguous"] = replace(SHORT_Q, dims=(128, 128), layout="varlen")
    found["dense"] = replace(PREFILL, dims=(128, 128), layout="dense", causal=False, sinks=torch.float32)
    found["rswa"] = replace(SHORT_Q, rswa=30)
    found["chunks"] = replace(SHORT_Q, chunk=50, dims=(128, 128))
    found["pages of 5"] = replace(SHORT_Q, page_size=5)
    found["pages of 5, decode"] = replace(found["shares"], page_size=5)
    found["table by index"] = replace(SHORT_Q, batch_index=True, whole_table=True, page_size=20)
    found["e4m3 result"] = replace(SHORT_Q, e4m3_out=True, dims=(128, 128))
    found["e4m3 result, combine"] = replace(found["combine"], e4m3_out=True, fp8="kv")
    found["checked"] = replace(SHORT_Q, check=True, leftpad=True)
    for name in WILD:
        found[f"wild {name}"] = found[name]
    return found


def run_wild(problem: Problem, device: torch.device) -> None:
    """Metadata of no sense, four times: the sanitizer says what is wrong, or the next call does."""
    for turn in range(4):
        rng = np.random.default_rng(turn)
        host = {name: wild(rng, values, slice(None)) for name, values in problem.host.items()}
        moved = to_device(replace(problem, host=host), device)
        if problem.spec.schedule:  # the key fits, the numbers do not
            moved.metadata = to_device(problem, device).metadata
        try:
            moved.run(*[x if x is None else x.to(device) for x in problem.empty_results()])
        except ValueError:
            if device.type == "cuda":
                raise


def to_device(problem: Problem, device: torch.device) -> Problem:
    """The same problem on the GPU, by copies alone: none of torch's kernels runs under the sanitizer."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().to(device)

    options = {name: copy(x) if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    lists = {name: torch.from_numpy(values).to(device) for name, values in problem.host.items()}
    moved = replace(
        problem, q=copy(problem.q), k=copy(problem.k), v=copy(problem.v), options=options, device=lists, metadata=None
    )  # fmt: skip
    moved.reschedule()
    return moved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    table = cases()
    if args.list:
        print("\n".join(table))
        return 0
    wrong = 0
    for name in args.names or table:
        spec = table[name]
        problem = build(spec, 1, "cpu")
        poison_unseen(problem)
        if name.startswith("wild "):
            run_wild(problem, torch.device(args.device))
            print(f"{name:14} ran", flush=True)
            continue
        results = problem.empty_results()
        moved = to_device(problem, torch.device(args.device))
        on_device = [x.to(args.device) for x in results]
        moved.run(*on_device)
        found = failures(problem, *(x.cpu() for x in on_device))
        chosen = " ".join(line for line in moved.explain().splitlines() if "chosen" in line)
        if args.device == "cuda" and re.match(r"d\d", name) and not re.search(rf"\b{name}\b", chosen):
            found = [*found, "another kernel ran"]
        wrong += bool(found)
        print(f"{name:14} {'wrong: ' + str(found) if found else 'right'}", flush=True)
        print(f"               {chosen}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
