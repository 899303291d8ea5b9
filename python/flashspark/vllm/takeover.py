"""Decides whether this process's vLLM is taken over, and does it.

The start-up hook and the plug-in both end here, each possibly several times. `switch` is the environment variable that
turns the takeover off, as NAME=value, or "" (flashspark._hook.switched_off).
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
import sys
from pathlib import Path

from . import probe, replace, report, sites, switches
from .names import CUDA_PLATFORM, FA_UTILS, FLASH_ATTN, MLA_PREFILL_SELECTOR, SELECTOR

BACKEND = "flashspark.vllm.backend.FlashSparkBackend"
# Functions with a cache of the classes that slots gave.
CACHED = (
    (SELECTOR, "_cached_get_attn_backend"),
    (CUDA_PLATFORM, "_get_attn_backend_class"),
    (MLA_PREFILL_SELECTOR, "_auto_select_mla_prefill_backend"),
)
# Texts in the explanation of every call: the first in builds without GPU kernels, the others where there are such.
NO_KERNELS = "built without CUDA kernels"
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 12: "sm_120f"}  # by the major number of the compute capability
SHIM = "fa4_sm120_shim"  # the module of the community's guide


class State:
    """The state of this process."""

    decided = False
    active = False
    reason = "vLLM's attention has not been imported"  # why not active


def module_loaded(name: str, switch: str) -> None:
    """The hook calls this after a module of names.WATCHED has run. Never raises."""
    try:
        start(switch)
        if State.active and name == FLASH_ATTN and (reason := probe.classes(sys.modules[name])):
            withdraw(f"this vLLM is unknown: {reason}")
    except Exception:
        report.exception(f"after the import of {name}; vLLM keeps its own attention")
        withdraw("an error, see above")


def start(switch: str) -> None:
    """Takes over what is loaded. Does nothing before vLLM's attention is loaded, and nothing twice."""
    if not _ready(switch):
        return
    if not State.decided:
        State.decided = True
        State.reason = _unavailable_reason(switch)
        if State.reason:
            report.info(f"vLLM keeps its own attention: {State.reason}")
            return
        State.active = True
        _register()
        if shim := importlib.util.find_spec(SHIM):
            report.warning(f"the community shim is installed, too, and replaced; remove it: {shim.origin}")
    if State.active:
        for record, thief in replace.stolen():
            report.warning(f"{thief.__module__} had replaced {record.name}; flashspark replaces it again")
        sites.apply()


def _ready(switch: str) -> bool:
    """Whether vLLM's questions about versions are loaded. Once its backend selection is, they are imported here."""
    if FA_UTILS not in sys.modules and SELECTOR in sys.modules and not switch:
        from vllm.platforms import current_platform

        if current_platform.is_cuda():
            importlib.import_module(FA_UTILS)
    return hasattr(sys.modules.get(FA_UTILS), "get_flash_attn_version")


def withdraw(reason: str) -> None:
    """Undoes the takeover."""
    if State.active:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        AttentionBackendEnum.FLASH_ATTN.clear_override()
        replace.restore()
        report.warning(f"vLLM keeps its own attention: {reason}")
    State.decided, State.active, State.reason = True, False, reason


def _unavailable_reason(switch: str) -> str:
    """The reason to leave vLLM alone; "" to take over."""
    if switch:
        return f"{switch} is set"
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        name = current_platform.device_type and current_platform.device_name  # ROCm's type is "cuda", too
        return f"its platform is {name or 'none (no GPU, or no driver)'}, not CUDA"
    capability = current_platform.get_device_capability()
    if capability is None:
        return "it sees no GPU"
    try:
        wants = switches.wants_capability(capability.major, capability.minor)
    except ValueError as error:  # the user's list is malformed
        return str(error)
    if not wants:
        wanted = ", ".join(f"{m}.{'x' if n is None else n}" for m, n in switches.capabilities())
        return f"compute capability {capability.major}.{capability.minor} is not {wanted}"
    if reason := probe.functions():
        return f"this vLLM is unknown: {reason}"
    return _library_unavailable_reason(capability.major, capability.minor)


def _library_unavailable_reason(major: int, minor: int) -> str:
    # Without the CUDA driver: once initialised here, it would not work in processes that vLLM forks later.
    import flashspark
    import numpy as np

    try:
        for folder in flashspark.__path__:
            for path in Path(folder).glob("*.so"):
                if _cut_short(path):
                    return f"flashspark's library is cut short: {path}"
        one = np.zeros((1, 1, 1, 8), np.float16)
        text = flashspark.attention_explain(flashspark.flash_attn_func, one, one, one)
    except Exception as error:  # the file is missing, or built for another glibc
        return f"flashspark's library does not load: {type(error).__name__}: {error}"
    if NO_KERNELS in text:
        return "flashspark's library was built without GPU kernels"
    if ARCHITECTURES.get(major, "none") not in text:
        return f"flashspark's library has no kernels for compute capability {major}.{minor}"
    return ""


def _cut_short(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers, which linkers put last. Loading it would crash."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + size * count


def _register() -> None:
    """Puts our class on the FLASH_ATTN slot, and discards the backend selections made so far."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.FLASH_ATTN, BACKEND)
    for module, name in CACHED:
        function = getattr(sys.modules.get(module), name, None)
        if hasattr(function, "cache_clear"):
            function.cache_clear()
