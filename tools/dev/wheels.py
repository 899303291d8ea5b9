"""Checks the wheels that run_tests.py builds, and creates environments with them installed."""

from __future__ import annotations

import platform
import re
import shutil
import zipfile
from pathlib import Path

from stage_log import BUILD, ROOT, Failed, Log

BIN = ROOT / ".venv/bin"
HOST = platform.machine()


def built_wheel(machine: str) -> Path:
    wheels = list((ROOT / "dist").glob(f"flashspark-*-linux_{machine}.whl"))
    if len(wheels) != 1:
        raise Failed(f"dist holds {len(wheels)} wheels for {machine}")
    return wheels[0]


def inspect_wheel(log: Log, wheel: Path, machine: str) -> None:
    """Tag, contents, linked libraries and size."""
    log.check(f"-py3-none-linux_{machine}.whl" in wheel.name, f"{wheel.name}: tag is not py3-none-linux_{machine}")
    # Most of the size is kernels, for three GPU architectures.
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
