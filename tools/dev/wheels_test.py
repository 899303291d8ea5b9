"""Tests of check_wheel and check_windows_wheel: every fault of a wheel is named, and nothing else."""

from __future__ import annotations

import shutil
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import setuptools
import wheels
from wheels import FATBIN, GLIBC, HOST, PARTS, WINDOWS_PARTS, check_wheel, check_windows_wheel

PROGRAM = Path(shutil.which("true") or "/bin/true").read_bytes()  # an ELF file that needs libc alone
COMMAND = "flashspark-0.1.0.data/scripts/flashspark"
SETUPTOOLS = Path(setuptools.__file__).parent  # which has programs for Windows
WINDOWS_PROGRAM = (SETUPTOOLS / "cli-64.exe").read_bytes().replace(b"VCRUNTIME140.dll", b"ADVAPI32.dll\0\0\0\0")
WINDOWS_COMMAND = f"{COMMAND}.exe"
OTHER = {"x86_64": b"\xb7\0", "aarch64": b"\x3e\0"}[HOST]  # e_machine of the other


class Wheel(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.wheel = Path(folder.name) / "flashspark-0.1.0-py3-none-some_tag.whl"
        native = {part: PROGRAM for part in (*PARTS, COMMAND) if part.endswith(".so") or part == COMMAND}
        self.files = {part: b"" for part in PARTS} | native
        self.files["flashspark/libflashspark.so"] = PROGRAM + FATBIN

    def faults(self, tag: str = "some_tag", libraries: str = GLIBC) -> list[str]:
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, data in self.files.items():
                archive.writestr(name, data)
        return [check.otherwise for check in check_wheel(self.wheel, HOST, tag, libraries) if not check.holds]

    def test_none(self) -> None:
        self.assertEqual(self.faults(), [])

    def test_tag(self) -> None:
        self.assertEqual(self.faults(tag="another"), ["the tag is not py3-none-another"])

    def test_size(self) -> None:
        with mock.patch.object(wheels, "MOST_BYTES", 1000):
            self.assertEqual(self.faults(), [f"{self.wheel.stat().st_size} bytes, more than 1000"])

    def test_missing_parts(self) -> None:
        for part in PARTS:
            data = self.files.pop(part)
            self.assertEqual(self.faults(), [f"{part} is missing"])
            self.files[part] = data
        del self.files[COMMAND]
        self.assertEqual(self.faults(), ["the command is missing"])

    def test_strays(self) -> None:
        self.files["tests/x.py"] = b""
        self.assertEqual(self.faults(), ["strays: ['tests/x.py']"])

    def test_libraries(self) -> None:
        (found, *more) = self.faults(libraries="libnone")
        self.assertEqual((len(more), "libc.so.6" in found), (2, True))

    def test_another_machine(self) -> None:
        self.files[COMMAND] = PROGRAM[:18] + OTHER + PROGRAM[20:]
        self.assertEqual(self.faults(), ["flashspark is for another machine"])

    def test_kernels_twice(self) -> None:
        self.files[COMMAND] = PROGRAM + FATBIN
        self.assertEqual(self.faults(), ["flashspark has GPU kernels, which only libflashspark.so is to have"])


class WindowsWheel(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.wheel = Path(folder.name) / "flashspark-0.1.0-py3-none-some_tag.whl"
        self.files = {
            p: WINDOWS_PROGRAM if p.endswith((".dll", ".exe")) else b"" for p in (*WINDOWS_PARTS, WINDOWS_COMMAND)
        }
        self.files["flashspark/flashspark.dll"] = WINDOWS_PROGRAM + FATBIN

    def faults(self) -> list[str]:
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, data in self.files.items():
                archive.writestr(name, data)
        return [check.otherwise for check in check_windows_wheel(self.wheel, "some_tag") if not check.holds]

    def test_none(self) -> None:
        self.assertEqual(self.faults(), [])

    def test_missing_parts(self) -> None:
        for part in WINDOWS_PARTS:
            data = self.files.pop(part)
            self.assertEqual(self.faults(), [f"{part} is missing"])
            self.files[part] = data
        del self.files[WINDOWS_COMMAND]
        self.assertEqual(self.faults(), ["the command is missing"])

    def test_libraries(self) -> None:
        self.files[WINDOWS_COMMAND] = WINDOWS_PROGRAM.replace(b"ADVAPI32.dll", b"libgomp1.dll")
        self.assertEqual(self.faults(), ["flashspark.exe needs ['libgomp1']"])
        # The binding alone may need the library and tvm-ffi.
        for part, wanted in (("_flashspark_ffi", []), ("flashspark", ["flashspark.dll needs ['tvm_ffi1']"])):
            name = b"tvm_ffi.dll\0" if part == "_flashspark_ffi" else b"tvm_ffi1.dll"
            self.files[f"flashspark/{part}.dll"] = WINDOWS_PROGRAM.replace(b"ADVAPI32.dll", name)
            self.files[WINDOWS_COMMAND] = WINDOWS_PROGRAM
            self.assertEqual(self.faults(), wanted)

    def test_another_machine(self) -> None:
        self.files[WINDOWS_COMMAND] = (SETUPTOOLS / "cli-32.exe").read_bytes()
        self.assertEqual(self.faults(), ["flashspark.exe is for another machine"])

    def test_kernels_twice(self) -> None:
        self.files[WINDOWS_COMMAND] = WINDOWS_PROGRAM + FATBIN
        self.assertEqual(self.faults(), ["flashspark.exe has GPU kernels, which only flashspark.dll is to have"])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
