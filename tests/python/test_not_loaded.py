"""A native library that does not load says why in one line, and another version on LD_LIBRARY_PATH is not taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import flashspark
import pytest
from flashspark import _core, _elf

PACKAGE = Path(flashspark.__file__).parent
NATIVE = Path(_core._find())
MACHINES = {"x86_64": 62, "aarch64": 183}


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "flashspark", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def error_of(folder: Path) -> str:
    done = run(folder, "import flashspark; flashspark.native_version()")
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_a_wheel_for_another_machine(copy):
    here = _elf.machine_of(str(NATIVE))
    (other,) = set(MACHINES) - {here}
    file = copy / "flashspark" / NATIVE.name
    data = bytearray(file.read_bytes())
    data[18:20] = MACHINES[other].to_bytes(2, "little")
    file.write_bytes(data)
    mend = f"is for {other}, this machine is {here}: install the wheel whose name ends in {here}.whl"
    assert error_of(copy) == f"ImportError: {file} {mend}"


def test_a_damaged_file(copy):
    file = copy / "flashspark" / NATIVE.name
    file.write_bytes(file.read_bytes()[:10])
    assert error_of(copy) == f"ImportError: {file} is damaged: it is no 64-bit ELF file; install flashspark again"


def test_the_loaders_own_reason_is_kept(copy):
    (copy / "flashspark" / "libflashspark.so").unlink()
    assert "_flashspark_ffi.so does not load: " in (said := error_of(copy))
    assert "libflashspark.so" in said.split("does not load: ")[1]


def test_musl(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", {"SOABI": "cpython-312-x86_64-linux-musl"}.get)
    assert "needs glibc, this Python has musl (Alpine)" in _elf.why_not_loaded(str(NATIVE), "")


def test_another_version_on_the_library_path_is_not_taken(tmp_path):
    shutil.copy(NATIVE, tmp_path / "libflashspark.so")  # a library without one function of ours
    code = "import flashspark; print(flashspark.native_version())"
    done = run(PACKAGE.parent, code, LD_LIBRARY_PATH=str(tmp_path))
    assert done.stdout.strip() == flashspark.native_version(), done.stderr
