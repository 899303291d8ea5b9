"""The package's functions for programs that may or may not be under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch

_package = import_module("..", __package__)  # flashspark, under whatever name a loader has imported it


def traceable(name: str) -> Callable[..., Any]:
    """flashspark's function of this name, with its signature, for callers that torch.compile traces.

    Under torch.compile the call becomes an operator of flashspark.torch_ops, which stays in the graph; otherwise the
    function itself runs, which has less overhead. Operators take no score_mod and no mask_mod.
    """
    plain = getattr(_package, name)

    @wraps(plain)  # callers read the signature to find out what is supported
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            from .. import torch_ops

            return getattr(torch_ops, name)(*args, **kwargs)
        return getattr(_package, name)(*args, **kwargs)

    return call
