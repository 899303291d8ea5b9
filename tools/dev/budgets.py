"""Compile budgets of the sm_120f kernels: registers, spills, shared memory and the instructions of the inner loop.

usage: budgets.py --check             against tests/budgets.json; what grows fails
       budgets.py --update [--only NAME ...] [--reason TEXT]
                                      writes new values, of the kernels of these instances, operations or names; those
                                      that grow need the reason. A kernel that spills fails
                                      the check until its line has a "spill_reason", written by hand
       budgets.py --table             writes bench/results/budgets-sm120f.md

Needs nvcc 12.9 or newer and PyPI's nvidia-cuda-nvdisasm (packaging/requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sass
from budgets_table import table
from kernel_list import Kernel, kernel_list
from measured_kernel import SHARED_OF_CTA, Measured, hmma_of_turn

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "tests/budgets.json"
TABLE = ROOT / "bench/results/budgets-sm120f.md"
CACHE = ROOT / "build/budgets"

USED: set[Path] = set()  # of the cache, by this run


def find_nvcc() -> tuple[Path, str] | None:
    """nvcc and its version, if it knows sm_120f."""
    folders = [
        os.environ.get("CUDA_HOME", "") + "/bin",
        os.environ.get("CUDA_PATH", "") + "/bin",
        "/usr/local/cuda/bin",
    ]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=":".join(folders))
    if not nvcc:
        return None
    version = re.search(r"V(\d+)\.(\d+)\.\d+", subprocess.check_output([nvcc, "--version"], text=True))
    if not version or (int(version[1]), int(version[2])) < (12, 9):
        return None
    return Path(nvcc), version[0][1:]


def find_nvdisasm() -> Path:
    for folder in sys.path:
        for found in sorted(Path(folder).glob("nvidia/cu*/bin/nvdisasm")):
            return found
    if found := shutil.which("nvdisasm"):
        return Path(found)
    sys.exit("nvdisasm is missing: pip install -r packaging/requirements-dev.txt")


def sources() -> bytes:
    files = sorted(p for p in (ROOT / "kernels").rglob("*") if p.is_file())
    return b"".join(str(p.relative_to(ROOT)).encode() + b"\0" + p.read_bytes() for p in files)


def cached(command: list[str], contents: bytes, suffix: str, to_stdout: bool = False) -> tuple[Path, str]:
    """Runs a command that writes one file, unless it ran before: the file, and what the command said beside it."""
    key = hashlib.sha256("\0".join(command).encode() + contents).hexdigest()[:24]
    result, said = CACHE / f"{key}.{suffix}", CACHE / f"{key}.{suffix}.said"
    USED.update((result, said))
    if not (result.exists() and said.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = CACHE / f"{key}.{os.getpid()}.partial"
        full = ["nice", "-n", "10", *command, *([] if to_stdout else ["-o", str(partial)])]
        ran = subprocess.run(full, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"{' '.join(command)}\n{ran.stderr}")
        if to_stdout:
            partial.write_text(ran.stdout)
        said.write_text(ran.stderr)
        partial.rename(result)
    return result, said.read_text()


def measure(nvcc: tuple[Path, str], nvdisasm: Path, kernel: Kernel) -> Measured:
    """The kernel as the build makes it, the entry point's name included: ptxas takes other choices for another."""
    command = [
        str(nvcc[0]),
        "-cubin",
        "-arch=sm_120f",
        "-std=c++20",
        "-O3",
        "-Xptxas",
        "-v",
        "-I",
        str(ROOT / "kernels"),
    ]
    command += [*(f"-D{macro}" for macro in kernel.macros), str(ROOT / "kernels" / kernel.source)]
    cubin, said = cached(command, sources() + nvcc[1].encode(), "cubin")
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if not registers or not spills:
        sys.exit(f"ptxas did not say what it used:\n{said}")
    static = re.search(r"(\d+) bytes smem", said)
    values: dict[str, int | float] = {
        "registers": int(registers[1]),
        "spill_bytes": max(int(spills[1]), int(spills[2])),
        "shared_bytes": kernel.sm_120f.shared_bytes + (int(static[1]) if static else 0),
    }
    listing, _ = cached([str(nvdisasm), "-c", "-hex", str(cubin)], b"", "sass", to_stdout=True)
    code = sass.read(listing.read_text())
    if not kernel.instance:
        values["code"] = len(code)
        return Measured(kernel, values, None)
    try:
        loop = sass.hot_loop(code)
    except sass.NotUnderstood as error:
        sys.exit(f"{kernel.name}: {error}")
    tiles, rest = divmod(loop.count("HMMA"), hmma_of_turn(kernel))
    if rest or not tiles:
        sys.exit(f"{kernel.name}: {loop.count('HMMA')} HMMA in a turn, but {hmma_of_turn(kernel)} for the keys of one")
    counted = {"hmma": ["HMMA"], "ldsm": ["LDSM"], "mufu": ["MUFU"], "ldgsts": ["LDGSTS"]}
    per_turn = {key: loop.count(*names) for key, names in counted.items()}
    per_turn["other"] = len(loop.path) - sum(per_turn.values())
    per_turn["loop"] = len(loop.instructions)
    values |= {
        key: count // tiles if count % tiles == 0 else round(count / tiles, 2) for key, count in per_turn.items()
    }
    values["loop_spills"] = loop.spills
    return Measured(kernel, values, loop)


def measure_all(nvcc: tuple[Path, str], only: list[str] | None = None) -> list[Measured]:
    nvdisasm = find_nvdisasm()
    kernels = kernel_list()
    known = {word for kernel in kernels for word in (kernel.name, kernel.instance, kernel.operation)}
    if unknown := [word for word in only or [] if word not in known]:
        sys.exit(f"--only: neither a kernel nor an instance or operation: {' '.join(unknown)}")
    wanted = [k for k in kernels if not only or {k.name, k.instance, k.operation} & set(only)]
    with ThreadPoolExecutor(2) as pool:
        measured = list(pool.map(lambda kernel: measure(nvcc, nvdisasm, kernel), wanted))
    if not only:
        for stale in set(CACHE.iterdir()) - USED:
            stale.unlink()
    return measured


def growth(values: dict[str, int | float], committed: dict[str, int | float | str]) -> list[str]:
    return [
        f"{key} {committed.get(key, 0)} -> {value}" for key, value in values.items() if value > committed.get(key, 0)
    ]


def check(nvcc: tuple[Path, str]) -> int:
    committed = json.loads(BUDGETS.read_text())
    kernels = committed["kernels"]
    same_compiler = nvcc[1] == committed["nvcc"]
    if not same_compiler:
        print(
            f"counts are of nvcc {committed['nvcc']}, this is {nvcc[1]}: only spills, registers and shared memory count"
        )
    passed, failures, lower = 0, [], []

    def expect(holds: bool, what: str) -> None:
        nonlocal passed
        passed += holds
        if not holds:
            failures.append(what)

    measured = measure_all(nvcc)
    for kernel in measured:
        name, values = kernel.name, kernel.values
        limit = kernels.get(name, {})
        expect(name in kernels, f"{name}: has no line in {BUDGETS.relative_to(ROOT)}")
        spills, of_loop, has_reason = (
            values["spill_bytes"],
            values.get("loop_spills", 0),
            bool(limit.get("spill_reason")),
        )
        expect(
            of_loop == 0 or (of_loop <= limit.get("loop_spills", 0) and has_reason),
            f"{name}: {of_loop} spills in the inner loop without a spill_reason of their own",
        )
        expect(
            spills == 0 or (spills <= limit.get("spill_bytes", 0) and has_reason),
            f"{name}: {spills} bytes of spills without a spill_reason of their own",
        )
        expect(
            values["registers"] <= kernel.allowed_registers,
            f"{name}: {values['registers']} registers, the plan allows {kernel.allowed_registers}",
        )
        expect(values["shared_bytes"] <= SHARED_OF_CTA, f"{name}: {values['shared_bytes']} bytes of shared memory")
        ctas = kernel.launch.min_ctas
        expect(kernel.resident >= ctas, f"{name}: an SM holds {kernel.resident} CTAs, not {ctas}")
        if same_compiler and name in kernels:
            grown = growth(values, limit)
            expect(not grown, f"{name}: grew: {', '.join(grown)}")
            if any(value < limit.get(key, 0) for key, value in values.items()):
                lower.append(name)
    gone = sorted(set(kernels) - {k.name for k in measured})
    expect(not gone, f"{BUDGETS.relative_to(ROOT)} has lines of no kernel: {', '.join(gone)}")
    for failure in failures:
        print(f"FAILED {failure}")
    if lower:
        print(f"below their budget, --update would lower it: {', '.join(lower)}")
    print(f"{passed} passed, {len(failures)} failed")
    return 1 if failures else 0


def update(nvcc: tuple[Path, str], only: list[str] | None, reason: str | None) -> int:
    old = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"kernels": {}}
    measured = measure_all(nvcc, only)
    kernels = dict(old["kernels"]) if only else {}
    unexplained = []
    for kernel in measured:
        before = old["kernels"].get(kernel.name)
        grown = growth(kernel.values, before or kernel.values | {"spill_bytes": 0})
        if grown and not reason:
            unexplained.append(f"{kernel.name}: {', '.join(grown)}")
        why = reason if grown else (before or {}).get("reason")
        spills = (before or {}).get("spill_reason") if kernel.values["spill_bytes"] else None
        kernels[kernel.name] = (
            kernel.values | ({"reason": why} if why else {}) | ({"spill_reason": spills} if spills else {})
        )
    if unexplained:
        print("these grew; say why with --reason:", *unexplained, sep="\n  ")
        return 1
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in kernels.items())
    BUDGETS.write_text(f'{{\n  "nvcc": "{nvcc[1]}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    print(f"{BUDGETS.relative_to(ROOT)}: {len(measured)} kernels")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--update", action="store_true")
    what.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--reason")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if not nvcc:
        print("skipped: no nvcc 12.9 or newer")
        return 0
    if arguments.check:
        return check(nvcc)
    if arguments.update:
        return update(nvcc, arguments.only, arguments.reason)
    TABLE.write_text(table(measure_all(nvcc), nvcc[1]))
    print(TABLE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
