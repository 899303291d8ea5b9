"""What the log says: one line for each kind of layer that is served, and one for each that is kept, with the reason."""

from __future__ import annotations

import logging
from typing import Any

_said: set[str] = set()


def _logger() -> Any:
    # Children of "vllm" get vLLM's handlers and prefixes; the name costs no import of vLLM.
    return logging.getLogger("vllm.flashspark")


def info(text: str) -> None:
    """Once per text and process."""
    if text not in _said:
        _said.add(text)
        _logger().info("flashspark: %s", text)


def warning(text: str) -> None:
    """Once per text and process."""
    if text not in _said:
        _said.add(text)
        _logger().warning("flashspark: %s", text)


def exception(text: str) -> None:
    """With the traceback of the exception in flight."""
    _logger().exception("flashspark: %s", text)


def kept(layer: str, reason: str) -> None:
    """A kind of layer stays on vLLM's own path."""
    info(f"kept on vLLM's own attention: {layer} ({reason})")
