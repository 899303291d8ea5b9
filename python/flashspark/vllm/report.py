"""Log lines: one for each kind of layer that flashspark serves, and one for each that it does not, with the reason."""

from __future__ import annotations

import logging
from typing import Any

_said: set[str] = set()


def _logger() -> Any:
    # A child of the logger "vllm" has vLLM's handlers and prefixes, without an import of vLLM.
    return logging.getLogger("vllm.flashspark")


def info(text: str) -> None:
    """Logs a text once a process."""
    if text not in _said:
        _said.add(text)
        _logger().info("flashspark: %s", text)


def warning(text: str) -> None:
    """Logs a text once a process."""
    if text not in _said:
        _said.add(text)
        _logger().warning("flashspark: %s", text)


def exception(text: str) -> None:
    """Logs a text with the traceback of the exception being handled."""
    _logger().exception("flashspark: %s", text)


def kept(layer: str, reason: str) -> None:
    """Logs that a kind of layer keeps vLLM's own attention."""
    info(f"kept on vLLM's own attention: {layer} ({reason})")
