"""Writes compilers for another system, which are zig's clang, and a folder of header-only libraries.

usage: zig.py MACHINE FOLDER

MACHINE is x86_64 or aarch64 (Linux with glibc 2.28 or newer), or windows (x86-64, mingw-w64 on ucrt).
packaging/zig.cmake has CMake take what lies in FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stage_log import BUILD, ROOT
from wheels import BIN

GLIBC = "2.28"  # Debian 10, RHEL 8
TARGETS = {
    "x86_64": f"x86_64-linux-gnu.{GLIBC}",
    "aarch64": f"aarch64-linux-gnu.{GLIBC}",
    "windows": "x86_64-windows-gnu",
}
HEADERS = {"hwy": "libhwy-dev", "fmt": "libfmt-dev", "CLI": "libcli11-dev", "nlohmann": "nlohmann-json3-dev"}
# zig spells the name of this architecture in its own way.
COMPILER = """#!/bin/sh
# zig {version}: ccache compares this text
for argument do
  shift
  case $argument in -march=x86-64-v2) argument=-march=x86_64_v2 ;; esac
  set -- "$@" "$argument"
done
exec "{zig}" {use} "$@"
"""


def run(*command: str | Path, **more: str) -> str:
    """A command's output; a command that fails ends the program with what it printed."""
    done = subprocess.run([str(x) for x in command], cwd=ROOT, env=os.environ | more, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def tools() -> Path:
    """The folder of Python that has zig, auditwheel and wheel."""
    venv, wanted = BUILD / "venv-release", ROOT / "packaging/requirements-release.txt"
    stamp = venv / ".stamp"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        run(BIN / "uv", "venv", "-q", "--clear", venv)
        run(BIN / "uv", "pip", "install", "-q", "--python", venv / "bin/python", "-r", wanted)
        stamp.write_text(wanted.read_text())
    return venv / "bin"


def write_compilers(folder: Path, machine: str, python: Path) -> None:
    """What packaging/zig.cmake names: compilers for one machine and C library, and header libraries."""
    zig = run(python / "python", "-c", "import ziglang; print(ziglang.__path__[0])").strip() + "/zig"
    version = run(zig, "version").strip()
    target = f"-target {TARGETS[machine]}"
    folder.mkdir(parents=True, exist_ok=True)
    uses = {"cc": f"cc {target}", "c++": f"c++ {target}"} | {name: name for name in ("ar", "ranlib", "dlltool")}
    for name, use in uses.items():
        (folder / name).write_text(COMPILER.format(zig=zig, use=use, version=version))
        (folder / name).chmod(0o755)
    (folder / "include").mkdir(exist_ok=True)
    for header in HEADERS:
        link = folder / "include" / header
        link.unlink(missing_ok=True)
        link.symlink_to(f"/usr/include/{header}")  # /usr/include itself would bring this machine's C library


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    write_compilers(Path(sys.argv[2]).resolve(), sys.argv[1], tools())
