"""vLLM's own wrapper with the kernel of a Hugging Face repository in place of FlashAttention 4's, on CPU tensors.

The repository is what `make hf-kernel` writes, of the installed package; the import hook is that of the runs on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

from attention import PAGED, build, flash_attn_varlen_func
from checks import FA_UTILS, Context

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/flashspark"


def fits(version: str) -> bool:
    """Whether this vLLM unpacks the two results of `_flash_attn_fwd`; from 0.26 on it wants four."""
    return tuple(map(int, version.split(".")[:2])) < (0, 26)


def repository(folder: Path) -> Path:
    import flashspark

    spec = importlib.util.spec_from_file_location("hf_kernel", ROOT / "tools/dev/hf_kernel.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    wheel = folder / f"flashspark-0.1.0-py3-none-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for part in map(Path, flashspark.__path__):
            for file in filter(Path.is_file, part.rglob("*")):
                archive.write(file, Path("flashspark") / file.relative_to(part))
    tool.write(folder / "hub", [wheel])
    return folder / "hub"


def install(folder: Path) -> Any:
    """The hook's loader, which counts calls."""
    os.environ["LOCAL_KERNELS"] = f"{NAME}={repository(folder)}"
    sys.path.insert(0, str(ROOT / "tests/vllm/gpu"))
    return importlib.import_module("kernel_hook").install(NAME, "cpu")


def calls(c: Context, kernel: Any) -> str:
    assert sys.modules[FA_UTILS].flash_attn_varlen_func.__module__.startswith("vllm.")
    specs = {name: spec for name, spec in PAGED.items() if not spec.fp8}  # whose factors vLLM does not pass on
    for name, spec in specs.items():
        call = build(spec)
        try:
            assert flash_attn_varlen_func(**call.arguments()) is call.out, "another tensor came back"
            call.check(call.out, call.expected()[0])
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert kernel.calls["decode"] == 1 and kernel.calls.total() == len(specs), kernel.calls
    return f"{len(specs)} cases"
