"""flashspark's CPU engine against torch's scaled_dot_product_attention, its own oracle, and the machine's memory.

    python bench/cpu.py [--json FILE] [--plot FILE.svg] [--threads N] [--require]

Both sides use the same number of threads in the same process, on the same numbers, and take turns, so that noise hits
both alike. Torch gets each layout that it likes best; of several ways to call it the fastest one counts, and the way
most people use it is listed beside it. Without torch the table holds flashspark alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flashspark
import ml_dtypes
import numpy as np
from plot import bar_chart

try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except ImportError:
    torch = None

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
PREFILL = {"heads_q": 16, "heads_kv": 8, "head_dim": 128, "seqlens": (128, 1024, 4096)}
DECODE = {"batch": 8, "seqlen_k": 4096, "heads_q": 16, "heads_kv": 2, "head_dim": 128, "page_size": 16}
# Above this estimate the oracle, which computes one score at a time, is not timed.
ORACLE_LIMIT_S = 20.0

Call = Callable[[], Any]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def as_torch(array: np.ndarray) -> Any:
    """The same memory as a torch tensor."""
    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def heads_first(array: np.ndarray) -> Any:
    """(B, S, H, D) as torch's own layout (B, H, S, D), contiguous."""
    return as_torch(array).transpose(1, 2).contiguous()


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(calls: dict[str, Call], budget_s: float) -> dict[str, list[float]]:
    """Times of each call. They run in turns, in a changing order, each turn warmed up by a call that does not count.

    The pause lets the other side's threads fall asleep: OpenMP's spin for a while after the end of a call.
    """
    once = {name: min(seconds(call), seconds(call)) for name, call in calls.items()}
    share = budget_s / len(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    rounds = max(5, min(15, int(share / (2 * max(once.values())))))
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            time.sleep(0.01)
            calls[name]()
            repeats = max(1, min(50, int(share / rounds / once[name]) - 1))
            times[name] += [seconds(calls[name]) for _ in range(repeats)]
    return times


def summary(times: list[float]) -> dict[str, float]:
    low, high = np.quantile(times, (0.1, 0.9))
    return {"median_s": statistics.median(times), "p10_s": float(low), "p90_s": float(high), "count": len(times)}


def largest_difference(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))))


def bench_prefill(seqlen: int, dtype_name: str, threads: int, budget_s: float) -> dict[str, Any]:
    """Causal self-attention of one sequence. GFLOP/s count 4 * D per (query, key) pair that the mask keeps."""
    heads_q, heads_kv, head_dim = PREFILL["heads_q"], PREFILL["heads_kv"], PREFILL["head_dim"]
    rng, dtype = np.random.default_rng(), DTYPES[dtype_name]
    q = normal(rng, (1, seqlen, heads_q, head_dim), dtype)
    k, v = (normal(rng, (1, seqlen, heads_kv, head_dim), dtype) for _ in range(2))

    def ours(**options: Any) -> np.ndarray:
        return flashspark.flash_attn_func(q, k, v, causal=True, num_threads=threads, **options)

    calls: dict[str, Call] = {"flashspark": ours}
    if torch:
        tq, tk, tv = heads_first(q), heads_first(k), heads_first(v)
        wide_k, wide_v = (x.repeat_interleave(heads_q // heads_kv, dim=1) for x in (tk, tv))
        calls["torch gqa"] = lambda: scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True)
        calls["torch"] = lambda: scaled_dot_product_attention(tq, wide_k, wide_v, is_causal=True)
    times = take_turns(calls, budget_s)
    flop = 4 * head_dim * heads_q * seqlen * (seqlen + 1) // 2
    result: dict[str, Any] = {"seqlen": seqlen, "dtype": dtype_name, "flop": flop}
    for name, values in times.items():
        result[name] = summary(values)
        result[name]["gflops"] = flop / result[name]["median_s"] / 1e9
    if torch:
        theirs = calls["torch"]().transpose(1, 2).float().numpy()
        result["difference_from_torch"] = largest_difference(ours(), theirs)
        result["speedup"] = best_torch(result)["median_s"] / result["flashspark"]["median_s"]
    # Timed on the first rows only and scaled by the number of (query, key) pairs.
    rows = min(seqlen, 64)
    head = (q[:, :rows], k[:, :rows], v[:, :rows])
    part = seconds(lambda: flashspark.flash_attn_func(*head, causal=True, implementation="cpu-reference"))
    estimate = part * (seqlen * (seqlen + 1)) / (rows * (rows + 1))
    if estimate < ORACLE_LIMIT_S:
        unrounded = np.empty(q.shape, np.float32)
        spent = seconds(lambda: ours(implementation="cpu-reference", out=unrounded))
        result["oracle"] = {"median_s": spent, "gflops": flop / spent / 1e9}
        result["error"] = largest_difference(ours(), unrounded)
    return result


def best_torch(result: dict[str, Any]) -> dict[str, float]:
    return min((value for name, value in result.items() if name.startswith("torch")), key=lambda x: x["median_s"])


def paged(dense: np.ndarray, page_size: int, order: np.ndarray) -> np.ndarray:
    """The pages of (B, S, H, D), each put where `order` says."""
    pages = dense.reshape(-1, page_size, *dense.shape[2:])
    cache = np.empty_like(pages)
    cache[order] = pages
    return cache


def bench_decode(dtype_name: str, threads: int, budget_s: float) -> dict[str, Any]:
    """One query token for each sequence over a long cache: bound by the bytes of K and V."""
    batch, seqlen_k, head_dim = DECODE["batch"], DECODE["seqlen_k"], DECODE["head_dim"]
    heads_q, heads_kv, page_size = DECODE["heads_q"], DECODE["heads_kv"], DECODE["page_size"]
    rng, dtype = np.random.default_rng(), DTYPES[dtype_name]
    q = normal(rng, (batch, 1, heads_q, head_dim), dtype)
    k, v = (normal(rng, (batch, seqlen_k, heads_kv, head_dim), dtype) for _ in range(2))
    lengths = np.full(batch, seqlen_k, np.int32)
    order = rng.permutation(batch * seqlen_k // page_size).astype(np.int32)
    k_pages, v_pages = paged(k, page_size, order), paged(v, page_size, order)
    table = order.reshape(batch, -1)

    def contiguous(**options: Any) -> np.ndarray:
        return flashspark.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, causal=True, num_threads=threads, **options
        )

    def from_pages(**options: Any) -> np.ndarray:
        return flashspark.flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=True, num_threads=threads, **options
        )

    calls: dict[str, Call] = {"flashspark": contiguous, "flashspark paged": from_pages}
    if torch:
        tq, tk, tv = heads_first(q), heads_first(k), heads_first(v)
        group = heads_q // heads_kv
        rows = tq.reshape(batch, heads_kv, group, head_dim)  # heads that share keys become rows of one head
        calls["torch packed"] = lambda: scaled_dot_product_attention(rows, tk, tv)
        calls["torch gqa"] = lambda: scaled_dot_product_attention(tq, tk, tv, enable_gqa=True)
        calls["torch repeat"] = lambda: scaled_dot_product_attention(
            tq, tk.repeat_interleave(group, dim=1), tv.repeat_interleave(group, dim=1)
        )
    times = take_turns(calls, budget_s)
    size = k.nbytes + v.nbytes
    result: dict[str, Any] = {"dtype": dtype_name, "bytes": size}
    for name, values in times.items():
        result[name] = summary(values)
        result[name]["gb_per_s"] = size / result[name]["median_s"] / 1e9
    if torch:
        theirs = calls["torch packed"]().reshape(batch, 1, heads_q, head_dim).float().numpy()
        result["difference_from_torch"] = largest_difference(contiguous(), theirs)
        result["speedup"] = best_torch(result)["median_s"] / result["flashspark"]["median_s"]
    # Calls made one after the other see the same machine state, so the median of ratios is steadier than the ratio of
    # medians.
    result["paged_over_contiguous"] = result["flashspark paged"]["median_s"] / result["flashspark"]["median_s"]
    unrounded = np.empty(q.shape, np.float32)
    spent = seconds(lambda: contiguous(implementation="cpu-reference", out=unrounded))
    result["oracle"] = {"median_s": spent, "gb_per_s": size / spent / 1e9}
    result["error"] = max(largest_difference(call(), unrounded) for call in (contiguous, from_pages))
    return result


def copy_bandwidth(threads: int) -> float:
    """GB/s of a copy by all threads, counting bytes read and written; best of several runs on buffers far larger than
    the caches."""
    source = np.ones(64 << 20, np.float32)
    target = np.zeros_like(source)
    cuts = list(zip(np.array_split(source, threads), np.array_split(target, threads)))
    with ThreadPoolExecutor(threads) as pool:
        times = [seconds(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), cuts))) for _ in range(9)]
    return 2 * source.nbytes / min(times) / 1e9


def call_overhead_us() -> float:
    """Microseconds of the smallest problem, from NumPy."""
    q = np.ones((1, 1, 1, 8), np.float32)
    flashspark.flash_attn_func(q, q, q)
    return 1e6 * statistics.median(seconds(lambda: flashspark.flash_attn_func(q, q, q)) for _ in range(5000))


def import_ms() -> float:
    """Milliseconds that `import flashspark` adds to the start of Python."""
    script = "import time; t = time.perf_counter(); import flashspark; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(7)]
    return 1e3 * statistics.median(float(run.stdout) for run in runs)


def machine_facts(threads: int) -> dict[str, Any]:
    def read(path: str, key: str) -> str:
        lines = Path(path).read_text().splitlines() if Path(path).exists() else []
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        run = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    wanted = ("OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_", "FLASHSPARK_", "ATEN_")
    return {
        "cpu": read("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "family": read("/proc/cpuinfo", "cpu family"),  # of x86-64: a model name may be "AMD EPYC" and no more
        "model": read("/proc/cpuinfo", "model\t"),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "threads": threads,
        "simd": flashspark.cpu_target(),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__ if torch else None,
        "torch_cpu": torch.backends.cpu.get_cpu_capability() if torch else None,
        "torch_mkl": torch.backends.mkl.is_available() if torch else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(wanted)},
        "flashspark": flashspark.native_version(),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def prefill_table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Prefill, causal, 16/8 heads, D = 128: GFLOP/s",
        "",
        "| S | type | flashspark | torch | torch gqa | ours / best | target | oracle | largest error |",
        "|---:|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for r in results:
        cells = [f"{r[name]['gflops']:.1f}" if name in r else "-" for name in ("flashspark", "torch", "torch gqa")]
        speedup = f"{r['speedup']:.2f}" if "speedup" in r else "-"
        oracle = f"{r['oracle']['gflops']:.2f}" if "oracle" in r else "-"
        error = f"{r['error']:.1e}" if "error" in r else "-"
        target = f"{prefill_target(r):g} {mark(met_prefill(r))}"
        cells += [speedup, target, oracle, error]
        lines.append(f"| {r['seqlen']} | {r['dtype']} | {' | '.join(cells)} |")
    return lines


def decode_table(results: list[dict[str, Any]], copy: float) -> list[str]:
    names = ("flashspark", "flashspark paged", "torch packed", "torch gqa", "torch repeat", "oracle")
    lines = [
        f"Decode, B = 8, 4096 keys, 16/2 heads, D = 128: ms a call, and GB/s of K and V (copy: {copy:.1f} GB/s)",
        "",
        "| type | " + " | ".join(names) + " | ours / best | of copy | paged / contiguous | largest error |",
        "|---|" + "---:|" * (len(names) + 4),
    ]
    for r in results:
        cells = [f"{r[n]['median_s'] * 1e3:.2f} ({r[n]['gb_per_s']:.1f})" if n in r else "-" for n in names]
        share, pages = r["flashspark"]["gb_per_s"] / copy, r["paged_over_contiguous"]
        speedup = f"{r['speedup']:.2f} {mark(r['speedup'] >= 1.5)}" if "speedup" in r else "-"
        lines.append(
            f"| {r['dtype']} | {' | '.join(cells)} | {speedup} | {share:.0%} {mark(share >= 0.6)} | "
            f"{pages:.3f} {mark(pages <= 1.02)} | {r['error']:.1e} |"
        )
    return [*lines, "", "Targets: 1.5 times torch's best use, 60% of the copy bandwidth, paged within 2% of dense."]


def prefill_target(result: dict[str, Any]) -> float:
    return 2.0 if result["seqlen"] <= 128 else 1.0


def met_prefill(result: dict[str, Any]) -> bool | None:
    return result["speedup"] >= prefill_target(result) if "speedup" in result else None


def mark(met: bool | None) -> str:
    return {True: "✓", False: "✗", None: ""}[met]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: all")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each line of the tables (default 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the machine's facts")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the prefill table as an SVG bar chart")
    parser.add_argument("--require", action="store_true", help="exit 1 if a target is missed")
    args = parser.parse_args()

    threads = args.threads or flashspark.cpu_threads()
    if torch:
        torch.set_num_threads(threads)
    facts = machine_facts(threads)
    compared = f"torch {facts['torch']} ({facts['torch_cpu']})" if torch else "torch is not installed"
    print(f"{facts['cpu']}, {threads} threads, flashspark {facts['flashspark']} ({facts['simd']}), {compared}\n")

    copy = copy_bandwidth(threads)
    prefill = [bench_prefill(s, d, threads, args.budget) for s in PREFILL["seqlens"] for d in DTYPES]
    decode = [bench_decode(d, threads, args.budget) for d in DTYPES]
    overhead, start_up = call_overhead_us(), import_ms()
    print("\n".join([*prefill_table(prefill), "", *decode_table(decode, copy), ""]))
    print(f"Smallest call from NumPy: {overhead:.1f} us. import flashspark: {start_up:.1f} ms.")

    if args.json:
        document = {"machine": facts, "copy_gb_per_s": copy, "prefill": prefill, "decode": decode}
        document |= {"call_overhead_us": overhead, "import_ms": start_up}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        bars = {
            f"S = {r['seqlen']}, {r['dtype']}": {
                "flashspark": r["flashspark"]["gflops"],
                **({"torch SDPA": r["flop"] / best_torch(r)["median_s"] / 1e9} if torch else {}),
            }
            for r in prefill
        }
        title = f"Causal attention, 16/8 heads, D = 128, GFLOP/s ({facts['cpu']}, {threads} threads)"
        args.plot.write_text(bar_chart(title, bars))
    missed = [r for r in prefill if met_prefill(r) is False]
    missed += [
        r
        for r in decode
        if r.get("speedup", 1.5) < 1.5 or r["flashspark"]["gb_per_s"] < 0.6 * copy or r["paged_over_contiguous"] > 1.02
    ]
    return 1 if args.require and missed else 0


if __name__ == "__main__":
    sys.exit(main())
