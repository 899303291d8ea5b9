"""Makes the wheels as they would be published, for x86-64 and 64-bit Arm, with all GPU kernels.

usage: release.py [--machine x86_64] [--machine aarch64] [--check-reproducible]

Into dist/release: a manylinux_2_28 wheel for each machine, SHA256SUMS, and an SBOM (CycloneDX 1.6). Both are compiled
on this machine by zig's clang against glibc 2.28, with its libc++ inside, so that nothing but glibc is needed. The GPU
kernels of the second come from ccache: the same bytes. --check-reproducible builds each wheel again, in another folder,
and compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import uuid
import zipfile
from pathlib import Path

from stage_log import BUILD, ROOT
from wheels import BIN, FATBIN, check_wheel
from zig import GLIBC, HEADERS, run, tools, write_compilers

OUT = ROOT / "dist/release"
MACHINES = ("x86_64", "aarch64")
LICENSES = {
    "libhwy-dev": "Apache-2.0",
    "libfmt-dev": "MIT",
    "libcli11-dev": "BSD-3-Clause",
    "nlohmann-json3-dev": "MIT",
    "libcxx": "Apache-2.0 WITH LLVM-exception",
    "apache-tvm-ffi": "Apache-2.0",
}


def platform_tag(machine: str) -> str:
    return f"manylinux_{GLIBC.replace('.', '_')}_{machine}"


def build(machine: str, python: Path, folder: Path) -> Path:
    """The wheel of one machine, made in a folder of its own."""
    print(f"{machine}: building in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    # As deep as the folders of the other builds: ccache knows kernels by the relative path of their sources.
    cmake = BUILD / f"release-{folder.name}"
    shutil.rmtree(cmake, ignore_errors=True)
    write_compilers(folder, machine, python)
    dated = {"SOURCE_DATE_EPOCH": run("git", "log", "-1", "--format=%ct").strip()}
    run(
        *(BIN / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", folder),
        *("-C", f"build-dir={cmake}"),
        *("-C", f"cmake.define.CMAKE_TOOLCHAIN_FILE={ROOT}/packaging/manylinux.toolchain.cmake"),
        *("-C", "cmake.define.FLASHSPARK_CUDA=ON"),
        *("-C", "cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=", "-C", "cmake.define.CMAKE_C_COMPILER_LAUNCHER="),
        _PYTHON_HOST_PLATFORM=f"linux-{machine}",
        CCACHE_BASEDIR=str(ROOT),  # as the Makefile has it: kernels that any build of this tree compiled
        CCACHE_NOHASHDIR="1",
        FLASHSPARK_RELEASE=str(folder),
        FLASHSPARK_RELEASE_MACHINE=machine,
        **dated,
    )
    (wheel,) = folder.glob("flashspark-*.whl")
    tags = ("--remove", "--platform-tag", platform_tag(machine))
    run(python / "python", "-m", "wheel", "tags", *tags, wheel, **dated)  # which writes RECORD again
    (wheel,) = folder.glob("flashspark-*.whl")
    return wheel


def check(wheel: Path, machine: str, python: Path) -> None:
    """What every wheel is checked for, that nothing but glibc is needed, the policy, and that there are kernels."""
    problems = [c.otherwise for c in check_wheel(wheel, machine, platform_tag(machine)) if not c.holds]
    said = run(python / "auditwheel", "show", wheel)
    tags = [tuple(map(int, m)) for m in re.findall(rf"manylinux_(\d+)_(\d+)_{machine}", said)]
    if not tags or min(tags) > tuple(map(int, GLIBC.split("."))):
        problems.append(f"auditwheel: {said}")
    with zipfile.ZipFile(wheel) as archive:
        problems += [] if FATBIN in archive.read("flashspark/libflashspark.so") else ["no GPU kernels"]
    if problems:
        sys.exit(f"release.py: {wheel.name}: " + "; ".join(problems))
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size:.1f} MB; auditwheel: manylinux_{min(tags)[0]}_{min(tags)[1]}", flush=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def members(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def compare(first: Path, second: Path) -> None:
    one, two = members(first), members(second)
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    if differ or digest(first) != digest(second):
        sys.exit(f"release.py: {first.name} is not reproducible: {differ or 'order or times'}")
    print(f"{first.name}: two builds are equal")


def sbom(wheels: list[Path], python: Path) -> dict[str, object]:
    """What the wheels contain of others, and themselves."""

    def component(name: str, version: str, purl: str) -> dict[str, object]:
        return {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"{purl}/{name}@{version}",
            "licenses": [{"expression": LICENSES[name]}],
        }

    debian = [component(p, run("dpkg-query", "-Wf", "${Version}", p), "pkg:deb/debian") for p in HEADERS.values()]
    freeze = run(BIN / "uv", "pip", "freeze", "--python", python / "python")
    (zig,) = re.findall(r"ziglang==(\S+)", freeze)
    (ffi,) = re.findall(r"apache-tvm-ffi==(\S+)", run(BIN / "uv", "pip", "freeze", "--python", BIN / "python"))
    version = wheels[0].name.split("-")[1]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, ' '.join(digest(w) for w in wheels))}",
        "version": 1,
        "metadata": {"component": {"type": "library", "name": "flashspark", "version": version}},
        "components": [
            *debian,
            component("apache-tvm-ffi", ffi, "pkg:pypi"),
            component("libcxx", f"of ziglang {zig}", "pkg:generic"),
            *({"type": "file", "name": w.name, "hashes": [{"alg": "SHA-256", "content": digest(w)}]} for w in wheels),
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", action="append", choices=MACHINES)
    parser.add_argument("--check-reproducible", action="store_true")
    arguments = parser.parse_args()
    if run("git", "status", "--porcelain").strip():
        print("release.py: the tree has changes that no commit holds", file=sys.stderr)
    python = tools()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    wheels = []
    for machine in arguments.machine or MACHINES:
        wheel = build(machine, python, BUILD / "release" / machine)
        check(wheel, machine, python)
        if arguments.check_reproducible:
            compare(wheel, build(machine, python, BUILD / "release" / f"{machine}-again"))
        wheels.append(Path(shutil.copy(wheel, OUT)))
    bom = OUT / f"flashspark-{wheels[0].name.split('-')[1]}.cdx.json"
    bom.write_text(json.dumps(sbom(wheels, python), indent=1) + "\n")
    sums = "".join(f"{digest(path)}  {path.name}\n" for path in [*wheels, bom])
    (OUT / "SHA256SUMS").write_text(sums)
    print(sums, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
