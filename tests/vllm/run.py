"""Runs the checks on the real Python files of vLLM's releases, on a faked GPU; prints version x check.

    VENV/bin/python -P tests/vllm/run.py [--versions 0.25.1 0.33.0 | all] [--scenarios NAME ...] [--jobs N]
                                         [--table FILE]

VENV has torch, what requirements-vllm.txt names, and flashspark's wheel. Each scenario runs in a process of its own,
forked from this one, which imports what vLLM imports but never vLLM: that takes a few seconds off each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
import sources  # noqa: E402

CI = ("0.25.1", "0.33.0")
LIMIT = 1200  # seconds of one scenario, on a machine that others keep busy, too


def preload() -> None:
    """What every scenario imports anyway."""
    import openai  # noqa: F401
    import torch._dynamo
    import torch._inductor  # noqa: F401
    import transformers
    import xgrammar  # noqa: F401

    torch.set_num_threads(1)
    _ = transformers.AutoConfig, transformers.PretrainedConfig, transformers.AutoTokenizer


def built_without_kernels() -> bool:
    """Whether flashspark's wheel comes from a machine without nvcc."""
    import flashspark
    import numpy as np

    one = np.zeros((1, 1, 1, 8), np.float16)
    return "without CUDA" in flashspark.attention_explain(flashspark.flash_attn_func, one, one, one)


def start(version: str, scenario: str, result: Path, log: Path) -> int:
    """A child that runs one scenario; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        folders = [str(HERE), str(HERE / "fakes"), str(sources.sources(version))]
        sys.path[:1] = folders
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(folders), "CHECKED_VERSION": version, "FAKE_CAPABILITY": "12.0",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        import scenarios

        try:
            results = scenarios.BY_NAME[scenario]()
        except BaseException as error:
            import traceback

            traceback.print_exc()
            results = {scenario: f"FAILED: {type(error).__name__}: {error}"[:600]}
        result.write_text(json.dumps(results))
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_all(jobs: list[tuple[str, str]], parallel: int, logs: Path) -> dict[tuple[str, str], dict[str, str]]:
    waiting, running, results = list(jobs), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < parallel:
                version, scenario = waiting.pop(0)
                log = logs / f"vllm-{version}-{scenario}.log"
                log.write_text("")
                path = Path(folder, f"{version}-{scenario}.json")
                running[start(version, scenario, path, log)] = (version, scenario, path, time.monotonic())
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                version, scenario, path, since = running.pop(pid)
                found = json.loads(path.read_text()) if path.exists() else {scenario: "FAILED: the process died"}
                results[version, scenario] = found
                bad = [f"{k}: {v}" for k, v in found.items() if v.startswith("FAILED")]
                took = f"{time.monotonic() - since:5.1f} s  {len(found)} checks"
                print(f"{version:8} {scenario:16} {took}", *bad, sep="\n    ", flush=True)
                continue
            for pid, (_, _, _, since) in running.items():
                if time.monotonic() - since > LIMIT:
                    os.kill(pid, 9)
            time.sleep(0.05)
    return results


def table(results: dict[tuple[str, str], dict[str, str]]) -> str:
    """Markdown: a row a release, a column a check; what a check remarked stands in its cell."""
    versions = list(dict.fromkeys(version for version, _ in results))
    columns = list(dict.fromkeys((s, c) for (_, s), found in results.items() for c in found))
    lines = ["| scenario: check | " + " | ".join(versions) + " |", "|---" * (len(versions) + 1) + "|"]
    for scenario, check in columns:
        cells = []
        for version in versions:
            said = results.get((version, scenario), {}).get(check, "")
            cells.append("**FAILED**" if said.startswith("FAILED") else said.replace("|", "/"))
        lines.append(f"| {scenario}: {check} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(CI))
    parser.add_argument("--scenarios", nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--logs", type=Path, default=HERE.parents[1] / "build/logs")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    versions = list(sources.VERSIONS) if arguments.versions == ["all"] else arguments.versions
    for version in versions:
        sources.sources(version)
    arguments.logs.mkdir(parents=True, exist_ok=True)
    preload()
    if built_without_kernels():
        os.environ["FAKE_KERNELS"] = "1"
    import scenarios

    names = arguments.scenarios or list(scenarios.BY_NAME)
    results = run_all([(v, s) for v in versions for s in names], arguments.jobs, arguments.logs)
    if arguments.table:
        arguments.table.write_text(table(results))
    said = [text for found in results.values() for text in found.values()]
    failed = sum(text.startswith("FAILED") for text in said)
    print(f"{len(said) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
