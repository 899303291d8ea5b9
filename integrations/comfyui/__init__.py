"""flashspark in ComfyUI: a custom node. README.md says how it is installed; flashspark's wheel has all that computes.

Loading it registers the attention function "flashspark", and writes one line to ComfyUI's log.
"""

from __future__ import annotations

import logging
from typing import Any


class FlashsparkAttention:
    """A node that gives back a clone of a model whose attention runs on flashspark."""

    DESCRIPTION = "Runs the model's attention on flashspark, and on ComfyUI's own where flashspark does not compute it."
    CATEGORY = "model/patch"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        return (comfyui.patched(model),)


NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

try:
    from flashspark.integrations import comfyui

    comfyui.register()
except (ImportError, NotImplementedError) as error:  # ComfyUI goes on without the node
    logging.warning("flashspark is not available in this ComfyUI: %s", error)
else:
    NODE_CLASS_MAPPINGS["FlashsparkAttention"] = FlashsparkAttention
    NODE_DISPLAY_NAME_MAPPINGS["FlashsparkAttention"] = "flashspark attention"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
