"""Writes the repository that Hugging Face's `kernels` loads flashspark from (make hf-kernel).

    tools/dev/hf_kernel.py [--wheel FILE ...] [--out build/hf-kernel]

The wheels default to those in dist. Each gives a folder build/VARIANT for every backend below, with the wheel's package
in it, less what only an installation uses. The loader imports the folder under a name of its own (`id`), so that a
kernel needs no installed flashspark and does not meet one that is. It reads the names of the folders and metadata.json;
packaging/hf-kernel-card.md becomes the README. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "packaging/hf-kernel-card.md"
NAME = "flashspark"
# The major version of the interface, which names the branch (v0) that a client asks for; 0: it may still change.
VERSION = 0
# tvm-ffi's major and minor version, which the loader wants equal, and the backends by their names in a variant. The
# native code loads the driver alone, so that torch's CUDA version, which the loader compares, means nothing to it: one
# variant a major version of CUDA serves all of its torches from that minor on. 12.8 is the first that knows SM12x.
FRAMEWORK = "tvm-ffi01"
BACKENDS = ("cu130", "cu128", "cpu")
# Parts that need an installation: the take-over of vLLM with its start-up hook.
LEFT_OUT = re.compile(r"vllm/|_hook\.py$|.*__pycache__|.*\.pyc$")
LIBRARY, BINDINGS = "libflashspark.so", "_flashspark_ffi.so"


def wheels_of(folder: Path) -> list[Path]:
    """Those for Linux; Hugging Face's loader has no variant that this library could be for Windows."""
    return sorted(folder.glob(f"{NAME}-*linux_*.whl"))


def read_wheel(path: Path) -> tuple[str, dict[str, bytes]]:
    """The machine that a wheel is for, and the files of its package."""
    machine = re.search(r"linux(?:_\d+_\d+)?_(x86_64|aarch64)\.whl$", path.name)
    if machine is None:
        raise SystemExit(f"{path}: must be a wheel for x86_64 or aarch64 Linux")
    with zipfile.ZipFile(path) as archive:
        files = {
            name.partition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if name.startswith(f"{NAME}/") and not name.endswith("/")
        }
    return machine[1], {name: data for name, data in sorted(files.items()) if not LEFT_OUT.match(name)}


def architectures(files: dict[str, bytes]) -> list[str]:
    """The library's GPU architectures as metadata.json has them: 8.0, 12.0f. None if it was built without kernels."""
    found = re.search(rb"flashspark: kernels for ([^\0]*)\0", files[LIBRARY])  # by cmake/Fatbin.cmake
    if found is None:
        raise SystemExit(f"{LIBRARY}: does not say which GPU architectures its kernels are for")
    words = re.findall(r"sm_(\d+)(\d)(f?)", found[1].decode())
    return [f"{major}.{minor}{family}" for major, minor, family in words]


def renamed(files: dict[str, bytes], digest: str) -> dict[str, bytes]:
    """The files with a library name of their own. The system's loader knows a library by its name alone: an installed
    flashspark of another version in the same process would otherwise be taken for this one."""
    name = f"libfs{digest[: len(LIBRARY) - len('libfs.so')]}.so"
    result = dict(files)
    for path in (LIBRARY, BINDINGS):
        old = b"\0" + LIBRARY.encode() + b"\0"
        if files[path].count(old) != 1:
            raise SystemExit(f"{path}: holds the name {LIBRARY} {files[path].count(old)} times, not once")
        result[path] = files[path].replace(old, b"\0" + name.encode() + b"\0")  # as long as the old one
    result[name] = result.pop(LIBRARY)
    return result


def digest_of(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def metadata(files: dict[str, bytes], variant: str, digest: str, archs: list[str]) -> dict[str, object]:
    backend: dict[str, object] = {"type": "cpu"} if "-cpu-" in variant else {"type": "cuda", "archs": archs}
    hashes = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    unique = hashlib.sha256(f"{variant} {digest}".encode()).hexdigest()[:12]
    return {
        "name": NAME,
        "id": f"_{NAME}_{unique}",  # the module's name, and that of its operators in torch.ops
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": ["tvm-ffi"],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def write_variants(out: Path, wheel: Path) -> list[str]:
    """build/VARIANT for each backend that a wheel serves; returns the variants' names."""
    machine, files = read_wheel(wheel)
    archs, digest = architectures(files), digest_of(files)
    files = renamed(files, digest)
    written = []
    for backend in BACKENDS:
        if backend != "cpu" and not archs:
            continue
        variant = f"{FRAMEWORK}-{backend}-{machine}-linux"
        folder = out / "build" / variant
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o644)
        about = metadata(files, variant, digest, archs)
        (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
        written.append(variant)
    return written


def write(out: Path, wheels: Iterable[Path]) -> list[str]:
    """The whole repository, in place of what `out` held; returns the variants' names."""
    shutil.rmtree(out, ignore_errors=True)
    variants = [variant for wheel in wheels for variant in write_variants(out, wheel)]
    listed = "\n".join(f"- `{variant}`" for variant in variants)
    (out / "README.md").write_text(CARD.read_text().replace("<variants>", listed))
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, nargs="+", default=wheels_of(ROOT / "dist"))
    parser.add_argument("--out", type=Path, default=ROOT / "build/hf-kernel")
    options = parser.parse_args()
    if not options.wheel:
        sys.exit("dist holds no wheel for Linux: make wheel, or --wheel FILE")
    for variant in write(options.out, options.wheel):
        print(options.out / "build" / variant)


if __name__ == "__main__":
    main()
