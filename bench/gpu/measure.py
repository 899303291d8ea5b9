"""Times calls on the GPU and the host, and measures the machine's limits."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from events import event_seconds
from peers import Call
from tensors import Inputs, rotation
from workloads import Workload

Makers = dict[str, Callable[[Inputs], Call]]
TOLERANCE = 0.05  # of results of normal inputs; one bf16 unit in the last place is 0.03 from 4 on
REPLAY_S = 0.012  # target duration of one graph replay: long enough to hide launch gaps and let clocks settle


def warm(calls: list[Call]) -> float:
    """Runs a few calls; returns a rough time per call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    several = (calls * 4)[:4]
    return max(event_seconds(lambda: [call() for call in several]) / 4, 1e-6)


def captured(calls: list[Call], once: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """Captures a graph that cycles through the input sets; returns it and the number of calls it holds."""
    rounds = max(1, min(round(REPLAY_S / once / len(calls)), 2000 // len(calls)))
    # Long calls need not cover every set in one replay.
    chosen = calls * rounds if once * len(calls) < 4 * REPLAY_S else calls[: max(2, int(4 * REPLAY_S / once))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chosen[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in chosen:
            call()
    return graph, len(chosen)


def take_turns(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], budget_s: float) -> dict[str, list[float]]:
    """Seconds per call. The graphs are replayed in turn, so that clock drift affects all of them alike."""
    once = {name: event_seconds(graph.replay) for name, (graph, _) in graphs.items()}
    rounds = max(5, min(40, int(budget_s / sum(once.values()))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            graph, count = graphs[name]
            times[name].append(event_seconds(graph.replay) / count)
    return times


def eager_seconds(calls: list[Call], once: float) -> float:
    """Seconds per call issued from Python back to back: the device's time, or the host's if that is longer."""
    count = max(4, min(64, int(0.01 / once)))
    chosen = [calls[i % len(calls)] for i in range(count)]

    def run() -> None:
        for call in chosen:
            call()

    return statistics.median(event_seconds(run) / count for _ in range(5))


def host_call_us(call: Call) -> float:
    """Microseconds until a call returns, while the device is still working."""
    times: list[float] = []
    for _ in range(20):
        torch.cuda.synchronize()
        for _ in range(100):  # far fewer than a stream can queue
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


FIRST_CALL = """
import time, torch
x = torch.randn(1, 64, 16, 128, device="cuda").bfloat16()
out = torch.empty_like(x)
torch.cuda.synchronize()
start = time.perf_counter()
import flashspark
function = flashspark.flash_attn_func
imported = time.perf_counter()
function(x, x, x, causal=True, out=out)
torch.cuda.synchronize()
print(imported - start, time.perf_counter() - imported)
"""


def first_call_ms() -> tuple[float, float]:
    """Milliseconds of the import, and of the first call until its result is there, in a new process with a context."""
    runs = [
        subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, check=True, text=True) for _ in range(2)
    ]
    pairs = [[1e3 * float(word) for word in run.stdout.split()] for run in runs]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def result_of(call: Call, x: Inputs) -> torch.Tensor:
    """The output of a call. torch has no out argument, so its result is returned."""
    x.out.fill_(float("nan"))
    if hasattr(call, "result"):
        return call.result()
    call()
    return x.out.clone()


def measure_workload(
    work: Workload, makers: Makers, label: str, budget: float
) -> tuple[dict[str, Any], dict[str, str]]:
    sets = rotation(work, torch.device("cuda"))
    left_out: dict[str, str] = {}
    graphs, entries, expected = {}, {}, None
    for name, maker in makers.items():
        begin = time.monotonic()
        try:
            calls = [maker(x) for x in sets]
            got = result_of(calls[0], sets[0]).float()
            if expected is None:
                expected = got
            differ = float((got - expected).abs().max())
            if not differ < TOLERANCE:
                raise RuntimeError(f"its result differs by {differ}")
            once = warm(calls)
            entries[name] = {"eager_s": eager_seconds(calls, once)}
            graphs[name] = captured(calls, once)
            if time.monotonic() - begin > 5:  # a peer that loads or compiles its kernels
                print(f"        {name}, {work.name}: {time.monotonic() - begin:.0f} s to begin", flush=True)
        except peers.NotOffered:
            continue
        except Exception as error:
            if name == label:
                raise
            left_out[f"{name}, {work.name}"] = f"{error!r:.200}"
            entries.pop(name, None)
    for name, times in take_turns(graphs, budget).items():
        ordered = sorted(times)
        entries[name] |= {
            "graph_s": ordered[len(ordered) // 2],
            "p10_s": ordered[len(ordered) // 10],
            "p90_s": ordered[len(ordered) * 9 // 10],
            "replays": len(ordered),
        }
    graphs.clear()
    row = {
        **{"name": work.name, "group": work.group, "flop": work.flop, "bytes": work.bytes, "sets": len(sets)},
        **{"must": work.must, "aim": work.aim, "own": work.own, "page_size": work.page_size, "times": entries},
        **{"fp8": work.fp8, "keys": sum(work.keys)},
        "shape": [work.batch, work.heads_q, work.heads_kv, work.head_dim, work.seqlen_q, work.seqlen_k],
    }
    return row, left_out


def measure_all(
    works: list[Workload], makers_of: Callable[[Workload], Makers], label: str, budget: float, document: dict[str, Any]
) -> None:
    """Adds a row for each workload. An interrupt ends the loop; the rows measured so far are kept."""
    start = time.monotonic()
    try:
        for work in works:
            row, left_out = measure_workload(work, makers_of(work), label, budget)
            document["rows"].append(row)
            document["left_out"] |= left_out
            spent = {name: f"{1e6 * entry['graph_s']:.1f}" for name, entry in row["times"].items()}
            print(f"{time.monotonic() - start:6.1f} s  {work.group}: {work.name}: {spent} us", flush=True)
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("stopped: the rows so far follow", flush=True)


def copy_gb_per_s() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(event_seconds(lambda: target.copy_(source)) for _ in range(20)) / 1e9


def read_gb_per_s() -> float:
    """GB/s of a reduction over more data than any cache holds."""
    source = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    source.sum()
    return 4 * source.numel() / statistics.median(event_seconds(source.sum) for _ in range(20)) / 1e9


def mma_peak_tflops() -> float | None:
    """TFLOP/s of mma.sync in registers, by a small program built with nvcc. None if nvcc is missing or fails."""
    major, minor = torch.cuda.get_device_capability()
    source = Path(__file__).with_name("peak.cu")
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "peak")
        compiler = [os.environ.get("NVCC", "nvcc"), "-O3", f"-arch=sm_{major}{minor}", "-o", program, str(source)]
        try:
            subprocess.run(compiler, check=True, capture_output=True, text=True)
            return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no mma.sync ceiling: {getattr(error, 'stderr', '') or error}", flush=True)
            return None


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return run.stdout.strip()


def gpu_facts() -> dict[str, Any]:
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[0]  # fmt: skip
        facts: dict[str, Any] = dict(zip(fields, (x.strip() for x in answer.split(","))))
    except (OSError, subprocess.CalledProcessError, IndexError):
        facts = {}
    device = torch.cuda.get_device_properties(0)
    return facts | {
        **{"name": device.name, "sms": device.multi_processor_count, "l2_bytes": device.L2_cache_size},
        **{"torch": torch.__version__, "cuda": torch.version.cuda},
    }
