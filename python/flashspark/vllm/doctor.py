"""`flashspark doctor`'s section about vLLM. The command runs this module in the environment's own Python.

    python -m flashspark.vllm.doctor        prints one line of JSON: lines, findings and the facts behind them

vLLM prints while it is imported; the report is the last line of the output.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from flashspark import _hook

from . import replace, takeover
from .names import FLASH_ATTN

HOOK_FILES = ("flashspark.pth", "flashspark.start")
# uv's environments have no pip. Only the path is asked: setuptools' finder takes the question for pip's own start, and
# then keeps its distutils away, without which setuptools, and so vLLM, does not import (Python before 3.12).
_PIP = "pip" if importlib.machinery.PathFinder.find_spec("pip") else "uv pip"
REINSTALL = f"install an intact wheel: {_PIP} install --no-deps --force-reinstall flashspark-*.whl"
_ASKED = ((64, "auto"), (128, "auto"), (256, "auto"), (512, "auto"), (128, "fp8"), (128, "nvfp4"))


def hook_files() -> list[str]:
    """The start-up hook's files, in the folders from which Python reads such files."""
    import site

    folders = {*site.getsitepackages(), site.getusersitepackages()} | {p for p in sys.path if p.endswith("-packages")}
    return sorted(str(Path(f, name)) for f in folders for name in HOOK_FILES if Path(f, name).is_file())


def inspect_process() -> dict[str, Any]:
    """Imports vLLM's attention and reports the state of this process."""
    import vllm.v1.attention.selector
    from vllm.platforms import current_platform

    from . import register

    importlib.import_module(FLASH_ATTN)
    armed = any(isinstance(finder, _hook.Finder) for finder in sys.meta_path)

    register()  # what vLLM's plug-in loader does
    capability = current_platform.get_device_capability()
    state = takeover.State
    return {
        "vllm": vllm.__version__,
        "capability": f"{capability.major}.{capability.minor}" if capability is not None else None,
        "armed": armed,
        "active": state.active,
        "reason": state.reason,
        "names": _names(),
        "backends": _backends() if capability is not None else {},
    }


def _names() -> list[dict[str, str]]:
    """Each function that flashspark replaces, and whose function is in its place now."""
    from . import sites

    rows = []
    for site in sites.SITES:
        held = getattr(sys.modules.get(site.module), site.name, None)
        if held is None or not site.wanted:
            continue
        mine = any(held is record.ours for record in replace.records)
        rows.append({"name": f"{site.module}.{site.name}", "holder": "flashspark" if mine else held.__module__})
    return rows


def _backends() -> dict[str, str]:
    """The backend class that vLLM chooses for each kind of decoder layer."""
    import inspect

    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    known, found = inspect.signature(get_attn_backend).parameters, {}
    config = VllmConfig()
    for head_size, dtype in _ASKED:
        asked = {"head_size": head_size, "dtype": torch.bfloat16, "kv_cache_dtype": dtype, "block_size": None}
        try:
            with set_current_vllm_config(config):
                cls = get_attn_backend(**{name: value for name, value in asked.items() if name in known})
            answer = f"{cls.__module__}.{cls.__qualname__}"
        except Exception as error:
            answer = f"none: {type(error).__name__}: {error}".splitlines()[0][:160]
        found[f"{head_size}, {dtype}"] = answer
    return found


def _findings(report: dict[str, Any]) -> list[dict[str, str]]:
    """Problems, each with its remedy."""
    found = []

    def add(level: str, text: str, mend: str = "") -> None:
        found.append({"level": level, "text": text, "mend": mend})

    if switch := _hook.switched_off():
        add("note", f"vLLM: {switch} keeps its own attention", f"unset {switch.partition('=')[0]}")
    elif not report.get("active"):
        reason = str(report.get("reason"))
        level, mend = ("warning", REINSTALL) if reason.startswith("flashspark's library") else ("note", "")
        add(level, f"vLLM keeps its own attention: {reason}", mend)
    if not report["hook"]:
        text = "vLLM: no start-up hook (flashspark.pth) in a folder that Python reads: the plug-in alone takes over"
        add("warning", text, "install flashspark into the environment itself, not with --target or PYTHONPATH")
    elif not report.get("armed", True) and not _hook.switched_off():
        add(
            "warning",
            "vLLM: the start-up hook's file is there, but Python did not run it",
            "start Python without -S and -I; look for another flashspark.pth, or an earlier .pth that imports vLLM",
        )
    if not report["plugin"]:
        add("warning", "vLLM: the plug-in's entry point is not found", REINSTALL)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "flashspark" not in plugins.split(","):
        add("note", f"VLLM_PLUGINS={plugins} leaves the plug-in out; the start-up hook does the same work")
    if shim := importlib.util.find_spec(takeover.SHIM):
        add("warning", f"vLLM: a community shim is installed as well; flashspark takes its place: {shim.origin}",
            f"rm {shim.origin}")  # fmt: skip
    if os.environ.get("VLLM_ATTENTION_BACKEND", "FLASH_ATTN") != "FLASH_ATTN":
        add("warning", "VLLM_ATTENTION_BACKEND chooses another backend", "unset VLLM_ATTENTION_BACKEND")
    for row in report.get("names", []):
        if report.get("active") and row["holder"] != "flashspark":
            add(
                "warning",
                f"vLLM: {row['name']} is held by {row['holder']}",
                "another plug-in has replaced it: remove one of them",
            )
    return found


def report() -> dict[str, Any]:
    """The report that the command prints: `lines` are (name, value), `findings` have level, text and mend."""
    from importlib.metadata import entry_points

    plugins = [e.name for e in entry_points(group="vllm.general_plugins")]
    result: dict[str, Any] = {"hook": hook_files(), "plugin": "flashspark" in plugins, "plugins": plugins}
    try:
        result |= inspect_process()
    except Exception as error:
        result |= {"active": False, "reason": f"vLLM does not import: {type(error).__name__}: {error}"[:300]}
    result["findings"] = _findings(result)
    state = "served by flashspark" if result["active"] else f"its own ({result['reason']})"
    result["lines"] = [
        ("vLLM", f"{result.get('vllm', 'unknown')}, attention: {state}"),
        ("hook", ", ".join(result["hook"]) or "none"),
        ("plug-ins", ", ".join(plugins) or "none"),
        ("functions", ", ".join(f"{n} by {holder}" for holder, n in _count(result.get("names", [])).items()) or "none"),
        *((f"D {layer}", cls) for layer, cls in result.get("backends", {}).items()),
    ]
    return result


def _count(rows: list[dict[str, str]]) -> dict[str, int]:
    holders = [row["holder"] for row in rows]
    return {holder: holders.count(holder) for holder in dict.fromkeys(holders)}


if __name__ == "__main__":
    print("\n" + json.dumps(report()))
