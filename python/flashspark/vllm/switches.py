"""The environment variables that steer flashspark inside vLLM. Each is read once a process, when it is first needed.

After changing os.environ, tests call `reread()`. FLASHSPARK and FA4_SM120_SHIM, which turn the takeover off, belong to
flashspark._hook, which needs them before it may import this package.
"""

from __future__ import annotations

import functools
import os

DEFAULT_CAPABILITIES = "12.x"


@functools.cache
def batch_invariant() -> bool:
    """VLLM_BATCH_INVARIANT: every row's result must be independent of the rest of its batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0").strip().lower() in {"1", "true"}


@functools.cache
def capabilities() -> tuple[tuple[int, int | None], ...]:
    """FLASHSPARK_CAPABILITIES: the compute capabilities to take over, as (major, minor); a minor of None is any.

    Raises ValueError, naming the variable, for anything but a list such as "9.0,12.x".
    """
    text = os.environ.get("FLASHSPARK_CAPABILITIES") or DEFAULT_CAPABILITIES
    wanted = []
    for word in text.replace(" ", "").split(","):
        major, _, minor = word.partition(".")
        if not major.isdigit() or not (minor.isdigit() or minor in {"", "x"}):
            raise ValueError(f"FLASHSPARK_CAPABILITIES = {text!r}: must be a list such as 9.0,12.x")
        wanted.append((int(major), int(minor) if minor.isdigit() else None))
    return tuple(wanted)


def wants_capability(major: int, minor: int) -> bool:
    return any(major == m and n in (None, minor) for m, n in capabilities())


def reread() -> None:
    """Discards what has been read; the next question reads os.environ again."""
    batch_invariant.cache_clear()
    capabilities.cache_clear()
