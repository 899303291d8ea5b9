"""Replaces functions and classes of loaded modules, and every copy that another module of vLLM imported by name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


def arguments_by_name(stock: Function) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """A function that gives all arguments of a call of `stock` by name, as Python itself would bind them."""
    names = tuple(inspect.signature(stock).parameters)
    name = getattr(stock, "__name__", "function")

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        if len(args) > len(names):
            raise TypeError(f"{name}() takes {len(names)} positional arguments but {len(args)} were given")
        given = dict(zip(names, args))
        if twice := given.keys() & kwargs.keys():
            raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
        return given | kwargs

    return by_name


@dataclass(frozen=True)
class Record:
    """One function of vLLM that has been replaced."""

    module: str
    name: str
    stock: Function
    ours: Function


records: list[Record] = []


def holders(function: Function) -> list[tuple[str, str]]:
    """(module, name) wherever a loaded module of vLLM holds this very object."""
    return [(module, name) for module, names in _find({id(function): function}).items() for name, _ in names]


def put(module: str, name: str, make: Callable[[Function], Function]) -> bool:
    """Replaces `module.name` and its copies. Returns whether the module is loaded and has the name.

    A second call puts the replacement back if something else has replaced it since.
    """
    loaded = sys.modules.get(module)
    current = getattr(loaded, name, None)
    if current is None:
        return False
    for record in records:
        if (record.module, record.name) == (module, name):
            if current is not record.ours:
                _exchange({id(current): record.ours})
            return True
    record = Record(module, name, current, make(current))
    records.append(record)
    _exchange({id(record.stock): record.ours})
    return True


def restore() -> None:
    """Puts every original back, in all modules that hold a replacement."""
    _exchange({id(record.ours): record.stock for record in records})
    records.clear()


def stolen() -> list[tuple[Record, Function]]:
    """Records whose replacement a third function has replaced, and that function."""
    found = []
    for record in records:
        current = getattr(sys.modules.get(record.module), record.name, None)
        if current is not None and current is not record.ours:
            found.append((record, current))
    return found


def _exchange(wanted: dict[int, Function]) -> None:
    for module, names in _find(wanted).items():
        for name, value in names:
            setattr(sys.modules[module], name, wanted[id(value)])


def _find(wanted: dict[int, Any]) -> dict[str, list[tuple[str, Any]]]:
    found: dict[str, list[tuple[str, Any]]] = {}
    for module, loaded in list(sys.modules.items()):
        if module != "vllm" and not module.startswith("vllm."):
            continue
        names = [(n, v) for n, v in list(getattr(loaded, "__dict__", {}).items()) if id(v) in wanted]
        if names:
            found[module] = names
    return found
