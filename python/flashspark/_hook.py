"""Start-up hook: tells flashspark.vllm when the vLLM modules that it changes have been loaded.

flashspark.pth (flashspark.start on Python 3.15) arms it in every interpreter of the environment, where it then costs
one comparison of a name per import. vLLM's plug-in arms it where no .pth file is read. This module uses the standard
library only, and imports nothing of flashspark.vllm before a module of vLLM is imported.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in __init__.py; flashspark.start imports this module in every interpreter
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def switched_off() -> str:
    """The environment variable that turns the takeover off, as NAME=value; "" if none does."""
    for name in ("FLASHSPARK", "FA4_SM120_SHIM"):
        if os.environ.get(name, "").strip().lower() in {"0", "off", "false", "no"}:
            return f"{name}={os.environ[name]}"
    return ""


class _Loader:
    """The real loader, followed by one call after the module has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _loaded(module.__name__)


class Finder:
    """First on sys.meta_path. Finds nothing itself; wraps the loaders that other finders give for vLLM's modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("vllm.") or name not in _watched():
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Finder) else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def _watched() -> frozenset[str]:
    try:
        from flashspark.vllm.names import WATCHED
    except Exception:  # the package has been removed meanwhile: vLLM goes on as it is
        return frozenset()
    return WATCHED


def _loaded(name: str) -> None:
    try:
        from flashspark.vllm import takeover
    except Exception as error:
        # Whatever is wrong here, vLLM goes on as it is.
        print(f"flashspark: vLLM keeps its own attention: {type(error).__name__}: {error}", file=sys.stderr)
        return
    takeover.module_loaded(name, switched_off())


def install() -> None:
    """Arm the hook once; do nothing when a switch is off."""
    if not switched_off() and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
