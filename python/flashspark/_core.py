"""Loads the native module and names its functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tvm_ffi

_MODULE = "_flashspark_ffi.so"


def _find() -> str:
    # An editable install keeps the native files in another folder of the package than the Python files.
    import flashspark

    for folder in flashspark.__path__:
        path = os.path.join(folder, _MODULE)
        if os.path.exists(path):
            return path
    raise ImportError(
        f"flashspark's native module {_MODULE} is not in {list(flashspark.__path__)}: "
        "install the package (pip install .); the source tree alone does not contain it"
    )


def _function(name: str) -> Callable[..., Any]:
    function = module.get_function(name)
    function.release_gil = True  # tvm-ffi's default, unless an environment variable says otherwise
    return function


tvm_ffi.register_error("NotImplementedError", NotImplementedError)
tvm_ffi.register_error("MemoryError", MemoryError)
module = tvm_ffi.load_module(_find())

attention_forward = _function("attention_forward")
attention_explain = _function("attention_explain")
attention_validate = _function("attention_validate")
attention_schedule = _function("attention_schedule")
append_kv = _function("append_kv")
signature = _function("signature")
version = _function("version")
cpu_target = _function("cpu_target")
cpu_threads = _function("cpu_threads")
implementation_name = _function("implementation_name")
implementation_description = _function("implementation_description")
