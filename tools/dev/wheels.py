"""Checks wheels, and creates environments with them installed."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import NamedTuple

from stage_log import BUILD, ROOT, Failed, Log

BIN = ROOT / ".venv/bin"
HOST = platform.machine()
MOST_BYTES = 12_000_000  # most of it is kernels, for three GPU architectures
PARTS = (
    "flashspark/__init__.py",
    "flashspark/libflashspark.so",
    "flashspark/_flashspark_ffi.so",
    "flashspark/py.typed",
    "flashspark.pth",
    "flashspark.start",
)
GLIBC = r"libm|libc|libdl|libpthread|librt|ld-linux-.*"  # of these libraries every Linux has some version
FATBIN = bytes.fromhex("50ed55ba")  # how a fatbin begins


class Check(NamedTuple):
    holds: bool
    otherwise: str


def check_contents(wheel: Path, folder: Path, platform_tag: str, parts: tuple[str, ...]) -> list[Check]:
    """Unpacks a wheel into a folder. Its tag and size, and that it has these parts and no strays."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    strays = [n for n in names if not re.match(r"flashspark(/|\.pth$|\.start$|-[\d.]+\.(dist-info|data)/)", n)]
    size = wheel.stat().st_size
    return [
        Check(wheel.name.endswith(f"-py3-none-{platform_tag}.whl"), f"the tag is not py3-none-{platform_tag}"),
        Check(size <= MOST_BYTES, f"{size} bytes, more than {MOST_BYTES}"),
        *(Check(part in names, f"{part} is missing") for part in parts),
        Check(not strays, f"strays: {strays}"),
    ]


def check_wheel(wheel: Path, machine: str, platform_tag: str, libraries: str = GLIBC) -> list[Check]:
    """Tag, contents, size, machine, linked libraries (a pattern of those allowed), and no kernel twice."""
    folder = BUILD / "unpacked" / wheel.stem
    checks = check_contents(wheel, folder, platform_tag, PARTS)
    commands = list(folder.glob("*.data/scripts/flashspark"))
    checks.append(Check(len(commands) == 1, "the command is missing"))
    for binary in [*folder.rglob("*.so"), *commands]:
        said = subprocess.check_output(["readelf", "-h", "-d", binary], text=True)
        needed = re.findall(r"NEEDED.*\[(.*?)\]", said)
        strange = [n for n in needed if not re.fullmatch(rf"(libflashspark|{libraries})\.so.*", n)]
        checks.append(Check(not strange, f"{binary.name} needs {strange}"))
        name = {"x86_64": "X86-64", "aarch64": "AArch64"}[machine]
        checks.append(Check(name in said, f"{binary.name} is for another machine"))
        twice = binary.name != "libflashspark.so" and FATBIN in binary.read_bytes()
        checks.append(Check(not twice, f"{binary.name} has GPU kernels, which only libflashspark.so is to have"))
    return checks


SYSTEM_DLLS = r"(?i:kernel32|advapi32|api-ms-win-crt-.*)"  # of every Windows 10 and newer
WINDOWS_PARTS = (
    "flashspark/__init__.py",
    "flashspark/flashspark.dll",
    "flashspark/_flashspark_ffi.dll",
    "flashspark/py.typed",
    "flashspark.pth",
    "flashspark.start",
)


def needed_dlls(data: bytes) -> list[str]:
    """The libraries that a PE file for x86-64 imports; ValueError: it is none."""
    (header,) = struct.unpack_from("<I", data, 0x3C)
    signature, machine, sections, optional_size = struct.unpack_from("<4sHH12xH", data, header)
    optional = header + 24
    (magic,) = struct.unpack_from("<H", data, optional)
    if (signature, machine, magic) != (b"PE\0\0", 0x8664, 0x20B):
        raise ValueError("no PE file for x86-64")
    (imports,) = struct.unpack_from("<I", data, optional + 120)
    spans = [struct.unpack_from("<IIII", data, optional + optional_size + 40 * n + 8) for n in range(sections)]

    def at(address: int) -> int:
        return next(raw + address - start for size, start, _, raw in spans if start <= address < start + size)

    names = []
    for entry in range(at(imports), len(data), 20):
        (name,) = struct.unpack_from("<I", data, entry + 12)
        if name == 0:
            break
        names.append(data[at(name) : data.index(b"\0", at(name))].decode().removesuffix(".dll"))
    return names


def check_windows_wheel(wheel: Path, platform_tag: str = "win_amd64") -> list[Check]:
    """The same of a wheel for Windows."""
    folder = BUILD / "unpacked" / wheel.stem
    checks = check_contents(wheel, folder, platform_tag, WINDOWS_PARTS)
    commands = list(folder.glob("*.data/scripts/flashspark.exe"))
    checks.append(Check(len(commands) == 1, "the command is missing"))
    for binary in [*folder.rglob("*.dll"), *commands]:
        data = binary.read_bytes()
        try:
            needed = needed_dlls(data)
        except ValueError:
            checks.append(Check(False, f"{binary.name} is for another machine"))
            continue
        ours = "flashspark|tvm_ffi|" if binary.name == "_flashspark_ffi.dll" else ""
        strange = [n for n in needed if not re.fullmatch(ours + SYSTEM_DLLS, n)]
        checks.append(Check(bool(needed) and not strange, f"{binary.name} needs {strange or 'nothing'}"))
        twice = binary.name != "flashspark.dll" and FATBIN in data
        checks.append(Check(not twice, f"{binary.name} has GPU kernels, which only flashspark.dll is to have"))
    return checks


def built_wheel(machine: str) -> Path:
    wheels = list((ROOT / "dist").glob(f"flashspark-*-linux_{machine}.whl"))
    if len(wheels) != 1:
        raise Failed(f"dist holds {len(wheels)} wheels for {machine}")
    return wheels[0]


def built_windows_wheel() -> Path:
    (wheel,) = (ROOT / "dist").glob("flashspark-*-win_amd64.whl")
    return wheel


def inspect_wheel(log: Log, wheel: Path, machine: str) -> None:
    """A wheel of this machine's compiler, whose run-time libraries it may need."""
    for check in check_wheel(wheel, machine, f"linux_{machine}", rf"libstdc\+\+|libgcc_s|{GLIBC}"):
        log.check(check.holds, f"{wheel.name}: {check.otherwise}")


def clean_venv(log: Log, name: str, *requirements: str | Path) -> Path:
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    log.run(BIN / "uv", "venv", "-q", folder)
    install(log, folder / "bin", *requirements)
    return folder / "bin"


def install(log: Log, venv: Path, *requirements: str | Path) -> None:
    log.run(BIN / "uv", "pip", "install", "-q", "--python", venv / "python", *requirements)
