"""Tests the wheels of dist/release from the files alone, in environments that have nothing of this tree.

usage: test_release.py [refused] [old] [here] [arm]

refused  pip and uv refuse the wheels where they cannot run: another CPU, musl, an older glibc
old      Debian 11 (glibc 2.31), made by debootstrap: the command's doctor and verify; the libraries load
here     a fresh environment of this machine: pip install, doctor, verify, a NumPy call
arm      Debian 12's Python for 64-bit Arm under qemu: pip install, import, doctor, verify of some cases, a NumPy call

Needs root (chroot) for `old`, and Debian's mirror for `old` and `arm`: the first run downloads their systems.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = ROOT / ".venv/bin/uv"
WORK = ROOT / "build/release-tests"
MIRROR = "http://deb.debian.org/debian"
VERIFY = ("verify", "--filter", "paged")
KERNELS = "sm_120f"  # in doctor's answer where the command finds the library's kernels
CALL = """
import numpy as np, flashspark
q = np.random.default_rng(0).standard_normal((2, 70, 4, 64), dtype=np.float32)
names = ("cpu-engine", "cpu-reference")
out, oracle = (flashspark.flash_attn_func(q, q, q, causal=True, implementation=name) for name in names)
assert np.abs(out - oracle).max() < 1e-5
print("attention", flashspark.__version__)
"""
LOAD = """
import ctypes
library = ctypes.CDLL("/wheel/flashspark/libflashspark.so")
library.flashspark_version.restype = ctypes.c_char_p
print("library", library.flashspark_version().decode())
"""


_AVX512 = {"avx2", "fma", "avx512vl", "avx512dq", "avx512bw", "avx512cd"}
X86_TARGETS = {"AVX-512-BF16": {*_AVX512, "avx512_bf16"}, "AVX-512": _AVX512, "AVX2": {"avx2", "fma"}}


class Failed(Exception):
    pass


def run(*command: str | Path, expect: str = "", **more: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    said = done.stdout + done.stderr
    if done.returncode != 0 or expect not in said:
        raise Failed(f"{' '.join(map(str, command))} ({done.returncode}), expected {expect!r}:\n{said[-3000:]}")
    return said


def refuses(*command: str | Path, expect: str) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=WORK)
    said = done.stdout + done.stderr
    if done.returncode == 0 or expect not in said:
        raise Failed(f"{' '.join(map(str, command))} ({done.returncode}), expected {expect!r}:\n{said[-3000:]}")


def wheel_of(machine: str) -> Path:
    found = list((ROOT / "dist/release").glob(f"flashspark-*-manylinux_*_{machine}.whl"))
    if len(found) != 1:
        raise Failed(f"dist/release holds {len(found)} wheels for {machine}: make wheels")
    return found[0]


def unpacked(wheel: Path, folder: Path) -> Path:
    """The wheel's files, as pip would lay them out; returns the command."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (command,) = folder.rglob("scripts/flashspark")
    command.chmod(0o755)
    return command


def widest_target() -> str:
    """The vectors that doctor must name here: a wheel whose compiler cannot tell them is right, and slow."""
    if platform.machine() != "x86_64":
        return "NEON"
    flags = set(next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")).split())
    return next((name for name, wanted in X86_TARGETS.items() if wanted <= flags), "SSE4")


def check_machine(wanted: str, *doctor: str | Path) -> None:
    """The vectors that doctor names, and what it says where there is no driver."""
    done = subprocess.run([*map(str, doctor), "--json"], capture_output=True, text=True, cwd=WORK)
    report = json.loads(done.stdout)
    simd, driver = report["machine"]["simd"], report["cuda"]["driver_error"]
    if simd != wanted:
        raise Failed(f"{doctor[-2]} computes with {simd}, though the machine has {wanted}")
    if doctor[0] == "chroot" and driver != "no NVIDIA driver: libcuda.so.1 is not found":
        raise Failed(f"a system without a driver: {doctor[-2]} says {driver!r}")


def refused() -> None:
    machine = platform.machine()
    other, mine = wheel_of({"x86_64": "aarch64", "aarch64": "x86_64"}[machine]), wheel_of(machine)
    venv = WORK / "refused"
    run(UV, "venv", "-q", "--clear", "--seed", venv)
    uv = (UV, "pip", "install", "--dry-run", "--no-deps", "--python", venv / "bin/python")
    by_uv, by_pip = "incompatible with the current platform", "is not a supported wheel on this platform"
    refuses(*uv, other, expect=by_uv)
    for system in (f"{machine}-unknown-linux-musl", f"{machine}-manylinux_2_17"):
        refuses(*uv, "--python-platform", system, mine, expect=by_uv)
    refuses(*uv, "--python-version", "3.9", mine, expect="does not satisfy Python>=3.10")
    pip = (venv / "bin/python", "-m", "pip", "install", "--dry-run", "--no-deps")
    refuses(*pip, other, expect=by_pip)
    for system in (f"musllinux_1_2_{machine}", f"manylinux_2_17_{machine}"):
        elsewhere = ("--only-binary", ":all:", "--target", WORK / "nothing", "--platform", system)
        refuses(*pip, *elsewhere, mine, expect=by_pip)


def bootstrap(name: str, suite: str, *options: str) -> Path:
    """A Debian of debootstrap's with Python, kept until this asks for another one."""
    system, recipe = WORK / name, " ".join((suite, *options))
    made = system / "recipe"
    if made.exists() and made.read_text() == recipe:
        return system
    shutil.rmtree(system, ignore_errors=True)
    run("debootstrap", "--variant=minbase", "--include=python3", *options, suite, system, MIRROR)
    if "--foreign" in options:  # what the second stage would configure is not needed
        for package in (system / "var/cache/apt/archives").glob("*.deb"):
            run("dpkg", "-x", package, system)
    made.write_text(recipe)
    return system


def old() -> None:
    system = bootstrap("debian11", "bullseye")
    command = "/" + str(unpacked(wheel_of("x86_64"), system / "wheel").relative_to(system))
    run("chroot", system, command, "--version", expect="flashspark")
    run("chroot", system, command, "doctor", expect=KERNELS)
    check_machine(widest_target(), "chroot", system, command, "doctor")
    run("chroot", system, command, *VERIFY, expect="PASSED")
    run("chroot", system, "python3", "-c", LOAD, expect="library")


def here() -> None:
    venv = WORK / "here"
    run(UV, "venv", "-q", "--clear", venv)
    run(UV, "pip", "install", "-q", "--python", venv / "bin/python", wheel_of(platform.machine()))
    run(venv / "bin/flashspark", "doctor", cwd=WORK, expect=KERNELS)
    check_machine(widest_target(), venv / "bin/flashspark", "doctor")
    run(venv / "bin/flashspark", *VERIFY, cwd=WORK, expect="PASSED")
    run(venv / "bin/python", "-P", "-c", CALL, cwd=WORK, expect="attention")


def arm() -> None:
    system, site = bootstrap("arm64", "bookworm", "--arch=arm64", "--foreign"), WORK / "arm64-site"
    shutil.rmtree(site, ignore_errors=True)
    run(
        *(UV, "pip", "install", "-q", "--python-platform", "aarch64-manylinux_2_28", "--python-version", "3.11"),
        *("--only-binary", ":all:", "--target", site, wheel_of("aarch64")),
    )
    emulator = ("qemu-aarch64", "-L", system)
    python = (*emulator, "-E", f"PYTHONPATH={site}", system / "usr/bin/python3.11", "-P")
    command = (*emulator, site / "bin/flashspark")
    run(*command, "doctor", cwd=WORK, expect=KERNELS)
    check_machine("NEON", *command, "doctor")
    run(*command, *VERIFY, cwd=WORK, expect="PASSED")
    run(*python, "-c", CALL, cwd=WORK, expect="attention")


TESTS = {"refused": refused, "old": old, "here": here, "arm": arm}


def main() -> int:
    names = sys.argv[1:] or list(TESTS)
    if unknown := [name for name in names if name not in TESTS]:
        print(f"test_release.py: no test {', '.join(unknown)}; there are {', '.join(TESTS)}", file=sys.stderr)
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        try:
            TESTS[name]()
            print(f"{name}: passed", flush=True)
        except Failed as error:
            failed += 1
            print(f"{name}: FAILED\n{error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
