"""Facts about the native library."""

from __future__ import annotations

from . import _core


def native_version() -> str:
    """Version of the native library, such as "0.1.0"."""
    return str(_core.version())


def cpu_target() -> str:
    """The SIMD target that the CPU engine uses on this machine, such as "AVX2" or "NEON"."""
    return str(_core.cpu_target())


def cpu_threads() -> int:
    """The number of CPU threads that a call uses when num_threads is 0."""
    return int(_core.cpu_threads())


def implementations() -> dict[str, str]:
    """The implementations in this build, best first: the name for `implementation=`, and a description."""
    found: dict[str, str] = {}
    while name := _core.implementation_name(len(found)):
        found[str(name)] = str(_core.implementation_description(len(found)))
    return found
