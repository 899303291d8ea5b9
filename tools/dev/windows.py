"""The stage `windows` of run_tests.py: the wheel for Windows, and what of it runs under wine.

Neither Python for Windows nor an NVIDIA driver is there: a small program calls the binding in Python's place, and a
driver without a GPU (tests/cuda/fake_cuda.cpp) lies in wine's system32 while the command looks for one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from budgets import find_nvcc
from stage_log import BUILD, Log
from wheels import BIN, FATBIN, built_windows_wheel, check_windows_wheel

PREFIX = BUILD / "wine"
WINE = {"WINEPREFIX": str(PREFIX), "WINEDEBUG": "-all"}
GPU = {"FAKE_CUDA_DEVICE": "NVIDIA GeForce RTX 5090"}
PLATFORM = ("--python-platform", "x86_64-pc-windows-msvc", "--python-version", "3.12", "--only-binary", ":all:")
DRIVER_CASES = (  # environment, arguments, what is said
    ({**GPU, "FAKE_CUDA_VERSION": "12020"}, ("doctor",), "offers CUDA 12.2, too old to load the kernels"),
    (
        {**GPU, "FAKE_CUDA_VERSION": "12080", "FAKE_CUDA_LOAD": "200"},
        ("verify", "--filter", "edge/one-key"),
        "offers CUDA 12.8 and does not load the kernels (cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE (200))",
    ),
    ({"FAKE_CUDA_INIT": "100", "CUDA_VISIBLE_DEVICES": "7"}, ("doctor",), "finds none with CUDA_VISIBLE_DEVICES=7"),
)


def install(log: Log, wheel: Path) -> Path:
    """The folder of a Python for Windows that has the wheel and what it requires, as pip lays them out there."""
    root, packages = BUILD / "windows-python", BUILD / "windows-python/Lib/site-packages"
    shutil.rmtree(root, ignore_errors=True)
    log.run(BIN / "uv", "pip", "install", "-q", *PLATFORM, "--target", packages, wheel)
    (packages / "bin").rename(root / "Scripts")
    return root


def doctor(log: Log, command: Path, **environment: str) -> dict[str, dict[str, object]]:
    said = log.run("wine", command, "doctor", "--json", check=False, env={**WINE, **environment})
    return json.loads(said[said.index("{") :])


@contextmanager
def driver(library: Path) -> Iterator[None]:
    """While it lasts, wine's system32 has an nvcuda.dll."""
    file = PREFIX / "drive_c/windows/system32/nvcuda.dll"
    shutil.copy(library, file)
    try:
        yield
    finally:
        file.unlink()


def check_command(log: Log, command: Path, fake_driver: Path, has_kernels: bool) -> None:
    said = doctor(log, command)
    log.check(said["cuda"]["driver_error"] == "no NVIDIA driver: nvcuda.dll is not found", f"doctor: {said['cuda']}")
    architectures = said["kernels"]["architectures"]
    log.check(has_kernels == bool(architectures), f"doctor finds kernels for {architectures}, the wheel has some")
    verify = log.run("wine", command, "verify", "--filter", "paged", check=False, env=WINE)
    log.check("PASSED" in verify, "flashspark.exe verify")
    if not has_kernels:
        log.skip("nvcuda.dll", "built without CUDA kernels: no nvcc 12.9 or newer")
        return
    with driver(fake_driver):
        log.check("5090" in str(doctor(log, command, **GPU)["cuda"]["gpus"]), "the driver's GPU is not found")
        for environment, arguments, wanted in DRIVER_CASES:
            said_then = log.run("wine", command, *arguments, check=False, env={**WINE, **environment})
            log.check(wanted in said_then, f"{' '.join(arguments)} does not say: {wanted}")


def check_binding(log: Log, program: Path, packages: Path) -> None:
    said = log.run(
        "wine", program, packages / "tvm_ffi/lib/tvm_ffi.dll", packages / "flashspark", check=False, env=WINE
    )
    log.check("binding: all held" in said, "the binding, called in Python's place")


def windows(log: Log) -> None:
    log.run("packaging/deps.sh", "windows")
    log.run("make", "--no-print-directory", "wheel-windows")
    wheel = built_windows_wheel()
    for check in check_windows_wheel(wheel):
        log.check(check.holds, f"the wheel for Windows: {check.otherwise}")
    python = install(log, wheel)
    packages = python / "Lib/site-packages"
    build = log.preset("windows", "unit_tests", "fake_nvcuda", "binding_test")
    has_kernels = FATBIN in (packages / "flashspark/flashspark.dll").read_bytes()
    log.check(has_kernels == (find_nvcc() is not None), "flashspark.dll has no GPU kernels, though nvcc is there")
    check_command(log, python / "Scripts/flashspark.exe", build / "tests/nvcuda.dll", has_kernels)
    check_binding(log, build / "tests/binding_test.exe", packages)
    log.skip("BigStride*, Fork*", "Windows has no fork(), and gives memory when it is asked for")
    log.together(log.gtest_parts("wine", build / "tests/unit_tests.exe", env=WINE))
