"""Random serving batches against the oracle: decode, verify and prefill rows together, every layout and feature.

FLASHSPARK_GPU_CASES: number of cases (500). FLASHSPARK_GPU_SEED: the first seed (0). A failure prints its seed and its
Spec; FLASHSPARK_GPU_CASES=1 FLASHSPARK_GPU_SEED=n reproduces it.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import failures, poison_unseen
from problem import ON_CPU, Problem, Spec, arena, build, wild

CASES = int(os.environ.get("FLASHSPARK_GPU_CASES", "60" if ON_CPU else "500"))
FIRST = int(os.environ.get("FLASHSPARK_GPU_SEED", "0"))
WILD_EVERY = 25  # one case in so many also runs with wild metadata
CHUNKS = min(CASES, 50)
# Limit of the scores of all heads, to which the oracle's time is proportional; every eighth case may exceed it.
SCORES, MORE_SCORES = (1 << 19, 1 << 21) if ON_CPU else (1 << 23, 1 << 27)
KEYS = 1 << (13 if ON_CPU else 16)

HEADS = [(1, 1), (2, 1), (4, 4), (8, 1), (8, 2), (9, 3), (12, 4), (16, 2), (16, 8), (32, 8), (5, 1), (24, 8), (16, 1)]
DIMS = [(64, 64), (128, 128), (96, 96), (80, 80), (192, 128), (256, 256), (72, 72), (512, 512)]
DIM_WEIGHTS = [0.25, 0.3, 0.08, 0.07, 0.1, 0.12, 0.04, 0.04]
PAGES = [16, 16, 16, 32, 48, 64, 128, 256, 784]


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def lengths(rng: np.random.Generator, budget: int) -> tuple[list[int], list[int]]:
    """Query rows of one engine step: mostly decode, some verify, few prefill, and none for padding."""
    kind = rng.choice(["decode", "verify", "prefill", "mixed", "mixed"])
    batch = log_uniform(rng, 1, 256)
    scores, keys = budget, KEYS
    longest = log_uniform(rng, 64, 16384)
    q_lens, k_lens = [], []
    for _ in range(batch):
        row = kind if kind != "mixed" else rng.choice(["decode", "verify", "prefill", "none"], p=[0.6, 0.2, 0.15, 0.05])
        q = {"decode": 1, "verify": int(rng.integers(2, 9)), "none": 0}.get(row) if row != "prefill" else None
        q = log_uniform(rng, 1, 4096) if q is None else q
        k = q + log_uniform(rng, 1, longest) - 1
        if rng.random() < 0.03:
            k = int(rng.integers(0, q + 1))  # no keys, or fewer than queries
        # Leave budget for the following rows: a long row takes at most half of the rest.
        k = max(0, min(k, keys // 2))
        if q * k > scores // 2:
            q = max(1, min(q, int(np.sqrt(scores // 2))))
            k = min(k, scores // 2 // q)
        if (q and scores < 64) or (keys < 16 and rng.random() < 0.9):
            break
        scores, keys = scores - q * k, keys - k
        q_lens.append(q)
        k_lens.append(k)
    order = rng.permutation(len(q_lens))
    return [q_lens[i] for i in order], [k_lens[i] for i in order]


def page_size(rng: np.random.Generator) -> int:
    """Mostly cheap shapes; one case in eight is unrestricted."""
    return log_uniform(rng, 1, 300) if rng.random() < 0.125 else int(rng.choice(PAGES))


def draw(seed: int) -> Spec:
    rng = np.random.default_rng([seed, 4])

    def often(probability: float) -> bool:
        return bool(rng.random() < probability)

    heads = HEADS[int(rng.integers(len(HEADS)))]
    dims = DIMS[int(rng.choice(len(DIMS), p=DIM_WEIGHTS))]
    if often(0.08):
        step = 1 if often(0.3) else 8  # multiples of other numbers are copied
        dims = tuple(step * int(rng.integers(1, 512 // step + 1)) for _ in range(2))
    budget = MORE_SCORES if often(0.125) else SCORES
    q_lens, k_lens = lengths(rng, budget // heads[0])
    options: dict[str, Any] = {"causal": often(0.75), "scale": float(rng.choice([1.0, 1.0, 1.0, 4.0, 0.2]))}
    options["layout"] = str(rng.choice(["paged", "varlen", "dense", "dense_paged"], p=[0.7, 0.14, 0.08, 0.08]))
    if options["layout"].startswith("dense"):
        # A dense tensor gives every row the capacity of the longest sequence.
        count = max(1, min(len(q_lens), 4 * KEYS // max(1, *k_lens), budget // (8 * heads[0] * max(1, *q_lens))))
        q_lens, k_lens = q_lens[:count], k_lens[:count]
        options["leftpad"], options["batch_index"] = often(0.2), options["layout"] == "dense" and often(0.3)
    elif options["layout"] == "paged":
        options["batch_index"] = often(0.06)
    if options["layout"].endswith("paged") and often(0.06) and max(k_lens) * len(k_lens) < KEYS:
        options["whole_table"] = True
    options |= {"fused_q": often(0.2), "seqused_q": often(0.15), "seqused_k": often(0.3), "loose_bounds": often(0.5)}
    options |= {"leftpad": options.get("leftpad", False) or (options["layout"] == "paged" and often(0.05))}
    options |= {"cache": str(rng.choice(["separate", "packed", "planes", "heads_first"]))}
    options |= {"page_size": page_size(rng), "shared_prefix": often(0.1), "causal_per_seq": often(0.08)}
    mask = str(rng.choice(["none", "window", "prefix", "rswa"], p=[0.6, 0.25, 0.1, 0.05]))
    if mask == "window" or (mask == "prefix" and often(0.5)):
        right = 0 if often(0.7) else int(rng.integers(-1, 100))
        options["window"] = (log_uniform(rng, 1, 2048) - 1, right)
    if mask == "prefix":
        options |= {"prefix": str(rng.choice(["per_seq", "per_token"])), "clamp": often(0.5)}
    if mask == "rswa":
        options["rswa"] = log_uniform(rng, 1, 1000)
    if mask in ("none", "window") and often(0.08):
        options["chunk"] = log_uniform(rng, 1, 4096)
    if often(0.1):
        options["softcap"] = float(rng.choice([5.0, 30.0, 50.0]))
    if often(0.2):
        options["sinks"] = torch.float32 if often(0.5) else torch.bfloat16
    if often(0.06):
        options["alibi"] = int(rng.integers(1, 3))
    if often(0.06) and sum(q_lens) * heads[0] < (1 << 17):
        options["rel_extent"] = log_uniform(rng, 1, 300)
    if all(dim % 16 == 0 for dim in dims) and often(0.2):
        options["fp8"] = "kv" if often(0.6) else "qkv"
    options |= {"check": often(0.1), "e4m3_out": often(0.08)}
    options |= {"lse": often(0.6), "deterministic": often(0.2)}
    options["num_splits"] = int(rng.choice([0, 0, 0, 1, 2, 3, 7]))
    dtype = torch.bfloat16 if often(0.6) else torch.float16
    options["schedule"] = str(rng.choice(["", "fresh", "stale"]))
    return Spec(q_lens, k_lens, heads, dims, dtype, **options)


def run_wild(problem: Problem, seed: int) -> None:
    """Runs the problem with meaningless metadata: it must not fault, and must not change the following run."""
    rng = np.random.default_rng([seed, 7])
    lists = {n: wild(rng, x, slice(None)) if rng.random() < 0.7 else x for n, x in problem.host.items()}
    changed = replace(problem, device=arena(lists, problem.q.device))
    changed.run(check_device=False)
    torch.cuda.synchronize()


def failures_of(spec: Spec, seed: int, device: torch.device) -> list[str]:
    problem = build(spec, seed, device)
    poison_unseen(problem)
    if seed % WILD_EVERY == 0 and not ON_CPU:  # the CPU rejects wild metadata
        run_wild(problem, seed)
    return failures(problem, *problem.run())


def failures_once_there_is_memory(spec: Spec, seed: int, device: torch.device) -> list[str]:
    """The oracle needs gigabytes for some cases and the GPU is shared by several processes: wait for free memory."""
    for _ in range(60):
        try:
            return failures_of(spec, seed, device)
        except torch.OutOfMemoryError:
            pass  # leave the handler, which keeps the frames and so their tensors alive
        torch.cuda.empty_cache()
        time.sleep(1)
    return failures_of(spec, seed, device)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_serving_batches(chunk, device):
    problems = []
    for seed in range(FIRST + chunk, FIRST + CASES, CHUNKS):
        spec = draw(seed)
        try:
            found = failures_once_there_is_memory(spec, seed, device)
        except Exception as error:
            # After a device fault every later case fails as well: stop at the first one.
            raise AssertionError(f"seed {seed}: {error!r}\n{spec}") from error
        if found:
            problems.append(f"seed {seed}: {found}\n  {spec}")
        # Sizes differ between cases and several processes share the GPU, so return cached memory.
        if device.type == "cuda" and torch.cuda.memory_reserved() > 4 << 30:
            torch.cuda.empty_cache()
    assert not problems, f"{len(problems)} of {CASES // CHUNKS}:\n" + "\n".join(problems[:5])


def test_what_the_batches_cover():
    """The random cases cover mixed batches of up to 256 rows, 4096 queries, each layout and each mask."""
    specs = [draw(seed) for seed in range(2000)]
    assert max(len(s.q_lens) for s in specs) >= 200
    assert min(len(s.q_lens) for s in specs) == 1
    assert max(max(s.q_lens) for s in specs) >= (500 if ON_CPU else 4000)
    for name in (
        "leftpad",
        "batch_index",
        "causal_per_seq",
        "shared_prefix",
        "rswa",
        "rel_extent",
        "alibi",
        "clamp",
        "chunk",
        "whole_table",
        "e4m3_out",
        "check",
    ):
        assert sum(bool(getattr(s, name)) for s in specs) >= 20, name
    for name, values in {
        "fp8": 3,
        "layout": 4,
        "cache": 4,
        "prefix": 3,
        "dtype": 2,
        "num_splits": 5,
        "schedule": 3,
    }.items():
        assert len({getattr(s, name) for s in specs}) == values, name
