"""Why the native module does not load, in one line; imported only where that happens."""

from __future__ import annotations

import platform
import struct
import sys
import sysconfig

# e_machine of ELF files, and the names in wheels' files.
_MACHINES = {62: "x86_64", 183: "aarch64"}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine_of(path: str) -> str:
    """The machine that a native file is for: "x86_64", "aarch64"; "" if it is no such file."""
    with open(path, "rb") as file:
        head = file.read(20)
    if len(head) < 20 or head[:5] != b"\x7fELF\x02":
        return ""
    return _MACHINES.get(struct.unpack_from("<H", head, 18)[0], "another machine")


def is_musl() -> bool:
    """Whether this Python's C library is musl, as Alpine's is."""
    return "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")) or "musl" in str(sysconfig.get_config_var("SOABI"))


def why_not_loaded(path: str, said: str) -> str:
    """`said` is what the loader says about it."""
    if sys.platform == "win32":
        return f"{path} does not load: {said.splitlines()[0] if said else 'no reason is given'}"
    here = platform.machine().lower()
    here, built = _ALIASES.get(here, here), machine_of(path)
    if not built:
        return f"{path} is damaged: it is no 64-bit ELF file; install flashspark again"
    if built != here:
        return f"{path} is for {built}, this machine is {here}: install the wheel whose name ends in {here}.whl"
    if is_musl():
        return f"{path} needs glibc, this Python has musl (Alpine): use an image with glibc, such as python:3.12-slim"
    return f"{path} does not load: {said.splitlines()[0] if said else 'no reason is given'}"
