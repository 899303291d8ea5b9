"""Loads the native module and names its functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import tvm_ffi

_WINDOWS = sys.platform == "win32"
_MODULE = "_flashspark_ffi.dll" if _WINDOWS else "_flashspark_ffi.so"


def _find() -> str:
    # An editable install keeps the native files in another folder of the package than the Python files.
    # The Hugging Face loader imports the package under a name of its own, so that its name is asked for.
    folders = sys.modules[__package__].__path__
    for folder in folders:
        path = os.path.join(folder, _MODULE)
        if os.path.exists(path):
            return path
    raise ImportError(
        f"flashspark's native module {_MODULE} is not in {list(folders)}: "
        "install the package (pip install .); the source tree alone does not contain it"
    )


def _load(path: str) -> Any:
    try:
        if _WINDOWS:  # which does not look beside a library for what it needs, but takes what is loaded
            import ctypes

            ctypes.CDLL(os.path.join(os.path.dirname(path), "flashspark.dll"))
        return tvm_ffi.load_module(path)
    except Exception as error:
        from . import _elf

        raise ImportError(_elf.why_not_loaded(path, str(error))) from error


def _function(name: str) -> Callable[..., Any]:
    function = module.get_function(name)
    function.release_gil = True  # tvm-ffi's default, unless an environment variable says otherwise
    return function


tvm_ffi.register_error("NotImplementedError", NotImplementedError)
tvm_ffi.register_error("MemoryError", MemoryError)
module = _load(_find())

attention_forward = _function("attention_forward")
attention_explain = _function("attention_explain")
attention_validate = _function("attention_validate")
attention_backward = _function("attention_backward")
attention_backward_explain = _function("attention_backward_explain")
attention_schedule = _function("attention_schedule")
append_kv = _function("append_kv")
create_block_mask = _function("create_block_mask")
score_mod_create = _function("score_mod_create")
mask_mod_create = _function("mask_mod_create")
mod_release = _function("mod_release")
set_nvrtc_search_path = _function("set_nvrtc_search_path")
signature = _function("signature")
version = _function("version")
cpu_target = _function("cpu_target")
cpu_threads = _function("cpu_threads")
implementation_name = _function("implementation_name")
implementation_description = _function("implementation_description")
