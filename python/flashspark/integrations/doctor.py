"""`flashspark doctor`'s list of programs that flashspark can serve. The command runs it in the environment's Python.

    python -m flashspark.integrations.doctor        prints one line of JSON: lines, which are (program, what it does)

Looks at what is installed and imports none of it. docs/integrations.md has the same programs; vLLM, which the command
asks more about, has flashspark.vllm.doctor.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple


class Program(NamedTuple):
    distribution: str
    switch: str  # what makes it use flashspark
    by_itself: bool = False  # the switch is a remark: it does so without one
    by_flash_attn: bool = False  # it does so where the stand-in is installed
    needs: str = ""  # a module of flashspark that this build may not have


STAND_IN = "pip install --no-deps flash_attn-*+flashspark*.whl (make wheel-flash-attn)"
PROGRAMS = {
    "transformers": Program(
        "transformers",
        'flashspark.integrations.transformers.register(), then attn_implementation="flashspark"',
        needs="flashspark.integrations.transformers",
    ),
    "diffusers": Program("diffusers", 'attention_backend("flash")', by_flash_attn=True),
    "xformers": Program("xformers", "where it chooses flash-attention", by_flash_attn=True),
    "torch SDPA": Program("torch", "flashspark.integrations.torch.enable()", needs="flashspark.integrations.torch"),
    "JAX": Program("jax", "from flashspark.jax import flash_attn_func", needs="flashspark.jax"),
    "CuPy": Program("cupy", "its arrays are arguments of flashspark's functions", by_itself=True),
    "Hugging Face kernels": Program(
        "kernels", 'make hf-kernel; get_local_kernel(Path("build/hf-kernel"))', needs="flashspark.interface"
    ),
    "ComfyUI": Program(  # which is no distribution itself
        "comfyui-frontend-package",
        "integrations/comfyui of flashspark's sources in its custom_nodes (the version is its frontend's)",
        needs="flashspark.integrations.comfyui",
    ),
    "SGLang": Program("sglang", "--attention-backend flashspark", needs="flashspark.integrations.sglang"),
}


def installed(distribution: str) -> str | None:
    """Its version; None if it is not there."""
    try:
        return version(distribution) or None
    except PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _flash_attn() -> tuple[str, bool]:
    """What owns `flash_attn`, as a line, and whether that is flashspark's."""
    found = installed("flash-attn")
    if found is None:
        return "", False
    if "flashspark" in found:
        return f"{found}: flashspark's stand-in; programs that import flash_attn use it", True
    return f"{found}: flash-attention itself; {STAND_IN} takes its place", False


def _would(program: Program, stand_in: bool) -> str:
    if program.by_itself:
        return f"uses flashspark: {program.switch}"
    if program.by_flash_attn:
        return f"uses flashspark's flash_attn: {program.switch}" if stand_in else f"does not use flashspark: {STAND_IN}"
    return f"uses flashspark when told: {program.switch}"


def lines() -> list[tuple[str, str]]:
    """(program, its version, whether it would use flashspark, and what switches it on), of those that are installed."""
    line, stand_in = _flash_attn()
    found = [("flash_attn", line)] if line else []
    for name, program in PROGRAMS.items():
        number = installed(program.distribution)
        if number is not None and (not program.needs or _is_there(program.needs)):
            found.append((name, f"{number}, {_would(program, stand_in)}"))
    return found


if __name__ == "__main__":
    print(json.dumps({"lines": lines()}))
