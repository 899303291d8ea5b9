"""The Python files of released vLLM wheels, cached: what the vLLM checks import. No compiled file of them is kept.

    sources.py VERSION ...        prints the folder of each version, downloading what is missing

The cache is FLASHSPARK_VLLM_CACHE or ~/.cache/flashspark/vllm; about 60 MB a version.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("FLASHSPARK_VLLM_CACHE") or Path.home() / ".cache/flashspark/vllm")
# One release of every minor version from 0.17 on.
VERSIONS = (
    *("0.17.1", "0.18.0", "0.19.1", "0.20.2", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1"),
    *("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
)
_PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in (35, 31, 28, 24)), "manylinux1_x86_64")
_KEPT = (".py", ".json", ".jinja")


def sources(version: str) -> Path:
    """The folder to put on sys.path for this version of vLLM: vllm/ and its .dist-info."""
    folder = CACHE / version
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as part:
        print(f"downloading vllm {version}", file=sys.stderr, flush=True)
        _unpack(_download(version, part), Path(part, "tree"))
        Path(part, "tree").rename(folder)
    return folder


def _download(version: str, folder: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--no-cache-dir"]
    pip += [word for name in _PLATFORMS for word in ("--platform", name)]
    subprocess.run([*pip, "--dest", folder, f"vllm=={version}"], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(_KEPT) or ".dist-info/" in name:
                archive.extract(name, folder)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(sources(wanted))
